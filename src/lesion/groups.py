"""Independent groups: arms that share no items, whose runs are one number each. Welch 1938, 1947 and 1951; Holm 1979.

Where two arms share seeds or items, `lesion.stats.compare` pairs them and finds more. Here no two groups are taken for
equally spread. A group has three runs or more, all finite: who leaves a failed run out does so before and by name, so that
n never shrinks in silence. It is without spread where its range is within 1e-9 of its largest absolute value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from lesion.paired import ALPHA, Array
from lesion.stats import generator, holm, noncentrality

Groups = Mapping[str, ArrayLike]
LEVEL = 0.95  # of all intervals
RUNS = 3  # the fewest in a group
EXACT = 20_000  # splits up to which all are gone through: 8 runs against 8
DRAWS = 10_000  # splits drawn where there are more


@dataclass(frozen=True)
class Description:
    """Runs of one group, in their unit. sd has n − 1 below, sem = sd / √n, low to high is mean ± t sem at 95 %: None
    where the runs are all the same, which tells nothing about the next one."""

    n: int
    mean: float
    sd: float
    sem: float
    median: float
    min: float
    max: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Anova:
    """Whether any means differ: Fisher's F, which takes all groups for equally spread, and beside it Welch's, which does not.

    eta2 = SS_between / SS_total; omega2 = (SS_between − df_between MS_within) / (SS_total + MS_within), less biased, and
    below 0 where means differ by less than chance makes them. Welch's F has df_between and welch_df degrees of freedom.
    None: without spread within all groups together (f, p), or within each one (Welch), or anywhere (eta2, omega2).
    """

    runs: int
    f: float | None
    df_between: int
    df_within: int
    p: float | None
    eta2: float | None
    omega2: float | None
    welch_f: float | None = None
    welch_df: float | None = None
    welch_p: float | None = None


@dataclass(frozen=True)
class Contrast:
    """Mean of `first` − mean of `second`, in the unit of the measure. None: neither group has any spread.

    low, high      value ± t s at 95 %: s² = s₁²/n₁ + s₂²/n₂, t at Welch–Satterthwaite's df
    t, df, p       Welch's test, two-sided; p_holm the same, corrected for a family (`pairwise`), else None
    p_permutation  two-sided share of the `splits` of all runs into n_first and n_second whose |t| is as large. Of Welch's
                   t, not of the difference: it keeps to 5 % with any number of runs where distributions are the same,
                   and with enough of them where spreads differ (Janssen 1997); 4 runs against 8 of a third their spread: 9 %
    g              Hedges' g of the mean variance (g*ₛ of Delacre et al. 2021): J(ν) value / u, u² = (s₁² + s₂²) / 2, with
                   J = Γ(ν/2) / (√(ν/2) Γ((ν − 1)/2)) and ν Satterthwaite's df of s₁² + s₂²
    g_low, g_high  at 95 %, of the population's value, without J: the noncentralities at which t is the upper or lower
                   quantile at df, times s / u. They exclude 0 where p < .05, and cover 94 to 97 % where spreads are the
                   same or one is three times the other
    """

    first: str
    second: str
    n_first: int
    n_second: int
    value: float
    p_permutation: float
    splits: int
    low: float | None = None
    high: float | None = None
    t: float | None = None
    df: float | None = None
    p: float | None = None
    g: float | None = None
    g_low: float | None = None
    g_high: float | None = None
    p_holm: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Slope:
    """Least squares of y on x over all runs: y = intercept + slope x; slope in units of y per unit of x.

    low, high, p   by HC3 errors (MacKinnon & White 1985) at n − 2 df: spreads may differ from x to x; of these x only
    p_fit          whether the means at each x lie off the line by more than runs do: F of lack of fit (Fisher 1922)
    p_means        of the slope against the means' distance from the line, at `distinct` − 2 df. If other x are to be
                   spoken of (another model of that size), this one is to be reported: with means that are off by half the
                   spread of runs, p rejects 25 % of true null hypotheses with ten runs at each of four x, p_means 5 %
    r2             1 − SS_residual / SS_total
    theil_sen      median slope of all pairs of runs with different x, its interval at 95 % (Sen 1968)
    tau, tau_p     Kendall's τ_b of x and y, and its p
    None: y has no spread, or none about the line. `note` says so, and where the distinct x are few.
    """

    slope: float
    intercept: float
    distinct: int
    runs: int
    theil_sen: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_fit: float | None = None
    p_means: float | None = None
    r2: float | None = None
    theil_low: float | None = None
    theil_high: float | None = None
    tau: float | None = None
    tau_p: float | None = None
    note: str | None = None


def describe(values: ArrayLike) -> Description:
    """What there is to say of one group of runs. ValueError for fewer than three, or what is not finite."""
    x = _runs(values, "the group")
    mean, square = (float(m) for m in moments(x))
    sem, t = square**0.5, float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1))
    low, high = (mean - t * sem, mean + t * sem) if sem > 0 else (None, None)
    middle, least, most = (float(f(x)) for f in (np.median, np.min, np.max))
    return Description(len(x), mean, sem * len(x) ** 0.5, sem, middle, least, most, low, high)


def anova(groups: Groups) -> Anova:
    """One-way analysis of variance. Welch (1951), with w = n / s², W = Σw, m = Σ w mean / W, k groups and
    Λ = Σ (1 − w/W)² / (n − 1):  F = Σ w (mean − m)² / (k − 1) / (1 + 2 (k − 2) Λ / (k² − 1)),  df = k − 1, (k² − 1) / 3Λ.

    ValueError for fewer than two groups or three runs in one.
    """
    runs = _groups(groups)
    n = np.array([len(x) for x in runs.values()])
    mean, square = np.array([moments(x) for x in runs.values()]).T
    k, total = len(n), int(n.sum())
    between, within = 0.0 if _flat(mean) else float(n @ (mean - n @ mean / total) ** 2), float(n * (n - 1) @ square)
    noise, whole = within / (total - k), between + within
    f = between / (k - 1) / noise if noise > 0 else None
    p = float(stats.f.sf(f, k - 1, total - k)) if f is not None else None
    eta2 = between / whole if whole > 0 else None
    omega2 = (between - (k - 1) * noise) / (whole + noise) if whole > 0 else None
    found = Anova(total, f, k - 1, total - k, p, eta2, omega2)
    if not (square > 0).all():
        return found
    share = (1 / square) / (1 / square).sum()
    lack = float(((1 - share) ** 2 / (n - 1)).sum())
    apart = float(((mean - share @ mean) ** 2 / square).sum()) / (k - 1)
    welch_f, df = apart / (1 + 2 * (k - 2) * lack / (k**2 - 1)), (k**2 - 1) / (3 * lack)
    return replace(found, welch_f=welch_f, welch_df=df, welch_p=float(stats.f.sf(welch_f, k - 1, df)))


def welch(a: ArrayLike, b: ArrayLike, *, names: tuple[str, str] = ("a", "b")) -> Contrast:
    """The difference a − b of two independent groups [runs]. ValueError for fewer than three runs, or not finite ones."""
    x, y = (_runs(values, f"group {name!r}") for values, name in zip((a, b), names, strict=True))
    value, error, df = (float(m) for m in welch_t(x, y))
    p, splits = permutation(x, y)
    still = " and ".join(repr(name) for name, runs in zip(names, (x, y), strict=True) if _flat(runs))
    found = Contrast(*names, len(x), len(y), value, p, splits, note=f"no spread in {still}" if still else None)
    if error == 0:
        return found
    t, half = value / error, float(stats.t.ppf((1 + LEVEL) / 2, df)) * error
    found = replace(found, low=value - half, high=value + half, t=t, df=df, p=float(2 * stats.t.sf(abs(t), df)))
    a_square, b_square = moments(x)[1] * len(x), moments(y)[1] * len(y)
    unit, nu = float((a_square + b_square) / 2) ** 0.5, float(_satterthwaite(a_square, b_square, len(x), len(y)))
    shrink = float(np.exp(special.gammaln(nu / 2) - special.gammaln((nu - 1) / 2)) / (nu / 2) ** 0.5)
    g_low, g_high = (noncentrality(t, df, tail) * error / unit for tail in ((1 + LEVEL) / 2, (1 - LEVEL) / 2))
    return replace(found, g=shrink * value / unit, g_low=g_low, g_high=g_high)


def pairwise(groups: Groups) -> list[Contrast]:
    """All pairs in the order of the groups, the earlier one first, with Welch's p corrected by Holm over all of them.

    Intervals are not corrected. ValueError for fewer than two groups, or three runs in one.
    """
    runs = _groups(groups)
    found = [welch(runs[a], runs[b], names=(a, b)) for a, b in combinations(runs, 2)]
    return [replace(one, p_holm=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def slope(x: ArrayLike, y: ArrayLike) -> Slope:
    """Whether y rises with x, e.g. with log₁₀ of the size of a model; x and y are [runs], several runs at each x.

    ValueError where shapes differ, a number is not finite, or there are fewer than 3 distinct x or 3 runs at one of them.
    """
    x, y = _runs(x, "x"), _runs(y, "y")
    if len(x) != len(y):
        raise ValueError(f"a slope needs one y a x; here are {len(x)} x and {len(y)} y")
    places, at = np.unique(x, return_inverse=True)
    if (k := len(places)) < 3:
        raise ValueError(f"a slope needs three distinct x or more; here are {places.tolist()}")
    n, each = len(x), [_runs(y[at == i], f"x = {place:g}") for i, place in enumerate(places)]
    b, error = (float(m) for m in slope_t(x, y))
    apart, flat, half = x - x.mean(), _flat(y), float(stats.t.ppf((1 + LEVEL) / 2, n - 2)) * error
    rest = float(((y - y.mean() - b * apart) ** 2).sum()) if error > 0 else 0.0
    pure = float(sum(len(runs) * (len(runs) - 1) * moments(runs)[1] for runs in each))
    off = (rest - pure) / (k - 2) if rest - pure > 1e-12 * rest else 0.0  # mean square of the means about the line
    p_fit = float(stats.f.sf(off / (pure / (n - k)), k - 2, n - k)) if pure > 0 else None
    said = ["y is the same in all runs" if flat else "all runs lie on the line"] * (error == 0)
    said += [f"only {k} distinct x: p speaks for these, p_means for others like them"] * (k < 6)
    said += ["means lie off the line by more than runs do"] * (p_fit is not None and p_fit < ALPHA)
    with np.errstate(invalid="ignore"):  # where most y tie, Sen's variance is below 0, and there is no interval
        sen = stats.theilslopes(y, x, LEVEL)
    p_means = float(2 * stats.t.sf(abs(b) * (apart @ apart / off) ** 0.5, k - 2)) if off > 0 else None
    found = Slope(b, float(y.mean() - b * x.mean()), k, n, float(sen.slope), p_fit=p_fit, p_means=p_means)
    if error > 0:
        found = replace(found, low=b - half, high=b + half, p=float(2 * stats.t.sf(abs(b) / error, n - 2)))
    if not flat:
        low, high = (None if np.isnan(m) else float(m) for m in (sen.low_slope, sen.high_slope))
        tau, tau_p = (float(m) for m in stats.kendalltau(x, y))
        r2 = 1 - rest / float(((y - y.mean()) ** 2).sum())
        found = replace(found, theil_low=low, theil_high=high, tau=tau, tau_p=tau_p, r2=r2)
    return replace(found, note="; ".join(said) or None)


def moments(x: Array) -> tuple[Array, Array]:
    """Mean [...] and squared standard error s² / n [...] of x [..., runs]; 0 where runs have no spread."""
    return x.mean(-1), np.where(_flat(x), 0.0, x.var(-1, ddof=1) / x.shape[-1])


def welch_t(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Difference of means, its standard error, and Welch–Satterthwaite's df, each [...]; df is NaN where the error is 0."""
    (a_mean, a_square), (b_mean, b_square) = moments(a), moments(b)
    df = _satterthwaite(a_square, b_square, a.shape[-1], b.shape[-1])
    return a_mean - b_mean, np.sqrt(a_square + b_square), df


