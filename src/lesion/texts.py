"""Corpora: what a model reads or is trained on, as documents with stable ids, pinned by the hash of their file.

A corpus is a packaged name ("austen" is Persuasion, "novels" the other five novels), files of a dataset repository of
the hub ("wikitext-2", "hub:org/name:PATH", see `lesion.hubtexts`) or the path of a file of one's own:

    .txt     documents stand between lines that hold only a form feed (U+000C); without such a line the file is one
    .jsonl   {"text": …} a line, with an optional "id"; other keys are left alone
    .csv     a header with the column "text", and optionally "id"; other columns are left alone

Files are UTF-8; a byte order mark is dropped, CRLF becomes LF. A packaged document is called "austen/chapter-03", one
of a user's file "<file>/document-0003", of the hub "<name>/document-0000003", unless the file gives it an id.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lesion import digests, hubtexts

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Document:
    """One text under its stable id."""

    id: str
    text: str


@dataclass(frozen=True)
class Shelf:
    """Where texts of one kind are found: packaged files, pinned by their sha256, and a user's files by their path."""

    kind: str  # "corpus": the word for one of them in messages
    folder: Path
    pins: Mapping[str, str]  # file name → sha256 of the content, unpacked where the file is .xz
    suffixes: tuple[str, ...]  # of a user's file
    elsewhere: str = ""  # what else a name may be, for messages
    _sound: set[tuple[str, str]] = field(default_factory=set, repr=False)  # packaged names and files that were checked

    def names(self) -> list[str]:
        """Packaged names."""
        return sorted(map(_name, self.pins))

    def fetch(self, name: str) -> tuple[Path, bytes]:
        """Path and content of a packaged name or of a user's file.

        Raises ValueError where there is no such thing, or where a packaged file is not the one that was pinned.
        """
        for file, pin in self.pins.items():
            if name == _name(file):
                path = self.folder / file
                data = path.read_bytes()
                if path.suffix == ".xz":
                    path, data = path.with_suffix(""), _unpacked(path, data)
                if (found := hashlib.sha256(data).hexdigest()) != pin:
                    raise ValueError(f"packaged {self.kind} {name!r} is damaged: {path} has sha256 {found}, not {pin}")
                return path, data
        path = self._own(name)
        return path, path.read_bytes()

    def _own(self, name: str) -> Path:
        """A user's file."""
        path = Path(name).expanduser()
        *others, last = self.suffixes
        hint = f"or give the path of a {', '.join(others)} or {last} file{self.elsewhere}"
        if path.suffix.lower() not in self.suffixes:
            raise ValueError(f"no {self.kind} {name!r}; packaged: {', '.join(self.names())}; {hint}")
        if not path.is_file():
            raise ValueError(f"no file {name!r} for a {self.kind}; packaged: {', '.join(self.names())}; {hint}")
        return path

    def digest(self, name: str) -> str:
        """sha256 of the file's content, unpacked, in hexadecimal. Raises what `fetch` raises."""
        for file, pin in self.pins.items():
            if name == _name(file):
                if (name, digests.of_file(self.folder / file)) not in self._sound:
                    self.fetch(name)
                    self._sound.add((name, digests.of_file(self.folder / file)))
                return pin
        return digests.of_file(self._own(name))


def _name(file: str) -> str:
    return file.split(".")[0]


@lru_cache(maxsize=2)  # by content; a study pins its corpus once for each sentence
def _unpacked(path: Path, data: bytes) -> bytes:
    import lzma

    try:
        return lzma.decompress(data)
    except lzma.LZMAError as error:
        raise ValueError(f"packaged {path} is damaged: {error}") from None


SHELF = Shelf(
    kind="corpus",
    folder=DATA / "corpora",
    pins={
        "austen.txt": "f5294e6a207dcea14872b68a5841e9eb6eda890e224e51e799cd0c16fd5131ee",
        "novels.txt.xz": "7bb9e2455eae1cb32fc0a69f003c11193696b68bb17323a6c0f739dd0f9546ce",
    },
    suffixes=(".txt", ".jsonl", ".csv"),
    elsewhere=f"; from the hub: {', '.join(hubtexts.ALIASES)}, {hubtexts.FORM}",
)
PARTS = {"austen": "chapter-{:02d}", "novels": "chapter-{:03d}"}  # what a document of a packaged corpus is


def corpora() -> list[str]:
    """Names of the packaged corpora."""
    return SHELF.names()


