"""A choice among trained models by a reading of each: the learning rate that did best, say, on text kept for that purpose.

All candidates stand in the sentence, with the reading that they are judged by, so that a choice is never made out of sight; text
that it is made on must not be what the result is reported on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from lesion.digest import named_tensors
from lesion.trial import NotThere, Reading, Specimen, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Choose(Step):
    """Becomes the candidate whose summary has the least value. Candidates begin at this sentence's subject and are built alike:
    they differ in how they were trained, not in their steps' kinds."""

    keeps: ClassVar[bool] = True

    candidates: tuple[Reading, ...] = Field(min_length=1, description="readings of the same measure, one a candidate")
    value: str = Field(default="nll", description="what is least in the best one's summary")

    @model_validator(mode="after")
    def _are_alike(self) -> Self:
        if len({reading.measure.to_json().__repr__() for reading in self.candidates}) > 1:
            raise ValueError("candidates are judged by one measure, and these readings have several")
        if len({tuple(type(step) for step in r.trial.steps) for r in self.candidates}) > 1:
            raise ValueError("candidates have the same kinds of steps, and these differ")
        if len({repr(r.trial.subject.to_json()) for r in self.candidates}) > 1:
            raise ValueError("candidates have one subject, and these have several")
        return self

    def attach(self, model: PreTrainedModel) -> None:
        for step in self.candidates[0].trial.steps:
            step.attach(model)

    def touches(self, specimen: Specimen) -> list[str]:
        return [name for name, _ in named_tensors(specimen.model)]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        assert specimen.recall is not None and specimen.bring is not None, "the walk recalls and brings what is quoted"
        if specimen.trial.steps:
            raise ValueError(
                f"candidates begin at a subject, so nothing can stand before a choice; got {specimen.trial}"
            )
        values = [self._value(reading, specimen) for reading in self.candidates]
        known = {i: value for i, value in enumerate(values) if value is not None}
        if not known:
            raise ValueError(f"no candidate has a {self.value!r}: all have failed")
        best = min(known, key=lambda i: known[i])
        found = specimen.bring(self.candidates[best].trial)
        self.attach(specimen.model)
        theirs, mine = (dict(named_tensors(s.model)) for s in (found, specimen))
        if {n: t.shape for n, t in theirs.items()} != {n: t.shape for n, t in mine.items()}:
            raise ValueError(f"{self.candidates[best].trial} is no {specimen.trial.subject}: its tensors differ")
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        return {"chosen": best, "values": values, "trial": str(self.candidates[best].trial)}

    def _value(self, reading: Reading, specimen: Specimen) -> float | None:
        """None for a candidate whose training was stopped: one that diverged is not the best one. Any other failure, such as of
        the memory, is none of its own, and would make another choice of what is not there."""
        assert specimen.recall is not None
        try:
            rows = specimen.recall(reading)
        except NotThere as gone:
            if not gone.why.startswith("Stopped:"):
                raise
            return None
        found: float | None = reading.measure.summarise(rows).get(self.value)
        return found
