"""Preferences: two replies to one conversation, of which people or a better model preferred one. What `dpo` learns from.

An example's choices are the preferred reply and the rejected one, in this order. Packaged are 300 pairs of the demonstration set
of LLaMA-Factory (Zheng et al. 2024), of which 90 are tested with; from the hub those of `trl-lib/ultrafeedback_binarized`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lesion import packagedfiles
from lesion.task import Example, FromHub, Part, divided
from lesion.tasks.instructions import FORM

TESTED = 90
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Preferences(FromHub):
    """Pairs of replies, the better one first."""

    new_tokens: ClassVar[int] = 128
    line: ClassVar[bool] = False
    dataset: ClassVar[tuple[str, str | None]] = ("trl-lib/ultrafeedback_binarized", None)

    def packaged(self) -> Mapping[Part, Sequence[Example]]:
        rows = json.loads(packagedfiles.path(packagedfiles.PREFERENCES).read_text(encoding="utf-8"))
        found = []
        for number, row in enumerate(rows):
            said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
            found.append(_example(number, said, row["chosen"]["value"], row["rejected"]["value"]))
        return divided([e for e in found if e is not None], TESTED)

    def of_hub(self, splits: Mapping[str, Any]) -> Mapping[Part, Sequence[Example]]:
        parts: dict[Part, list[Example]] = {"train": [], "test": []}
        number = 0
        for part, found in parts.items():
            for row in splits[part]:
                turns = [(turn["role"], turn["content"]) for turn in row["chosen"]]
                e = _example(number, turns[:-1], turns[-1][1], row["rejected"][-1]["content"])
                number += 1
                if e is not None:
                    found.append(e)
        asked = {e.asked for e in parts["test"]}
        return {"train": [e for e in parts["train"] if e.asked not in asked], "test": parts["test"]}

    def prompt(self, example: Example) -> str:
        """In the words that `instructions` are put in, so that what has learned those is asked alike."""
        return FORM.format(example.asked)

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        """A written reply has no grade; which of the two is the likelier one has."""
        return {"correct": None}


def _example(number: int, turns: Sequence[tuple[str, str]], better: str, worse: str) -> Example | None:
    """None where a reply is missing, or where both are the same."""
    better, worse = better.strip(), worse.strip()
    if not better or not worse or better == worse:
        return None
    said = tuple((ROLES[who], text.strip()) for who, text in turns)
    asked = said[0][1] if len(said) == 1 else "\n\n".join(f"{role.capitalize()}: {text}" for role, text in said)
    return Example(f"pair/{number:05d}", asked, better, (better, worse), 0, said)
