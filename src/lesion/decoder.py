"""Our decoder: RMSNorm → attention → RMSNorm → SwiGLU, with rotary positions and grouped heads (Touvron et al. 2023).

An ordinary transformers model, so `generate`, peft, lm-eval and our own bench know it, and its parameters are named as
Llama's are: a Llama checkpoint loads into it, strictly, and computes the same. Beyond Llama it has attention sinks
(`lesion.sinks`) and mixtures of experts (`lesion.experts`), and projections that write into the residual stream begin
1/√(2L) as large (Radford et al. 2019, section 2.3).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lesion.experts import Experts
from lesion.shapes import SIZES as SIZES
from lesion.shapes import DecoderConfig
from lesion.sinks import angles, attend, turn

SCORES = 2**25  # pairs of query and key that are scored at a time while nothing is learned


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · w, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.variance_epsilon).to(x.dtype)


class Where:
    """Positions of the new tokens [B, T] and what they need to find those of the keys."""

    def __init__(self, at: torch.Tensor, frequencies: torch.Tensor, mask_BS: torch.Tensor | None):
        self.at, self.frequencies, self.mask_BS = at, frequencies, mask_BS
        self._turns: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def in_order(self) -> bool:
        """Whether positions are those of one text from its beginning, as they stand."""
        return bool((self.at == torch.arange(self.at.shape[1], device=self.at.device)).all())

    def turns(self, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, 1, T, D] of the new tokens' rotation, the same in all layers."""
        if kind not in self._turns:
            self._turns[kind] = angles(self.at, self.frequencies, kind)
        return self._turns[kind]

    def of_keys(self, past: Any, count: int) -> torch.Tensor:
        """Positions [B, S] of the keys: without a cache those of the tokens themselves; else those that a rolling cache
        tells, or those that the padding leaves, or their columns."""
        if past is None:
            return self.at
        if hasattr(past, "key_positions"):
            return past.key_positions().expand(len(self.at), -1)
        if self.mask_BS is not None:
            return (self.mask_BS.long().cumsum(1) - 1).clamp(min=0)
        return torch.arange(count, device=self.at.device).expand(len(self.at), -1)

    def seen(self, mask: Any, count: int, past: Any) -> torch.Tensor | None:
        """What may be looked at beside the causal rule: no padding, and whatever a mask of four axes says."""
        if isinstance(mask, torch.Tensor) and mask.dim() == 4:
            return mask if mask.dtype == torch.bool else mask >= 0
        if self.mask_BS is not None and not hasattr(past, "key_positions"):
            return self.mask_BS.bool()[:, None, None, :]
        return None


