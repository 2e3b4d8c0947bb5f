"""Corpora of the hub: files of a dataset repository, known by their content and not by the branch they were found on.

    hub:org/name:PATH              files that PATH matches, in the order of their names: a glob whose * crosses folders
    hub:org/name@revision:PATH     … at a branch, tag or commit (without one: main)
    wikitext-2, tinystories, …     short names of such, see `ALIASES`

Files are .parquet, .jsonl, .csv or .txt; tables have the column "text" and optionally "id". No code of a repository is
run. What was fetched stays in the hub's cache and is read from there when the hub is out of reach. A process that has
found a commit on a branch stays with it.

WikiText (Merity et al. 2016, arXiv:1609.07843) is stored as one row a line and is given back as articles.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lesion import digests
from lesion.hub import REPOSITORY, ask

WIKITEXT, STORIES = (
    "hub:Salesforce/wikitext:wikitext-{}-raw-v1/{}-*.parquet",
    "hub:roneneldan/TinyStories:data/{}-*.parquet",
)
ALIASES = {
    **{
        f"wikitext-{size}{end}": WIKITEXT.format(size, split)
        for size in (2, 103)
        for end, split in (("", "train"), ("-validation", "validation"), ("-test", "test"))
    },
    "tinystories": STORIES.format("train"),
    "tinystories-validation": STORIES.format("validation"),
}
FORM = "hub:org/name[@revision]:PATH"
SUFFIXES = (".parquet", ".jsonl", ".csv", ".txt")
OF_LINES = {"salesforce/wikitext", "wikitext"}  # repositories whose rows are lines of articles; names have no case
HEADING = re.compile(r" = [^=\s](?:.*[^=\s])? = \n?")  # one "=" on each side: sections have two and more
BLANK = " \n"  # the line of the raw file that the hub's copy holds as an empty row
SHOWN = 20  # names in an error message


@dataclass(frozen=True)
class Source:
    """Files of a dataset repository. `stem` is what documents without an id are called by."""

    stem: str
    repository: str
    revision: str
    pattern: str

    @property
    def of_lines(self) -> bool:
        """Whether rows are lines, which `articles` joins, and not documents."""
        return self.repository.casefold() in OF_LINES

    def files(self) -> dict[str, Path]:
        """Names within the repository → files in the hub's cache, in the order of the names; fetched where missing.

        Raises ValueError where the hub refuses or is out of reach and the cache has not all of them, and where no file
        matches (saying which there are).
        """
        found = _files(self.repository, self.revision, self.pattern)
        if not all(path.is_file() for _, path in found):  # somebody has tidied the cache
            _files.cache_clear()
            found = _files(self.repository, self.revision, self.pattern)
        return dict(found)

    def digest(self) -> str:
        """sha256 of the list that `sha256sum` prints of the files: another name or other content gives another one."""
        lines = [f"{digests.of_file(path)}  {name}\n" for name, path in self.files().items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def source(name: str) -> Source | None:
    """What a corpus name means on the hub; None for a name of another kind. Raises ValueError for a malformed one."""
    written = ALIASES.get(name, name)
    if not written.startswith("hub:"):
        return None
    match = re.fullmatch(rf"hub:({REPOSITORY})(?:@([^\s:@]+))?:(\S(?:.*\S)?)", written)
    if match is None:
        raise ValueError(f"no corpus {name!r}; expected {FORM}, as in {ALIASES['wikitext-2']}")
    repository, revision, pattern = match.groups()
    if not pattern.endswith(SUFFIXES):
        raise ValueError(f"corpus {name!r}: expected a PATH that ends in {', '.join(SUFFIXES)}, got {pattern!r}")
    stem = name if name in ALIASES else repository.split("/")[-1]
    return Source(stem=stem, repository=repository, revision=revision or "main", pattern=pattern)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Lines of WikiText → its articles, each from its title (" = Title = ") to the line before the next one.

    Joined again they are the raw file, where an empty row is a blank line; only blank lines before the first title are
    left out.
    """
    held: list[str] = []
    for line in lines:
        if HEADING.fullmatch(line):
            if "".join(held).strip():
                yield "".join(held)
            held = []
        held.append(line or BLANK)
    if "".join(held).strip():
        yield "".join(held)


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Columns "text" and "id" of a parquet file, each row with the place it stands at ("a.parquet, row 3").

    A missing id is left out. Raises ValueError for a file without the column "text", or that is no whole parquet file.
    """
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise ValueError(f'{path} has no column "text"; there are: {", ".join(names) or "none"}')
            for batch in table.iter_batches(columns=[name for name in ("text", "id") if name in names]):
                for cells in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", cells
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file: {error}") from error


@cache
def _files(repository: str, revision: str, pattern: str) -> tuple[tuple[str, Path], ...]:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    kind = {"repo_type": "dataset", "hint": " (a corpus is looked for among datasets)"}
    folder = Path(ask(snapshot_download, repository, revision, allow_patterns=[pattern], **kind))
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if matched := sorted(filter_repo_objects(here, allow_patterns=[pattern])):
        return tuple((name, here[name]) for name in matched)
    try:
        there = sorted(ask(list_repo_files, repository, revision, **kind))
    except ValueError:  # offline: the names only serve an error message
        there = sorted(here)
    told = [name for name in there if name.endswith(SUFFIXES)] or there
    more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    raise ValueError(f"{repository}@{revision} has no file {pattern!r}; there are: {', '.join(told[:SHOWN])}{more}")
