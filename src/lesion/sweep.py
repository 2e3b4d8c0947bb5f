"""A sweep: sites × doses × seeds, every cell with its rows, turned into arrays, curves, effects, thresholds and matches.

Dose 0 is the undamaged model and part of every sweep. Cells of one seed share items and all randomness but the dose, so
everything here is paired. Doses are in the order of growing damage; where that is not the order of the numbers (levels of
a quantiser), `strength` is what grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesion import doses as dose_response
from lesion.outcomes import Outcome
from lesion.report.heat import HEAT
from lesion.report.page import CURVES
from lesion.stats import Effect, compare, holm, ratio
from lesion.trial import Row

Array = NDArray[np.float64]
Cell = tuple[str, float, int]  # site, dose, seed
LARGE = 0.8  # the d at which a threshold is set, as in the study that is described


@dataclass
class Sweep:
    """rows: measure → item → row, for each cell that was read. `doses` has 0 first, then rises in damage; `strength` is a
    function that is its own inverse: the dose itself, or 1/dose for levels."""

    sites: Sequence[str]
    doses: Sequence[float]
    seeds: Sequence[int]
    rows: Mapping[Cell, Mapping[str, Mapping[str, Row]]]
    strength: Callable[[float], float] = float
    _arrays: dict[tuple[str, str, float], tuple[Array, Array]] = field(default_factory=dict)

    @property
    def _strengths(self) -> list[float]:
        """Of all doses: they rise from 0."""
        return [0.0, *(self.strength(dose) for dose in self.doses[1:])]

    def array(self, outcome: Outcome, site: str, dose: float) -> tuple[Array, Array]:
        """Values [seeds, items] (NaN: none) and their weights (0 where there is none), items as the undamaged model has
        them."""
        place = outcome.name, site, dose
        if place not in self._arrays:
            items = self.items(outcome)
            values = np.full((len(self.seeds), len(items)), np.nan)
            weights = np.zeros_like(values)
            for i, seed in enumerate(self.seeds):
                found = self.rows.get((site, dose, seed), {}).get(outcome.measure, {})
                for j, item in enumerate(items):
                    row = found.get(item)
                    if row is not None and (value := outcome.value(row)) is not None:
                        values[i, j] = value
                        weights[i, j] = 1.0 if outcome.weight is None else outcome.weight(row) or 0.0
            self._arrays[place] = values, weights
        return self._arrays[place]

    def items(self, outcome: Outcome) -> list[str]:
        """Items that have a value in any undamaged cell or, where only damage has one, in any cell."""
        found: dict[str, None] = {}
        for whole in (True, False):
            for (_, dose, _), measures in self.rows.items():
                if (dose == 0) == whole:
                    rows = measures.get(outcome.measure, {})
                    found |= dict.fromkeys(i for i, row in rows.items() if outcome.value(row) is not None)
            if found:
                break
        return list(found)

    def has(self, outcome: Outcome) -> bool:
        return bool(self.items(outcome))

    def point(self, outcome: Outcome, site: str, dose: float) -> dict[str, Any]:
        """The mean at one dose with its interval; of a relative outcome the change from the undamaged model."""
        values, weights = self.array(outcome, site, dose)
        if outcome.relative:
            values = values - self.array(outcome, site, 0.0)[0]
            weights = np.where(np.isnan(values), 0, weights)
        if not weights.any():
            return {"value": None, "low": None, "high": None, "items": None, "seeds": None}
        e = ratio(np.where(weights > 0, np.nan_to_num(values) * weights, 0), weights, purpose=outcome.name)
        shown = [_exp(x) if outcome.exp else x for x in (e.value, e.low, e.high)]
        return {**dict(zip(("value", "low", "high"), shown, strict=True)), "items": e.items, "seeds": e.seeds}

    def curves(self, outcomes: Sequence[Outcome]) -> pl.DataFrame:
        """A row for each outcome × site × dose, as the report draws them."""
        rows: list[dict[str, Any]] = []
        for o in outcomes:
            for site in self.sites:
                for dose in self.doses:
                    reference = (1.0 if o.exp else 0.0) if o.relative else None
                    said = {"measure": o.name, "unit": o.unit, "better": o.better, "group": o.group, "site": site}
                    rows.append({**said, "dose": dose, "reference": reference, **self.point(o, site, dose)})
        return pl.DataFrame(rows, schema={**CURVES, "group": pl.String})

    def effect(self, outcome: Outcome, site: str, dose: float) -> Effect | None:
        """The paired change from the undamaged model, or None where fewer than two items have one."""
        after, before = self.array(outcome, site, dose)[0], self.array(outcome, site, 0.0)[0]
        if pairs(after, before) < 2:
            return None
        return compare(after, before, purpose=outcome.name)

    def effects(self, outcomes: Sequence[Outcome]) -> pl.DataFrame:
        """A row for each outcome × site × damaged dose: signed change, interval, test, p and p after Holm over the whole
        table, d with interval, power."""
        rows: list[dict[str, Any]] = []
        for o in outcomes:
            for site in self.sites:
                for dose in self.doses[1:]:
                    if (e := self.effect(o, site, dose)) is not None:
                        fields = (
                            "value",
                            "low",
                            "high",
                            "items",
                            "seeds",
                            "test",
                            "p",
                            "d",
                            "d_low",
                            "d_high",
                            "power",
                        )
                        said = {"outcome": o.name, "unit": o.unit, "site": site, "dose": dose}
                        rows.append({**said, **{name: getattr(e, name) for name in fields}, "note": e.note})
        for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = corrected
        return pl.DataFrame(rows, schema=EFFECTS)

    def change(self, outcome: Outcome, site: str) -> tuple[list[float], Array]:
        """Strengths that rise from 0, and changes from the undamaged model [doses, seeds, items]."""
        whole = self.array(outcome, site, 0.0)[0]
        stack = np.stack([self.array(outcome, site, dose)[0] - whole for dose in self.doses])
        return self._strengths, stack

    def threshold(self, outcome: Outcome, site: str) -> dose_response.Threshold | None:
        """The smallest strength at which |d| reaches LARGE, signed: for the worse where that has a meaning, else on the
        side that is reached first. None where too few items have a value at every dose."""
        strengths, change = self.change(outcome, site)
        signs = [outcome.worse] if outcome.worse else [-1, 1]
        if _full(change) < 2:
            return None
        found = [dose_response.threshold(strengths, change, LARGE * s, purpose=outcome.name) for s in signs]
        reached = [t for t in found if t.dose is not None]
        return min(reached, key=lambda t: t.dose or 0.0) if reached else found[0]

    def thresholds(self, outcomes: Sequence[Outcome]) -> pl.DataFrame:
        rows: list[dict[str, Any]] = []
        for o in outcomes:
            for site in self.sites:
                if (t := self.threshold(o, site)) is None:
                    continue
                half, why = self.half(o, site)
                rows.append(
                    {
                        "outcome": o.name,
                        "site": site,
                        "at d": t.at,
                        "dose": self._dose(t.dose),
                        "dose_low": self._dose(t.low),
                        "dose_high": self._dose(t.high),
                        "ED50": self._dose(half.ed50) if half else None,
                        "ED50_low": self._dose(half.low) if half else None,
                        "ED50_high": self._dose(half.high) if half else None,
                        "items": t.items,
                        "seeds": t.seeds,
                        "note": t.reason,
                        "ED50 note": why,
                    }
                )
        return pl.DataFrame(rows, schema=THRESHOLDS)

    def half(self, outcome: Outcome, site: str) -> tuple[dose_response.Fit | None, str | None]:
        """The dose of half effect, or None where the response has no trend or too few doses; and what there is to say of it."""
        strengths, change = self.change(outcome, site)
        try:
            found = dose_response.fit(strengths, change, purpose=outcome.name)
        except ValueError as error:
            return None, str(error)
        return found, found.reason

    def _dose(self, strength: float | None) -> float | None:
        """A strength in the unit of the doses."""
        return self.strength(strength) if strength else strength

    def at_damage(self, damage: Outcome, level: float) -> dict[str, float | None]:
        """For each site the strength at which this outcome's mean reaches a level."""
        found: dict[str, tuple[Array, Array]] = {}
        for site in self.sites:
            values = [self.point(damage, site, dose)["value"] for dose in self.doses]
            points = zip(self._strengths, values, strict=True)
            known = [(s, v) for s, v in points if v is not None and (v > 0 or s == 0)]
            if len(known) >= 3:
                found[site] = np.array([s for s, _ in known]), np.array([v for _, v in known])
        return dose_response.match(found, level)

    def range_of(self, damage: Outcome) -> tuple[float, float] | None:
        """The levels of damage that every site reaches: from the largest of the smallest to the smallest of the largest."""
        ends = []
        for site in self.sites:
            values = [v for d in self.doses[1:] if (v := self.point(damage, site, d)["value"]) is not None]
            if not values:
                return None
            ends.append((min(values), max(values)))
        low, high = max(a for a, _ in ends), min(b for _, b in ends)
        return (low, high) if 0 < low < high else None

    def at(self, outcome: Outcome, site: str, strength: float) -> Array:
        """Values [seeds, items] at a strength between two doses: a straight line between the neighbours, item by item."""
        return self.between([self.array(outcome, site, dose)[0] for dose in self.doses], strength)

    def between(self, values: Sequence[Array] | Array, strength: float) -> Array:
        """The same of any values, one array for each dose."""
        strengths = self._strengths
        after = int(np.clip(np.searchsorted(strengths, strength), 1, len(strengths) - 1))
        share = (strength - strengths[after - 1]) / (strengths[after] - strengths[after - 1])
        return np.asarray(values[after - 1] * (1 - share) + values[after] * share, float)

    def heat(self, outcomes: Sequence[Outcome], strengths: Mapping[str, float | None], note: str) -> pl.DataFrame:
        """Signed d of every outcome for every site, each at its own strength (None: no cell)."""
        rows: list[dict[str, Any]] = []
        for site in self.sites:
            for o in outcomes:
                d, strength = None, strengths.get(site)
                if strength is not None:
                    here, whole = self.at(o, site, strength), self.array(o, site, 0.0)[0]
                    if pairs(here, whole) >= 2:
                        d = compare(here, whole, purpose=o.name).d
                label = "–" if d is None else f"{d:+.1f}".replace("-", "−")
                rows.append({"row": site, "column": o.name, "value": d, "label": label, "note": note})
        return pl.DataFrame(rows, schema=HEAT)


def pairs(after: Array, before: Array) -> int:
    """Items that both arms have a value of, in some seed."""
    return int((~np.isnan(after - before)).any(0).sum())


def _full(change: Array) -> int:
    """Items that have a value at every dose in some seed."""
    return int((~np.isnan(change)).any(1).all(0).sum())


def _exp(x: float | None) -> float | None:
    return None if x is None or x > 700 else math.exp(x)


EFFECTS: dict[str, Any] = {
    **dict.fromkeys(("outcome", "unit", "site"), pl.String),
    **dict.fromkeys(("dose", "value", "low", "high", "d", "d_low", "d_high", "p", "p_holm", "power"), pl.Float64),
    "test": pl.String,
    **dict.fromkeys(("items", "seeds"), pl.Int64),
    "note": pl.String,
}
THRESHOLDS: dict[str, Any] = {
    **dict.fromkeys(("outcome", "site"), pl.String),
    **dict.fromkeys(("at d", "dose", "dose_low", "dose_high", "ED50", "ED50_low", "ED50_high"), pl.Float64),
    **dict.fromkeys(("items", "seeds"), pl.Int64),
    **dict.fromkeys(("note", "ED50 note"), pl.String),
}
