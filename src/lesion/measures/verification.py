"""Verification: what a verifier says of sampled solutions, and what choosing by it is worth.

    first        the first solution to each problem is the answer
    majority     the number that most of the first k solutions state (Wang et al. 2023, "self-consistency"), or the words
                 where the task reads no number; the first of equals
    best of k    the solution among the first k that the verifier believes most (Cobbe et al. 2021)

One row a solution. AUROC and calibration are over all solutions; the three choices over problems, for k = 1, 2, 4, …
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from lesion.trial import Measure, Reading, Row, Specimen


class Verification(Measure):
    """Chances that solutions are right."""

    chunk: ClassVar[int] = 64

    of: Reading = Field(description="solutions: a reading by task with several replies")

    @model_validator(mode="after")
    def _reads_solutions(self) -> Self:
        if self.of.measure.name != "task":
            raise ValueError(f"solutions are read by task, not by {self.of.measure.name!r}")
        asked: Any = self.of.measure
        if asked.task.metric != "correct" or asked.part != "test":
            raise ValueError(
                "solutions are right or wrong, and of examples to test with; these are of the part "
                f"{asked.part!r} of {asked.task.name!r}, which is graded by {asked.task.metric!r}"
            )
        return self

    def _rows(self, specimen: Specimen) -> dict[str, Row]:
        assert specimen.recall is not None, "the walk recalls what is quoted"
        return {row["item"]: row for row in specimen.recall(self.of)}

    def items(self, specimen: Specimen) -> list[str]:
        return list(self._rows(specimen))

    def size(self) -> tuple[int, int] | None:
        return self.of.measure.size()

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        import torch

        from lesion import verifying
        from lesion.inference import inference
        from lesion.likelihood import padded
        from lesion.tasks.jsonl import plain

        started, known = time.perf_counter(), self._rows(specimen)
        found = verifying.solutions(specimen, self.of, [known[item] for item in items])
        texts = {item: text for item, text, _ in found}
        chances: dict[str, float] = {}
        most = verifying.longest(specimen.model)
        order = sorted((i for i in texts if most is None or len(texts[i]) <= most), key=lambda i: -len(texts[i]))
        with inference(specimen.model):
            for start in range(0, len(order), 16):
                some = [texts[item] for item in order[start : start + 16]]
                last = torch.tensor([len(text) - 1 for text in some], device=specimen.device)
                logits = verifying.verdicts(specimen.model, padded(some).to(specimen.device), last)
                chances.update(zip(order[start : start + 16], logits.double().sigmoid().tolist(), strict=True))
        rows = []
        for item in items:
            chance, row = chances.get(item), known[item]
            fine = chance is not None and math.isfinite(chance)
            rows.append(
                {
                    "item": item,
                    "example": row["example"],
                    "outcome": "read"
                    if fine
                    else "not finite"
                    if chance is not None
                    else "too long"
                    if item in texts
                    else "no solution",
                    "chance": chance if fine else None,
                    "correct": row["correct"],
                    "stated": row["stated"] if "stated" in row else plain(row["text"] or "") or None,
                }
            )
        return [{**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows]

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        from lesion import verifying

        good = [row for row in rows if row["chance"] is not None]
        said: dict[str, Any] = {"solutions": len(good), "not_finite": sum(r["outcome"] == "not finite" for r in rows)}
        if not good:
            return said
        chances, right = [row["chance"] for row in good], [bool(row["correct"]) for row in good]
        said |= {"right": statistics.fmean(right), "auroc": verifying.auroc(chances, right)}
        said["calibration_error"] = verifying.calibration_error(chances, right)
        said["brier"] = statistics.fmean((c - r) ** 2 for c, r in zip(chances, right, strict=True))
        for k, by in choices(rows).items():
            said |= {f"{name}_{k}": statistics.fmean(values.values()) for name, values in by.items()}
        return said


def choices(rows: Sequence[Row]) -> dict[int, dict[str, dict[str, float]]]:
    """k → way of choosing → example → whether what is chosen among its first k solutions is right; "any": the share of them that
    is, a choice at random. A solution without a number or a chance is chosen last."""
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row["example"], []).append(row)
    most = min(map(len, of.values()))
    ks = sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})
    found: dict[int, dict[str, dict[str, float]]] = {}
    for k in ks:
        found[k] = {"first": {}, "majority": {}, "best": {}, "any": {}}
        for example, some in of.items():
            found[k]["first"][example] = float(bool(some[0]["correct"]))
            found[k]["majority"][example] = float(bool(majority(some[:k])["correct"]))
            best = max(some[:k], key=lambda row: -1.0 if row["chance"] is None else row["chance"])
            found[k]["best"][example] = float(bool(best["correct"]))
            found[k]["any"][example] = statistics.fmean(bool(row["correct"]) for row in some[:k])
    return found


def majority(some: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first solution that states the number most of them state."""
    votes = Counter(row["stated"] for row in some if row["stated"] is not None)
    return max(some, key=lambda row: votes.get(row["stated"], 0))
