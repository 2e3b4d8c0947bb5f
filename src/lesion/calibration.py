"""Calibration: every procedure of `lesion.stats` and `lesion.doses` on studies in which the truth is known.

In an A/A study both arms are the same, so a test may reject in 5 % of them at most and an interval must cover zero in
95 % (Morris, White & Crowther 2019, "Using simulation studies to evaluate statistical methods"). The studies are of the
kind that language models give: few items, ratings that tie, right or wrong, skewed counts, one seed or three, items
that differ in difficulty and in how they respond, seeds that move all items at once. The kernels that run here are those
that run on real rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from lesion.doses import fit, hill, threshold
from lesion.paired import ALPHA, Array, generator, interval, item_means, p_values, two_one_sided, with_seeds
from lesion.stats import holm, trend

ITEMS = (6, 12, 40)
SEEDS = (1, 3)
FAMILY = 5  # comparisons in a family
MARGIN = 0.4
DOSES = np.array([0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
HALF = 0.2  # the true ED50
GAIN, NOISE = 0.2, 0.15  # how items differ in their response, and what is left to chance
UNENDED = 0.85  # half dose of a curve that has not come to its end, as a share of the largest dose
UNITS: tuple[Literal["d"], Literal["raw"]] = ("d", "raw")
AT = {"d": -0.8, "raw": -0.5}

Draw = Callable[[np.random.Generator, tuple[int, int, int], float], Array]


@dataclass(frozen=True)
class Line:
    """One row of the table. Of `rejected` and `covered`, both shares of the simulations, one is None; `low` and `high`
    are its Wilson interval at 95 %, and `ok` says that this interval meets what is expected."""

    procedure: str
    case: str
    n: int
    seeds: int
    simulations: int
    rejected: float | None
    covered: float | None
    low: float
    high: float
    expected: str
    ok: bool


def calibrate(simulations: int = 1000, seed: int = 0) -> pl.DataFrame:
    """A row for each procedure × case × number of items × number of seeds: how often it rejected or covered.

    Expected are "<= 0.05" for tests and "0.93–0.97" for intervals; "0.93–0.99" with three seeds, which leave open
    whether seeds matter, and the interval allows for it; and ">= 0.93" for differences so coarse that no procedure can
    come near a share of its choice. Of rows that are right on the mark one in forty is not `ok` by chance. A study that
    a procedure refuses (no trend, an ED50 beyond the doses) is not counted: `simulations` is how many were. ValueError
    for fewer than 10 simulations.
    """
    if simulations < 10:
        raise ValueError(f"a share needs 10 or more simulations, not {simulations}")
    lines = [line for part in (_comparisons, _families, _trends, _curves) for line in part(simulations, seed)]
    return pl.DataFrame([asdict(line) for line in lines], infer_schema_length=None)


# A case draws the differences of its studies [runs, seeds, items], whose mean in truth is `shift`.


def _normal(g: np.random.Generator, shape: tuple[int, int, int], shift: float, seed_spread: float = 0.0) -> Array:
    runs, seeds, items = shape
    response = 0.5 * g.normal(size=(runs, 1, items)) + seed_spread * g.normal(size=(runs, seeds, 1))
    return shift + response + 0.7 * g.normal(size=shape)


def _rounded(g: np.random.Generator, shape: tuple[int, int, int], shift: float) -> Array:
    """Ratings from 0 to 4; a rise by `shift` is by one whole point, that often."""
    runs, _, items = shape
    liking = g.uniform(0.2, 0.8, (runs, 1, items))
    risen = g.random(shape) < shift
    return (g.binomial(4, liking, shape) + risen - g.binomial(4, liking, shape)).astype(float)


def _lognormal(g: np.random.Generator, shape: tuple[int, int, int], shift: float) -> Array:
    """Counts of two arms, each lognormal about an item's own size: heavy tails on both sides."""
    size = g.lognormal(0, 0.3, (shape[0], 1, shape[2]))
    return shift + size * (g.lognormal(0, 0.7, shape) - g.lognormal(0, 0.7, shape))


