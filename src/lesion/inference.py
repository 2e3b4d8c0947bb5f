"""The model's own forward, arranged for inference: a slot cache, grouped attention, and packed matrices on a CPU.

Nothing here changes what is computed, only the order of the additions: every module keeps its weights, and a module
that is not exactly of a known class, or that carries hooks, keeps its own forward.

Two facts decide the speed of small-batch decoding on a CPU. oneDNN multiplies fp32 matrices about twice as fast as the
default path, faster still when the weight is packed once for many products; and projections that read the same input
are one product when their rows are stacked. Legend of suffixes: B rows, T new tokens, S cache columns, H heads, D head_dim.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from lesion.constraints import Rectified, class_of, signed
from lesion.ffn import oriented

PACK_LIMIT = (
    4 * 2**30
)  # bytes of weights up to which a packed copy is made; a constant, so that results do not depend on load
ROWS = 512  # tokens in a product that packing is made for; it serves few rows as well, and many better than the reverse
COLUMNS = 16  # the cache grows by so many positions


class SlotCache(Cache):
    """Keys and values of B independent rows, column = position, [B, H, S, D] for each layer.

    A row is started, continued and replaced without regard to its neighbours. The last column is never attended to: the
    padding of a prefill is written there.
    """

    def __init__(self, rows: int, columns: int = 0):
        super().__init__(layers=[])
        self.rows, self.columns = rows, 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.turn_to(torch.arange(rows), torch.zeros(rows, 1, dtype=torch.long))
        self.reserve(columns)

    def turn_to(self, slots: torch.Tensor, at: torch.Tensor) -> None:
        """Says which rows the next forward is about, and at which columns [len(slots), T] its tokens are."""
        self.slots, self.at = slots, at
        self._place: dict[int, torch.Tensor] = {}
        self.whole = len(slots) == self.rows and bool((slots[1:] > slots[:-1]).all())

    def reserve(self, columns: int) -> None:
        """Makes room for so many columns and the spare one."""
        if columns + 1 > self.columns:
            grown = -(-(columns + 1) // COLUMNS) * COLUMNS
            self.keys = [F.pad(k, (0, 0, 0, grown - self.columns)) for k in self.keys]
            self.values = [F.pad(v, (0, 0, 0, grown - self.columns)) for v in self.values]
            self.columns = grown

    def keep_rows(self, slots: torch.Tensor) -> None:
        """Drops all other rows."""
        self.keys, self.values = [k[slots] for k in self.keys], [v[slots] for v in self.values]
        self.rows = len(slots)

    def clear(self, slots: torch.Tensor) -> None:
        """Forgets rows. What is masked has the weight 0, and 0 · NaN is NaN: a row must not meet what another left behind."""
        for layer in (*self.keys, *self.values):
            layer[slots] = 0

    def copy_prefix(self, prefix: SlotCache, slots: torch.Tensor, length: int) -> None:
        """Starts rows from the first `length` columns of a cache of one row."""
        for mine, theirs in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for layer, tensor in enumerate(theirs):
                if layer == len(mine):
                    mine.append(tensor.new_zeros(self.rows, tensor.shape[1], self.columns, tensor.shape[3]))
                mine[layer][slots, :, :length] = tensor[:, :, :length]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Stores [n, H, T, D] at (slots, at) and returns all columns of these rows."""
        while len(self.keys) <= layer_idx:
            shape = self.rows, key_states.shape[1], self.columns, key_states.shape[3]
            self.keys.append(key_states.new_zeros(shape))
            self.values.append(value_states.new_zeros((*shape[:3], value_states.shape[3])))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self.whole and key_states.shape[2] == 1:
            index = self._places(key_states.shape[1])
            for whole, new in ((keys, key_states), (values, value_states)):
                whole.view(-1, whole.shape[-1]).index_copy_(0, index, new.reshape(-1, whole.shape[-1]))
            return keys, values
        places = self.slots[:, None], slice(None), self.at
        keys[places] = key_states.transpose(1, 2)
        values[places] = value_states.transpose(1, 2)
        return (keys, values) if self.whole else (keys[self.slots], values[self.slots])

    def _places(self, heads: int) -> torch.Tensor:
        """Where the one new token of every row and head lies in the flattened cache [B·H·S]; the same in all layers."""
        if heads not in self._place:
            first = torch.arange(self.rows * heads, device=self.at.device) * self.columns
            self._place[heads] = (first.view(self.rows, heads) + self.at).view(-1)
        return self._place[heads]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def mask(self, window: int | None, dtype: torch.dtype, shows: torch.Tensor | None = None) -> torch.Tensor:
        """Additive mask [n, 1, T, S]: a token sees the columns up to its own, within the window where there is one.

        shows [n, T]: the picture a token stands for, 0 for text; tokens of one picture see each other both ways.
        """
        column, at = torch.arange(self.columns, device=self.at.device), self.at[:, None, :, None]
        seen = column <= at
        if shows is not None:
            there = torch.zeros(len(shows), self.columns, dtype=shows.dtype, device=shows.device)
            there = there.scatter_(1, self.at, shows)[:, None, None, :]
            seen |= (there == shows[:, None, :, None]) & (there > 0)
        if window is not None:
            seen &= column > at - window
        seen[..., 0] |= self.at[:, None] == self.columns - 1  # padding sees something, so that it stays finite
        return additive(seen, dtype)


