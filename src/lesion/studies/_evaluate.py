"""What `evaluate` says of its readings: a row a model, each against the first, and the samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from lesion.claiming import decided, tested
from lesion.report.page import CURVES, GENERATIONS
from lesion.report.tables import to_csv
from lesion.stats import ratio

Cells = Mapping[str, Mapping[str, Mapping[str, dict[str, Any]]]]  # model → measure → item → row


def summary(cells: Cells) -> pl.DataFrame:
    rows = []
    for name, cell in cells.items():
        row: dict[str, Any] = {"model": name}
        scored = [r for r in cell.get("perplexity", {}).values() if r["nll"] is not None]
        if scored:
            nll, tokens, size = (np.array([[r[field] for r in scored]], float) for field in ("nll", "tokens", "bytes"))
            token, byte = ratio(nll, tokens, purpose="token"), ratio(nll / math.log(2), size, purpose="byte")
            row |= {"loss": token.value, "loss_low": token.low, "loss_high": token.high}
            row |= {"perplexity": math.exp(token.value) if token.value < 700 else None}
            row |= {"bits a byte": byte.value, "bits a byte_low": byte.low, "bits a byte_high": byte.high}
            row["documents"] = len(scored)
        texts = list(cell.get("generation", {}).values())
        if graded := [r["correct"] for r in texts if r["correct"] is not None]:
            share = ratio(np.array([graded], float), np.ones((1, len(graded))), purpose="accuracy")
            row |= {"accuracy": share.value, "accuracy_low": share.low, "accuracy_high": share.high}
        rows.append({**row, "samples": len(texts)})
    return pl.DataFrame(rows, infer_schema_length=None)


def claims(cells: Cells) -> pl.DataFrame:
    """Whether each model predicts otherwise than the first, in bits a byte, which tokenizers share."""
    names, found = list(cells), []

    def bits(name: str) -> dict[str, float]:
        rows = cells[name].get("perplexity", {})
        return {i: r["nll"] / math.log(2) / r["bytes"] for i, r in rows.items() if r["nll"] is not None}

    first = bits(names[0])
    for name in names[1:]:
        here = bits(name)
        items = [item for item in first if item in here]
        after, before = (np.array([[x[item] for item in items]]) for x in (here, first))
        text = f"{name} predicts worse than {names[0]}"
        found.append(tested(text, after, before, "bits a byte", name, direction=1))
    return decided(found)


def no_curves() -> pl.DataFrame:
    return pl.DataFrame(schema=CURVES)


def generations(cells: Cells, seed: int) -> pl.DataFrame:
    kept = ("prompt", "group", "asked", "text", "correct", "stop", "tokens", "logprob")
    found = [
        {"site": name, "dose": 1.0, "seed": seed, **{field: row[field] for field in kept}}
        for name, cell in cells.items()
        for row in cell.get("generation", {}).values()
    ]
    return pl.DataFrame(found, schema=GENERATIONS)


def files(cells: Cells) -> dict[str, bytes]:
    """losses.csv and samples.json, as scripts that go over checkpoints write them."""
    samples = [
        {"model": name, **{field: row[field] for field in ("prompt", "asked", "text", "stop", "tokens")}}
        for name, cell in cells.items()
        for row in cell.get("generation", {}).values()
    ]
    found = {"losses.csv": to_csv(summary(cells))}
    text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
    return {**found, **({"samples.json": text.encode()} if samples else {})}
