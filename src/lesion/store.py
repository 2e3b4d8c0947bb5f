"""The store: one directory in which nothing that was read is ever lost, rewritten or mixed up.

    lab/states/<key>/      trial.json  model.safetensors  ledger.json     kept steps only
    lab/log/<writer>.jsonl what was read, see `log.py`                    (and *.parquet, compacted; *.log, for people)
    lab/studies/<name>/    report.html, tables, figures                   derived, never read back

A reading is asked for by its key alone. Its `take` is 0 until somebody forces it to be taken again; the highest sealed
take is the one that counts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from lesion import log
from lesion.log import Record
from lesion.spec import KEY_LENGTH

if TYPE_CHECKING:
    import polars as pl

    from lesion.trial import Row, Specimen

_ROW, _STATE = b'{"is":"row","reading":"', b'{"is":"state","state":"'
_KEY, _STATE_KEY = (slice(len(head), len(head) + KEY_LENGTH) for head in (_ROW, _STATE))
TIMINGS = ("duration", "at", "writer")  # what two runs of the same command may differ in


def _head(reading: str, take: int) -> bytes:
    """How a row begins. No line is parsed that need not be."""
    return b'%b%b","take":%d,' % (_ROW, reading.encode(), take)


@dataclass
class Seal:
    """The end of a reading: what was asked, how many rows there are, what they come to."""

    reading: str
    take: int
    state: str
    measure: dict[str, Any]
    n: int
    summary: dict[str, Any]
    duration: float
    writer: str


class Records(Mapping[str, Record]):
    """Records by key, each parsed when it is asked for: a lab has more ledgers than anybody looks at."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[bytes, Path, int]] = {}

    def add(self, key: str, text: bytes, path: Path, number: int = 0) -> None:
        self._lines[key] = text, path, number

    def __getitem__(self, key: str) -> Record:
        return log.parse(*self._lines[key])

    def __contains__(self, key: object) -> bool:
        return key in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


@dataclass
class Index:
    """What the log says, without the rows of finished readings."""

    seals: dict[str, Seal] = field(default_factory=dict)
    begun: dict[str, dict[int, dict[str, Row]]] = field(default_factory=dict)  # reading → take → item → row
    states: Records = field(default_factory=Records)
    failures: dict[str, Record] = field(default_factory=dict)  # by state or reading key; gone once it succeeds
    environments: dict[str, Record] = field(default_factory=dict)