def slope_t(x: Array, y: Array) -> tuple[Array, Array]:
    """Slope and its HC3 standard error, each [...], of y [..., runs] on x [runs]; the error is 0 where y lies on the line.

    s² = Σ ((x − x̄) e / (1 − h))² / (Σ (x − x̄)²)², h = 1/n + (x − x̄)² / Σ (x − x̄)². Type I error with 3 to 10 runs at 3
    to 6 x: 4 to 5 %; up to 7 % where the last x spreads four times as much (t of equal variances: 11 to 14 %).
    """
    apart = x - x.mean()
    total = apart @ apart
    b = (y - y[..., :1]) @ apart / total
    rest = y - y.mean(-1, keepdims=True) - b[..., None] * apart
    error = np.sqrt(((apart * rest / (1 - 1 / len(x) - apart**2 / total)) ** 2).sum(-1)) / total
    return b, np.where(np.abs(rest).max(-1) <= 1e-9 * np.abs(y).max(-1), 0.0, error)


def permutation(a: Array, b: Array) -> tuple[float, int]:
    """p of |Welch's t| over splits of all runs: every split where there are up to 20,000, else 10,000 drawn and the one
    that was seen (Phipson & Smyth 2010), so that p is never 0; and how many they were."""
    everything, order = np.concatenate([a, b]), _splits(len(a), len(b))
    split = everything[order]
    value, error, _ = welch_t(split[:, : len(a)], split[:, len(a) :])
    value = np.where(np.abs(value) <= 1e-9 * np.abs(everything).max(), 0.0, np.abs(value))
    t = np.divide(value, error, out=np.where(value > 0, np.inf, 0.0), where=error > 0)
    return float((t >= t[0] * (1 - 1e-9)).mean()), len(order)


