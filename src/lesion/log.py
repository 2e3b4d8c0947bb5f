"""The log of a lab: append-only segments, one for each writer process, that nobody else ever touches.

    {"is":"open", …}                           who writes, in which environment
    {"is":"state","state":…}                   a trial as it lay on the bench, with its ledger
    {"is":"row","reading":…,"take":0,"item":…} one observation
    {"is":"seal","reading":…}                  a reading is complete when its seal is in the log
    {"is":"failure", …}                        what could not be done, with its trace
    {"is":"void","of":…,"take":0}              rows of this reading were of a model that had been changed

A torn last line is what a killed process leaves: it is skipped and its items are taken again. Any other line that cannot
be read is an error that names it. Segments of dead writers are compacted into parquet, line for line, so a lab holds few
files however long it lives. There the rows of sealed readings stand in a column of their own (and what says that a segment is
closed): whoever only wants to know what is missing does not read them.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import orjson

from lesion.leases import ABANDONED_S, host_word, is_gone, whoami

Record = dict[str, Any]

ROW, SEAL, STATE = b'{"is":"row","reading":"', b'{"is":"seal","reading":"', b'{"is":"state","state":"'

COMPACT_AT = 16  # closed segments, or compacted files of about one size, that are worth merging
BATCH = 65536  # lines that are written at a time
SYNC_EVERY_S = 1.0  # a killed process loses nothing; a power cut loses at most this much


class Unwritable(OSError):
    """The lab cannot be written: no fault of what was being done, and the end of the run."""


class Segment:
    """The segment of this process. The file appears with the first record."""

    def __init__(self, folder: Path, environment: Record):
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.writer = f"{stamp}-{host_word()}-{os.getpid()}-{secrets.token_hex(8)}"
        self.path = folder / f"{self.writer}.jsonl"
        self._environment = environment
        self._file: int | None = None
        self._size = 0  # of whole lines
        self.synced = 0.0

    def append(self, records: Iterable[Record]) -> None:
        """Writes whole lines. NaN and infinities are refused (ValueError): a missing value is None. Raises Unwritable where
        the disk takes no more; what it took of these lines is cut off again, so that later lines are whole."""
        lines = b"".join(line(record) for record in records)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            if self._size == 0:
                opened = {"is": "open", "writer": self.writer, **whoami(), "at": time.time()}
                lines = line({**opened, "environment": self._environment}) + lines
            view = memoryview(lines)
            while view:
                view = view[os.write(self._file, view) :]
            self._size += len(lines)
            if time.monotonic() - self.synced > SYNC_EVERY_S:
                self.sync()
        except OSError as error:
            if self._file is not None:
                os.ftruncate(self._file, self._size)
            raise Unwritable(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            self.synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self.append([{"is": "close"}])
            self.sync()
            os.close(self._file)
            self._file = None


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def line(record: Record) -> bytes:
    return _encode(record).encode() + b"\n"


CLOSE = line({"is": "close"})


def parse(text: bytes, path: Path, number: int) -> Record:
    """A line as a record. Raises ValueError that names the place where it cannot be read."""
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} cannot be read ({error}); nothing was changed") from None
    if not isinstance(record, dict) or "is" not in record:
        raise ValueError(f"{path} line {number} is not a record of a lab; nothing was changed")
    return record


def segments(
    folder: Path, known: Mapping[Path, dict[str, int | None]] | None = None
) -> dict[Path, dict[str, int | None]]:
    """All files of a log, oldest first, each with the segments it holds and how many lines of them (None: to its end).
    `known`: what is known of compacted files already."""
    if not folder.is_dir():
        return {}
    known = known or {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith((".jsonl", ".parquet")))
    try:
        return {
            path: {name: None} if name.endswith(".jsonl") else known[path] if path in known else _held(path)
            for name, path in ((name, folder / name) for name in names)
        }
    except FileNotFoundError:  # it was merged just now
        return segments(folder, known)


def read(folder: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Every complete line of a log once, with its place, also while others write and compact it."""
    return Reader(folder).new()


