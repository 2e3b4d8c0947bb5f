"""Hardening: adversarial training with HotFlip in the loop, the usual defence (Goodfellow et al. 2015; Ebrahimi et al. 2018,
section 4).

In each optimizer step a share of the rows has some of its tokens replaced by those that raise its loss most to first order under
the weights of that moment (`lesion.hardening`). All else is training on clean text through the one loop, so `heal`
with the same options is its control.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator

from lesion.texttraining import TextTraining
from lesion.trial import Specimen


class Harden(TextTraining):
    """Trains every weight on text of which some rows are attacked."""

    share: float = Field(default=0.5, gt=0, le=1, description="of a step's rows, rounded to whole rows: those attacked")
    flips: int = Field(default=10, ge=1, description="tokens that are replaced in an attacked row")

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.flips >= self.length:
            raise ValueError(f"{self.flips} flips leave no token of a row of {self.length} as it was")
        return self

    def guidance(self, specimen: Specimen) -> dict[str, Any]:
        from lesion.flips import allowed, table
        from lesion.hardening import attacked_rows, harden

        if not (count := round(self.share * self.batch)):
            raise ValueError(f"a share of {self.share} of {self.batch} rows is no row: nothing would be attacked")
        may: torch.Tensor = allowed(specimen.tokenizer, len(table(specimen.model)))
        part = -(-count // self.split)

        def perturb(team: Any, step: int, batch: list[Any]) -> list[Any]:
            chosen = attacked_rows(self.seed, step, self.batch, self.share)
            return harden(team, batch, chosen, self.flips, may, self.precision == "bfloat16", part)

        return {"perturb": perturb}
