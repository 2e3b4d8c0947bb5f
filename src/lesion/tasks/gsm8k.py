"""GSM8K: word problems of a few steps, by exact match of the final number (Cobbe et al. 2021).

Solutions are taught as one line without the calculator's marks ("<<2*3=6>>"), and end in "#### 18". A reply's answer is the
number after "####", or else the one that it states (`numerals.stated_number`); whether it kept to the form is a column of its
own. The packaged file has the 1,319 problems of the test split; 600 are tested with, the others are there to train on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

from lesion import packageddata
from lesion.numerals import stated_number
from lesion.task import Example, FromHub, Part, divided

TESTED = 600
FINAL = re.compile(r"####\s*([-−]?)\s*\$?\s*([-−]?)\s*([\d,]*\.?\d+)")


class Gsm8k(FromHub):
    """Word problems."""

    new_tokens: ClassVar[int] = 200
    dataset: ClassVar[tuple[str, str | None]] = ("openai/gsm8k", "main")

    def packaged(self) -> Mapping[Part, Sequence[Example]]:
        _, documents = packageddata.documents("gsm8k")
        return divided([_example(f"gsm8k/{n:05d}", d) for n, d in enumerate(documents)], TESTED)

    def of_hub(self, splits: Mapping[str, Any]) -> Mapping[Part, Sequence[Example]]:
        train = [_example(f"train/{n:05d}", row) for n, row in enumerate(splits["train"])]
        return {"train": train, "test": [_example(f"gsm8k/{n:05d}", row) for n, row in enumerate(splits["test"])]}

    def prompt(self, example: Example) -> str:
        return f"Question: {example.asked}\nAnswer:"

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        number = final(reply)
        said = number if number is not None else stated_number(reply, example.asked)
        return {
            "correct": said is not None and said == final(example.answer),
            "stated": written(said),
            "form": number is not None,
        }


def _example(id: str, row: Mapping[str, Any]) -> Example:
    solution = re.sub(r"<<.*?>>", "", row["answer"])
    return Example(id, " ".join(row["question"].split()), " ".join(solution.split()))


def written(number: Decimal | None) -> str | None:
    """A number in one spelling: 18, 18.0 and 18.00 are one answer."""
    return None if number is None else f"{number.normalize():f}"


def final(text: str) -> Decimal | None:
    """The number after the first "####"."""
    found = FINAL.search(text)
    try:
        return Decimal(("-" if found[1] or found[2] else "") + found[3].replace(",", "")) if found else None
    except InvalidOperation:
        return None
