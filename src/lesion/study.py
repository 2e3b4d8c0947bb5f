"""A study: a question, the sentences that answer it, and what their rows say.

    readings()      options → sentences with their measures
    answer(store)   rows → tables and the pieces of a report

Nothing in an answer comes from anywhere but the rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from lesion.spec import Spec, find
from lesion.trial import Reading, Row

if TYPE_CHECKING:
    import polars as pl

    from lesion.report.figures import Drawing
    from lesion.store import Store


@dataclass
class Answer:
    """The pieces of a report. `summary` is what a person reads first; see `report/page.py` for the frames' columns."""

    question: str
    sentences: list[str]
    summary: pl.DataFrame
    curves: pl.DataFrame
    generations: pl.DataFrame
    notes: list[str] = field(default_factory=list)
    missing: int = 0  # readings that are not there yet, or failed
    claims: pl.DataFrame | None = None
    heat: pl.DataFrame | None = None
    extra: dict[str, pl.DataFrame] = field(default_factory=dict)  # title → a further table
    files: dict[str, bytes] = field(default_factory=dict)  # path below the study's folder → content
    drawings: list[Drawing] = field(default_factory=list)  # further figures
    words: tuple[str, str] = ("damage to", "dose")  # what the columns `site` and `dose` of the frames are called


class Study(Spec):
    """Base of every study. Its fields are the options of `lesion run NAME`."""

    family: ClassVar[str] = "study"

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a preset or a tier that was asked for says of the other options."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _where_nothing_else_is_said(cls, given: Any) -> Any:
        return {**cls.defaults(given), **given} if isinstance(given, dict) else given

    @abstractmethod
    def readings(self) -> list[Reading]:
        """Every reading that the question needs, pinned."""

    def check(self, store: Store) -> None:
        """Refuses a lab in which these options make no sense, before any work (ValueError)."""
        return

    def rows(self, store: Store) -> dict[str, dict[str, Row]]:
        """Reading → item → row, of all readings that are complete."""
        found: dict[str, dict[str, Row]] = {}
        for row in store.rows(r.key for r in self.readings()):
            found.setdefault(row["reading"], {})[row["item"]] = row
        return found

    def missing(self, store: Store) -> int:
        """Readings that are not there yet, or failed."""
        return sum(r.key not in store.index.seals for r in self.readings())

    def said_of_missing(self, store: Store) -> list[str]:
        """A note, where there is anything to say."""
        readings = self.readings()
        absent = [r for r in readings if r.key not in store.index.seals]
        failed = [r for r in absent if store.failures([r])]
        said = []
        if failed:
            errors = Counter(store.failures([r])[0]["error"] for r in failed)
            why = "; ".join(error for error, _ in errors.most_common(3))
            said.append(f"{len(failed)} of {len(readings)} readings failed (the same command tries them again): {why}")
        if more := len(absent) - len(failed):
            said.append(f"{more} of {len(readings)} readings are missing: run the same command again.")
        return said

    @abstractmethod
    def answer(self, store: Store) -> Answer:
        """What the rows in the lab say, whether all of them are there yet or not."""


def study(name: str) -> type[Study]:
    """A study's class by its name. Raises ValueError that lists what exists."""
    found = find(f"study/{name}")
    assert issubclass(found, Study)
    return found


def refuse_encoders(model: Any, name: str) -> None:
    """ValueError for an encoder-decoder, where a study is of causal models."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"this study is of causal models, and {name} is encoder-decoder")


def folder(store: Store, asked: Study) -> Path:
    """Where the answer to exactly these options is written."""
    return store.root / "studies" / f"{asked.name}-{asked.key[:8]}"


def write_report(store: Store, asked: Study) -> tuple[Answer, Path]:
    """Answers a study from the lab and writes study.json, report.html, tables and figures."""
    import json

    from lesion.report.page import build, write

    answer = asked.answer(store)
    readings = asked.readings()
    keys = {reading.key for reading in readings}
    states = {reading.trial.key: reading.trial for reading in readings}
    writers = {store.index.seals[key].writer for key in keys & store.index.seals.keys()}
    ledgers: list[dict[str, Any]] = [
        {"trial": str(trial), "ledger": store.index.states[state]["ledger"]}
        for state, trial in states.items()
        if state in store.index.states
    ]
    failures = store.failures(readings)
    where = folder(store, asked)
    where.mkdir(parents=True, exist_ok=True)
    (where / "study.json").write_text(json.dumps(asked.to_json(), indent=1), encoding="utf-8")
    for name, content in answer.files.items():
        if not (where / name).resolve().is_relative_to(where.resolve()):
            raise ValueError(f"an answer's file {name!r} would lie outside its study's folder")
        write(where / name, content)
    page = build(
        where,
        title=asked.name,
        question=answer.question,
        sentences=answer.sentences,
        summary=answer.summary,
        curves=answer.curves,
        generations=answer.generations,
        failures=failures,
        ledgers=ledgers,
        environments=unique([store.index.environments[w] for w in sorted(writers) if w in store.index.environments]),
        notes=answer.notes,
        claims=answer.claims,
        heat=answer.heat,
        extra=answer.extra,
        further=answer.drawings,
        words=answer.words,
    )
    return answer, page


def unique(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    for value in values:
        if value not in seen:
            seen.append(value)
    return seen
