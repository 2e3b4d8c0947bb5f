"""The log of a lab: append-only segments, one for each writer process, that nobody else ever touches.

    {"is":"open", …}                           who writes, in which environment
    {"is":"state","state":…}                   a trial as it lay on the bench, with its ledger
    {"is":"row","reading":…,"take":0,"item":…} one observation
    {"is":"seal","reading":…}                  a reading is complete when its seal is in the log
    {"is":"failure", …}                        what could not be done, with its trace

A torn last line is what a killed process leaves: it is skipped and its items are taken again. Any other line that cannot
be read is an error that names it. Segments of dead writers are compacted into parquet, line for line, so a lab holds few
files however long it lives.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
import psutil

Record = dict[str, Any]

COMPACT_AT = 16  # closed segments of one level that are worth merging
SYNC_EVERY_S = 1.0  # a killed process loses nothing; a power cut loses at most this much


class Segment:
    """The segment of this process. The file appears with the first record."""

    def __init__(self, folder: Path, environment: Record):
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        host = "".join(c if c.isalnum() else "_" for c in socket.gethostname())
        self.writer = f"{stamp}-{host}-{os.getpid()}-{secrets.token_hex(3)}"
        self.path = folder / f"{self.writer}.jsonl"
        self._environment = environment
        self._file: int | None = None
        self._synced = 0.0

    def append(self, records: Iterable[Record]) -> None:
        """Writes whole lines in one call. NaN and infinities are refused (ValueError): a missing value is None."""
        lines = b"".join(line(record) for record in records)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            process = psutil.Process()
            lines = (
                line(
                    {
                        "is": "open",
                        "writer": self.writer,
                        "host": socket.gethostname(),
                        "process": [process.pid, process.create_time()],
                        "at": time.time(),
                        "environment": self._environment,
                    }
                )
                + lines
            )
        view = memoryview(lines)
        while view:
            view = view[os.write(self._file, view) :]
        if time.monotonic() - self._synced > SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self.append([{"is": "close"}])
            self.sync()
            os.close(self._file)
            self._file = None


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def line(record: Record) -> bytes:
    return _encode(record).encode() + b"\n"


def parse(text: bytes, path: Path, number: int) -> Record:
    """A line as a record. Raises ValueError that names the place where it cannot be read."""
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} cannot be read ({error}); nothing was changed") from None
    if not isinstance(record, dict) or "is" not in record:
        raise ValueError(f"{path} line {number} is not a record of a lab; nothing was changed")
    return record


def segments(folder: Path) -> list[Path]:
    """All segments, oldest first. One that was already merged, but not yet removed, is left out."""
    if not folder.is_dir():
        return []
    found = sorted(p for p in folder.iterdir() if p.suffix in (".jsonl", ".parquet"))
    try:
        merged = {name for p in found if p.suffix == ".parquet" for name in _sources(p)}
    except FileNotFoundError:  # it was merged itself, just now
        return segments(folder)
    return [p for p in found if p.name not in merged]


def read(folder: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Every line of every segment, with its place.

    A segment that another process compacts just now is read where it went. Some lines then come twice; none is lost.
    """
    done: set[str] = set()
    while left := [path for path in segments(folder) if path.name not in done]:
        for path in left:
            try:
                for number, text in lines(path):
                    yield path, number, text
            except FileNotFoundError:
                if os.path.lexists(path):
                    raise
                break
            done.add(path.name)


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered complete lines of a segment, from 1."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=8192, columns=["line"]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        yield number, text
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise ValueError(f"{path} cannot be read ({error}); nothing was changed") from None
        return
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.endswith(b"\n"):  # else torn: the writer was killed here
                yield number, text


def compact(folder: Path) -> None:
    """Merges the segments of writers that are gone: written aside, synced, renamed, and only then the sources go."""
    try:
        _compact(folder)
    except FileNotFoundError:  # another process is at it
        return


def _compact(folder: Path) -> None:
    """Each merge adds a part to a name. Only segments of equally long names are merged, so that no line is rewritten
    more often than the logarithm of the number of writers."""
    levels: dict[int, list[Path]] = defaultdict(list)
    for path in segments(folder):
        if path.suffix == ".parquet" or _is_closed(path):
            levels[path.stem.count("-")].append(path)
    for sources in levels.values():
        if len(sources) >= COMPACT_AT:
            _merge(folder, sources)
    merged = {name for p in folder.glob("*.parquet") for name in _sources(p)}
    for name in merged:
        (folder / name).unlink(missing_ok=True)


def _merge(folder: Path, sources: list[Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    names = json.dumps([p.name for p in sources])
    schema = pa.schema([("line", pa.binary())], metadata={"sources": names})
    target = folder / f"{sources[0].stem}-{secrets.token_hex(3)}.parquet"
    aside = target.with_suffix(".tmp")
    try:
        with parquet.ParquetWriter(aside, schema, compression="zstd") as writer:
            batch: list[bytes] = []
            for source in sources:
                for _, text in lines(source):
                    batch.append(text)
                    if len(batch) == 65536:
                        writer.write_batch(pa.record_batch([batch], schema=schema))
                        batch = []
            writer.write_batch(pa.record_batch([batch], schema=schema))
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(target)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(folder)


def _sources(path: Path) -> list[str]:
    import pyarrow.parquet as parquet

    try:
        metadata = parquet.read_schema(path).metadata or {}
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); nothing was changed") from None
    return json.loads(metadata.get(b"sources", b"[]"))


def _is_closed(path: Path) -> bool:
    """Its last record says so, or its process ran on this host and is gone."""
    with path.open("rb") as file:
        first = file.readline()
        file.seek(max(0, path.stat().st_size - 64))
        if file.read().endswith(line({"is": "close"})):
            return True
    if not first.endswith(b"\n"):
        return False
    opened = parse(first, path, 1)
    if opened.get("host") != socket.gethostname():
        return False
    pid, born = opened["process"]
    return not (psutil.pid_exists(pid) and abs(psutil.Process(pid).create_time() - born) < 2.0)


def sync_folder(folder: Path) -> None:
    """Makes a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
