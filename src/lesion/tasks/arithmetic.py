"""Arithmetic: sums and differences of whole numbers, with the steps written out; as many problems as are asked for.

    Problem: 27 + 8 - 15 =        Solution: 27 + 8 = 35. 35 - 15 = 20. #### 20

Small enough for a small model to solve some of, and a wrong step shows: what a verifier is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from lesion.stats import generator
from lesion.task import AnyTask, Example, Part
from lesion.tasks.gsm8k import final, written


class Arithmetic(AnyTask):
    """Made-up sums."""

    new_tokens: ClassVar[int] = 48

    terms: int = Field(default=3, ge=2, le=6, description="numbers of a sum")
    largest: int = Field(default=30, ge=2, description="of the numbers")
    train: int = Field(default=2000, ge=1, description="problems to train on")
    test: int = Field(default=300, ge=1, description="problems to test with")
    seed: int = Field(default=0, ge=0, description="of the numbers")

    def load(self) -> Mapping[Part, Sequence[Example]]:
        draw, seen, found = generator("arithmetic", self.seed, self.terms, self.largest), set[str](), list[Example]()
        many = self.train + self.test
        for _ in range(100 * many):
            numbers = draw.integers(1, self.largest + 1, self.terms).tolist()
            signs = draw.integers(0, 2, self.terms - 1).tolist()
            asked = str(numbers[0]) + "".join(f" {'+-'[s]} {n}" for s, n in zip(signs, numbers[1:], strict=True))
            if asked not in seen:
                seen.add(asked)
                found.append(Example(f"sum/{len(found):05d}", asked, _solution(numbers, signs)))
            if len(found) == many:
                return {"train": found[self.test :], "test": found[: self.test]}
        raise ValueError(f"there are no {many} different problems with {self.terms} numbers up to {self.largest}")

    def prompt(self, example: Example) -> str:
        return f"Problem: {example.asked} =\nSolution:"

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        said = final(reply)
        return {
            "correct": said is not None and said == final(example.answer),
            "stated": written(said),
        }


def _solution(numbers: Sequence[int], signs: Sequence[int]) -> str:
    steps, total = [], numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        result = total - number if sign else total + number
        steps.append(f"{total} {'+-'[sign]} {number} = {result}.")
        total = result
    return " ".join([*steps, f"#### {total}"])
