"""The lab: the front door from Python.

    lab = Lab("lab")
    table = lab.read([intact, damaged], [Perplexity(corpus="austen")])

Asking again costs nothing; asking for more costs only what is new.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lesion.store import Store
from lesion.trial import Measure, Reading, Subject, Trial

if TYPE_CHECKING:
    import polars as pl

    from lesion.walk import Tell


def default_lab() -> Path:
    return Path(os.environ.get("LESION_LAB", "lab"))


class Lab:
    """A directory of readings and the bench to take more on. `device`: "cpu", "cuda", "cuda:1", "mps"."""

    def __init__(self, path: str | Path | None = None, device: str = "cpu", tell: Tell | None = None):
        self.path = Path(path) if path is not None else default_lab()
        self.device, self.tell = device, tell

    def open(self) -> Store:
        from lesion.environment import environment

        return Store(self.path, environment(self.device))

    def take(self, readings: Sequence[Reading], force: bool = False, store: Store | None = None) -> Store:
        """Takes what is missing and returns the store, closed for writing. Failures are in its index, not raised."""
        from lesion.walk import Walk

        store = store or self.open()
        try:
            Walk(store, self.device, self.tell).take(readings, force)
        finally:
            store.close()
        return store

    def read(self, trials: Iterable[Trial | Subject], measures: Iterable[Measure], force: bool = False) -> pl.DataFrame:
        """One row for each trial × measure × item, taken now where missing.

        Columns: `trial` (the sentence), `state`, `reading`, `measure`, `item`, and the fields of the rows.
        Raises RuntimeError where a reading failed: its trace is in the lab.
        """
        import polars as pl

        readings = product(trials, measures)
        store = self.take(readings, force)
        if failed := [r for r in readings if r.key not in store.index.seals]:
            errors = dict.fromkeys(failure["error"] for failure in store.failures(failed))
            raise RuntimeError(f"{len(failed)} of {len(readings)} readings failed: " + "; ".join(errors))
        names = pl.DataFrame(
            [{"reading": r.key, "trial": str(r.trial), "state": r.trial.key} for r in readings],
            schema={"reading": pl.String, "trial": pl.String, "state": pl.String},
        )
        table = names.unique("reading", maintain_order=True).join(
            store.table(r.key for r in readings), on="reading", how="inner", maintain_order="left"
        )
        return table.select(
            "trial", "state", "reading", "measure", "item", pl.exclude("trial", "state", "reading", "measure", "item")
        )


def product(trials: Iterable[Trial | Subject], measures: Iterable[Measure]) -> list[Reading]:
    """Every measure of every trial, all pinned, each once."""
    sentences = [t if isinstance(t, Trial) else Trial(subject=t) for t in trials]
    subjects = {json.dumps(t.subject.to_json(), sort_keys=True): t.subject for t in sentences}
    once = {text: subject.pin() for text, subject in subjects.items()}  # a folder is hashed, a hub asked, once
    pinned = [
        Trial(subject=once[json.dumps(t.subject.to_json(), sort_keys=True)], steps=tuple(s.pin() for s in t.steps))
        for t in sentences
    ]
    asked = [m.pin() for m in measures]
    found = {(r := Reading(trial=trial, measure=measure)).key: r for trial in pinned for measure in asked}
    return list(found.values())