def corpus_digest(name: str) -> str:
    """sha256 of the corpus file's content, so that a changed file asks for other readings; of the hub's files, see
    `hubtexts.Source.digest`."""
    hub = hubtexts.source(name)
    return SHELF.digest(name) if hub is None else hub.digest()


def apart(trained: str, read: str, names: str = "corpus and held_out") -> None:
    """Refuses to read what is trained on (ValueError), under whichever name: what counts is the content."""
    if corpus_digest(trained) == corpus_digest(read):
        same = repr(trained) if trained == read else f"{trained!r}, which is {read!r},"
        raise ValueError(f"{same} would be trained on and read: {names} must be two corpora")


def corpus(name: str) -> list[Document]:
    """The documents of a corpus, in the order of its file. Empty ones are kept: a measure decides what they are worth.

    Raises ValueError for an unknown name, a file that is not UTF-8 or not of its format (naming the line), two
    documents of one id, and a corpus without any text.
    """
    hub = hubtexts.source(name)
    if hub is None:
        path, data = SHELF.fetch(name)
        where, stem, part = str(path), path.stem, PARTS.get(name, "document-{:04d}")
        found = _documents(path, data)
    else:
        where, stem, part = name, hub.stem, "document-{:07d}"
        found = (document for path in hub.files().values() for document in _documents(path))
        if hub.of_lines:
            found = ((None, text) for text in hubtexts.articles(line for _, line in found))
    documents = [Document(given or f"{stem}/{part.format(n)}", text) for n, (given, text) in enumerate(found, 1)]
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"{where} holds no text: {len(documents)} documents, none with a word in it")
    refuse_duplicates(where, [document.id for document in documents])
    return documents


def split(text: str) -> list[str]:
    """Documents of a plain text, which stand between lines that hold only a form feed, less the empty lines around."""
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line == "\f":
            documents.append([])
        else:
            documents[-1].append(line)
    return ["\n".join(lines).strip("\n") for lines in documents]


def decoded(path: Path, data: bytes) -> str:
    """UTF-8 as text with LF line ends. Raises ValueError that names the file and the first wrong byte."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{path} is not UTF-8: {wrong} ({error.reason})") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def records(path: Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl or .csv file, each with the place it stands at ("prompts.csv, line 3"); blank lines are no rows.

    A cell of a .csv is a string, and an empty one is as good as none (it is left out, unless its column is "text").
    """
    text = decoded(path, data)
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)
    for line, row in rows:
        yield f"{path}, line {line}", row


def refuse_duplicates(path: Path | str, ids: list[str]) -> None:
    """Raises ValueError where two things have one id, for rows are joined by it."""
    seen: dict[str, int] = {}
    for position, id in enumerate(ids, 1):
        if id in seen:
            raise ValueError(
                f"{path}: number {seen[id]} and number {position} have the same id {id!r}; ids must differ"
            )
        seen[id] = position


def optional_id(row: dict[str, Any], where: str) -> str | None:
    """The "id" of a row as a string, or None where it has none. Raises ValueError for what can be no id."""
    given = row.get("id")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (str, int)) or not str(given).strip():
        raise ValueError(f"{where}: expected an id that is a word or a whole number, got {given!r}")
    return str(given)


def _documents(path: Path, data: bytes | None = None) -> Iterator[tuple[str | None, str]]:
    """Documents of one file, each with the id that the file gives it; `data` is its content where that is known."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return (_document(row, where) for where, row in hubtexts.parquet_rows(path))
    data = path.read_bytes() if data is None else data
    if suffix == ".txt":
        return ((None, text) for text in split(decoded(path, data)))
    return (_document(row, where) for where, row in records(path, data))


def _document(row: dict[str, Any], where: str) -> tuple[str | None, str]:
    if not isinstance(row.get("text"), str):
        came = f"{row['text']!r}" if "text" in row else f"only {', '.join(map(repr, row)) or 'nothing'}"
        raise ValueError(f'{where}: expected a string under "text", got {came}')
    return optional_id(row, where), row["text"]


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON, {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:60]!r}")
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    before = csv.field_size_limit(max(len(text), 1))  # a document may be longer than the module's 128 KiB
    header: list[str] = []
    start = 1
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) != len(header):
                    raise ValueError(f"{path}, line {start}: the header names a column twice: {', '.join(header)}")
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(f"{path}, line {start}: expected {len(header)} cells, got {len(cells)}")
                named = zip(header, cells, strict=True)
                rows.append((start, {column: cell for column, cell in named if cell or column == "text"}))
            start = reader.line_num + 1  # a quoted cell may hold line breaks
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not CSV, {error}") from error
    finally:
        csv.field_size_limit(before)
    yield from rows