def additive(seen: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """A mask to be added to scores: 0 where something is seen, the least number of its type elsewhere."""
    return torch.zeros(seen.shape, dtype=kind, device=seen.device).masked_fill_(~seen, torch.finfo(kind).min)


MASK_BY_KIND = {"qwen2", "gemma2", "gemma3_text"}  # these take one mask for each kind of layer


def mask_by_kind(text: Any, make: Callable[[int | None], torch.Tensor]) -> Any:
    """The attention mask as a model with this text configuration wants it: one, or a dictionary with one for each kind of
    its layers. `make(window)` makes the mask of a sliding window, or without any (None)."""
    window = getattr(text, "sliding_window", None)
    if "sliding_attention" in set(getattr(text, "layer_types", None) or ()) or text.model_type in MASK_BY_KIND:
        return {"full_attention": make(None), "sliding_attention": make(window)}
    return make(window)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q·kᵀ·scaling + mask)·v for query [B, Hq, T, D] and key, value [B, Hkv, S, D]; returns [B, T, Hq, D].

    One new token attends without copying keys for each query head of a group, and without copying the cache.
    """
    if extra := [name for name in ("position_bias", "s_aux") if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {extra[0]} is not arranged here; this model keeps its own attention")
    b, heads, t, d = query.shape
    groups, s = key.shape[1], key.shape[2]
    scaling = d**-0.5 if scaling is None else scaling
    if t == 1 and attention_mask is not None and attention_mask.is_floating_point() and softcap is None:
        rows = b * groups
        q_BGD = (query * scaling).reshape(rows, heads // groups, d)
        mask = attention_mask.expand(b, groups, 1, s).reshape(rows, 1, s)
        scores = torch.baddbmm(mask, q_BGD, key.reshape(rows, s, d).transpose(1, 2))
        out = torch.bmm(scores.softmax(-1), value.reshape(rows, s, value.shape[-1]))
        return out.view(b, 1, heads, -1), None
    if softcap is not None:
        scores = query @ key.repeat_interleave(heads // groups, 1).transpose(2, 3) * scaling
        scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is None:
            attention_mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
        if not attention_mask.is_floating_point():
            attention_mask = additive(attention_mask, scores.dtype)
        out = (scores + attention_mask).softmax(-1, dtype=torch.float32).to(value.dtype) @ value.repeat_interleave(
            heads // groups, 1
        )
        return out.transpose(1, 2), None
    return fused_attention(module, query, key, value, attention_mask, scaling), None


def fused_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """torch's own kernel, heads grouped: [B, T, Hq, D]. Without a mask it is causal, unless the module says otherwise."""
    causal = mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2)


AttentionInterface.register("lesion", grouped_attention)
AttentionMaskInterface.register("lesion", sdpa_mask)  # without it transformers would leave out sliding windows


_arranged: set[int] = set()  # models inside of a block


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Arranges a model for inference for the length of a `with` block.

    Weights must not change inside the block: packed copies are made of them. Inside of another such block nothing is done
    again: a search arranges its model once, and not for each of its scores.
    """
    if id(model) in _arranged:
        with torch.inference_mode():
            yield
        return
    patched: list[nn.Module] = []
    before = model.config._attn_implementation
    ours = not model.config.is_encoder_decoder  # T5 adds a position bias of its own to the scores
    with torch.inference_mode():
        if ours:
            model.set_attn_implementation("lesion")
        _arranged.add(id(model))
        try:
            if model.device.type == "cpu":
                _arrange(model, patched)
            yield
        finally:
            _arranged.discard(id(model))
            for module in patched:
                del module.__dict__["forward"]
            if ours:
                model.set_attn_implementation(before)


def _arrange(model: nn.Module, patched: list[nn.Module]) -> None:
    pack = sum(p.numel() * p.element_size() for p in model.parameters()) <= PACK_LIMIT
    done: set[nn.Module] = set()
    for module in model.modules():
        if module in done or not _plain(module):
            continue
        forward = None
        if _is_layer(module) and all(map(_plain, module.modules())) and all(map(_is_linear, _linears(module))):
            done.update(module.modules())
            forward = _layer(module, pack)
        elif isinstance(module, nn.Linear) and _is_linear(module):
            product = _linear([module], pack)
            forward = lambda self, input, product=product: product(input)  # noqa: E731
        elif signed(module) is not None:
            forward = _constant(module)
        if forward is not None:
            module.forward = types.MethodType(forward, module)
            patched.append(module)


def _constant(module: Any) -> Callable[..., torch.Tensor]:
    """A linear module of another class whose weight is held to a sign: the weight is computed once, and not at each use."""
    weight, bias, rectified = oriented(module).detach(), module.bias, isinstance(module, Rectified)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        found = F.linear(x, weight, bias)
        return found.clamp(min=0) if rectified else found

    return forward


# Exactly these classes of transformers compute what `_layer` computes.
_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
CONSTRAINTS = "lesion.constraints", "torch.nn.utils.parametrize"  # compute a weight, or an activation, which they say
OURS = "lesion.decoder"  # our own decoder's layers compute the same where they have neither sinks nor experts


def _plain(module: nn.Module) -> bool:
    """True where nobody has hooked, wrapped or patched the module, or parametrized it but to hold its weights to a sign."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    known = class_of(module).__module__.startswith(("transformers.", "torch.nn.modules.", OURS, *CONSTRAINTS))
    foreign = "parametrizations" in module._modules and signed(module) is None
    return not hooks and known and "forward" not in module.__dict__ and not foreign