class Store:
    """A lab's directory. Opening one reads its log; nothing is created before something is written."""

    def __init__(self, root: Path | str, environment: Record | None = None):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"a lab is a directory, but {self.root} is a file")
        self.log = self.root / "log"
        self.index = self._read_index()
        self._segment = log.Segment(self.log, environment or {})
        self.index.environments[self.writer] = environment or {}
        self.index.environments[self._segment.writer] = environment or {}

    # ------------------------------------------------------------------ what is there

    def _read_index(self) -> Index:
        index = Index()
        pending: dict[bytes, list[tuple[bytes, Path, int]]] = defaultdict(list)
        measures: dict[bytes, Any] = {}  # equal ones are one object
        for path, number, text in log.read(self.log):
            if text.startswith(_ROW):
                pending[text[_KEY]].append((text, path, number))
                continue
            if text.startswith(_STATE):
                index.states.add(text[_STATE_KEY].decode(), text, path, number)
                continue
            record = log.parse(text, path, number)
            match record["is"]:
                case "seal":
                    seal = Seal(*(record[name] for name in Seal.__dataclass_fields__))
                    seal.measure = measures.setdefault(orjson.dumps(seal.measure), seal.measure)
                    if seal.reading not in index.seals or seal.take > index.seals[seal.reading].take:
                        index.seals[seal.reading] = seal
                    rows, head = pending.pop(seal.reading.encode(), ()), _head(seal.reading, seal.take)
                    if later := [place for place in rows if not place[0].startswith(head)]:
                        pending[seal.reading.encode()] = later
                case "failure":
                    index.failures[record["of"]] = record
                case "open":
                    index.environments[record["writer"]] = record["environment"]
        for key in [key for key in index.failures if key in index.seals or key in index.states]:
            del index.failures[key]  # mended since, whatever the clocks of their writers say
        for texts in pending.values():
            for place in texts:
                row = log.parse(*place)
                sealed = index.seals.get(row["reading"])
                if sealed is None or row["take"] > sealed.take:
                    index.begun.setdefault(row["reading"], {}).setdefault(row["take"], {}).setdefault(row["item"], row)
        return index

    def next_take(self, reading: str, force: bool = False) -> int | None:
        """The take to work on, or None where the reading is complete."""
        sealed = self.index.seals.get(reading)
        begun = max(self.index.begun.get(reading, {}), default=-1)
        if force:
            return max(begun, sealed.take if sealed else -1) + 1
        return None if sealed else max(begun, 0)

    def _lines(self, readings: Iterable[str] | None) -> Iterator[tuple[str, bytes, Path, int]]:
        """Key, text and place of every row of complete readings, in the take that counts."""
        keys = set(self.index.seals) if readings is None else set(readings) & set(self.index.seals)
        heads = {key.encode(): (key, _head(key, self.index.seals[key].take)) for key in keys}
        nothing = "", b"\n"
        for path, number, text in log.read(self.log):
            key, head = heads.get(text[_KEY], nothing)
            if text.startswith(head):
                yield key, text, path, number

    def rows(self, readings: Iterable[str] | None = None) -> Iterator[Row]:
        """Rows of complete readings, once each, as they were written."""
        seen: dict[str, set[str]] = defaultdict(set)
        for key, text, path, number in self._lines(readings):
            row = log.parse(text, path, number)
            if row["item"] not in seen[key]:
                seen[key].add(row["item"])
                yield row

    def table(self, readings: Iterable[str] | None = None) -> pl.DataFrame:
        """The same rows as a frame: a column for each field and one for the measure's name; missing is null."""
        import polars as pl

        texts: dict[str, BytesIO] = defaultdict(BytesIO)
        for key, text, _, _ in self._lines(readings):
            texts[self.index.seals[key].measure["is"]].write(text)
        frames = []
        for word in sorted(texts):
            frame = pl.read_ndjson(texts.pop(word).getvalue(), infer_schema_length=None)
            frame = frame.unique(["reading", "item"], keep="first", maintain_order=True)
            frames.append(frame.drop("is", "take").with_columns(measure=pl.lit(word.split("/")[1])))
        if not frames:
            return pl.DataFrame(schema={"reading": pl.String, "item": pl.String, "measure": pl.String})
        return pl.concat(frames, how="diagonal_relaxed")

    def canonical(self) -> Iterator[bytes]:
        """Everything taken, one sorted line each, timings aside: equal for two labs that hold the same."""
        kept = [self._untimed(row) for row in self.rows()]
        kept += [self._untimed({"is": "seal", **vars(seal)}) for seal in self.index.seals.values()]
        kept += [self._untimed(state) for state in self.index.states.values()]
        kept += [{k: failure[k] for k in ("is", "of", "error")} for failure in self.index.failures.values()]
        yield from sorted(json.dumps(r, sort_keys=True, ensure_ascii=False).encode() + b"\n" for r in kept)

    def _untimed(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._untimed(v) for k, v in value.items() if k not in TIMINGS}
        return [self._untimed(v) for v in value] if isinstance(value, list) else value

    # ------------------------------------------------------------------ writing

    @property
    def writer(self) -> str:
        return self._segment.writer

    def add_rows(self, reading: str, take: int, rows: Iterable[Row]) -> None:
        """Adds a chunk of rows to a reading that is under way."""
        records = [{"is": "row", "reading": reading, "take": take, **row} for row in rows]
        self._segment.append(records)
        begun = self.index.begun.setdefault(reading, {}).setdefault(take, {})
        begun.update((record["item"], record) for record in records)

    def seal(self, seal: Seal) -> None:
        self._segment.append([{"is": "seal", **vars(seal)}])
        self.index.seals[seal.reading] = seal
        self.index.begun.pop(seal.reading, None)
        self.index.failures.pop(seal.reading, None)

    def add_state(self, state: str, trial: Record, ledger: list[Record]) -> None:
        """Records how a state came about, once."""
        if state not in self.index.states:
            record = {"is": "state", "state": state, "trial": trial, "ledger": ledger}
            self._segment.append([record])
            self.index.states.add(state, log.line(record), self._segment.path)
            self.index.failures.pop(state, None)

    def fail(self, of: str, error: BaseException, trace: str) -> None:
        """Records what could not be done. It is tried again by the next run."""
        record = {"is": "failure", "of": of, "error": f"{type(error).__name__}: {error}", "trace": trace}
        self._segment.append([record])
        self.index.failures[of] = record

    def close(self) -> None:
        self._segment.close()
        if self.log.is_dir():
            log.compact(self.log)

    # ------------------------------------------------------------------ kept states

    def state_folder(self, state: str) -> Path | None:
        folder = self.root / "states" / state
        return folder if folder.is_dir() else None

    def keep(self, state: str, specimen: Specimen) -> Path:
        """Keeps a state on disk: written aside, synced, renamed, so that it is there whole or not at all."""
        from safetensors.torch import save_file

        from lesion.digest import named_tensors

        target = self.root / "states" / state
        aside = target.with_name(f".{state}-{secrets.token_hex(8)}")
        aside.mkdir(parents=True)
        try:
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in named_tensors(specimen.model)},
                aside / "model.safetensors",
            )
            (aside / "trial.json").write_text(json.dumps(specimen.trial.to_json(), indent=1), encoding="utf-8")
            (aside / "ledger.json").write_text(json.dumps(specimen.ledger, indent=1), encoding="utf-8")
            if _tokenizer_of(specimen.ledger):
                assert specimen.tokenizer is not None
                specimen.tokenizer.save_pretrained(aside / "tokenizer")
            for path in aside.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            log.sync_folder(aside)
            if target.exists():
                shutil.rmtree(aside)  # another process kept the same state first
            else:
                aside.rename(target)
                log.sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return target

    def workplace(self, state: str) -> Path:
        """Where the step that makes a state may save what it has. Gone once the state is kept."""
        return self.root / "states" / f".{state}.work"

    def clear_workplace(self, state: str) -> None:
        """Keeps the metrics beside the state and drops the rest."""
        work, kept = self.workplace(state), self.root / "states" / state
        if (work / "metrics.jsonl").is_file() and not (kept / "metrics.jsonl").exists():
            shutil.move(work / "metrics.jsonl", kept / "metrics.jsonl")
        shutil.rmtree(work, ignore_errors=True)

    def restore(self, state: str, specimen: Specimen) -> None:
        """Fills a specimen of the right structure with a kept state. Raises ValueError where anything does not fit."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

        from lesion.digest import combined, digests, named_tensors
        from lesion.vocabularies import tokenizer_digest

        folder = self.root / "states" / state
        try:
            saved = load_file(folder / "model.safetensors")
            ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"the kept state {folder} cannot be read ({error}); nothing was changed") from None
        here = dict(named_tensors(specimen.model))
        if saved.keys() != here.keys():
            odd = sorted(saved.keys() ^ here.keys())
            raise ValueError(
                f"the kept state {folder} does not fit its model: {len(odd)} names differ, such as {odd[:3]}"
            )
        with torch.no_grad():
            for name, tensor in here.items():
                if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
                    raise ValueError(f"the kept state {folder} has {name} as {saved[name].shape}, not {tensor.shape}")
                tensor.copy_(saved[name])
        if (known := _tokenizer_of(ledger)) is not None:
            specimen.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            if tokenizer_digest(specimen.tokenizer) != known:
                raise ValueError(f"the tokenizer of the kept state {folder} is not the one its ledger describes")
        specimen.digests, specimen.ledger = digests(specimen.model), ledger
        if combined(specimen.digests) != ledger[-1]["after"]:
            raise ValueError(f"the kept state {folder} is not the one its ledger describes: its digest differs")


def _tokenizer_of(ledger: list[Record]) -> str | None:
    """Digest of the tokenizer that a step has made, or None where it is the subject's own."""
    return next((entry["tokenizer"] for entry in reversed(ledger) if "tokenizer" in entry), None)
