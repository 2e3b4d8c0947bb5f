"""Release: what was held to a sign is so no longer. Every constrained matrix becomes a plain one of the value that it has, so the
model computes what it did, and can be damaged, quantised and trained like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lesion.constraints import held, release
from lesion.digest import named_tensors
from lesion.trial import Specimen, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Release(Step):
    """Ends a constraint; the weights stay what they are, and so does an activation that was made monotone."""

    keeps: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel) -> None:
        release(model)

    def touches(self, specimen: Specimen) -> list[str]:
        inside = tuple(f"{path}." for path, _, _ in held(specimen.model))
        return [name for name, _ in named_tensors(specimen.model) if name.startswith(inside)]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        return {"matrices": release(specimen.model)}
