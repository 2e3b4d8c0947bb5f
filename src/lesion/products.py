"""Products for training on a CPU: float32 matrices through oneDNN, and attention in bfloat16 by its formula.

torch's own path for float32 reaches half of what a processor without Intel's name can do; oneDNN's reaches nearly all of
it. Three products belong to a linear layer:  y = x·Wᵀ,  ∂x = g·W,  ∂W = gᵀ·x.  Other types and devices keep torch's path,
which uses oneDNN for bfloat16 anyway. The numbers are the same but for the order of additions.

In bfloat16 torch's fused attention spends most of its time in its backward pass; for rows of a few hundred tokens three
batched products and a softmax are a third faster, and round as the fused kernel does, at the scores and the weights.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from lesion.constraints import class_of, signed
from lesion.inference import additive, fused_attention

LONGEST = 512  # tokens of a row up to which attention goes by its formula: beyond, its scores would fill the memory


def fits(*tensors: torch.Tensor) -> bool:
    """Whether oneDNN is to be asked: float32 on a CPU, outside autocast."""
    return not torch.is_autocast_enabled("cpu") and all(
        t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors
    )


def times_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., K] · b [N, K]ᵀ → [..., N]."""
    if fits(a, b) and a.numel() and b.numel():
        return _onednn(a, b, None)
    return a @ b.T


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.lesion.onednn(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("lesion::onednn", mutates_args=())
def _opaque(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same as an operator of our own: the compiler's knowledge of oneDNN's holds for constant weights only."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_opaque.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _onednn(x, weight, bias)

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


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q·kᵀ·scaling + mask)·v for [B, H, T, D], in bfloat16 under autocast; returns [B, T, H, D]. Whatever is longer,
    of another type, or asks for more (dropout, soft caps) goes to torch's fused kernel."""
    b, heads, t, d = query.shape
    scaling = d**-0.5 if scaling is None else scaling
    short = torch.is_autocast_enabled("cpu") and key.shape[2] == t <= LONGEST
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("this attention is not arranged for training; the model keeps its own")
    if not short or dropout or query.device.type != "cpu":
        return fused_attention(module, query, key, value, attention_mask, scaling, dropout), None
    kind = torch.get_autocast_dtype("cpu")
    q, k, v = (part.to(kind).repeat_interleave(heads // part.shape[1], 1).flatten(0, 1) for part in (query, key, value))
    if attention_mask is None:
        below = torch.ones(1, t, t, dtype=torch.bool).tril()
        mask = additive(below, kind)  # one for all rows and heads: what is broadcast is read from the cache
    else:
        if attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, kind)
        mask = attention_mask.to(kind).expand(b, heads, t, t).reshape(b * heads, t, t)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), v).view(b, heads, t, d).transpose(1, 2), None


AttentionInterface.register("lesion-train", attention)
AttentionMaskInterface.register("lesion-train", sdpa_mask)  # without it transformers would leave out sliding windows


@contextmanager
def fast_products(model: PreTrainedModel) -> Iterator[None]:
    """Linear layers of a model go through `linear`, and attention that was torch's fused one through `attention`, for the
    length of a `with` block. Layers that are not exactly `nn.Linear`, or that somebody has patched or parametrized, keep
    their own forward, unless it is we who hold their weights to a sign."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    ours = before == "sdpa" and model.device.type == "cpu" and not model.config.is_encoder_decoder
    if ours:
        model.set_attn_implementation("lesion-train")
    patched = [
        m
        for m in model.modules()
        if class_of(m) is nn.Linear
        and "forward" not in m.__dict__
        and ("parametrizations" not in m._modules or signed(m))
    ]
    for module in patched:
        module.__dict__["forward"] = types.MethodType(lambda self, x: linear(x, self.weight, self.bias), module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]
        if ours:
            model.set_attn_implementation(before)
