"""The store: one directory in which nothing that was read is ever lost, rewritten or mixed up.

    lab/states/<key>/      trial.json  model.safetensors  ledger.json     kept steps only, see `states.py`
    lab/log/<writer>.jsonl what was read, see `log.py`                    (and *.parquet, compacted; *.log, for people)
    lab/leases/            who is at work on what, see `leases.py`
    lab/studies/<name>/    report.html, tables, figures                   derived, never read back

A reading is asked for by its key alone. Its `take` is 0 until somebody forces it to be taken again; the highest sealed
take is the one that counts.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import dropwhile, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lesion import log
from lesion.leases import Leases
from lesion.log import ROW, STATE, Record
from lesion.spec import KEY_LENGTH
from lesion.states import States

if TYPE_CHECKING:
    import polars as pl

    from lesion.trial import Reading, Row

_KEY, _STATE_KEY = (slice(len(head), len(head) + KEY_LENGTH) for head in (ROW, STATE))
_TAKE = _KEY.stop + len(b'","take":')
T = TypeVar("T")
AHEAD = 20_000  # rows at most that are brought along with those that are recalled
TIMINGS = ("duration", "at", "writer")  # what two runs of the same command may differ in


def _head(reading: str, take: int) -> bytes:
    """How a row begins. No line is parsed that need not be."""
    return b'%b%b","take":%d,' % (ROW, reading.encode(), take)


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


class Lines(Mapping[str, T]):
    """What lines of the log say, by key, each unfolded when it is asked for: a lab has more than anybody looks at."""

    def __init__(self) -> None:
        self._lines: dict[str, Any] = {}  # text and place, and what else tells lines of one key apart

    def __contains__(self, key: object) -> bool:
        return key in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


class Records(Lines[Record]):
    """Records by key."""

    def add(self, key: str, text: bytes, path: Path, number: int = 0) -> None:
        self._lines[key] = text, path, number

    def __getitem__(self, key: str) -> Record:
        return log.parse(*self._lines[key])


class Seals(Lines[Seal]):
    """Seals by reading, those of the highest take."""

    def add(self, key: str, take: int, text: bytes, path: Path, number: int = 0) -> None:
        if take > self.take(key):
            self._lines[key] = take, text, path, number

    def take(self, key: str) -> int:
        """The take that counts; -1 where there is none."""
        return int(self._lines[key][0]) if key in self._lines else -1

    def __getitem__(self, key: str) -> Seal:
        record = log.parse(*self._lines[key][1:])
        return Seal(*(record[name] for name in Seal.__dataclass_fields__))


@dataclass
class Index:
    """What the log says, without the rows of finished readings."""

    seals: Seals = field(default_factory=Seals)
    begun: dict[str, dict[int, dict[str, Row]]] = field(default_factory=dict)  # reading → take → item → row
    states: Records = field(default_factory=Records)
    failures: dict[str, Record] = field(default_factory=dict)  # by state or reading key; gone once it succeeds
    environments: dict[str, Record] = field(default_factory=dict)
    void: dict[str, int] = field(default_factory=dict)  # reading → last take whose rows are of a model that was changed

    def drop(self, reading: str, take: int) -> None:
        """Forgets that a take, and those before it, were begun."""
        if begun := self.begun.pop(reading, None):
            later = {number: rows for number, rows in begun.items() if number > take}
            if later:
                self.begun[reading] = later


class Store(States):
    """A lab's directory. Opening one reads its log; nothing is created before something is written."""

    def __init__(self, root: Path | str, environment: Record | None = None):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"a lab is a directory, but {self.root} is a file")
        self.log = self.root / "log"
        self.index = Index()
        self._recalled: dict[str, tuple[int, list[Row]]] = {}  # take and rows of readings that may be recalled next
        self._ahead = 16
        self._reader = log.Reader(self.log, settled=False)
        self._segment = log.Segment(self.log, environment or {})
        self._reader.skip(self._segment.path.name)
        self.refresh()
        self.index.environments[self.writer] = environment or {}
        self._leases = Leases(self.root / "leases", self.writer)
        self._released: dict[str, float] = {}  # leases to let go once what they guarded is on disk, and since when

    # ------------------------------------------------------------------ what is there

    def refresh(self) -> None:
        """Reads what others have written since."""
        index = self.index
        pending: dict[bytes, list[tuple[bytes, Path, int]]] = defaultdict(list)
        told: set[str] = set()  # keys of which something new was said
        for path, number, text in self._reader.new():
            if text.startswith(ROW):
                pending[text[_KEY]].append((text, path, number))
                continue
            if text.startswith(STATE):
                index.states.add(state := text[_STATE_KEY].decode(), text, path, number)
                told.add(state)
                continue
            record = log.parse(text, path, number)
            match record["is"]:
                case "seal":
                    reading, take = record["reading"], record["take"]
                    index.seals.add(reading, take, text, path, number)
                    index.drop(reading, take)
                    told.add(reading)
                    if (rows := pending.pop(key := reading.encode(), None)) is not None:
                        head = _head(reading, take)
                        if later := [place for place in rows if not place[0].startswith(head)]:
                            pending[key] = later
                case "failure":
                    index.failures[record["of"]] = record
                    told.add(record["of"])
                case "void":
                    index.void[record["of"]] = max(record["take"], index.void.get(record["of"], -1))
                case "open":
                    index.environments[record["writer"]] = record["environment"]
        for key in [key for key in index.failures if key in told and (key in index.seals or key in index.states)]:
            del index.failures[key]  # mended since, whatever the clocks of their writers say
        for texts in pending.values():
            for place in texts:
                row = log.parse(*place)
                if row["take"] > max(index.seals.take(row["reading"]), index.void.get(row["reading"], -1)):
                    index.begun.setdefault(row["reading"], {}).setdefault(row["take"], {}).setdefault(row["item"], row)

    def next_take(self, reading: str, force: bool = False) -> int | None:
        """The take to work on, or None where the reading is complete."""
        sealed, void = self.index.seals.take(reading), self.index.void.get(reading, -1)
        begun = max(self.index.begun.get(reading, {}), default=-1)
        if force:
            return max(begun, void, sealed) + 1
        return None if sealed >= 0 else max(begun, void + 1)

    def _lines(self, readings: Iterable[str] | None) -> Iterator[tuple[str, bytes, Path, int]]:
        """Key, text and place of every row of complete readings, in the take that counts."""
        keys = set(self.index.seals) if readings is None else set(readings) & set(self.index.seals)
        heads = {key.encode(): (key, _head(key, self.index.seals.take(key))) for key in keys}
        nothing = "", b"\n"
        for path, number, text in log.read(self.log):
            key, head = heads.get(text[_KEY], nothing)
            if text.startswith(head):
                yield key, text, path, number

    def failures(self, readings: Iterable[Reading]) -> list[Record]:
        """What failed of these readings, or on the way to their states, in their order, each once."""
        keys: dict[str, None] = {}
        for reading in readings:
            keys |= dict.fromkeys((*reading.trial.passed(), reading.key))
        return [self.index.failures[key] for key in keys if key in self.index.failures]

    def rows(self, readings: Iterable[str] | None = None) -> Iterator[Row]:
        """Rows of complete readings, once each, as they were written."""
        if readings is not None and len(wanted := list(readings)) == 1:
            yield from self._recall(wanted[0])
        else:
            yield from self._rows(wanted if readings is not None else None)

    def _recall(self, reading: str) -> list[Row]:
        """Rows of one reading. The log is read from its beginning, so those that were taken after it are brought along, more
        each time: whoever quotes one reading after another comes to them next."""
        seals = self.index.seals
        if reading not in seals:
            return []
        if self._recalled.get(reading, (-1,))[0] != seals.take(reading):
            wanted: dict[str, list[Row]] = {reading: []}
            left = self._ahead = min(AHEAD, 4 * self._ahead)
            for key in islice(dropwhile(lambda key: key != reading, seals), 1, None):
                if (left := left - seals[key].n) < 0:
                    break
                wanted[key] = []
            for row in self._rows(wanted):
                wanted[row["reading"]].append(row)
            self._recalled = {key: (seals.take(key), rows) for key, rows in wanted.items()}
        return [dict(row) for row in self._recalled[reading][1]]

    def _rows(self, readings: Iterable[str] | None) -> Iterator[Row]:
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

    def claim(self, keys: Sequence[str]) -> list[str]:
        """Those of these readings or states that this process may make now. All that others have written is known by then,
        so that the caller looks whether they still have to be made."""
        mine = [key for key in keys if self._released.pop(key, None) is not None or self._leases.holds(key)]
        new = [key for key in keys if key not in mine and self._leases.take(key)]
        if new:
            self.refresh()
        return [key for key in keys if key in mine or key in new]

    def is_free(self, key: str) -> bool:
        """Whether nobody else who is alive is at work on a reading or state."""
        return self._leases.is_free(key)

    def release(self, key: str) -> None:
        """Lets others work on it, once what was written is synced: whoever takes it then must see that."""
        self._released[key] = time.monotonic()
        while self._released:
            key, when = next(iter(self._released.items()))
            if when > self._segment.synced:
                break
            del self._released[key]
            self._leases.let_go(key)

    def release_all(self) -> None:
        """Syncs what was written and lets go of everything: this process is at work on nothing."""
        self._segment.sync()
        self._released.clear()
        self._leases.let_go_of_all()

    def add_rows(self, reading: str, take: int, rows: Iterable[Row]) -> None:
        """Adds a chunk of rows to a reading that is under way. Raises Lost where another process has taken it over."""
        self._leases.check(reading)
        records = [{"is": "row", "reading": reading, "take": take, **row} for row in rows]
        self._segment.append(records)
        begun = self.index.begun.setdefault(reading, {}).setdefault(take, {})
        begun.update((record["item"], record) for record in records)

    def void(self, reading: str) -> None:
        """What was read so far is of a model that was not what it should be: it is never looked at again."""
        if takes := self.index.begun.pop(reading, None):
            self._segment.append([{"is": "void", "of": reading, "take": max(takes)}])
            self.index.void[reading] = max(takes)

    def seal(self, seal: Seal) -> None:
        self._leases.check(seal.reading)
        record = {"is": "seal", **vars(seal)}
        self._segment.append([record])
        self.index.seals.add(seal.reading, seal.take, log.line(record), self._segment.path)
        self.index.drop(seal.reading, seal.take)
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
        said = f"{type(error).__name__}: {error}"
        said, trace = (  # the name of a file may hold what UTF-8 cannot
            text.encode("utf-8", "backslashreplace").decode() for text in (said, trace)
        )
        record = {"is": "failure", "of": of, "error": said, "trace": trace}
        self._segment.append([record])
        self.index.failures[of] = record

    def close(self) -> None:
        try:
            self._segment.close()
        finally:
            self._leases.close()
        if self.log.is_dir():
            log.compact(self.log, self._reader.held)
            self.sweep()
