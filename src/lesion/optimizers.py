"""Optimizers by name. What is asked for is what is used: an unknown name is refused and none is ever substituted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

OptimizerName = Literal["adamw", "adam", "adafactor", "sgd", "sgd-momentum", "signsgd"]
EPSILON = 1e-8


class SignSGD(torch.optim.Optimizer):
    """w ← w − lr·(sign(g) + λ·w) (Bernstein et al. 2018)."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes gradients itself"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad.sign(), alpha=-group["lr"])


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; norms, biases and embeddings (which tied heads are) do not, nor does
    the V of a weight that is held to a sign, whose decay would pull softplus(V) up to 0.69."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(v) for m in model.modules() if isinstance(m, ParametrizationList) for v in m.parameters()}
    found: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in model.parameters():
        if p.requires_grad:
            found[p.dim() >= 2 and id(p) not in tables].append(p)
    made = [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for decays, params in found.items()
        if params
    ]
    if not made:
        raise ValueError("this model has no parameter that can be trained")
    return made


def optimizer(
    name: OptimizerName, params: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.Optimizer:
    """Adam's ε is 1e-8; momentum is betas[0]. Adam's decay is added to the gradient, AdamW's is not (Loshchilov & Hutter)."""
    match name:
        case "adamw":
            return torch.optim.AdamW(params, lr=lr, betas=betas, eps=EPSILON, fused=True)
        case "adam":
            return torch.optim.Adam(params, lr=lr, betas=betas, eps=EPSILON, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(params, lr=lr)
        case "sgd":
            return torch.optim.SGD(params, lr=lr)
        case "sgd-momentum":
            return torch.optim.SGD(params, lr=lr, momentum=betas[0])
        case "signsgd":
            return SignSGD(params, lr=lr)
    raise ValueError(f"no optimizer {name!r}; there are: adamw, adam, adafactor, sgd, sgd-momentum, signsgd")