class Reader:
    """Reads a log, and later what has been added to it since. It remembers how far each segment was read, in whichever
    file it lay. `settled`: whether the rows of sealed readings are wanted too, where they stand apart."""

    def __init__(self, folder: Path, settled: bool = True):
        self.folder, self._settled = folder, settled
        self._read: dict[str, int] = {}  # lines read of each segment
        self._bytes: dict[str, int] = {}  # the same of segments that are files of their own
        self.held: dict[Path, dict[str, int | None]] = {}  # of compacted files, which never change
        self._closed: set[str] = set()  # segments that never grow again

    def skip(self, name: str) -> None:
        """Leaves out a segment that was not read so far: the caller's own."""
        self._closed.add(name)

    def new(self) -> Iterator[tuple[Path, int, bytes]]:
        waiting = True
        while waiting:
            waiting = False
            found = segments(self.folder, self.held)
            self.held = {path: held for path, held in found.items() if None not in held.values()}
            for path, held in found.items():
                try:
                    yield from self._compacted(path, held) if path in self.held else self._whole(path)
                except FileNotFoundError:  # merged just now: its lines are elsewhere
                    if os.path.lexists(path):
                        raise
                    waiting = True

    def _whole(self, path: Path) -> Iterator[tuple[Path, int, bytes]]:
        name = path.name
        if name in self._closed:
            return
        text = b""
        with path.open("rb") as file:
            file.seek(self._bytes.get(name, 0))
            for text in file:
                if not text.endswith(b"\n"):  # torn, or not yet written to its end
                    break
                self._bytes[name] = self._bytes.get(name, 0) + len(text)
                self._read[name] = self._read.get(name, 0) + 1
                yield path, self._read[name], text
        if text == CLOSE:
            self._closed.add(name)

    def _compacted(self, path: Path, held: dict[str, int | None]) -> Iterator[tuple[Path, int, bytes]]:
        if all(name in self._closed for name in held):
            return
        if self._closed.isdisjoint(held) and self._read.keys().isdisjoint(held):  # all of it is new
            yield from _placed(path, self._settled)
            self._closed.update(held)
            return
        numbered, end = lines(path, self._settled), 0
        number, text = next(numbered, (math.inf, b""))
        for name, count in held.items():
            assert count is not None
            start, end = end, end + count
            begin = end if name in self._closed else start + self._read.get(name, 0)
            while number <= end:
                if number > begin:
                    self._read[name] = int(number) - start
                    yield path, int(number), text
                number, text = next(numbered, (math.inf, b""))
            self._closed.add(name)


def _parts(path: Path, held: dict[str, int | None], done: dict[str, None]) -> Iterator[Iterator[tuple[int, bytes]]]:
    """The numbered lines of each segment in a file that is not among those done, where it is entered after it was read."""
    numbered = lines(path)
    for name, count in held.items():
        part = islice(numbered, count)
        if name in done:
            deque(part, maxlen=0)
            continue
        yield part
        done[name] = None


def lines(path: Path, settled: bool = True) -> Iterator[tuple[int, bytes]]:
    """Numbered complete lines of a segment, from 1. Without `settled`, rows that stand apart are left out."""
    if path.suffix == ".parquet":
        for _, number, text in _placed(path, settled):
            yield number, text
        return
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.endswith(b"\n"):  # else torn: the writer was killed here
                yield number, text