def _skewed(g: np.random.Generator, shape: tuple[int, int, int], shift: float) -> Array:
    """Differences that are themselves skewed: most items change little, a few much."""
    return shift + g.lognormal(0, 0.5, (shape[0], 1, shape[2])) - np.exp(0.125) + 0.2 * g.normal(size=shape)


def _right_or_wrong(g: np.random.Generator, shape: tuple[int, int, int], shift: float) -> Array:
    easy = g.uniform(0.1, 0.9 - shift, (shape[0], 1, shape[2]))
    return (g.random(shape) < easy + shift).astype(float) - (g.random(shape) < easy)


def _holed(g: np.random.Generator, shape: tuple[int, int, int], shift: float) -> Array:
    """Three items in ten lack one of their seeds."""
    x = _normal(g, shape, shift)
    runs, seeds, items = shape
    lost = (g.random((runs, 1, items)) < 0.3) & (np.arange(seeds)[:, None] == g.integers(0, seeds, (runs, 1, items)))
    return np.where(lost, np.nan, x)


def _same(g: np.random.Generator, shape: tuple[int, int, int], shift: float) -> Array:
    return np.full(shape, shift)


CASES: dict[str, Draw] = {
    "normal": _normal,
    "seeds shift": partial(_normal, seed_spread=0.3),
    "missing cells": _holed,
    "ties": _rounded,
    "0/1": _right_or_wrong,
    "lognormal arms": _lognormal,
    "skewed differences": _skewed,
    "no difference": _same,
}
SEVERAL = ("seeds shift", "missing cells")  # cases that need several seeds
COARSE = ("0/1", "no difference")


def _comparisons(simulations: int, seed: int) -> Iterator[Line]:
    for case, draw in CASES.items():
        for items in ITEMS:
            for seeds in SEEDS if case not in SEVERAL else SEEDS[1:]:
                shape, binary = (simulations, seeds, items), case == "0/1"
                stream = generator("calibrate", case, items, seeds, seed)
                x = draw(stream, shape, 0.0)
                # Differences of two like arms are symmetric; skewed ones are no A/A study, only their mean is asked for.
                tests = [] if case == "skewed differences" else ["permutation", "wilcoxon", "t"]
                for test in tests + ["mcnemar"] * (binary and seeds == 1):
                    p = with_seeds(p_values(item_means(x), test), x)
                    yield _rejected(f"compare {test}", case, items, seeds, p < ALPHA)
                low, high = interval(x, binary)
                said = ~np.isnan(low)
                covers = ((low <= 0) & (high >= 0))[said]
                if len(covers):
                    yield _covered("interval of the mean", case, items, seeds, covers, coarse=case in COARSE)
                if case == "skewed differences":
                    continue
                x = draw(stream, shape, MARGIN)
                yield _rejected("equivalent", case, items, seeds, two_one_sided(x, binary, MARGIN)[2] < ALPHA)


def _families(simulations: int, seed: int) -> Iterator[Line]:
    for items in ITEMS:
        x = _normal(generator("calibrate", "family", items, seed), (simulations * FAMILY, 1, items), 0.0)
        p = p_values(item_means(x), "permutation").reshape(simulations, FAMILY)
        any_found = [min(v for v in holm(family) if v is not None) < ALPHA for family in p.tolist()]
        yield _rejected(f"holm, any of {FAMILY}", "normal", items, 1, np.array(any_found))


def _trends(simulations: int, seed: int) -> Iterator[Line]:
    for case in ("normal", "ties"):
        for items in ITEMS:
            stream = generator("calibrate", "trend", case, items, seed)
            y = CASES[case](stream, (simulations, 5, items), 0.0)  # its seeds stand for doses that do nothing
            yield _rejected("trend", case, items, 1, np.array([trend(study).p < ALPHA for study in y]))


