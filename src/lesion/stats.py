"""Statistics: arrays in, numbers out.

Two arms that took the same measure share their items, so every comparison is paired by item. Seeds (of the damage and
of the sampling) and items are crossed factors: each is drawn again, with replacement, in the bootstrap
(Efron & Tibshirani 1993, ch. 6 and 13; crossed factors: Owen 2007, "The pigeonhole bootstrap").
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums and its percentile interval; `low` and `high` are None where too little is there to say."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    items: int


def ratio(total: Array, weight: Array, *, level: float = 0.95, purpose: str = "") -> Estimate:
    """Σ total / Σ weight over [seeds, items], with a crossed bootstrap interval.

    A cell that is missing has weight 0. Raises ValueError where shapes differ, a number is not finite, or no weight is
    left. With a single item nothing is known about its spread, and the interval is missing; with a single seed the
    interval speaks of items only.
    """
    total, weight = np.atleast_2d(np.asarray(total, float)), np.atleast_2d(np.asarray(weight, float))
    if total.shape != weight.shape:
        raise ValueError(f"totals are {total.shape} and weights {weight.shape}")
    if not (np.isfinite(total).all() and np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("totals must be finite, and weights finite and not negative")
    if weight.sum() == 0:
        raise ValueError("nothing to average: all weights are zero")
    some = np.ix_(weight.any(1), weight.any(0))  # a seed or an item without any weight is none
    total, weight = np.where(weight > 0, total, 0.0)[some], weight[some]
    value = float(total.sum() / weight.sum())
    seeds, items = total.shape
    if items < 2:
        return Estimate(value, None, None, seeds, items)
    stream = generator("bootstrap", purpose, seeds, items)
    per_seed = stream.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES).astype(float)
    per_item = stream.multinomial(items, np.full(items, 1 / items), RESAMPLES).astype(float)
    above, below = ((per_seed @ x * per_item).sum(1) for x in (total, weight))
    drawn = above[below > 0] / below[below > 0]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), seeds, items)


def generator(*place: object) -> np.random.Generator:
    """A stream of its own for each purpose: an interval does not depend on what was computed before it."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))
