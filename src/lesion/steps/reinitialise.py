"""Reinitialisation: every weight is drawn anew as the architecture does it at birth, and what was learned is gone.

The control of whatever is said of healing: how far does so much training come from nothing?
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from lesion.digest import named_tensors
from lesion.trial import Specimen, Step


class Reinitialise(Step):
    """Draws all weights anew, by transformers' own initialisation of this family."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="of the weights")

    def touches(self, specimen: Specimen) -> list[str]:
        return [name for name, _ in named_tensors(specimen.model)]

    @torch.no_grad()
    def apply(self, specimen: Specimen) -> dict[str, Any]:
        """Raises ValueError for a model that holds other tensors than it is born with (codes, adapters, signs)."""
        model = specimen.model
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would touch the accelerators' too
            fresh = dict(named_tensors(type(model)(model.config)))
        here = dict(named_tensors(model))
        if odd := sorted(here.keys() ^ fresh.keys()):
            raise ValueError(
                f"a {type(model).__name__} is not born with {odd[0]!r}: merge or undo what holds its weights first"
            )
        for name, tensor in here.items():
            tensor.copy_(fresh[name].to(tensor.dtype))
        return {"tensors": len(here)}
