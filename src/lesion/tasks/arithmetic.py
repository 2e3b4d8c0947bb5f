"""Arithmetic: sums and differences of whole numbers, with the steps written out; as many problems as are asked for.

    Problem: 27 + 8 - 15 =        Solution: 27 + 8 = 35. 35 - 15 = 20. #### 20

Small enough for a small model to solve some of, and a wrong step shows: what a verifier is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from lesion.numerals import stated_number
from lesion.stats import generator
from lesion.task import AnyTask, Example, Part
from lesion.tasks.gsm8k import final, written

PARTS = 5  # a fifth of all problems is tested with


class Arithmetic(AnyTask):
    """Made-up sums."""

    new_tokens: ClassVar[int] = 48

    terms: int = Field(default=3, ge=2, le=6, description="numbers of a sum")
    largest: int = Field(default=30, ge=2, description="of the numbers")
    train: int = Field(default=2000, ge=1, description="problems to train on")
    test: int = Field(default=300, ge=1, description="problems to test with")
    seed: int = Field(default=0, ge=0, description="of the numbers")
    half: Literal[0, 1, 2] = Field(
        default=0, description="0: of all problems to train on; 1 and 2: of one half and the other, which share none"
    )

    def load(self) -> Mapping[Part, Sequence[Example]]:
        none = (
            f"there are no {self.train} different problems to train on and {self.test} to test with, of {self.terms} numbers "
            f"up to {self.largest}"
        )
        if self.train + self.test > (every := self.largest**self.terms * 2 ** (self.terms - 1)):
            raise ValueError(f"{none}: there are {every}")
        draw, seen = generator("arithmetic", self.seed, self.terms, self.largest), set[str]()
        found: dict[Part, list[Example]] = {"train": [], "test": []}
        for _ in range(100 * PARTS * (self.train + self.test)):
            numbers = draw.integers(1, self.largest + 1, self.terms).tolist()
            signs = draw.integers(0, 2, self.terms - 1).tolist()
            asked = str(numbers[0]) + "".join(f" {'+-'[s]} {n}" for s, n in zip(signs, numbers[1:], strict=True))
            part, half = _place(asked)
            if asked not in seen and (part == "test" or self.half in (0, half)):
                some = found[part]
                if len(some) < (self.train if part == "train" else self.test):
                    some.append(Example(f"sum/{asked.replace(' ', '')}", asked, _solution(numbers, signs)))
                seen.add(asked)
            if len(found["train"]) == self.train and len(found["test"]) == self.test:
                return found
        raise ValueError(none)

    def prompt(self, example: Example) -> str:
        return f"Problem: {example.asked} =\nSolution:"

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        """As in `gsm8k`: the number after "####", or else the one that is stated; whether the form was kept is another matter."""
        number = final(reply)
        said = number if number is not None else stated_number(reply, example.asked)
        right = final(example.answer)
        return {"correct": said is not None and said == right, "stated": written(said), "form": number is not None}


def _place(asked: str) -> tuple[Part, int]:
    """The part of a problem and its half, by its text alone: what a task is tested with, no task of other sizes is trained on."""
    number = hashlib.sha256(asked.encode()).digest()[0] % PARTS
    return ("test", 0) if number == 0 else ("train", 1 + number % 2)


def _solution(numbers: Sequence[int], signs: Sequence[int]) -> str:
    steps, total = [], numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        result = total - number if sign else total + number
        steps.append(f"{total} {'+-'[sign]} {number} = {result}.")
        total = result
    return " ".join([*steps, f"#### {total}"])
