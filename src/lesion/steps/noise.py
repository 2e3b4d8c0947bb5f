"""Gaussian noise on weights, each element for itself: multiplicative, additive or lognormal.

The multiplicative form is that of analog hardware studies (e.g. Joshi et al. 2020), where the error of a conductance grows
with the conductance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from lesion.blocks import Block, by_view, cut, facts, names, pieces, rewrite, square, total, with_draws
from lesion.sites import resolve
from lesion.streams import drawing
from lesion.trial import Specimen, Step

Law = Literal["multiplicative", "additive", "lognormal"]


def disturb(w: torch.Tensor, z: torch.Tensor, law: Law, sigma: float, std: float = 1.0) -> tuple[float, float]:
    """Changes w in place and returns (Σw², ΣΔw²), w as it was. z ~ N(0, 1), of the shape of w.

    multiplicative   w ← w·(1 + σz)       the root mean square grows by √(1 + σ²), a sign flips with probability Φ(-1/σ)
    additive         w ← w + σ·std·z      `std` is the standard deviation of the whole tensor
    lognormal        w ← w·exp(σz)        no sign flips
    """
    before = square(w)
    if law == "additive":
        w.add_(z, alpha=sigma * std)
        return before, square(z) * (sigma * std) ** 2
    if law == "multiplicative":
        change = w * z
        w.add_(change, alpha=sigma)
        return before, square(change) * sigma**2
    change = w.clone()
    w.mul_((z * sigma).exp_())
    return before, square(change.sub_(w))


def spread(blocks: Sequence[Block]) -> float:
    """Standard deviation of one view (of a population: divided by n), from pieces (Chan, Golub & LeVeque 1983)."""
    parts: list[tuple[int, float, float]] = []  # n, mean, Σ(w - mean)²
    for w in pieces(blocks):
        mean = float(w.mean())
        parts.append((len(w), mean, square(w - mean)))
    count = sum(n for n, _, _ in parts)
    mean = math.fsum(n * m for n, m, _ in parts) / count
    return math.sqrt(math.fsum(s + n * (m - mean) ** 2 for n, m, s in parts) / count)


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
        if self.sigma == 0:  # left alone even where adding 0·z would turn -0 into 0
            return facts(views, 1.0, 0.0)
        blocks, sums = cut(specimen.model, views), []
        std = [spread(group) if self.law == "additive" else 1.0 for group in by_view(blocks)]
        with drawing("normal", self.seed, f"noise.{self.law}") as draws:
            for block, z in with_draws(blocks, draws):
                sums.append(
                    rewrite(block.tensor, partial(disturb, law=self.law, sigma=self.sigma, std=std[block.view]), z)
                )
        return facts(views, *total(sums))
