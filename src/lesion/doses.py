"""Dose and response: the dose of half effect (Hill 1910, as the log-logistic of Finney 1971), the dose at which an
effect is reached, and doses of several components that do the same damage.

Doses are paired by item and by seed: the same noise, scaled. Dose 0 is the undamaged model. Nothing is extrapolated:
what lies beyond the doses tested is None, with a reason. Intervals draw seeds and items again, whole curves at a time,
and stretch the percentile interval as `lesion.stats` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import interpolate, optimize

from lesion.paired import ALPHA, Array, draw_means, interval, item_means, resamples, stretch
from lesion.stats import cohens_d, trend

DRAWS = 1000  # curves drawn for an interval
LEVEL = 0.95
STEPS = 20  # doses between two neighbours at which bounds are worked out
SLOPES = np.geomspace(0.5, 32, 18)
ROUNDS = 12  # steps of the fit of each curve that is drawn
PLACES = 120  # half-doses tried, from e² below the smallest dose to e² above the largest


@dataclass(frozen=True)
class Fit:
    """f(x) = bottom + (top − bottom) / (1 + (x / ed50)^slope), slope > 0: `top` is at dose 0, `bottom` at endless dose.

    bottom > top where the response rises. ed50 is in the unit of the dose, `low` to `high` its interval at 95 %. Where
    the half effect lies beyond the doses tested all are None and `reason` says so; a bound that lies there is None too.
    """

    top: float | None
    bottom: float | None
    ed50: float | None
    slope: float | None
    low: float | None
    high: float | None
    seeds: int
    items: int
    reason: str | None = None

    def __call__(self, dose: ArrayLike) -> Array:
        """The fitted response at these doses. ValueError where nothing was fitted."""
        if self.top is None or self.bottom is None or self.ed50 is None or self.slope is None:
            raise ValueError(f"there is no curve to read: {self.reason}")
        return self.bottom + (self.top - self.bottom) * hill(np.asarray(dose, float), self.ed50, self.slope)


@dataclass(frozen=True)
class Threshold:
    """The smallest dose at which a signed effect reaches `at`, and its interval at 95 %. None comes with a reason.

    Where the effect itself never arrives, `low` may still say from which dose on it could have.
    """

    dose: float | None
    low: float | None
    high: float | None
    at: float
    unit: str
    seeds: int
    items: int
    reason: str | None = None


def hill(x: Array, ed50: Array | float, slope: Array | float) -> Array:
    """1 / (1 + (x / ed50)^slope), from 1 at dose 0 towards 0."""
    with np.errstate(over="ignore"):  # an endless power is a response of 0
        return np.asarray(1 / (1 + (x / ed50) ** slope))


def fit(doses: ArrayLike, response: ArrayLike, *, purpose: str = "", draws: int = DRAWS) -> Fit:
    """Fits the log-logistic curve to the mean response at each dose; response is [doses, seeds, items], NaN: missing.

    Least squares on the means, every dose with the same weight: a grid of half-doses and slopes, on which top and
    bottom are linear, then scipy's least_squares from the best of them. Each of the `draws` is fitted likewise: a curve that
    has not come to its end has its optimum between the points of any grid, where an interval would miss its own estimate.
    ValueError where doses do not rise, there are fewer than 4, or the response neither falls nor rises with dose
    (Page's trend test, p ≥ .05): such a response has no half effect.
    """
    x, y = _curves(doses, response, 4)
    seeds, items = y.shape[1:]
    tested = trend(item_means(y))
    if tested.p >= ALPHA:
        raise ValueError(f"the response neither falls nor rises with dose (Page's trend test, p = {tested.p:.3g})")
    means = item_means(y).mean(1)
    top, bottom, place, slope = _least_squares(x, means)
    first, last = float(x[x > 0][0]), float(x[-1])
    if not first <= place <= last:
        where = "beyond the largest dose" if place > last else "below the smallest dose"
        return Fit(None, None, None, None, None, None, seeds, items, f"the half effect lies {where} tested")
    centre = float(np.log(place))
    curves = _drawn_curves(y, purpose, draws)
    drawn = np.log(_polished(x, curves, *_grid(x, curves)))
    # What each cell adds to log ed50, to first order: it gives the interval the spread that seeds and items allow.
    pull = np.linalg.pinv(_jacobian(x, top, bottom, place, slope))[2]
    linear = np.tensordot(pull, _filled(y), 1)[None]
    wider = float(stretch(linear, draw_means(linear, purpose), LEVEL)[0])
    low, high = np.exp(centre + wider * (np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - centre))
    out = [side for side, beyond in (("lower", low < first), ("upper", high > last)) if beyond]
    ends = f"{out[0]} end of the interval lies" if len(out) == 1 else "interval lies at both ends"
    reason = f"the {ends} beyond the doses tested" if out else None
    bounds = (None if low < first else float(low)), (None if high > last else float(high))
    return Fit(top, bottom, place, slope, *bounds, seeds, items, reason)


def threshold(
    doses: ArrayLike, change: ArrayLike, at: float, unit: Literal["d", "raw"] = "d", *, purpose: str = ""
) -> Threshold:
    """The smallest dose at which the mean change (or its d_z) reaches `at`: at = −0.8 is a fall by .8 deviations.

    change is [doses, seeds, items], after − before; where dose 0 is not among the doses it is added, without change.
    Between neighbouring doses the effect is taken as linear in the dose, never in its logarithm, as dose 0 is one of
    them. The interval goes from where the bound of the effect nearer to `at` arrives to where the other one does (the
    test at each dose, inverted): bounds by the crossed bootstrap for "raw", by noncentral t for "d", between doses those
    of a weighted sum of two correlated estimates (Zou & Donner 2008). Drawing whole curves again instead covers 85 %
    for "d" with 6 items. Where all items change alike d_z is endless: then that dose is the threshold.
    """
    if unit not in ("d", "raw"):
        raise ValueError(f"no unit {unit!r}; there are d and raw")
    if at == 0 or not np.isfinite(at):
        raise ValueError(f"a threshold is a signed effect other than 0, not {at}")
    x, y = _curves(doses, change, 1)
    if x[0] > 0:
        x, y = np.r_[0.0, x], np.concatenate([np.zeros_like(y[:1]), y])
    seeds, items = y.shape[1:]
    x, effects = _between(x, _effects(y, unit, purpose) * np.sign(at), item_means(y))
    found, first, last = (_reached(x, e, abs(at)) for e in (effects[0], effects.max(0), effects.min(0)))
    reason = None
    if found is None:
        reason = "never reached at the doses tested"
    elif last is None:
        reason = "the upper end of the interval lies beyond the doses tested"
    return Threshold(found, first, last, at, unit, seeds, items, reason)


def match(components: Mapping[str, tuple[ArrayLike, ArrayLike]], at: float) -> dict[str, float | None]:
    """The dose at which each component first does the damage `at`; {name: (doses, damage)} → {name: dose}.

    Damage (a perplexity, a relative error of the output) is interpolated in its logarithm by a monotone cubic in the
    dose (PCHIP, Fritsch & Carlson 1980), which makes no turn that the points do not make. A damage of 0 at dose 0 has
    no logarithm and is left out. None where `at` is not reached, or was passed before the first dose.
    """
    if not (np.isfinite(at) and at > 0):
        raise ValueError(f"a damage to match is a positive number, not {at}")
    out: dict[str, float | None] = {}
    for name, (doses, damage) in components.items():
        x, y = np.asarray(doses, float), np.asarray(damage, float)
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"{name}: doses are {x.shape} and damage {y.shape}; one damage a dose is expected")
        keep = (x != 0) | (y != 0)
        x, y = x[keep], y[keep]
        if len(x) < 2 or not (
            np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all() and (y > 0).all()
        ):
            raise ValueError(f"{name}: 2 or more rising doses with a positive damage are expected, not {x} with {y}")
        same = np.flatnonzero(y == at)
        roots = interpolate.PchipInterpolator(x, np.log(y)).solve(np.log(at), extrapolate=False)
        roots = np.r_[roots[np.isfinite(roots)], x[same]]
        out[name] = float(roots.min()) if len(roots) else None
    return out


def _curves(doses: ArrayLike, values: ArrayLike, least: int) -> tuple[Array, Array]:
    """Doses that rise from 0 or more, and values [doses, seeds, items] of the items that have one at every dose."""
    x, y = np.asarray(doses, float), np.asarray(values, float)
    if x.ndim != 1 or y.ndim != 3 or len(x) != len(y):
        raise ValueError(f"expected doses [doses] and values [doses, seeds, items]; got {x.shape} and {y.shape}")
    if len(x) < least or not (np.isfinite(x).all() and (np.diff(x) > 0).all() and x[0] >= 0 and x[-1] > 0):
        raise ValueError(f"expected {least} or more doses that rise from 0 or above; got {x.tolist()}")
    if np.isinf(y).any():
        raise ValueError("a value is infinite; a missing one is NaN")
    there = ~np.isnan(y)
    y = y[:, there.any((0, 2))][:, :, there.any(1).all(0)]
    if y.shape[2] < 2:
        raise ValueError(f"a curve needs 2 items with a value at every dose; here are {y.shape[2]}")
    return x, y


def _drawn_curves(y: Array, purpose: str, draws: int) -> Array:
    """Mean curves [draws, doses] of seeds and items drawn again, the same ones at every dose."""
    per_seed, per_item = (a[:draws] for a in resamples(purpose, *y.shape[1:]))
    there = ~np.isnan(y)
    count = np.einsum("bs,dsi->bdi", per_seed, there.astype(float))
    total = np.einsum("bs,dsi->bdi", per_seed, np.where(there, y, 0))
    # an item that none of the drawn seeds has keeps its mean over all
    means = np.where(count > 0, total / np.maximum(count, 1), item_means(y))
    return np.einsum("bi,bdi->bd", per_item, means) / y.shape[2]


def _filled(y: Array) -> Array:
    """Cells that are missing take their item's mean at that dose: only for the share of spread that seeds have."""
    return np.where(np.isnan(y), item_means(y)[:, None], y)


@lru_cache(maxsize=8)
def _features(doses: tuple[float, ...]) -> tuple[Array, Array, Array]:
    """The grid: half-doses, slopes, and the curves of both, centred and of unit length [doses, places × slopes]."""
    x = np.array(doses)
    places = np.geomspace(x[x > 0][0] * np.exp(-2), x[-1] * np.exp(2), PLACES)
    shapes = hill(x[:, None, None], places[:, None], SLOPES).reshape(len(x), -1)
    shapes = shapes - shapes.mean(0)
    length = np.linalg.norm(shapes, axis=0)
    return places, SLOPES, np.where(length > 1e-3, shapes / np.maximum(length, 1e-3), 0)


def _grid(doses: Array, means: Array) -> tuple[Array, Array]:
    """Half-dose and slope [runs] of the curves nearest to means [runs, doses]; a parabola refines the half-dose."""
    places, slopes, shapes = _features(tuple(doses))
    score = ((means @ shapes) ** 2).reshape(len(means), len(places), len(slopes))
    best, slope = np.unravel_index(score.reshape(len(means), -1).argmax(1), score.shape[1:])
    runs, inner = np.arange(len(means)), np.clip(best, 1, len(places) - 2)
    left, middle, right = (score[runs, inner + step, slope] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.clip(np.divide(left - right, 2 * bend, out=np.zeros_like(bend), where=bend < 0), -1, 1)
    step = np.log(places[1] / places[0])
    moved = np.where(inner == best, places[inner] * np.exp(shift * step), places[best])
    return moved, slopes[slope]


def _polished(doses: Array, means: Array, place: Array, slope: Array) -> Array:
    """Half-doses [runs] of the curves nearest to means [runs, doses], by Levenberg and Marquardt's steps from half-dose and slope
    [runs]; top and bottom are linear and projected out (Kaufman 1975)."""
    places, slopes, _ = _features(tuple(doses))
    box = np.array([np.log(places[[0, -1]]), slopes[[0, -1]]])
    target = means - means.mean(1, keepdims=True)
    away = np.log(np.maximum(doses, np.finfo(float).tiny))

    def parts(p: Array) -> tuple[Array, Array, Array]:
        """Residuals [runs, doses], their derivatives [runs, doses, 2], and their squares' sum [runs]."""
        h = hill(doses, np.exp(p[:, :1]), p[:, 1:])
        shape = h - h.mean(1, keepdims=True)
        square = np.maximum((shape**2).sum(1, keepdims=True), np.finfo(float).tiny)
        slant = (shape * target).sum(1, keepdims=True) / square
        bell = slant * h * (1 - h)
        turn = np.stack([bell * p[:, 1:], -bell * (away - p[:, :1])], 2)
        turn = turn - turn.mean(1, keepdims=True)
        turn -= shape[:, :, None] * ((shape[:, :, None] * turn).sum(1, keepdims=True) / square[:, :, None])
        rest = target - slant * shape
        return rest, turn, (rest**2).sum(1)

    p, damping = np.stack([np.log(place), slope], 1), np.full(len(means), 1e-3)
    rest, turn, score = parts(p)
    for _ in range(ROUNDS):
        square = np.einsum("rdi,rdj->rij", turn, turn)
        diagonal = np.einsum("rii->ri", square)
        square[:, [0, 1], [0, 1]] = diagonal * (1 + damping[:, None]) + np.finfo(float).tiny
        step = np.linalg.solve(square, np.einsum("rdi,rd->ri", turn, rest)[:, :, None])[:, :, 0]
        tried = np.clip(p + step, box[:, 0], box[:, 1])
        new_rest, new_turn, new_score = parts(tried)
        better = new_score < score
        p, rest, turn = (
            np.where(better.reshape(-1, *[1] * (a.ndim - 1)), b, a)
            for a, b in ((p, tried), (rest, new_rest), (turn, new_turn))
        )
        score, damping = np.where(better, new_score, score), np.where(better, damping / 10, damping * 10)
    return np.exp(p[:, 0])


def _least_squares(doses: Array, means: Array) -> tuple[float, float, float, float]:
    """Top, bottom, half-dose and slope of the curve nearest to means [doses]."""
    place, slope = (float(a[0]) for a in _grid(doses, means[None]))
    shape = hill(doses, place, slope)
    slant, bottom = np.polyfit(shape, means, 1)
    places, slopes, _ = _features(tuple(doses))
    box = np.array([[-np.inf, np.inf], [-np.inf, np.inf], np.log(places[[0, -1]]), slopes[[0, -1]]])
    start = np.clip([slant + bottom, bottom, np.log(place), slope], box[:, 0], box[:, 1])

    def rest(p: Array) -> Array:
        return p[1] + (p[0] - p[1]) * hill(doses, np.exp(p[2]), p[3]) - means

    def slopes_of(p: Array) -> Array:
        return _jacobian(doses, p[0], p[1], float(np.exp(p[2])), p[3])

    found = optimize.least_squares(rest, start, slopes_of, bounds=(box[:, 0], box[:, 1]), x_scale="jac")
    top, bottom, log_place, slope = (float(v) for v in found.x)
    return top, bottom, float(np.exp(log_place)), slope


def _jacobian(doses: Array, top: float, bottom: float, place: float, slope: float) -> Array:
    """Derivatives of the curve by top, bottom, log ed50 and slope [doses, 4]."""
    h = hill(doses, place, slope)
    away = np.log(np.maximum(doses, np.finfo(float).tiny) / place)
    bell = (top - bottom) * h * (1 - h)
    return np.stack([h, 1 - h, bell * slope, -bell * away], axis=1)


def _effects(y: Array, unit: str, purpose: str) -> Array:
    """The effect at each dose and the bounds of its interval [3, doses]; endless where nothing bounds it."""
    means = item_means(y).mean(1)
    if unit == "raw":
        low, high = interval(y, False, level=LEVEL, purpose=purpose)
        still = ~np.nan_to_num(y).any((1, 2))
        low, high = (np.where(still, 0, bound) for bound in (low, high))
        return np.stack([means, np.nan_to_num(low, nan=-np.inf), np.nan_to_num(high, nan=np.inf)])
    out = np.empty((3, len(y)))
    for dose, mean in enumerate(means):
        size = cohens_d(y[dose], level=LEVEL)
        endless = 0.0 if mean == 0 else np.copysign(np.inf, mean)
        out[:, dose] = [endless if v is None else v for v in (size.d, size.low, size.high)]
    return out


def _between(doses: Array, effects: Array, each: Array) -> tuple[Array, Array]:
    """Doses and effects (with their two bounds) [3, …], filled in between neighbours; each: items' changes [doses, items].

    At (1 − w) e₁ + w e₂ the distance to a bound is √((1 − w)² h₁² + w² h₂² + 2 ρ w (1 − w) h₁ h₂), h those of e₁ and e₂, and ρ
    the correlation of the items' changes: chance at two doses cancels in part.
    """
    apart = each - each.mean(1, keepdims=True)
    length = np.linalg.norm(apart, axis=1)
    w = np.arange(1, STEPS) / STEPS
    xs, es = [doses[:1]], [effects[:, :1]]
    for k in range(len(doses) - 1):
        one, two = effects[:, k], effects[:, k + 1]
        if np.isfinite([one[0], two[0]]).all():
            rho = apart[k] @ apart[k + 1] / (length[k] * length[k + 1]) if length[k] * length[k + 1] > 0 else 0.0
            h1, h2 = (np.abs(e[1:] - e[0])[:, None] for e in (one, two))
            square = ((1 - w) * h1) ** 2 + (w * h2) ** 2 + 2 * rho * w * (1 - w) * np.where(h1 * h2 > 0, h1 * h2, 0)
            side = np.sign(one[1:] - one[0] + two[1:] - two[0])[:, None]
            middle = (1 - w) * one[0] + w * two[0]
            xs.append(doses[k] + w * (doses[k + 1] - doses[k]))
            es.append(np.vstack([middle, middle + side * np.sqrt(np.maximum(square, 0))]))
        xs.append(doses[k + 1 : k + 2])
        es.append(effects[:, k + 1 : k + 2])
    return np.concatenate(xs), np.concatenate(es, axis=1)


def _reached(doses: Array, effect: Array, goal: float) -> float | None:
    """The first dose at which effect [doses] is `goal` or more, linear between doses; None where it never is."""
    after = int((effect >= goal).argmax())
    if not effect[after] >= goal:
        return None
    if after == 0 or not np.isfinite(effect[after - 1 : after + 1]).all():
        return float(doses[after])
    return float(np.interp(goal, effect[after - 1 : after + 1], doses[after - 1 : after + 1]))