def _curves(simulations: int, seed: int) -> Iterator[Line]:
    for items in ITEMS:
        for seeds in SEEDS:
            stream = generator("calibrate", "curve", items, seeds, seed)
            truth = {unit: _true_threshold(unit, seeds) for unit in UNITS}
            inside: dict[str, list[bool]] = {"ED50": [], **{unit: [] for unit in UNITS}}
            for y in _responses(stream, (simulations, seeds, items), HALF, NOISE):
                try:
                    found = fit(DOSES, y, draws=300)
                except ValueError:  # no trend: refused, as it should be
                    continue
                if found.ed50 is not None:
                    inside["ED50"].append((found.low or 0) <= HALF <= (found.high or np.inf))
                for unit in UNITS:
                    end = threshold(DOSES, y - y[0], AT[unit], unit)
                    inside[unit].append(end.low is not None and end.low <= truth[unit] <= (end.high or np.inf))
            yield _covered(
                "interval of the ED50", "unended curve", items, seeds, _unended(stream, simulations, seeds, items)
            )
            for what, hits in inside.items():
                name = "interval of the ED50" if what == "ED50" else f"interval of the threshold, {what}"
                yield _covered(name, "falling curve", items, seeds, np.array(hits))


def _unended(stream: np.random.Generator, simulations: int, seeds: int, items: int) -> NDArray[np.bool_]:
    """Whether intervals hold the half dose of curves whose largest dose does little more than half; with so little noise that
    least squares decide and not the spread."""
    hits = []
    for y in _responses(stream, (simulations, seeds, items), UNENDED * DOSES[-1], 0.1 * NOISE):
        found = fit(DOSES, y, draws=300)
        if found.ed50 is not None:
            hits.append((found.low or 0) <= UNENDED * DOSES[-1] <= (found.high or np.inf))
    return np.array(hits)


def _true_threshold(unit: str, seeds: int) -> float:
    """Where the curve without noise reaches it, linear between doses: d_z counts the spread of items and of seeds' noise."""
    fall = hill(DOSES, HALF, 4.0) - 1
    spread = np.sqrt((GAIN * fall) ** 2 + 2 * NOISE**2 / seeds) if unit == "d" else 1.0
    return float(np.interp(-AT[unit], -fall / spread, DOSES))


def _responses(g: np.random.Generator, shape: tuple[int, int, int], half: float, noise: float) -> Array:
    """Curves [runs, doses, seeds, items] that fall from 1 to 0 with a slope of 4, each item by more or less."""
    runs, seeds, items = shape
    fall = hill(DOSES, half, 4.0)[:, None, None] * (1 + GAIN * g.normal(size=(runs, 1, 1, items)))
    return fall + 0.1 * g.normal(size=(runs, 1, 1, items)) + noise * g.normal(size=(runs, len(DOSES), seeds, items))


def _rejected(procedure: str, case: str, items: int, seeds: int, hits: NDArray[np.bool_]) -> Line:
    share, low, high = _share(hits)
    return Line(procedure, case, items, seeds, len(hits), share, None, low, high, "<= 0.05", low <= ALPHA)


def _covered(
    procedure: str, case: str, items: int, seeds: int, hits: NDArray[np.bool_], *, coarse: bool = False
) -> Line:
    share, low, high = _share(hits)
    most = 1.0 if coarse else 0.97 if seeds == 1 else 0.99
    expected = ">= 0.93" if coarse else f"0.93–{most}"
    return Line(
        procedure, case, items, seeds, len(hits), None, share, low, high, expected, high >= 0.93 and low <= most
    )


def _share(hits: NDArray[np.bool_]) -> tuple[float, float, float]:
    found = stats.binomtest(int(hits.sum()), len(hits))
    low, high = found.proportion_ci(0.95, method="wilson")
    return float(found.statistic), float(low), float(high)
