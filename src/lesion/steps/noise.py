"""Gaussian noise on weights, each element for itself: multiplicative, additive or lognormal.

The multiplicative form is that of analog hardware studies (e.g. Joshi et al. 2020), where the error of a conductance grows
with the conductance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from pydantic import Field

from lesion.blocks import Block, Weights, by_view, cut, facts, load, names, rewrite, total
from lesion.sites import resolve
from lesion.streams import Floats, drawing
from lesion.threads import each
from lesion.trial import Specimen, Step

Law = Literal["multiplicative", "additive", "lognormal"]


def disturb(w: Weights, z: Floats, law: Law, sigma: float, std: float = 1.0) -> None:
    """Changes w in place, with z ~ N(0, 1) of the same shape.

    multiplicative   w ← w·(1 + σz)    the root mean square grows by √(1 + σ²), a sign flips with probability Φ(-1/σ)
    additive         w ← w + σ·std·z   `std` is the standard deviation of the whole tensor
    lognormal        w ← w·exp(σz)     no sign flips
    """
    change = np.multiply(z, sigma * std if law == "additive" else sigma, dtype=w.dtype)
    if law == "additive":
        w += change
        return
    if law == "multiplicative":
        change += 1
    else:
        np.exp(change, out=change)
    w *= change


def spread(parts: Iterable[Weights]) -> float:
    """Standard deviation of all parts together (of a population: divided by n), after Chan, Golub & LeVeque (1983)."""
    count, mean, squares = 0, 0.0, 0.0
    for part in parts:
        here = float(part.mean(dtype=np.float64))
        step, count = here - mean, count + len(part)
        mean += step * len(part) / count
        within = float(np.square(part.astype(np.float64) - here).sum())
        squares += within + step * step * len(part) * (count - len(part)) / count
    return math.sqrt(squares / count)


class Noise(Step):
    """Gaussian noise on the weights of a site, biases left alone.

    An element's z depends on (seed, law, parameter, position in it), not on sigma: doses are paired. Two noises with the
    same seed in one sentence therefore use the same z twice. With sigma = 0 nothing is touched.
    """

    site: str = Field(description="what is disturbed: mlp, attention.value, embedding, mlp.in@3-5, …")
    sigma: float = Field(
        ge=0,
        le=1e6,
        description="dose: standard deviation relative to each weight (additive: to its tensor's; lognormal: of log w)",
    )
    law: Law = Field(default="multiplicative", description="w·(1 + sigma z), w + sigma·std(w)·z, or w·exp(sigma z)")
    seed: int = Field(default=0, ge=0, description="of the noise; doses of one seed share their draws")

    def touches(self, specimen: Specimen) -> list[str]:
        return names(resolve(specimen.model, self.site))

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        views = resolve(specimen.model, self.site)
        if self.sigma == 0:  # added, even 0·z would turn -0 into 0
            return facts(views, 1.0, 0.0)
        blocks = cut(specimen.model, views)
        std = [1.0] * len(views)
        if self.law == "additive":
            std = each(lambda group: spread(load(block.tensor) for block in group), by_view(blocks))
        with drawing("normal", self.seed, f"noise.{self.law}") as draws:

            def work(block: Block) -> tuple[float, float]:
                z = block.beside(draws)
                return rewrite(block.tensor, lambda w: disturb(w, z, self.law, self.sigma, std[block.view]))

            weight, change = total(each(work, blocks))
        return facts(views, weight, change)
