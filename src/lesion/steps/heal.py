"""Healing: a model is trained further on clean text, after whatever was done to it.

Every weight is trained with the usual loss of language modelling through the one loop (`lesion.fit`); of a weight that is held to
a sign (`constrain`), the V behind it. Where a teacher is named, usually the model before the damage, its distribution may be a
part of the loss (Hinton et al. 2015), and constraints may come gradually: over the first steps of the run every constrained
matrix is W + (1 − α)·(W₀ − W₁), α rising from 0 to 1, W₀ the teacher's matrix and W₁ the constrained one that the run began
with, so that training begins at the teacher's weights and ends within the constraint.

What it brings back is a question for measures; the ledger says how far the loss fell and what share of the weights moved.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator

from lesion.constraints import held
from lesion.distilling import Distilled
from lesion.texttraining import TextTraining
from lesion.trial import Specimen, Trial


class Heal(TextTraining):
    """Trains every weight on clean text."""

    teacher: Trial | None = Field(default=None, description="a model to learn from, such as the undamaged one")
    distil: float = Field(default=0.0, ge=0, le=1, description="share of KL(teacher ‖ model) in the loss")
    anneal: float = Field(
        default=0.0, ge=0, le=1, description="share of the steps over which constraints come gradually; 0: at once"
    )

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Self:
        if (self.teacher is None) == bool(self.distil or self.anneal):
            raise ValueError("a teacher is needed for distil and anneal, and for nothing else")
        return self

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        try:
            return super().apply(specimen)
        finally:
            for _, _, how in held(specimen.model):
                how.lift = None

    def guidance(self, specimen: Specimen) -> dict[str, Any]:
        if self.teacher is None:
            return {}
        assert specimen.bring is not None, "the walk can bring a second model"
        model = specimen.bring(self.teacher).model
        if model.get_output_embeddings().weight.shape[0] != specimen.model.get_output_embeddings().weight.shape[0]:
            raise ValueError("the teacher has another vocabulary than the model that learns from it")
        if not self.anneal:
            return {"objective": Distilled(model, self.distil)}
        lift(specimen.model, model)
        over = max(1, round(self.anneal * self.steps))

        def before(model: Any, step: int) -> None:
            for _, _, how in held(model):
                how.left = max(0.0, 1 - step / over)

        return {"before": before} | ({"objective": Distilled(model, self.distil)} if self.distil else {})


@torch.no_grad()
def lift(model: Any, teacher: Any) -> None:
    """What every constrained matrix lacks of the teacher's: W₀ − W₁. Raises ValueError where nothing is constrained."""
    found = list(held(model))
    if not found:
        raise ValueError("anneal brings constraints gradually, and this model has none: constrain it first")
    for name, module, how in found:
        whole = teacher.get_submodule(name)
        if "base_layer" in whole._modules:
            raise ValueError(
                f"the teacher has an adapter beside {name}, which is no part of its matrix: merge it first"
            )
        how.lift = (whole.weight.detach() - module.weight.detach()).float()
