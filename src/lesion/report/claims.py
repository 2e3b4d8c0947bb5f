"""Claims: what a study set out to show, and for each the effect, its interval, the test and a verdict in words.

The intervals of claims in the same unit are drawn to the same scale, with zero in the middle, so that signs and sizes can
be compared by eye down the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import polars as pl

from lesion.report import tables

CLAIMS: dict[str, Any] = {
    "claim": pl.String,
    **dict.fromkeys(("effect", "low", "high"), pl.Float64),
    "unit": pl.String,
    **dict.fromkeys(("items", "seeds"), pl.Int64),
    "test": pl.String,
    **dict.fromkeys(("p", "p_holm", "power"), pl.Float64),
    **dict.fromkeys(("verdict", "note"), pl.String),
}
VERDICTS = ("supported", "contradicted", "inconclusive", "not tested")
HALF = 92  # of a drawing's width from zero to its edge, in pixels; the drawing is 2 × 100 wide


@dataclass(frozen=True)
class Claim:
    """One claim as the page shows it. `marks` are places from −HALF to HALF: the effect and the ends of its interval."""

    text: str
    verdict: str
    effect: str
    interval: str
    unit: str
    facts: list[tuple[str, str]]
    note: str | None
    marks: tuple[float, float, float] | None
    said: str


def check(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame itself. Raises ValueError for an unknown verdict, a probability beyond 0 to 1, an interval inside out."""
    if strange := [v for v in frame["verdict"].unique(maintain_order=True) if v not in VERDICTS]:
        raise ValueError(f"no verdict {strange[0]!r}; there are {', '.join(VERDICTS)}")
    for name in ("p", "p_holm", "power"):
        if (beyond := frame[name].drop_nulls()).len() and not beyond.is_between(0, 1).all():
            raise ValueError(
                f"claims: {name} should be from 0 to 1, but one is {next(x for x in beyond if not 0 <= x <= 1)}"
            )
    if (wrong := frame.filter(pl.col("low") > pl.col("high"))).height:
        raise ValueError(f"claims: the interval of {wrong['claim'][0]!r} begins above its end")
    return frame


def claims(frame: pl.DataFrame) -> list[Claim]:
    """The rows as the page shows them, in their order."""
    reach: dict[str | None, float] = {}
    for row in frame.iter_rows(named=True):
        known = [abs(row[name]) for name in ("effect", "low", "high") if row[name] is not None]
        reach[row["unit"]] = max([reach.get(row["unit"], 0.0), *known])
    return [_claim(row, reach[row["unit"]]) for row in frame.iter_rows(named=True)]


def tally(found: list[Claim]) -> str:
    """5 claims: 3 supported, 1 contradicted, 1 inconclusive."""
    counts = [(sum(claim.verdict == verdict for claim in found), verdict) for verdict in VERDICTS]
    named = ", ".join(f"{n} {verdict}" for n, verdict in counts if n)
    return f"{len(found)} {'claim' if len(found) == 1 else 'claims'}: {named}"


def size(row: Mapping[str, Any]) -> str:
    """What a claim rests on: 60 items × 1 seed; empty where it says nothing of it."""
    return " × ".join(
        f"{row[name]} {name[: None if row[name] != 1 else -1]}" for name in ("items", "seeds") if row[name] is not None
    )


def probability(p: float) -> str:
    """Two digits: 0.034, 0.51, < 0.0001."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def estimate(effect: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """The effect with its sign, and its interval, as many places as tell two digits of the interval's width."""
    if effect is None:
        return tables.MISSING, ""
    if low is None or high is None:
        shown, interval = tables.number(effect), ""
    else:
        size = (high - low) or abs(effect)
        places = min(max(0, 1 - floor(log10(size))), 6) if size else 0
        below, above = (tables.number(x, places) for x in (low, high))
        if 0 < abs(effect) < 0.5 * 10.0**-places:  # −0.003 beside [−0.11, 0.10]: it has a sign, and is next to nothing
            places = min(places + 2, ceil(-log10(abs(effect))))
        shown = tables.number(effect, places)
        interval = f"[{below}, {above}]"
    return (f"+{shown}" if effect > 0 else shown), interval


def _claim(row: dict[str, Any], reach: float) -> Claim:
    effect, interval = estimate(row["effect"], row["low"], row["high"])
    p = [] if row["p"] is None else [probability(row["p"])]
    p += [] if row["p_holm"] is None else [f"(Holm {probability(row['p_holm'])})"]
    power = "" if row["power"] is None else f"{row['power']:.2f}"
    facts = [("n", size(row)), ("test", row["test"] or ""), ("p", " ".join(p)), ("power", power)]
    marks = None
    if row["effect"] is not None and reach > 0:
        ends = (row["effect"], row["low"], row["high"])
        value, low, high = (HALF * (row["effect"] if end is None else end) / reach for end in ends)
        marks = (round(value, 1), round(low, 1), round(high, 1))
    elif row["effect"] is not None:
        marks = (0.0, 0.0, 0.0)
    unit = (row["unit"] or "") if row["effect"] is not None else ""
    said = " ".join(x for x in (f"Effect {effect}", unit, f"interval {interval}" if interval else "") if x)
    facts = [(name, text) for name, text in facts if text]
    return Claim(row["claim"], row["verdict"], effect, interval, unit, facts, row["note"], marks, said)
