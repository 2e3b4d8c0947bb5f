"""Claims of a study as rows: a paired comparison or an equivalence each, corrected together, with a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesion.report.claims import CLAIMS
from lesion.stats import ALPHA, compare, equivalent, holm, ratio, verdict, wilson
from lesion.sweep import pairs

Array = NDArray[np.float64]


def tested(text: str, after: Array, before: Array, unit: str, purpose: str, **more: Any) -> dict[str, Any]:
    """A paired comparison [seeds, items] as a claim; not tested where fewer than two items can be paired. `more` may have
    `direction` (the sign that supports the claim) and `smallest` (an effect that would matter)."""
    if (count := pairs(after, before)) < 2:
        return untested(text, unit, f"only {count} items can be compared")
    e = compare(after, before, purpose=purpose)
    fields = {name: getattr(e, name) for name in ("low", "high", "items", "seeds", "test", "p", "power", "note")}
    if e.p is not None and e.p_items is not None and e.p > e.p_items:
        fields["test"] = f"{e.test} over items, raised to t over seeds × items"
    if e.p is not None and e.p_items is not None and e.p_items < ALPHA <= e.p:
        advice = "; so few cannot speak for all draws: take 5 or more" if e.seeds < 5 else "; but draws differ"
        fields["note"] = f"for these {e.seeds} draws alone p = {e.p_items:.2g}{advice}"
    return {"claim": text, "effect": e.value, "unit": unit, **fields, **more}


def the_same(text: str, after: Array, before: Array, unit: str, margin: float) -> dict[str, Any]:
    """An equivalence within ±margin as a claim. Its p is that of what was found, a change within the margin or one beyond it, and
    either verdict is held to the correction over all claims."""
    if (count := pairs(after, before)) < 2:
        return untested(text, unit, f"only {count} items can be compared")
    e = equivalent(after, before, margin)
    said = {"equivalent": "supported", "different": "contradicted"}.get(e.verdict, "inconclusive")
    p, test = (e.p, "two one-sided t tests") if abs(e.value) <= margin else (e.beyond, "t test beyond the margin")
    row: dict[str, Any] = {"effect": e.value, "low": e.low, "high": e.high, "unit": unit, "p": p}
    row |= {"items": count, "seeds": int(np.isfinite(after - before).any(1).sum())}
    return {"claim": text, **row, "test": f"{test}, interval at 90 %", "verdict": said}


def untested(text: str, unit: str, why: str) -> dict[str, Any]:
    return {"claim": text, "unit": unit, "verdict": "not tested", "note": why}


def annotated(row: Mapping[str, Any], *said: str) -> str | None:
    """The note of a claim with more said after it."""
    return "; ".join(filter(None, [row.get("note"), *said])) or None


def decided(found: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """All claims of a study, with verdicts after Holm's correction over all of them."""
    rows = [dict(row) for row in found]
    for row, p in zip(rows, holm([row.get("p") for row in rows]), strict=True):
        direction, smallest = row.pop("direction", 1), row.pop("smallest", 0.0)
        row["p_holm"] = p
        if "verdict" not in row:
            row["verdict"] = verdict(
                row["low"], row["high"], p, direction=direction, smallest=smallest, power=row["power"]
            )
            # With too little power it is not called nil; that its interval is so narrow is worth knowing all the same.
            low, high = row["low"], row["high"]
            if row["verdict"] == "inconclusive" and low is not None and -smallest < low and high < smallest:
                within = f"its interval lies within ±{smallest:g}, which is called none"
                row["note"] = annotated(row, within)
        elif p is not None and p >= ALPHA:  # an equivalence, whose verdict was before its correction
            row["verdict"] = "inconclusive"
    return pl.DataFrame(rows, schema=CLAIMS)


def averaged(values: Array, name: str, share: bool = False) -> dict[str, Any]:
    """The mean over [seeds, items] with its crossed bootstrap interval, as three columns of a summary; None where there is no
    value. Of a `share` of items that is none or all of them, where nothing can be drawn again that differs, Wilson's."""
    there = np.isfinite(values)
    if not there.any():
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    e = ratio(np.where(there, values, 0.0), there.astype(float), purpose=name)
    low, high = (e.low, e.high) if not share or e.value not in (0.0, 1.0) else wilson(e.value, int(there.any(0).sum()))
    return {name: e.value, f"{name}_low": low, f"{name}_high": high}
