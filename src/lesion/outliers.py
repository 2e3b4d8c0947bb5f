"""Outliers, and an analysis made twice, with them and without, so that a report prints both.

Leaving out runs because of what came out of them makes tests too liberal; the result of all runs is the one to believe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesion.groups import RUNS, Groups, _groups, _runs
from lesion.paired import Array

Mask = NDArray[np.bool_]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Both(Generic[Result]):
    """One analysis of all runs and of those that a filter keeps; `outliers` are the places of the dropped ones in their
    group. `filtered` is None where a group is left with fewer than three; `note` says so, or what cannot be filtered."""

    method: str
    limit: float
    kept: dict[str, int]
    dropped: dict[str, int]
    outliers: dict[str, tuple[int, ...]]
    unfiltered: Result
    filtered: Result | None
    note: str | None = None


def keep_iqr(values: ArrayLike, multiplier: float = 1.5) -> Mask:
    """True where q₁ − multiplier IQR ≤ value ≤ q₃ + multiplier IQR (Tukey 1977), quartiles interpolated linearly.

    The fences belong to what is kept. Constant values are all kept; but where the middle half is the same and others are
    not, IQR is 0 and every other one is dropped. ValueError for a multiplier that is not positive, or as in `describe`.
    """
    x = _runs(values, "the group")
    first, third = np.quantile(x, [0.25, 0.75])
    room = _room(x, multiplier, third - first)
    return np.asarray((x >= first - room) & (x <= third + room))


def keep_zscore(values: ArrayLike, threshold: float = 3.0) -> Mask:
    """True where |value − mean| ≤ threshold sd, sd with n − 1 below. Constant values are all kept.

    An outlier widens the sd it is judged by: no |z| of n values exceeds (n − 1) / √n (Shiffler 1988). With n ≤
    threshold² + 1 nothing can be dropped, i.e. with a threshold of 3 and 10 runs or fewer. ValueError as in `keep_iqr`.
    """
    x = _runs(values, "the group")
    return np.asarray(np.abs(x - x.mean()) <= _room(x, threshold, float(x.std(ddof=1))))


Filter = Callable[[Array, float], Mask]
FILTERS: dict[str, tuple[Filter, float]] = {"iqr": (keep_iqr, 1.5), "zscore": (keep_zscore, 3.0)}


def both(
    groups: Groups,
    method: Literal["iqr", "zscore"],
    analysis: Callable[[Mapping[str, Array]], Result],
    *,
    limit: float | None = None,
    by: Groups | None = None,
) -> Both[Result]:
    """analysis(all runs) and analysis(the runs kept), for a report that prints the two.

    limit is the filter's multiplier (1.5) or threshold (3). `by` judges each run by another measure of it: its perplexity,
    where its rank is analysed. The unfiltered result is the one to believe: where groups of ten runs are each filtered by
    their own outcome (IQR), Welch's test rejects 9 % of true null hypotheses, 12 % of lognormal ones (see Bakker &
    Wicherts 2014). ValueError where method, names or numbers of runs do not fit, and whatever the analysis raises.
    """
    if method not in FILTERS:
        raise ValueError(f"no filter {method!r}; there are {', '.join(FILTERS)}")
    runs, judged = _groups(groups, 1), _groups(groups if by is None else by, 1)
    sizes, others = ({name: len(x) for name, x in one.items()} for one in (runs, judged))
    if sizes != others:
        raise ValueError(f"runs are judged by another measure of the same runs; here are {sizes} and {others}")
    keep, usual = FILTERS[method]
    bound = usual if limit is None else limit
    masks = {name: keep(judged[name], bound) for name in runs}
    outliers = {name: tuple(np.flatnonzero(~mask).tolist()) for name, mask in masks.items()}
    dropped = {name: len(places) for name, places in outliers.items()}
    kept = {name: n - dropped[name] for name, n in sizes.items()}
    short = ", ".join(f"{name!r} {n}" for name, n in kept.items() if n < RUNS)
    stuck = ", ".join(repr(name) for name, n in sizes.items() if method == "zscore" and n - 1 <= bound * n**0.5)
    said = [f"with so few runs no |z| exceeds {bound:g}: nothing can be filtered in {stuck}"] * bool(stuck)
    said += [f"a test needs three runs or more; the filter leaves {short}"] * bool(short)
    whole = analysis(runs)
    rest = None if short else analysis({name: runs[name][mask] for name, mask in masks.items()})
    return Both(method, bound, kept, dropped, outliers, whole, rest, "; ".join(said) or None)


def _room(x: Array, limit: float, width: float) -> float:
    """limit × width, and a little: a value on a fence lies on it, whatever the rounding."""
    if not (np.isfinite(limit) and limit > 0):
        raise ValueError(f"the limit of a filter is a positive number, not {limit}")
    return limit * width + 1e-12 * float(np.abs(x).max())
