"""Steps and measures that exist for tests only: honest ones that cost nothing, and dishonest ones."""

from typing import ClassVar

import torch
from pydantic import Field

from lesion.digest import named_tensors
from lesion.task import AnyTask, Example
from lesion.trial import Measure, Reading, Step

CALLS: list[str] = []  # what was really done, in order


class TestShift(Step):
    """Adds a constant to one tensor, chosen by number."""

    name = "test-shift"
    by: float = 1.0
    tensor: int = 0

    def touches(self, specimen):
        return [list(dict(named_tensors(specimen.model)))[self.tensor]]

    def apply(self, specimen):
        CALLS.append(f"shift {self.by:g}")
        with torch.no_grad():
            specimen.model.get_parameter(self.touches(specimen)[0]).add_(self.by)
        return {"by": self.by}


class TestBreaks(Step):
    """Changes half of what it may touch, then raises."""

    name = "test-breaks"

    def touches(self, specimen):
        return list(dict(specimen.model.named_parameters()))[:4]

    def apply(self, specimen):
        with torch.no_grad():
            for name in self.touches(specimen)[:2]:
                specimen.model.get_parameter(name).zero_()
        raise RuntimeError("halfway")


class TestLies(Step):
    """Changes a tensor that it does not report."""

    name = "test-lies"

    def touches(self, specimen):
        return list(dict(specimen.model.named_parameters()))[:1]

    def apply(self, specimen):
        with torch.no_grad():
            list(specimen.model.parameters())[3].add_(1)
        return {}


class TestTrains(Step):
    """An expensive step: its state is kept."""

    name = "test-trains"
    keeps: ClassVar[bool] = True
    seed: int = 0

    def touches(self, specimen):
        return []

    def apply(self, specimen):
        CALLS.append(f"train {self.seed}")
        with torch.no_grad():
            for parameter in specimen.model.parameters():
                parameter.mul_(1 + 0.1 * (self.seed + 1))
        return {"loss": 1.0}


class TestNorms(Measure):
    """One row a tensor: the sum of its absolute values."""

    name = "test-norms"
    chunk = 3
    power: float = Field(default=1.0)

    def items(self, specimen):
        return list(dict(named_tensors(specimen.model)))

    def read(self, specimen, items):
        CALLS.append(f"norms {len(items)}")
        tensors = dict(named_tensors(specimen.model))
        return [{"item": i, "norm": float(tensors[i].detach().double().abs().pow(self.power).sum())} for i in items]

    def summarise(self, rows):
        return {"total": sum(row["norm"] for row in rows)}


class TestMeddles(TestNorms):
    """A measure that changes the model."""

    name = "test-meddles"

    def read(self, specimen, items):
        with torch.no_grad():
            next(specimen.model.parameters()).mul_(2)
        return super().read(specimen, items)


class TestFails(TestNorms):
    """A measure that raises at its second chunk."""

    name = "test-fails"

    def read(self, specimen, items):
        if self.items(specimen)[0] not in items:
            raise RuntimeError("no second chunk")
        return super().read(specimen, items)


class TestQuotes(TestNorms):
    """A measure that needs what another reading says."""

    name = "test-quotes"
    other: Reading

    def read(self, specimen, items):
        rows = {row["item"]: row["norm"] for row in specimen.recall(self.other)}
        return [{**row, "norm": row["norm"] - rows[row["item"]]} for row in super().read(specimen, items)]


class TestNaN(Step):
    """What too strong a damage comes to."""

    name = "test-nan"

    def touches(self, specimen):
        return [next(iter(dict(specimen.model.named_parameters())))]

    def apply(self, specimen):
        with torch.no_grad():
            next(specimen.model.parameters()).fill_(float("nan"))
        return {}


class TestSums(AnyTask):
    """A few sums; a reply is right where it has an even number of letters, which some of what a random model writes has."""

    name = "test-sums"
    new_tokens: ClassVar[int] = 5

    def load(self):
        found = [Example(f"sum/{n}", f"{n} + {n + 1}", str(2 * n + 1)) for n in range(12)]
        return {"train": found[:8], "test": found[8:]}

    def prompt(self, example):
        return f"{example.asked} ="

    def grade(self, example, reply):
        return {"correct": len(reply) % 2 == 0, "stated": str(len(reply))}


class TestPairs(AnyTask):
    """Pairs of replies, the better one first."""

    name = "test-pairs"

    def load(self):
        found = [Example(f"pair/{n}", f"Say {n}", f"I say {n}", (f"I say {n}", "no" * (n + 1)), 0) for n in range(8)]
        return {"train": found[:5], "test": found[5:]}

    def prompt(self, example):
        return f"{example.asked}:"

    def grade(self, example, reply):
        return {"correct": reply == example.answer}
