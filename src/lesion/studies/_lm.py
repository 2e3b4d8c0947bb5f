"""What `modern-lm` says of its readings: bits a byte beside those of counting, the loss as it fell, samples, attention."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from lesion.claiming import decided, tested, untested
from lesion.report.figures import Drawing
from lesion.report.page import GENERATIONS
from lesion.report.tables import to_csv
from lesion.stats import ratio
from lesion.studies._told import fell

Cells = Mapping[int, Mapping[str, Mapping[str, dict[str, Any]]]]  # seed → reading → item → row
WAYS = ("model", "trigram", "5-gram")
SHOWN = 160  # characters of the context that are shown before a sample


def bits(cells: Cells, way: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits, bytes and tokens [seeds, documents], the documents of all ways by name; NaN where one was not read, and NaN bits and
    tokens where it has no finite loss."""
    items = sorted({item for cell in cells.values() for name in WAYS for item in cell.get(name, {})})
    found = np.full((3, len(cells), len(items)), np.nan)
    for i, cell in enumerate(cells.values()):
        for j, item in enumerate(items):
            row = cell.get(way, {}).get(item)
            if row is not None:
                found[1, i, j] = row["bytes"]
            if row is not None and row["nll"] is not None:
                found[::2, i, j] = row["nll"] / math.log(2), row["tokens"]
    return found[0], found[1], found[2]


def summary(cells: Cells) -> pl.DataFrame:
    """Perplexity and bits a byte with intervals, and how far each way is from the model."""
    rows = []
    for way in WAYS:
        total, size, tokens = bits(cells, way)
        if not np.isfinite(total).any():
            continue
        known = np.where(np.isfinite(total), 1.0, 0.0)
        byte = ratio(np.nan_to_num(total), np.nan_to_num(size) * known, purpose="bits a byte")
        token = ratio(np.nan_to_num(total), np.nan_to_num(tokens) * known, purpose="bits a token")
        row = {"way": way, "bits a byte": byte.value, "bits a byte_low": byte.low, "bits a byte_high": byte.high}
        power = [None if x is None or x > 1000 else 2.0**x for x in (token.value, token.low, token.high)]
        row |= dict(zip(("perplexity", "perplexity_low", "perplexity_high"), power, strict=True))
        rows.append({**row, "documents": byte.items, "trainings": byte.seeds, "tokens": int(np.nansum(tokens[0]))})
    return pl.DataFrame(rows, infer_schema_length=None)


def claims(cells: Cells) -> pl.DataFrame:
    """The model against both ways of counting, document by document: counting minus model, in bits a byte."""
    found = []
    for way, text in (
        ("trigram", "The model predicts better than an interpolated trigram"),
        ("5-gram", "The model predicts better than an interpolated 5-gram"),
    ):
        (mine, size, _), (theirs, other, _) = (bits(cells, name) for name in ("model", way))
        if not (mine.size and mine.shape == theirs.shape and np.array_equal(size, other, equal_nan=True)):
            found.append(untested(text, "bits a byte", "not both were read"))
            continue
        found.append(tested(text, theirs / size, mine / size, "bits a byte", way, direction=1))
    return decided(found)


def curves(ledgers: Mapping[int, list[dict[str, Any]]]) -> pl.DataFrame:
    """The loss as it fell, from the ledgers."""
    entries = ((seed, entry.get("facts", {})) for seed, ledger in ledgers.items() for entry in ledger)
    return fell(("training loss", f"seed {seed}", facts) for seed, facts in entries)


def generations(cells: Cells) -> pl.DataFrame:
    found = []
    for seed, cell in cells.items():
        for row in cell.get("samples", {}).values():
            kept = {name: row[name] for name in ("prompt", "text", "correct", "stop", "tokens", "logprob")}
            said = {"site": f"seed {seed}", "dose": 1.0, "seed": seed, "group": "continuations"}
            asked = row["asked"] if len(row["asked"]) <= SHOWN else "…" + row["asked"][-SHOWN:]
            found.append({**said, **kept, "asked": asked})
    return pl.DataFrame(found, schema=GENERATIONS)


def drawings(cells: Cells) -> list[Drawing]:
    """The attention of the first training."""
    from lesion.report.maps import draw

    for seed, cell in cells.items():
        if rows := cell.get("attention"):
            frame = pl.DataFrame(list(rows.values()), infer_schema_length=None)
            return [draw(frame, f"Attention, seed {seed}")]
    return []


def files(cells: Cells) -> dict[str, bytes]:
    """The losses of all evaluated models as CSV, and the samples as JSON: what evaluation scripts are used to write."""
    rows = summary(cells)
    samples = [
        {"seed": seed, **{name: row[name] for name in ("item", "asked", "text", "written", "stop", "tokens")}}
        for seed, cell in cells.items()
        for row in cell.get("samples", {}).values()
    ]
    found = {"evaluation.csv": to_csv(rows)} if len(rows) else {}
    text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
    return {**found, **({"samples.json": text.encode()} if samples else {})}
