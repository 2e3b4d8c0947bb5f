"""Precision: the whole model is held in another type, as if it had been loaded so, or its linear layers as codes.

    bfloat16, float16   every floating tensor is rounded to the type, but for those that transformers' own loading leaves in
                        float32: positions' frequencies, and what a family names (T5's second matrix in float16)
    int8, nf4           linear layers but the head become codes of 8 or 4 bits (`lesion.coded`); all else stays as it is

It may stand first in a sentence, as loading, or behind other steps, as quantisation of what they left. Nothing undoes it: what
was rounded away is gone.
"""

from __future__ import annotations

import copy
import math
import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from lesion.adapters import adapted
from lesion.checkpoints import OVERFLOWING
from lesion.coded import LARGEST, code_of, encode, structure
from lesion.digest import named_tensors
from lesion.packaged import quietly
from lesion.trial import Specimen, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def types(model: Any, to: torch.dtype) -> dict[str, torch.dtype]:
    """The type of each floating tensor of a model that transformers loads in `to`. The V of a weight that is held to a sign stays
    in float32, and what it computes follows the model."""
    exact = {*(model._keep_in_fp32_modules_strict or ())}
    exact |= {*(model._keep_in_fp32_modules or ())} if to == torch.float16 else set()
    stays = [re.compile(pattern.replace("*", ".*")) for pattern in sorted(exact)]
    with quietly(), torch.device("meta"):
        outline = type(model)._from_config(copy.deepcopy(model.config), dtype=to)
    buffers = {name: buffer.dtype for name, buffer in outline.named_buffers()}
    found = {}
    for name, _ in model.named_parameters():
        free = ".parametrizations." in name and name.endswith(".original")
        found[name] = torch.float32 if free or any(pattern.search(name) for pattern in stays) else to
    found |= {name: buffers.get(name, to) for name, _ in model.named_buffers()}
    return {name: found[name] for name, tensor in named_tensors(model) if tensor.is_floating_point()}


class Precision(Step):
    """Holds a model in sixteen bits, or its linear weights as codes of eight or four."""

    keeps: ClassVar[bool] = True

    dtype: Literal["bfloat16", "float16", "int8", "nf4"] = Field(
        description="bfloat16, float16: all of it; int8, nf4: linear layers but the head, as codes"
    )

    def attach(self, model: PreTrainedModel) -> None:
        self._check(model)
        if self.dtype == "int8" or self.dtype == "nf4":
            structure(model, self.dtype)
            return
        tensors = dict(named_tensors(model))
        for name, kind in types(model, getattr(torch, self.dtype)).items():
            tensors[name].data = tensors[name].data.to(kind)

    def touches(self, specimen: Specimen) -> list[str]:
        return [name for name, _ in named_tensors(specimen.model)]

    @torch.no_grad()
    def apply(self, specimen: Specimen) -> dict[str, Any]:
        model, before = specimen.model, size(specimen.model)
        self._check(model)
        if self.dtype == "int8" or self.dtype == "nf4":
            made = encode(model, self.dtype)
            facts = facts_of(made.matrices, made.weights, made.square, made.error)
        else:
            facts = self._round(model)
        return facts | {"bytes_before": before, "bytes": size(model)}

    def _round(self, model: Any) -> dict[str, Any]:
        tensors, weights = dict(named_tensors(model)), {name for name, _ in model.named_parameters()}
        matrices, count, square, error = 0, 0, 0.0, 0.0
        for name, kind in types(model, getattr(torch, self.dtype)).items():
            exact, tensors[name].data = tensors[name].data, tensors[name].data.to(kind)
            if lost := int((torch.isfinite(exact) & ~torch.isfinite(tensors[name])).sum()):
                raise ValueError(
                    f"{lost} numbers of {name} overflow in {self.dtype}, which ends at {torch.finfo(kind).max:g}; the largest is "
                    f"{float(exact[torch.isfinite(exact)].abs().max()):g}. bfloat16 reaches as far as float32"
                )
            if name in weights:
                exact = exact.double()
                matrices, count, square = (
                    matrices + (exact.dim() > 1),
                    count + exact.numel(),
                    square + float(exact.square().sum()),
                )
                error += float((tensors[name].double() - exact).square().sum())
        return facts_of(matrices, count, square, error)

    def _check(self, model: Any) -> None:
        if any(adapted(model)):
            raise ValueError(
                f"this model has adapters: `merge` them before it is held in {self.dtype}, or add them after it"
            )
        if (other := code_of(model)) is not None:
            raise ValueError(
                f"the linear weights of this model are {other} codes already, and {self.dtype} is made of floats"
            )
        if self.dtype == "float16" and str(model.config.model_type).startswith(OVERFLOWING):
            raise ValueError(
                f"the hidden states of a {model.config.model_type} overflow in float16, which ends at {LARGEST:g}: expected "
                "bfloat16"
            )


def size(model: Any) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(model))


def facts_of(matrices: int, weights: int, square: float, error: float) -> dict[str, Any]:
    """√(Σ(ŵ − w)² / Σw²) over all weights that were rounded or coded; missing where they are all zero or not all finite."""
    good = square > 0 and math.isfinite(square) and math.isfinite(error)
    return {"matrices": matrices, "weights": weights, "relative": math.sqrt(error / square) if good else None}
