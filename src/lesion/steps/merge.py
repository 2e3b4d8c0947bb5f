"""Merging: adapters are folded into the matrices beside which they stand, W ← W + (α/r)·BA (Hu et al. 2021, "LoRA", section 4.1).

The model is a plain one again, of the same tensors under the same names, and every weight of it can be trained, damaged and
exported. In sixteen bits the sum is rounded to the type of W.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from lesion.adapters import adapted, fold, unwrap
from lesion.digest import named_tensors
from lesion.trial import Specimen, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Merge(Step):
    """Folds adapters into the weights."""

    keeps: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel) -> None:
        unwrap(model)

    def touches(self, specimen: Specimen) -> list[str]:
        inside = tuple(f"{path}." for path, _ in adapted(specimen.model))
        return [name for name, _ in named_tensors(specimen.model) if name.startswith(inside)]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        matrices, weights, square, moved = fold(specimen.model)
        return {"matrices": matrices, "weights": weights, "relative": math.sqrt(moved / square) if square else None}
