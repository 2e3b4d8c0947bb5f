"""A task of one's own: a .jsonl or .csv file with the columns prompt and answer, and optionally id, part and choices.

    {"prompt": "Capital of France?", "answer": "Paris", "part": "test"}
    {"prompt": "2 + 2 =", "answer": "4", "choices": ["3", "4"]}

Replies are ranked where there are choices, else compared with the answer, in upper or lower case and without quotation marks and
final points.
Without parts a fifth of the examples is tested with. A reply has as many lines and as much room as the answers need.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field

from lesion.task import AnyTask, Example, Part, divided, loaded
from lesion.texts import optional_id, records

COLUMNS = ("id", "prompt", "answer", "choices", "part")


class Jsonl(AnyTask):
    """Examples of a file."""

    path: str = Field(description="a .jsonl or .csv file")

    @property
    def called(self) -> str:
        return self.path

    @property
    def line(self) -> bool:  # type: ignore[override]
        """Whether no answer has a second line: then a reply ends with its first."""
        return _answers(self, self.stamp())[0]

    @property
    def new_tokens(self) -> int:  # type: ignore[override]
        """Room for the longest answer, a token a character at worst, and for 32 tokens."""
        return max(32, _answers(self, self.stamp())[1])

    def stamp(self) -> Any:
        path = self._file()
        known = path.stat() if path.is_file() else None
        return known and (known.st_mtime_ns, known.st_size, known.st_ino)

    def _file(self) -> Path:
        return Path(os.path.expanduser(self.path))  # noqa: PTH111  a name that is no user's is no error here

    def identity(self) -> Any:
        if self.sha256 is None:
            raise ValueError(f"{self.path} has no identity before it is pinned")
        return {k: v for k, v in self.to_json().items() if k != "path"}

    def load(self) -> Mapping[Part, Sequence[Example]]:
        path = self._file()
        if not path.is_file():
            raise ValueError(f"no file {self.path!r} for a task")
        found: dict[str, list[Example]] = {"": [], "train": [], "test": []}
        asked: Counter[str] = Counter()
        for where, row in records(path, path.read_bytes()):
            if unknown := [column for column in row if column not in COLUMNS]:
                raise ValueError(f"{where}: unknown column {unknown[0]!r}; there are: {', '.join(COLUMNS)}")
            if (part := row.get("part") or "") not in found:
                raise ValueError(f"{where}: expected the part train or test, got {part!r}")
            found[part].append(_example(where, row, asked))
        if alone := [e.id for some in found.values() for e in some if bool(e.choices) != bool(some[0].choices)]:
            raise ValueError(
                f"{self.path}: either all examples of a part have choices, or none has; {alone[0]!r} differs from the first"
            )
        if found[""] and (found["train"] or found["test"]):
            raise ValueError(f"{self.path}: either all examples name their part, or none does")
        if found[""]:
            return divided(found[""], max(1, len(found[""]) // 5))
        return {"train": found["train"], "test": found["test"]}

    def prompt(self, example: Example) -> str:
        return example.asked

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        return {"correct": plain(reply) == plain(example.answer)}


@lru_cache(maxsize=16)
def _answers(task: Jsonl, stamp: Any) -> tuple[bool, int]:
    """Whether each answer is one line, and the characters of the longest."""
    every = [e.answer for part in loaded(task).values() for e in part]
    return not any("\n" in answer for answer in every), max(map(len, every), default=0)


def _example(where: str, row: dict[str, Any], asked: Counter[str]) -> Example:
    """Its id, where it has none, is that of its words: neither the file's name nor its other rows decide what is tested with."""
    for column in ("prompt", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise ValueError(f"{where}: expected words under {column!r}, got {row.get(column)!r}")
        if any("\ud800" <= c <= "\udfff" for c in row[column]):
            raise ValueError(
                f"{where}: half of a character stands under {column!r}: a surrogate without its other half"
            )
    choices = row.get("choices") or []
    if isinstance(choices, str):
        choices = [part.strip() for part in choices.split("|")]
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"{where}: expected a list of words under 'choices', got {choices!r}")
    answer = row["answer"].strip()
    if choices and (len(set(choices)) < 2 or len(set(choices)) < len(choices) or answer not in choices):
        raise ValueError(f"{where}: expected different choices with the answer {answer!r} among them, got {choices}")
    label = choices.index(answer) if choices else None
    words = row["prompt"].rstrip()
    asked[words] += 1
    id = hashlib.sha256(words.encode()).hexdigest()[:12] + (f"-{asked[words]}" if asked[words] > 1 else "")
    return Example(optional_id(row, where) or id, words, answer, tuple(choices), label)


def plain(text: str) -> str:
    """In lower case, without quotation marks, emphasis and the points that end a sentence. Signs and points of numbers stay, and
    what consists of nothing else stays whole."""
    spaced = " ".join(text.casefold().split())
    return spaced.strip("\"'“”‘’«»*_` ").rstrip(".,;:!? ").strip("\"'“”‘’«»*_` ") or spaced