def _is_layer(module: Any) -> bool:
    if type(module).__module__ == OURS and type(module).__name__ == "DecoderLayer":
        return module.self_attn.config.sinks == "none" and hasattr(module.mlp, "gate_proj")
    return type(module).__name__ in _LAYERS


def _linears(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if isinstance(inner, nn.Linear)]


def _is_linear(module: nn.Module) -> bool:
    return class_of(module) is nn.Linear and module.weight.dtype in (torch.float32, torch.bfloat16)


def _linear(modules: list[nn.Linear], pack: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """x ↦ x·[W₁; W₂; …]ᵀ + [b₁; b₂; …] as one oneDNN product."""
    if len(modules) > 1 and not pack:  # stacking would copy the weights for nothing
        parts = [_linear([m], pack) for m in modules]
        return lambda x: torch.cat([part(x) for part in parts], -1)
    weight = torch.cat([m.weight.detach() for m in modules]) if len(modules) > 1 else modules[0].weight.detach()
    biases = [m.bias.detach() for m in modules if m.bias is not None]
    assert len(biases) in (0, len(modules)), "projections that read the same input have biases all or none"
    bias = torch.cat(biases) if biases else None
    if pack:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, weight, bias, "none", [], "")


def _layer(module: Any, pack: bool) -> Callable[..., torch.Tensor]:
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)), with RMS norms, half-split rotation of queries and
    keys (Su et al. 2021), grouped heads and a gated mlp. Projections of the same input are one product, and queries
    and keys are rotated together."""
    attention, mlp = module.self_attn, module.mlp
    project = _linear([attention.q_proj, attention.k_proj, attention.v_proj], pack)
    output, gate_up, down = (
        _linear(some, pack) for some in ([attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
    )
    d = attention.head_dim
    heads, groups = attention.q_proj.out_features // d, attention.k_proj.out_features // d
    first, second = module.input_layernorm, module.post_attention_layernorm

    def norm(x: torch.Tensor, how: Any) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), how.weight, how.variance_epsilon)

    def layer(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: Any, past: Cache | None) -> torch.Tensor:
        b, t, _ = x.shape
        qkv_BTHD = project(norm(x, first)).view(b, t, heads + 2 * groups, d)
        qk = qkv_BTHD[:, :, : heads + groups]
        turned = torch.cat((-qk[..., d // 2 :], qk[..., : d // 2]), -1)
        qk = torch.addcmul(qk * cos, turned, sin).transpose(1, 2)
        query, key, value = qk[:, :heads], qk[:, heads:], qkv_BTHD[:, :, heads + groups :].transpose(1, 2)
        if past is not None:
            key, value = past.update(key, value, attention.layer_idx)
        out, _ = grouped_attention(attention, query, key, value, mask, scaling=attention.scaling)
        x = x + output(out.reshape(b, t, -1))
        gate, up = gate_up(norm(x, second)).chunk(2, -1)
        return x + down(mlp.act_fn(gate).mul_(up))

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        assert position_embeddings is not None
        cos, sin = (part[:, :, None] for part in position_embeddings)  # [B, T, 1, D]
        return layer(hidden_states, cos, sin, attention_mask, cache)

    def own(self: Any, x: torch.Tensor, where: Any, mask: Any, past: Cache | None, **kwargs: Any) -> torch.Tensor:
        cos, sin = (part.transpose(1, 2) for part in where.turns(x.dtype))
        return layer(x, cos, sin, mask, past)

    return own if type(module).__module__ == OURS else forward