@lru_cache(maxsize=8)
def _splits(n: int, m: int) -> NDArray[np.intp]:
    """Orders of n + m runs [splits, runs], of which the first n are one group; the one that was seen comes first."""
    if special.comb(n + m, n) > EXACT:
        order = np.tile(np.arange(n + m), (DRAWS + 1, 1))
        order[1:] = generator("splits", n, m).permuted(order[1:], axis=1)
        return order
    return np.array([[*one, *sorted({*range(n + m)} - {*one})] for one in combinations(range(n + m), n)])


def _satterthwaite(a: Array | float, b: Array | float, n: int, m: int) -> Array:
    """df of a + b, two independent mean squares of n − 1 and m − 1 df; NaN where both are 0."""
    whole = np.asarray(a + b, float)
    share = np.divide(a, whole, out=np.full_like(whole, np.nan), where=whole > 0)
    return np.asarray(1 / (share**2 / (n - 1) + (1 - share) ** 2 / (m - 1)))


def _flat(x: Array) -> NDArray[np.bool_]:
    return np.asarray(np.ptp(x, axis=-1) <= 1e-9 * np.abs(x).max(-1))


def _runs(values: ArrayLike, name: str) -> Array:
    x = np.asarray(values, float)
    if x.ndim != 1:
        raise ValueError(f"{name} is one number a run [runs], not {x.shape}")
    if len(x) < RUNS:
        raise ValueError(f"a test needs three runs or more; {name} has {len(x)}")
    if lost := int((~np.isfinite(x)).sum()):
        raise ValueError(f"{name} has {lost} of {len(x)} values that are not finite; leave failed runs out, and say so")
    return x


def _groups(groups: Groups, least: int = 2) -> dict[str, Array]:
    if len(groups) < least:
        raise ValueError(f"groups: expected {least} or more, not {list(groups)}")
    return {name: _runs(values, f"group {name!r}") for name, values in groups.items()}
