"""What `modern-sinks` says of its sweep: the table, the claims of streaming with sinks, and the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from lesion.claiming import decided, tested, the_same, untested
from lesion.outcomes import of_extrapolation, of_prose
from lesion.report.page import GENERATIONS
from lesion.sweep import Sweep
from lesion.trial import Reading

SHOWN = 70  # characters of the context that are shown before a sample
OUTCOMES = [*of_extrapolation(), *(o for o in of_prose() if o.name in ("unknown words", "looping", "length"))]


def summary(sweep: Sweep, training: pl.DataFrame) -> pl.DataFrame:
    """Perplexity by attention and context, with intervals."""
    (o,) = of_extrapolation()
    rows = []
    for site in sweep.sites:
        for k in sweep.doses:
            found = sweep.point(o, site, k)
            cells = [sweep.rows.get((site, k, seed), {}).get("extrapolation", {}) for seed in sweep.seeds]
            lost = sum(row["nll"] is None for cell in cells for row in cell.values())
            row = {"attention": site, "context": k, "perplexity": found["value"]}
            row |= {"perplexity_low": found["low"], "perplexity_high": found["high"]}
            rows.append({**row, "stretches": found["items"], "trainings": found["seeds"], "not finite": lost})
    return pl.DataFrame(rows, infer_schema_length=None)


def claims(sweep: Sweep, last: int, margin: float) -> pl.DataFrame:
    """What streaming with sinks is said to do, at the longest context, as differences of nats a token."""
    (o,) = of_extrapolation()
    unit, found = "nats a token", []

    def at(site: str, k: float = float(last)) -> Any:
        return sweep.array(o, site, k)[0]

    def worse(text: str, one: str, other: str) -> None:
        if {one, other} <= set(sweep.sites):
            found.append(tested(text, at(one), at(other), unit, o.name, direction=1, smallest=margin))

    far = f"at {last} × the training length"
    first, fresh = "window + first tokens", "read afresh"
    worse(f"Full attention predicts worse {far} than the same model reading afresh", "full attention", fresh)
    worse(f"A rolling window alone predicts worse {far} than reading afresh", "window", fresh)
    worse(f"A rolling window alone predicts worse {far} than one with the first tokens kept", "window", first)
    worse(f"Full attention predicts worse {far} than a window with the first tokens kept", "full attention", first)
    if {first, fresh} <= set(sweep.sites):
        text = f"With the first tokens kept nothing is lost {far}: within {margin:g} nats of reading afresh"
        found.append(the_same(text, at(first), at(fresh), unit, margin))
    if {"window", first} <= set(sweep.sites):
        text = f"The first tokens do not matter {far}: a window alone is within {margin:g} nats of one that keeps them"
        found.append(the_same(text, at("window"), at(first), unit, margin))
    worse(f"A window alone predicts worse {far} than a model trained with sink tokens", "window", "learned sink tokens")
    worse(f"Kept first tokens predict worse {far} than learned sink tokens", first, "learned sink tokens")
    logits = "learned sink logits + window"
    worse(f"A window alone predicts worse {far} than one of a model trained with sink logits", "window", logits)
    if not found:
        found.append(untested("Sinks matter", unit, "no two ways of attending were compared"))
    return decided(found)


def generations(cells: Mapping[tuple[str, int], Mapping[str, Reading]], rows: Mapping[str, Any]) -> pl.DataFrame:
    """Samples, each behind the end of its context."""
    found = []
    for (site, seed), readings in cells.items():
        if "continuation" in readings:
            for row in rows.get(readings["continuation"].key, {}).values():
                kept = {name: row[name] for name in ("prompt", "correct", "stop", "tokens", "logprob")}
                text = f"[…{row['asked'][-SHOWN:]}] {row['text']}"
                said = {"site": site, "dose": float(row["times"]), "seed": seed, "group": "continuations"}
                found.append({**said, **kept, "asked": row["prompt"], "text": text})
    return pl.DataFrame(found, schema=GENERATIONS)
