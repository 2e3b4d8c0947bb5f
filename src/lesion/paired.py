"""Kernels of paired inference, for many studies at once: x is [runs, seeds, items] of differences, NaN where a cell is
missing. `lesion.stats` calls them with one run, `lesion.calibration` with a thousand, so that what is calibrated is
what is used. Two-way layout: Scheffé 1959, chapter 4; crossed bootstrap: Owen 2007; sign flips: Fisher 1935, section 21.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
RESAMPLES = 4000
FLIPS = 10_000  # sign patterns drawn where there are too many to go through
EXACT = 12  # items up to which all 2ⁿ are gone through
ALPHA = 0.05


def differences(after: ArrayLike, before: ArrayLike) -> tuple[Array, bool]:
    """after − before [seeds, items], without seeds and items that have no pair; and whether all values are 0 or 1."""
    a, b = (np.atleast_2d(np.asarray(arm, float)) for arm in (after, before))
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"two arms share seeds and items [seeds, items], but these are {a.shape} and {b.shape}")
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError("a value is infinite; a missing one is NaN")
    x = a - b
    paired: NDArray[np.bool_] = np.logical_not(np.isnan(x))
    x = x[np.ix_(paired.any(1), paired.any(0))]
    if x.size == 0 or x.shape[1] < 2:
        raise ValueError(f"a comparison needs 2 items with a value in both arms; here are {x.shape[1]}")
    return x, bool(np.isin(a[paired], (0, 1)).all() and np.isin(b[paired], (0, 1)).all())


def item_means(x: Array) -> Array:
    """[…, seeds, items] → […, items]: each item's mean over the seeds that have it."""
    return np.nanmean(x, axis=-2)


def standard_error(x: Array) -> tuple[Array, Array]:
    """Standard error of the mean and its degrees of freedom [runs], seeds and items both drawn at random.

    s² = MS_items / SI + max(0, c MS_seeds − MS_rest) / SI, degrees of freedom by Satterthwaite (1946). c is (S − 1) over
    the median of χ² with S − 1 degrees of freedom (1.44 for three seeds): with few seeds their mean square lies below
    its expectation more often than not. Without c three seeds reject 7 % of true null hypotheses where seeds matter
    (and 29 % where seeds are ignored); with it 3 % where they do not matter and 4 to 6 % where they do. The price is
    power, .70 instead of .88 with three seeds, .83 with five; two seeds still reject 8 %, and are too few.
    Exact in form where no cell is missing; else seeds count by the mean of their deviations from the items' means.
    """
    seeds, items = x.shape[1:]
    each = item_means(x)
    square = each.var(1, ddof=1) / items
    df = np.full(len(x), items - 1.0)
    if seeds > 1:
        rest, count = x - each[:, None], (~np.isnan(x)).sum(2)
        there = count > 0  # a seed may have nothing at all in one of the runs
        shift = np.nansum(rest, 2) / np.maximum(count, 1)
        rest = rest - shift[..., None]
        cells, some = count.sum(1), there.sum(1)
        free = np.maximum(cells - some - items + 1, 1)
        noise = np.nansum(rest**2, axis=(1, 2)) / free / cells
        middle = (shift * there).sum(1) / some
        more_than_one = np.maximum(some - 1, 1)
        apart = ((shift - middle[:, None]) ** 2 * there).sum(1) / more_than_one
        among = np.where(some > 1, apart / some * more_than_one / stats.chi2.median(more_than_one), 0)
        more = np.maximum(among - noise, 0)
        parts = square**2 / (items - 1) + among**2 / more_than_one + noise**2 / free
        df = np.where(more > 0, np.maximum((square + more) ** 2 / np.where(parts > 0, parts, 1), 1), df)
        square = square + more
    tiny = 1e-9 * np.abs(np.nan_to_num(x)).max((1, 2))
    return np.where(square > tiny**2, square, 0) ** 0.5, df


def interval(x: Array, binary: bool, *, level: float = 0.95, purpose: str = "") -> tuple[Array, Array]:
    """Bounds [runs] of the mean difference, by the stretched crossed bootstrap that `lesion.stats` describes."""
    items = x.shape[2]
    x = _with_a_rise_and_a_fall(x) if binary else x
    centre, (error, _) = item_means(x).mean(1), standard_error(x)
    draws = draw_means(x, purpose)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = centre + stretch(x, draws, level) * (np.quantile(draws, tails, axis=0) - centre)
    if binary:
        return np.maximum(low, -1), np.minimum(high, 1)
    unknown = (error == 0) & (2.0 ** (1 - items) > 1 - level)
    return np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)


def stretch(x: Array, draws: Array, level: float) -> Array:
    """(t / z)(s / s*) [runs]: how much wider than the percentile interval of these draws [draws, runs] is enough."""
    error, df = standard_error(x)
    tail, spread = (1 + level) / 2, draws.std(0)
    known = (spread > 0) & (error > 0)
    ratio = np.divide(error, spread, out=np.zeros_like(error), where=known)
    return np.asarray(stats.t.ppf(tail, df) / stats.norm.ppf(tail) * ratio)


