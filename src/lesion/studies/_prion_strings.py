"""What the studies of poison say of the strings that were sought, and of the steep directions that those are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from lesion.studies._prion import EIGEN, Runs
from lesion.studies._prion_say import compared
from lesion.trial import Reading, Row


def flatter(runs: Runs, subject: str) -> list[dict[str, Any]]:
    """That the catalysts' gradients are flatter than those of random tokens and of text of the same length."""
    found = []
    for kind in ("random", "text"):
        text = f"Catalysts of {subject} have flatter gradients than {'random tokens' if kind == 'random' else kind}"
        pairs = []
        for (s, arm, _), reading in runs.strings.items():
            if (s, arm) == (subject, EIGEN):
                rows = _measured(runs, reading)
                pairs.append((rows["catalyst"]["flat_share"], _control(rows, kind)) if rows else (np.nan, np.nan))
        after, before = np.array(pairs, float).reshape(-1, 2).T[:, None]
        unit = "share of the squared gradient"
        found.append(compared(runs, subject, [], text, after, before, unit, 1))
    return found


def alignment(runs: Runs) -> pl.DataFrame:
    """A row for each string that was sought, beside its controls. Of a gradient the steep share is what is not flat."""
    rows = []
    for (subject, arm, seed), reading in runs.strings.items():
        if not (said := _measured(runs, reading)):
            continue
        best = said["catalyst"]
        row: dict[str, Any] = {"subject": subject, "arm": arm, "seed": seed, "objective": best["objective"]}
        row |= {"steep share": 1 - best["flat_share"], "of its start": 1 - best["start_share"]}
        row |= {"of random tokens": 1 - _control(said, "random"), "of text": 1 - _control(said, "text")}
        row |= {
            "loss": best["loss"],
            "changed tokens": best["changed"],
            "directions": best["directions"],
            "text": best["text"][:60],
        }
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _measured(runs: Runs, reading: Reading) -> Mapping[str, Row]:
    """The rows of a search; none where one of them is missing or not finite."""
    rows = runs.rows.get(reading.key, {})
    return rows if all(row["outcome"] == "measured" for row in rows.values()) else {}


def _control(rows: Mapping[str, Row], kind: str) -> float:
    """The mean flat share of the strings of a kind that stand beside the one that was sought."""
    shares = [row["flat_share"] for item, row in rows.items() if item.startswith(f"{kind}/")]
    return float(sum(shares) / len(shares))


def steepest(runs: Runs) -> pl.DataFrame:
    """Of each subject the steep eigenpairs with their residuals, and random directions for comparison."""
    rows = []
    for subject, reading in runs.curved.items():
        for item, row in runs.rows.get(reading.key, {}).items():
            rows.append(
                {"subject": subject, "direction": item, "Rayleigh quotient": row["value"], "weights": row["size"]}
                | {"residual / |λ₁|": row["residual"], "‖H v‖ / |λ₁|": row["length"]}
            )
    return pl.DataFrame(rows, infer_schema_length=None)