class Attention(nn.Module):
    """Grouped-query attention; with sinks, keys are cached before they are rotated."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups, self.scaling, self.is_causal = heads // groups, config.head_dim**-0.5, True
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=False)
        self.o_proj = _writer(heads * self.head_dim, config.hidden_size)
        self.sink_logit = nn.Parameter(torch.zeros(heads)) if config.sinks == "logit" else None

    def forward(self, x: torch.Tensor, where: Where, mask: Any, past: Cache | None, **kwargs: Any) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.sinks == "none":
            q, k = (turn(part, *where.turns(q.dtype)) for part in (q, k))
            if past is not None:
                k, v = past.update(k, v, self.layer_idx)
            function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
            out = function(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **kwargs)[0]
        else:
            if past is not None:
                k, v = past.update(k, v, self.layer_idx)
            out = self._attend(q, k, v, where, mask, past)
        return self.o_proj(out.reshape(b, t, -1))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: Where, mask: Any, past: Any) -> Any:
        """A long text is read in parts where nothing is learned from it: scores of all pairs would fill the memory. Where
        nothing but the window is asked, a part looks at the keys of its window and at the sinks, and not at all keys."""
        config, (b, heads, t, _), s = self.config, q.shape, k.shape[2]
        seen, key_at = where.seen(mask, s, past), where.of_keys(past, s)
        sinks = config.sink_tokens if config.sinks in ("cache", "tokens") else 0
        rows = t if torch.is_grad_enabled() else max(1, SCORES // (b * heads * s))
        near = config.window is not None and t > 2 * config.window and past is None and seen is None and where.in_order
        if banded := near and config._attn_implementation != "lesion-maps":  # maps show all pairs
            rows = min(rows, config.window)
        parts = []
        for i in range(0, t, rows):
            part = slice(i, i + rows)
            keys: Any = slice(None)
            if banded:
                low = max(0, i - config.window + 1)
                first = torch.arange(min(sinks, low), device=q.device)
                keys = torch.cat((first, torch.arange(low, min(t, i + rows), device=q.device)))
            out, _ = attend(
                q[:, :, part],
                k[:, :, keys],
                v[:, :, keys],
                at_BT=where.at[:, part],
                key_at_BS=key_at[:, keys],
                seen=seen if seen is None or seen.shape[2] == 1 else seen[:, :, part],
                frequencies=where.frequencies,
                window=config.window,
                sinks=sinks,
                sink_logit=self.sink_logit,
            )
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = _writer(config.intermediate_size, config.hidden_size)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        e, k = config.experts, config.experts_per_token
        sizes = config.hidden_size, config.intermediate_size
        self.mlp = Experts(*sizes, e, k, config.capacity_factor) if e else MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, where: Where, mask: Any, past: Cache | None, **kwargs: Any) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), where, mask, past, **kwargs)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderPreTrainedModel(PreTrainedModel):
    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        writes = std / math.sqrt(2 * self.config.num_hidden_layers)  # what ends in the residual stream
        match module:
            case nn.Linear() | nn.Embedding():
                module.weight.normal_(0, writes if hasattr(module, "writes") else std)
            case Attention() if module.sink_logit is not None:
                module.sink_logit.zero_()
            case Experts():
                module.gate_up_proj.normal_(0, std)
                module.down_proj.normal_(0, writes)
            case RMSNorm():
                module.weight.fill_(1)


class DecoderModel(DecoderPreTrainedModel):
    """The stack without its head."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cached = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cached and cache is None:
            cache = DynamicCache()
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]  # padding has no place
        if position_ids is None:
            before = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(before, before + x.shape[1], device=x.device)[None]
        d = self.config.head_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float) / d)
        flat = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
        where = Where(position_ids.expand(len(x), -1), frequencies, flat)
        mask = attention_mask
        if self.config.sinks == "none":
            kind = x.device.type  # turned here and not in the first layer, so that all compiled layers find the same
            where.turns(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                cache=cache,
                position_ids=position_ids,
            )
        for layer in self.layers:
            x = layer(x, where, mask, cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), cache=cache)


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The stack and its head. With labels the loss is transformers' own, plus the routers' losses where there are any."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers reads it from the class

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = DecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        hidden = out.last_hidden_state[:, logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else kept]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = (
                self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size) + self.router_loss()
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=out.cache)

    def router_loss(self) -> torch.Tensor:
        """Balance and z losses of all mixtures, weighted, of the last forward; zero for a dense model."""
        balance, z = (sum(m.losses[name] for m in self._mixtures()) for name in ("balance", "z"))
        return torch.as_tensor(self.config.balance_weight * balance + self.config.z_weight * z)

    def routed(self) -> tuple[int, int, float]:
        """Of the last forward: pairs of token and expert, how many were dropped, and the largest load by the mean load."""
        counts = [m.counts for m in self._mixtures()]
        pairs = sum(int(c["load"].sum()) for c in counts)
        busiest = max(float(c["load"].max() / c["load"].float().mean()) for c in counts)
        return pairs, sum(int(c["dropped"]) for c in counts), busiest

    def _mixtures(self) -> list[Any]:
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, Experts)]


def _writer(size: int, hidden: int) -> nn.Linear:
    """A projection that writes into the residual stream, marked so that it begins smaller."""
    made = nn.Linear(size, hidden, bias=False)
    made.writes = True  # type: ignore[assignment]
    return made


def _eager(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Attention by its formula, for `attn_implementation="eager"`."""
    k, v = (part.repeat_interleave(module.num_key_value_groups, 1) for part in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModel.register(DecoderConfig, DecoderModel)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
