"""A task of one's own: a .jsonl or .csv file with the columns prompt and answer, and optionally id, part and choices.

    {"prompt": "Capital of France?", "answer": "Paris", "part": "test"}
    {"prompt": "2 + 2 =", "answer": "4", "choices": ["3", "4"]}

Replies are ranked where there are choices, else compared with the answer, in upper or lower case and without quotation marks and
final points.
Without parts a fifth of the examples is tested with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lesion.task import AnyTask, Example, Part, divided
from lesion.texts import optional_id, records

COLUMNS = ("id", "prompt", "answer", "choices", "part")


class Jsonl(AnyTask):
    """Examples of a file."""

    new_tokens: ClassVar[int] = 32

    path: str = Field(description="a .jsonl or .csv file")

    def identity(self) -> Any:
        if self.sha256 is None:
            raise ValueError(f"{self.path} has no identity before it is pinned")
        return {k: v for k, v in self.to_json().items() if k != "path"}

    def load(self) -> Mapping[Part, Sequence[Example]]:
        path = Path(os.path.expanduser(self.path))  # noqa: PTH111  a name that is no user's is no error here
        if not path.is_file():
            raise ValueError(f"no file {self.path!r} for a task")
        found: dict[str, list[Example]] = {"": [], "train": [], "test": []}
        for number, (where, row) in enumerate(records(path, path.read_bytes()), 1):
            if unknown := [column for column in row if column not in COLUMNS]:
                raise ValueError(f"{where}: unknown column {unknown[0]!r}; there are: {', '.join(COLUMNS)}")
            if (part := row.get("part") or "") not in found:
                raise ValueError(f"{where}: expected the part train or test, got {part!r}")
            found[part].append(_example(where, row, f"{path.stem}/{number:05d}"))
        if found[""] and (found["train"] or found["test"]):
            raise ValueError(f"{self.path}: either all examples name their part, or none does")
        if found[""]:
            return divided(found[""], max(1, len(found[""]) // 5))
        return {"train": found["train"], "test": found["test"]}

    def prompt(self, example: Example) -> str:
        return example.asked

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        return {"correct": plain(reply) == plain(example.answer)}


def _example(where: str, row: dict[str, Any], id: str) -> Example:
    for column in ("prompt", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise ValueError(f"{where}: expected words under {column!r}, got {row.get(column)!r}")
    choices = row.get("choices") or []
    if isinstance(choices, str):
        choices = [part.strip() for part in choices.split("|")]
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"{where}: expected a list of words under 'choices', got {choices!r}")
    answer = row["answer"].strip()
    if choices and (len(set(choices)) < 2 or len(set(choices)) < len(choices) or answer not in choices):
        raise ValueError(f"{where}: expected different choices with the answer {answer!r} among them, got {choices}")
    label = choices.index(answer) if choices else None
    return Example(optional_id(row, where) or id, row["prompt"].rstrip(), answer, tuple(choices), label)


def plain(text: str) -> str:
    """In lower case, without quotation marks, emphasis and the points that end a sentence. Signs and points of numbers stay, and
    what consists of nothing else stays whole."""
    spaced = " ".join(text.casefold().split())
    return spaced.strip("\"'“”‘’«»*_` ").rstrip(".,;:!? ").strip("\"'“”‘’«»*_` ") or spaced
