"""Products of float32 matrices through oneDNN, forward and backward, for training on a CPU.

torch's own path for float32 reaches half of what a processor without Intel's name can do; oneDNN's reaches nearly all of
it. Three products belong to a linear layer:  y = x·Wᵀ,  ∂x = g·W,  ∂W = gᵀ·x.  Other types and devices keep torch's path,
which uses oneDNN for bfloat16 anyway. The numbers are the same but for the order of additions.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def fits(*tensors: torch.Tensor) -> bool:
    """Whether oneDNN is to be asked: float32 on a CPU, outside autocast."""
    return not torch.is_autocast_enabled("cpu") and all(
        t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors
    )


def times_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., K] · b [N, K]ᵀ → [..., N]."""
    if fits(a, b) and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Any:
        (g,) = above
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = times_transposed(g, weight.T.contiguous()) if wants_x else None
        grad_weight = times_transposed(flat_g.T, flat_x.T) if wants_weight else None
        grad_bias = flat_g.sum(0) if ctx.has_bias and wants_bias else None
        return grad_x, grad_weight, grad_bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x·weightᵀ + bias, differentiable once."""
    if fits(x, weight) and x.numel():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Linear layers of a model go through `linear` for the length of a `with` block. Layers that are not exactly
    `nn.Linear`, or that somebody has patched or parametrized, keep their own forward."""
    patched = [
        m
        for m in model.modules()
        if type(m) is nn.Linear and "forward" not in m.__dict__ and "parametrizations" not in m._modules
    ]
    for module in patched:
        module.__dict__["forward"] = types.MethodType(lambda self, x: linear(x, self.weight, self.bias), module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]
