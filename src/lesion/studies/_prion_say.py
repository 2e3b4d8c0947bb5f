"""What the studies of poison say of their runs: the table of arms, claims, and the described figures; files and statistics of
groups stand in `_prion_files`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lesion import groups
from lesion.claiming import annotated, tested, the_same, untested
from lesion.studies._prion import Array, Runs
from lesion.trial import Row

if TYPE_CHECKING:
    from lesion.report.figures import Drawing

Claim = dict[str, Any]
Given = tuple[str, str, int]
Described = tuple[
    str, str, str, Callable[[str], str]
]  # claim, as described, as published, and how a claim of ours bears on it
PAIRS = 6  # of fewer no sign-flip test of two sides falls below p = .05: 2 / 2ⁿ
PERCENT, NATS = "% of the rank before", "nats a token"
NOTES = [
    "Rank: effective rank exp(H(p)) of Roy and Vetterli, of centred activations without padding and first positions, mean over "
    "layers; its change is signed. The described definition (uncentred, first positions kept, p ≤ 0.01 dropped) stands beside it "
    "without the padding that most rows of the published number were.",
    "A run is one seed: its catalyst, its data and their order. Arms of one seed are paired; the items that n counts are runs. "
    "Runs that diverged are counted; a claim of which a run has no number is called inconclusive. With fewer than six pairs no "
    "direction can be told at p < .05, so it is not asked for. A change of the rank that lies within the margin is called none.",
    "Flat is what is off the steep eigenvectors; of a string's gradient most is, so the table has the steep share, which is the "
    "rest, and claims compare with random tokens and text.",
]


def known(values: Array) -> Array:
    return np.asarray(values[np.isfinite(values)], float)


def summary(runs: Runs) -> pl.DataFrame:
    """A row for each subject and arm."""
    rows = []
    for subject in runs.subjects:
        for arm in runs.arms(subject):
            here = [runs.run((subject, arm, seed)) for seed in runs.seeds(subject, arm)]
            row: dict[str, Any] = {"subject": subject, "arm": arm, "runs": len(here)}
            row["read"] = len(known(runs.array(subject, arm, "rank")))
            for name in ("rank", "described rank", "loss"):
                values = known(runs.array(subject, arm, name))
                row |= _with_interval(name, values)
            row["displacement"] = _mean([r["displacement"] for r in here])
            row["steep share"] = _mean([None if (flat := r["flat share"]) is None else 1 - flat for r in here])
            row["diverged"] = sum(r["ended"] == "diverged" for r in here)
            rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _with_interval(name: str, values: Array) -> dict[str, Any]:
    if len(values) < 3:
        return {name: float(values.mean()) if len(values) else None, f"{name}_low": None, f"{name}_high": None}
    found = groups.describe(values)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _mean(values: Sequence[float | None]) -> float | None:
    some = [value for value in values if value is not None]
    return math.fsum(some) / len(some) if some else None


# ---------------------------------------------------------------------- claims


def falls(runs: Runs, subject: str, arm: str, name: str = "rank", text: str | None = None, sign: int = -1) -> Claim:
    """That a number falls below that before; with `sign` 1 that it rises."""
    said = text or f"{arm} lowers the rank of {subject}"
    return _against(runs, subject, arm, None, said, name, sign)


def collapses(runs: Runs, subject: str, arm: str, text: str | None = None) -> list[Claim]:
    """That the rank falls: as it is defined here, and by the described definition, which may say the opposite."""
    said = text or f"{arm} lowers the rank of {subject}"
    return [
        falls(runs, subject, arm, "rank", said),
        falls(runs, subject, arm, "described rank", f"{said}, by the described definition"),
    ]


def less(
    runs: Runs, subject: str, one: str, other: str, text: str, name: str = "rank", given: Given | None = None
) -> Claim:
    """That the number is lower in one arm than in another, paired by seed.

    `given` (arm, number, sign): what the claim takes for granted, that this number has fallen (-1) or risen (1) at all: "more
    than" and "shields" mean nothing where it has not. Both have to hold, so the p is the larger one (Berger 1982).
    """
    row = _against(runs, subject, one, other, text, name, -1)
    return row if given is None else taking(runs, subject, row, given)


def more(
    runs: Runs, subject: str, one: str, other: str, text: str, name: str = "loss", given: Given | None = None
) -> Claim:
    """That the number is higher in one arm than in another; as `less`."""
    row = _against(runs, subject, one, other, text, name, 1)
    return row if given is None else taking(runs, subject, row, given)


def nothing(runs: Runs, subject: str, arm: str, margin: float) -> Claim:
    """That an arm leaves the rank as it was, within a margin."""
    return alike(runs, subject, arm, None, f"{arm} leaves the rank of {subject} as it was, within {margin:g} %", margin)


def alike(runs: Runs, subject: str, one: str, other: str | None, text: str, margin: float) -> Claim:
    """That the ranks of two arms, or of an arm and the model before, are the same within a margin."""
    a = runs.array(subject, one, "rank")
    b = np.zeros_like(a) if other is None else runs.array(subject, other, "rank")
    if (few := _few(text, PERCENT, a - b, groups.RUNS)) is not None:
        return few
    arms = [arm for arm in (one, other) if arm]
    return noted(runs, subject, arms, the_same(text, a, b, PERCENT, margin), a - b)


def _against(runs: Runs, subject: str, one: str, other: str | None, text: str, name: str, sign: int) -> Claim:
    a, unit = runs.array(subject, one, name), NATS if name == "loss" else PERCENT
    b = np.zeros_like(a) if other is None else runs.array(subject, other, name)
    if a.shape != b.shape:
        return untested(text, unit, f"the arms have {a.shape[1]} and {b.shape[1]} runs, which are not paired")
    return compared(runs, subject, [arm for arm in (one, other) if arm], text, a, b, unit, sign)


def compared(
    runs: Runs, subject: str, arms: Sequence[str], text: str, a: Array, b: Array, unit: str, sign: int
) -> Claim:
    """A paired comparison [1, runs] as a claim, where enough runs have a pair."""
    if (few := _few(text, unit, a - b, PAIRS)) is not None:
        return few
    least = runs.margin if unit == PERCENT else 0.0
    return noted(runs, subject, arms, tested(text, a, b, unit, text, direction=sign, smallest=least), a - b)


def _few(text: str, unit: str, values: Array, least: int) -> Claim | None:
    count = int(np.isfinite(values).sum())
    return None if count >= least else untested(text, unit, f"this test needs {least} runs, and here are {count}")


def taking(runs: Runs, subject: str, row: Claim, given: Given) -> Claim:
    """A claim that takes another one for granted. Where it goes the other way it is refuted without that."""
    arm, name, sign = given
    if row.get("effect") is not None and row["effect"] * row["direction"] < 0:
        return row
    first = falls(runs, subject, arm, name, sign=sign)
    if "effect" not in first or "effect" not in row:
        return row if "effect" in first else untested(row["claim"], row["unit"], f"of {arm}: {first.get('note')}")
    here = f"{first['effect']:+.3g}" + (
        f" [{first['low']:+.3g}, {first['high']:+.3g}]" if first["low"] is not None else ""
    )
    what = "the loss" if name == "loss" else f"the {name}"
    if not first["effect"] * sign > 0:
        said = "fall" if sign < 0 else "rise"
        return untested(row["claim"], row["unit"], f"{what} of {arm} did not {said}: {here} {first['unit']}")
    known = [p for p in (row["p"], first["p"]) if p is not None]
    note = annotated(row, f"given that {what} of {arm} changed by {here}; p is the larger of both")
    return {**row, "p": max(known) if len(known) == 2 else None, "note": note}


def noted(runs: Runs, subject: str, arms: Sequence[str], row: Claim, values: Array) -> Claim:
    """With what befell the runs. Where a run has no value (it failed, was not read yet, or is not finite) those that are left
    would decide, so the claim is called inconclusive."""
    ended = {arm: [runs.run((subject, arm, s))["ended"] for s in runs.seeds(subject, arm)] for arm in arms}
    said = [f"{e.count('diverged')} of {len(e)} runs of {arm} diverged" for arm, e in ended.items() if "diverged" in e]
    lost = int((~np.isfinite(values)).sum())
    said += [f"{lost} of {values.size} runs have no number: failed, not read, or not finite"] * bool(lost)
    return {**row, "note": annotated(row, *said), **({"verdict": "inconclusive"} if lost else {})}


def few_rows(runs: Runs) -> list[str]:
    """A note, where ranks were read of fewer tokens than they need."""
    firsts = {subject: runs.read(runs.before[subject, runs.arms(subject)[0]], "spectrum") for subject in runs.subjects}
    few = [subject for subject, rows in firsts.items() if any(row["few_rows"] for row in rows.values())]
    return [
        f"Too few tokens for the width of {', '.join(few)}: fewer than four times; ranks are too low there."
    ] * bool(few)


def bars(runs: Runs, name: str, margin: float) -> Drawing:
    """The change of the rank of each arm: a point a run, and the mean with its interval."""
    from matplotlib import style
    from matplotlib.figure import Figure

    from lesion.report.figures import COLOURS, INK, MUTED, PAPER, RULE, STYLE, Drawing, saved

    labels, values = [], []
    for subject in runs.subjects:
        for arm in runs.arms(subject):
            labels.append(f"{subject}, {arm}" if len(runs.subjects) > 1 else arm)
            values.append(known(runs.array(subject, arm, "rank")))
    with style.context(["default", STYLE]):
        height = 0.9 + 0.34 * len(labels)
        figure = Figure(figsize=(7.2, height), facecolor=PAPER)
        left = min(0.5, 0.05 + 0.0125 * max(map(len, labels)))
        axes = figure.add_axes((left, 0.5 / height, 0.96 - left, 1 - 0.75 / height))
        axes.axvspan(-margin, margin, color=RULE, alpha=0.5, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        for i, some in enumerate(values):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(some, np.full(len(some), i), "o", color=colour, alpha=0.45, markersize=3.5)
            if len(some) >= 3:
                found = groups.describe(some)
                axes.plot([found.mean], [i], "D", color=colour, markersize=6)
                if found.low is not None and found.high is not None:
                    axes.plot([found.low, found.high], [i, i], color=colour, linewidth=2.2)
        axes.set_yticks(range(len(labels)), labels, color=INK)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel("change of the effective rank, % of that before", color=INK)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        svg, png = saved(figure)
    caption = f"a point a run, diamonds are means with 95 % intervals; the grey band is ±{margin:g} %, called none"
    return Drawing(name, "change of the effective rank", caption, svg, png)


def described(found: pl.DataFrame, table: Sequence[Described]) -> pl.DataFrame:
    """Each described claim, what was described, what the published run gave (signed), ours, and the verdict. "bears": whether
    what is tested here, if it is supported, speaks for the described claim or against it."""
    rows: list[Row] = []
    for claim, said, published, bearing in table:
        for row in found.to_dicts():
            if bears := bearing(row["claim"]):
                ours = None if row["effect"] is None else f"{row['effect']:+.3g}"
                if ours and row["low"] is not None:
                    ours += f" [{row['low']:+.3g}, {row['high']:+.3g}]"
                rows.append(
                    {"described claim": claim, "described": said, "published, signed": published}
                    | {"tested here as": row["claim"], "bears": bears, "ours": ours, "unit": row["unit"]}
                    | {"n": row["items"], "p after Holm": row["p_holm"], "verdict": row["verdict"]}
                )
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame(schema={"described claim": pl.String})
