"""Instructions and written responses in the format of Alpaca (Taori et al. 2023): what supervised fine-tuning learns from.

Packaged are 999 examples, of which 150 are tested with; from the hub the 52,002 of `tatsu-lab/alpaca`. A response has many
lines and ends where its end token stands. What can be graded is how much a reply has in common with the written one (ROUGE),
which says little; the loss of written responses (`task`, column `nll`) and whether replies end say more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lesion import packagedfiles
from lesion.task import Example, FromHub, Part, divided
from lesion.tasks.summarise import rouge

TESTED = 150
FORM = "### Instruction:\n{}\n\n### Response:\n"


class Instructions(FromHub):
    """Alpaca's instructions."""

    metric: ClassVar[str] = "rougeL"
    new_tokens: ClassVar[int] = 128
    line: ClassVar[bool] = False
    dataset: ClassVar[tuple[str, str | None]] = ("tatsu-lab/alpaca", None)

    def packaged(self) -> Mapping[Part, Sequence[Example]]:
        rows = json.loads(packagedfiles.path(packagedfiles.INSTRUCTIONS).read_text(encoding="utf-8"))
        return divided([e for n, row in enumerate(rows) if (e := _example(n, row))], TESTED)

    def of_hub(self, splits: Mapping[str, Any]) -> Mapping[Part, Sequence[Example]]:
        return divided([e for n, row in enumerate(splits["train"]) if (e := _example(n, row))], 1000)

    def prompt(self, example: Example) -> str:
        """Alpaca's own words, for a model without a chat template."""
        return FORM.format(example.asked)

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        return rouge(example.answer, reply)


def _example(number: int, row: Mapping[str, Any]) -> Example | None:
    """None where nobody has written a response."""
    asked = f"{row['instruction'].strip()}\n\n{row['input'].strip()}".strip()
    answer = row["output"].strip()
    return Example(f"alpaca/{number:05d}", asked, answer, turns=(("user", asked),)) if answer and asked else None
