"""Attention as it is computed: the probabilities of every layer and head, told while the model runs (Vaswani et al. 2017,
"Attention is all you need", section 3.2.1).

    p = softmax(c·tanh(q·kᵀ·scaling / c) + mask)            c: soft cap, where the model has one
    pⱼ = exp(sⱼ) / (exp(z) + Σ exp(s))                      z: sink logit; the rest, exp(z) / (…), goes to nothing

Queries and keys come here as the model made them, after norms and rotation. A model that is listened to lends its
attention for the length of a `with` block; `output_attentions` would leave hooks in it for good. Legend: B rows, H query
heads, G key heads, T queries, S keys, D head_dim.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from lesion import decoder
from lesion.inference import additive

Hear = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Told of each layer: its number, its probabilities [B, H, T, S], and the mass on nothing [B, H, T]."""

_ear: ContextVar[Hear | None] = ContextVar("_ear", default=None)


def probabilities(
    query_BHTD: torch.Tensor,
    key_BGSD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_logit_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, H, T, S] and the mass on nothing [B, H, T], in float32 or better, as the fused kernels keep them.

    mask: added to the scores; broadcast to [B, H, T, S]. Without a sink logit the mass on nothing is 0.
    """
    kind = torch.promote_types(query_BHTD.dtype, torch.float32)
    key = key_BGSD.repeat_interleave(query_BHTD.shape[1] // key_BGSD.shape[1], 1).to(kind)
    scores = query_BHTD.to(kind) @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sink_logit_H is None:
        return scores.softmax(-1), scores.new_zeros(scores.shape[:3])
    nothing = sink_logit_H.to(kind)[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, nothing), -1).softmax(-1)
    return weights[..., :-1], weights[..., -1]


def told_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention for transformers' interface: output [B, T, H, D] and probabilities, which the listener is told as well.

    Raises ValueError where scores have a position bias. Modules without a layer number (of vision towers) tell nothing.
    """
    if position_bias is not None:
        raise ValueError(f"the attention of {type(module).__name__} has a position bias, which is not listened to here")
    t, s = query.shape[2], key.shape[2]
    if attention_mask is None and getattr(module, "is_causal", True):
        seen = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
        attention_mask = additive(seen, torch.float32)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights, nothing = probabilities(query, key, attention_mask, scaling, softcap, s_aux)
    _tell(module, weights, nothing)
    out = weights.to(value.dtype) @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return out.transpose(1, 2).contiguous(), weights


AttentionInterface.register("lesion-maps", told_attention)
AttentionMaskInterface.register("lesion-maps", eager_mask)  # without it transformers would leave out every mask


@contextmanager
def listening(model: PreTrainedModel, hear: Hear) -> Iterator[None]:
    """Tells `hear` of every layer that runs in the `with` block; then the model is as before, whatever happened in it.

    Raises ValueError for an encoder-decoder, whose layers have two attentions of one number.
    """
    if model.config.is_encoder_decoder:
        raise ValueError("attention is listened to in causal models, and this one is encoder-decoder")
    before = _implementations(model.config)
    ear = _ear.set(hear)
    try:
        model.set_attn_implementation("lesion-maps")
        with _sinks_telling(model):
            yield
    finally:
        model.set_attn_implementation(before)
        _ear.reset(ear)


def _implementations(config: Any) -> dict[str, Any]:
    """Which attention a model and each model inside it have now, as `set_attn_implementation` takes it."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    return {
        "": config._attn_implementation,
        **{name: _implementations(part) for name, part in parts.items() if part is not None},
    }


@contextmanager
def _sinks_telling(model: PreTrainedModel) -> Iterator[None]:
    """Our decoder's attention with sinks asks no interface. It calls `attend`, once or for one part of its queries after
    another; what that returns beside the output is gathered here, layer by layer."""
    asked = [m for m in model.modules() if type(m) is decoder.Attention and m.config.sinks != "none"]
    patched = [m for m in asked if "forward" not in m.__dict__]
    attend, parts = decoder.attend, []

    def gathering(*given: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, weights = attend(*given, **how)
        parts.append(weights)
        return out, weights

    def forward(self: decoder.Attention, *given: Any, **how: Any) -> torch.Tensor:
        parts.clear()
        out = decoder.Attention.forward(self, *given, **how)
        if parts:
            weights = torch.cat(parts, 2)
            rest = 1 - weights.float().sum(-1)
            _tell(self, weights, rest.clamp(min=0) if self.sink_logit is not None else torch.zeros_like(rest))
        return out

    if patched:
        decoder.attend = gathering
    for module in patched:
        module.__dict__["forward"] = types.MethodType(forward, module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]
        if patched:
            decoder.attend = attend


def _tell(module: nn.Module, weights: torch.Tensor, nothing: torch.Tensor) -> None:
    hear, layer = _ear.get(), getattr(module, "layer_idx", None)
    if hear is not None and layer is not None:
        hear(layer, weights, nothing)
