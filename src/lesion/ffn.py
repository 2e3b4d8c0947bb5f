"""Feed-forward networks of a model, one a layer, in every family: what they are made of, and what they compute.

f(x) = out(act(in(x)))                     GPT-2, GPT-NeoX, OPT, T5
f(x) = out(act(gate(x)) ⊙ in(x))           gated: Llama, Mistral, Qwen, Gemma, T5 v1.1 (Shazeer 2020)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lesion.contents import contents, type_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS = ("act_fn", "act", "activation_fn")  # what families call it


@dataclass(frozen=True, eq=False)
class Ffn:
    """One network: its matrices as modules, and the module that holds its activation."""

    tower: str
    layer: int
    into: Any
    gate: Any
    out: Any
    owner: nn.Module
    activation: str

    @property
    def item(self) -> str:
        return f"{self.tower}/{self.layer:02d}"

    @property
    def act(self) -> Any:
        return getattr(self.owner, self.activation)

    @property
    def parts(self) -> dict[str, Any]:
        """Its matrices by the names of their sites."""
        found = {"mlp.in": self.into, "mlp.gate": self.gate, "mlp.out": self.out}
        return {name: module for name, module in found.items() if module is not None}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] in the network's own input, behind the norm; dropout is left out."""
        hidden = self.into(x)
        hidden = self.act(hidden) if self.gate is None else self.act(self.gate(x)) * hidden
        found: torch.Tensor = self.out(hidden)
        return found


def ffns(model: PreTrainedModel, towers: bool = False) -> list[Ffn]:
    """The networks of the text model (of all towers, where that is asked), first to last. ValueError where there is none."""
    layers: dict[tuple[str, int], dict[str, str]] = {}
    for entry in contents(model):
        if entry.role == "mlp" and entry.layer is not None and (towers or entry.tower.default):
            layers.setdefault((entry.tower.name, entry.layer), {})[entry.part] = entry.place.path
    if not layers:
        raise ValueError(f"{type_of(model)} has no feed-forward network that lesion.families knows")
    found = []
    for (tower, layer), paths in layers.items():
        owner = model.get_submodule(paths["mlp.in"].rpartition(".")[0])
        names = [name for name in ACTIVATIONS if hasattr(owner, name)]
        if not names or "mlp.out" not in paths:
            raise ValueError(
                f"{type(owner).__name__} is no feed-forward network that is known here: no activation in it"
            )
        into, gate, out = (
            model.get_submodule(paths[part]) if part in paths else None for part in ("mlp.in", "mlp.gate", "mlp.out")
        )
        found.append(Ffn(tower, layer, into, gate, out, owner, names[0]))
    return found


def is_turned(module: nn.Module) -> bool:
    """Whether a module stores its matrix as [in, out]."""
    return isinstance(module, Conv1D)


def oriented(module: Any) -> torch.Tensor:
    """The matrix that a linear module computes with, [out, in], parametrized or not. ValueError where it has an adapter, which is
    no part of that matrix."""
    if "base_layer" in module._modules:
        raise ValueError("a matrix with an adapter beside it is not all that is computed with: merge the adapter first")
    weight: torch.Tensor = module.weight
    return weight.t() if is_turned(module) else weight