def _placed(path: Path, settled: bool) -> Iterator[tuple[Path, int, bytes]]:
    """The lines of a compacted file with their places."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    number = 1
    try:
        with parquet.ParquetFile(path) as file:
            apart = "row" in file.schema_arrow.names
            columns = ["line", "row"] if apart and settled else ["line"]
            for batch in file.iter_batches(batch_size=8192, columns=columns, use_threads=False):
                found = batch.column(0)
                if apart and settled:
                    found = compute.coalesce(found, batch.column(1))
                places: Iterable[int] = range(number, number + len(found))
                if found.null_count:
                    places = (found.is_valid().to_numpy(zero_copy_only=False).nonzero()[0] + number).tolist()
                    found = found.drop_null()
                yield from zip(repeat(path), places, found.to_pylist())
                number += len(batch)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{path} cannot be read ({error}); nothing was changed") from None


def compact(folder: Path, known: Mapping[Path, dict[str, int | None]] | None = None) -> None:
    """Merges the segments of writers that are gone: written aside, synced, renamed, and only then the sources go.

    Files are merged with others that hold about as many segments, so that no line is rewritten more often than the
    logarithm of their number. Processes that compact at the same time may merge the same segments. That does no harm: a
    segment is read from one file only, and a file goes when greater ones hold all that it holds. `known`: what is known of
    compacted files already.
    """
    tiers: dict[int, dict[Path, dict[str, int | None]]] = defaultdict(dict)
    with suppress(FileNotFoundError):  # another process was faster
        for path, held in segments(folder, known).items():
            if path.suffix == ".parquet" or _is_closed(path):
                tiers[int(math.log(len(held), COMPACT_AT) + 1e-9)][path] = held
        for sources in tiers.values():
            if len(sources) >= COMPACT_AT:
                _merge(folder, sources)
    for path in superfluous(segments(folder, known)):
        path.unlink(missing_ok=True)
    for path in (*folder.glob("*.tmp"), *folder.glob("*.jsonl")):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED_S and (path.suffix == ".tmp" or _is_empty(path)):
                path.unlink()


def superfluous(files: Mapping[Path, Mapping[str, int | None]]) -> list[Path]:
    """Files whose segments are all held by greater ones. Greater means more segments, or else the later name: an order on
    which all processes agree, so that two files with the same content are not each removed for the other's sake."""
    greater: set[str] = set()
    found = []
    for path, held in sorted(files.items(), key=lambda file: (len(file[1]), file[0]), reverse=True):
        if held.keys() <= greater:
            found.append(path)
        greater |= held.keys()
    return found


def _merge(folder: Path, sources: dict[Path, dict[str, int | None]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = pa.schema([("line", pa.binary()), ("row", pa.binary())])
    target = folder / f"{'-'.join(next(iter(sources)).stem.split('-')[:4])}-{secrets.token_hex(8)}.parquet"
    aside = target.with_suffix(".tmp")
    counts: list[int] = []
    done: dict[str, None] = {}
    seals = {mark for path in sources for _, text in lines(path, settled=False) if (mark := _mark(text, SEAL))}
    try:
        with parquet.ParquetWriter(aside, schema, compression="zstd") as writer:
            batch: list[tuple[bytes | None, bytes | None]] = []
            for path, held in sources.items():
                for part in _parts(path, held, done):
                    counts.append(0)
                    for _, text in part:
                        counts[-1] += 1
                        batch.append((None, text) if _mark(text, ROW) in seals or text == CLOSE else (text, None))
                        if len(batch) == BATCH:
                            writer.write_batch(_columns(batch, schema))
                            batch = []
            writer.write_batch(_columns(batch, schema))
            writer.add_key_value_metadata({"segments": json.dumps(dict(zip(done, counts, strict=True)))})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(target)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(folder)


def _columns(batch: list[tuple[bytes | None, bytes | None]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.record_batch([[line for line, _ in batch], [row for _, row in batch]], schema=schema)


def _mark(text: bytes, head: bytes) -> bytes | None:
    """Reading and take of a row or a seal; None where it is neither."""
    return text[len(head) : text.index(b",", text.index(b",", len(head)) + 1)] if text.startswith(head) else None


def _held(path: Path) -> dict[str, int | None]:
    """Segments that a compacted file holds, in their order, and how many lines of each."""
    import pyarrow.parquet as parquet

    try:
        metadata = parquet.read_metadata(path).metadata or {}
        return dict(json.loads(metadata[b"segments"]))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); nothing was changed") from None


def _is_closed(path: Path) -> bool:
    """Its last record says so, or its process ran on this host and is gone."""
    with path.open("rb") as file:
        first = file.readline()
        file.seek(max(0, path.stat().st_size - 64))
        if file.read().endswith(CLOSE):
            return True
    if not first.endswith(b"\n"):
        return False
    opened = parse(first, path, 1)
    return bool(is_gone(opened))


def _is_empty(path: Path) -> bool:
    """Its process was killed before the first line was whole."""
    with path.open("rb") as file:
        return not file.readline().endswith(b"\n")


def sync_folder(folder: Path) -> None:
    """Makes a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
