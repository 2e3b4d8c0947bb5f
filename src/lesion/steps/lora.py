"""Low-rank adapters: a few numbers are trained beside each matrix, which stays as it is (Hu et al. 2021, "LoRA").

What comes after it in a sentence trains the adapters alone, through the one loop (`heal`, `pretrain`). Behind `precision` with
int8 or nf4 the frozen matrices are codes, which is QLoRA (Dettmers et al. 2023). `merge` folds them in again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from lesion.adapters import adapted, begin, parts, wrap
from lesion.coded import coded
from lesion.digest import named_tensors
from lesion.sites import matrices, parse
from lesion.trial import Specimen, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Lora(Step):
    """Puts adapters beside the matrices of a site and freezes everything else."""

    keeps: ClassVar[bool] = True

    rank: int = Field(default=8, ge=1, description="r: rows of A, columns of B")
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False, description="α: the adapter counts α/r times")
    site: str = Field(
        default="attention+mlp", description="whole matrices: attention, mlp, attention+mlp, attention.value@3-5, …"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of an adapter's input that is left out in training"
    )
    seed: int = Field(default=0, ge=0, description="of A; B is zero")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if any(term.heads for term in parse(self.site)):
            raise ValueError(
                f"adapters stand beside whole matrices, so the site must not name heads; got {self.site!r}"
            )
        return self

    def attach(self, model: PreTrainedModel) -> None:
        self._wrap(model)

    def touches(self, specimen: Specimen) -> list[str]:
        inside = tuple(f"{path}." for path in matrices(specimen.model, self.site))
        return [name for name, _ in named_tensors(specimen.model) if name.startswith(inside)]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        modules = self._wrap(specimen.model)
        begin(modules, self.seed)
        trained = sum(weight.numel() for module in modules.values() for weight in parts(module)[:2])
        there = sum(p.numel() for p in specimen.model.parameters()) + sum(
            layer.out_features * layer.in_features for _, layer in coded(specimen.model)
        )
        return {"modules": len(modules), "trainable": trained, "share": trained / there}

    def _wrap(self, model: PreTrainedModel) -> dict[str, Any]:
        if (there := next(adapted(model), None)) is not None:
            raise ValueError(f"this model has adapters already, such as that of {there[0]}: `merge` them first")
        paths = matrices(model, self.site)
        head = model.get_output_embeddings()
        if strange := [path for path in paths if model.get_submodule(path) is head]:
            raise ValueError(
                f"the site {self.site!r} has the head {strange[0]} too, whose weights are read without calling it: an adapter "
                "beside it would not be seen"
            )
        return wrap(model, paths, self.rank, self.alpha, self.dropout)