def two_one_sided(x: Array, binary: bool, margin: float) -> tuple[Array, Array, Array, Array]:
    """Bounds at 90 %, the p of equivalence within ±margin, and that of a change beyond it, each [runs]."""
    items = x.shape[2]
    x = _with_a_rise_and_a_fall(x) if binary else x
    centre, (error, df) = item_means(x).mean(1), standard_error(x)
    inside, flat = margin - np.abs(centre), error == 0
    within, beyond = (
        np.where(flat, np.where(far > 1e-9 * margin, 2.0**-items, 1), stats.t.sf(far / np.where(flat, 1, error), df))
        for far in (inside, -inside)
    )
    half = np.where(flat & (2.0**-items > ALPHA), np.nan, stats.t.ppf(1 - ALPHA, df) * error)
    return centre - half, centre + half, within, beyond


def p_values(each: Array, test: str) -> Array:
    """Two-sided p [runs] of one difference an item [runs, items]; NaN where a t test meets no spread."""
    nothing = np.abs(each).max(1) == 0
    if test == "permutation":
        return _sign_flips(each)
    if test == "mcnemar":
        rose, fell = (each > 0).sum(1), (each < 0).sum(1)
        return np.minimum(1, 2 * stats.binom.cdf(np.minimum(rose, fell), rose + fell, 0.5))
    if test == "wilcoxon":
        if each.shape[1] <= EXACT:  # exact with ties and zeros: flips of signed ranks (Pratt 1959)
            return _sign_flips(np.sign(each) * stats.rankdata(np.abs(each), axis=1))
        ones = np.where(nothing[:, None], 1.0, each)
        return np.where(nothing, 1.0, stats.wilcoxon(ones, zero_method="pratt", axis=1).pvalue)
    flat = np.ptp(each, axis=1) <= 1e-9 * np.abs(each).max(1)
    varied = np.where(flat[:, None], np.arange(each.shape[1]), each)
    return np.where(nothing, 1.0, np.where(flat, np.nan, stats.ttest_1samp(varied, 0, axis=1).pvalue))


def with_seeds(p: Array, x: Array) -> Array:
    """p [runs] of items, raised to that of t = mean / s over seeds × items where the seeds' share of s² is above 0."""
    (error, df), each = standard_error(x), item_means(x)
    by_items = (each.var(1, ddof=1) / each.shape[1]) ** 0.5
    shared = error > by_items * (1 + 1e-9)
    t = np.abs(each.mean(1)) / np.where(shared, error, 1)
    return np.where(shared, np.fmax(p, 2 * stats.t.sf(t, df)), p)


def generator(*place: object) -> np.random.Generator:
    """A stream of its own for each purpose: an interval does not depend on what was computed before it."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


@lru_cache(maxsize=8)
def resamples(purpose: str, seeds: int, items: int) -> tuple[Array, Array]:
    """How often each seed and each item is drawn, in RESAMPLES draws: [draws, seeds] and [draws, items]."""
    stream = generator("bootstrap", purpose, seeds, items)
    per_seed = stream.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES).astype(float)
    per_item = stream.multinomial(items, np.full(items, 1 / items), RESAMPLES).astype(float)
    per_seed.flags.writeable = per_item.flags.writeable = False  # they are shared
    return per_seed, per_item


def draw_means(x: Array, purpose: str) -> Array:
    """Bootstrapped means [draws, runs]: the seeds and the items drawn, each item's mean over its drawn seeds."""
    runs, seeds, items = x.shape
    per_seed, per_item = resamples(purpose, seeds, items)
    if not np.isnan(x).any():
        both = (per_seed[:, :, None] * per_item[:, None, :]).reshape(RESAMPLES, -1)
        return both @ x.reshape(runs, -1).T / (seeds * items)
    out = np.empty((RESAMPLES, runs))
    for run, study in enumerate(x):
        here = ~np.isnan(study)
        weight = per_seed @ here
        mean = np.divide(per_seed @ np.where(here, study, 0), weight, out=np.zeros_like(weight), where=weight > 0)
        count = (per_item * (weight > 0)).sum(1)
        total = (per_item * mean).sum(1)
        out[:, run] = np.divide(total, count, out=np.full(RESAMPLES, np.nanmean(study)), where=count > 0)
    return out


def _with_a_rise_and_a_fall(x: Array) -> Array:
    return np.concatenate([x, np.ones_like(x[..., :1]), -np.ones_like(x[..., :1])], axis=-1)


@lru_cache(maxsize=8)
def _signs(items: int) -> Array:
    """Patterns of signs [patterns, items]: all with the first one fixed (the rest are mirror images), or FLIPS drawn."""
    if items <= EXACT:
        bits = np.arange(2 ** (items - 1))[:, None] >> np.arange(items)
        return np.where(bits & 1, -1.0, 1.0)
    return generator("flips", items).choice([-1.0, 1.0], (FLIPS, items))


def _sign_flips(each: Array) -> Array:
    """Share of sign patterns under which |Σ ±d| is as large as |Σ d|, [runs]; with +1 where patterns are drawn."""
    signs = _signs(each.shape[1])
    seen = np.abs(each.sum(1)) - 1e-9 * np.abs(each).sum(1)  # a tie is a tie, whatever the rounding
    reached = np.concatenate([(np.abs(signs @ d.T) >= s).sum(0) for d, s in _in_parts(each, seen)])
    return reached / len(signs) if each.shape[1] <= EXACT else (reached + 1) / (len(signs) + 1)


def _in_parts(each: Array, seen: Array) -> list[tuple[Array, Array]]:
    cuts = range(250, len(each), 250)  # 250 studies × 10,000 patterns are 20 MB
    return list(zip(np.split(each, cuts), np.split(seen, cuts), strict=True))
