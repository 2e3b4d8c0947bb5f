"""Second derivatives of the language-modelling loss: products of its Hessian, or of its Gauss-Newton matrix, with vectors.

    L(θ) = Σ −ln p(target) / |targets| over a fixed batch          in nats
    H v  = ∂/∂θ ⟨∂L/∂θ, v⟩                                         (Pearlmutter 1994)
    G v  = Jᵀ (diag(p) − p pᵀ) J v / |targets|,  J = ∂logits/∂θ    (Schraudolph 2002), positive semidefinite

θ are whole matrices of chosen sites, flattened one after the other; everything else is held fixed. Embedding rows of tokens that
the batch does not hold, and the shift of a head that its softmax does not see, are directions of no curvature for a trivial
reason, so sites without embedding and head are the ones to ask about.

The graph of the gradient is kept, so that a product costs one more backward pass through it and no forward; on a CPU its
float32 products go through oneDNN. Attention must be twice differentiable, which torch's fused kernels are not.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lesion.constraints import class_of
from lesion.inference import additive
from lesion.loss import IGNORE
from lesion.products import fits, times_transposed
from lesion.sites import resolve

Operator = Literal["hessian", "gauss-newton"]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]  # ids, targets, mask, positions [B, T]
TWICE = "lesion-twice", "eager"  # attention that can be differentiated twice


class _Product(torch.autograd.Function):
    """a [..., K] · b [N, K]ᵀ, differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return times_transposed(a, b)

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Any:
        (g,), (a, b) = above, ctx.saved_tensors
        grad_a = product(g, b.T.contiguous()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_a, None
        return grad_a, product(g.reshape(-1, g.shape[-1]).T, a.reshape(-1, a.shape[-1]).T)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., K] · b [N, K]ᵀ → [..., N]."""
    if fits(a, b) and a.numel() and b.numel():
        found: torch.Tensor = _Product.apply(a, b)
        return found
    return a @ b.T


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q·kᵀ·scaling + mask)·v by its formula: query [B, Hq, T, D], key and value [B, Hkv, S, D] → [B, T, Hq, D]."""
    if extra := [name for name in ("position_bias", "s_aux") if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {extra[0]} is not differentiated twice here")
    b, heads, t, d = query.shape
    groups, s = key.shape[1], key.shape[2]
    q_BGND = query.reshape(b, groups, heads // groups * t, d)
    scores = (q_BGND @ key.transpose(2, 3)).view(b, heads, t, s) * (d**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None and getattr(module, "is_causal", True):
        attention_mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
    if attention_mask is not None:
        bool_mask = attention_mask.dtype == torch.bool
        scores = scores + (additive(attention_mask, scores.dtype) if bool_mask else attention_mask)
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    out = weights.view(b, groups, heads // groups * t, s) @ value
    return out.view(b, heads, t, -1).transpose(1, 2), None


AttentionInterface.register("lesion-twice", attention)
AttentionMaskInterface.register("lesion-twice", sdpa_mask)


@contextmanager
def twice_differentiable(model: Any) -> Iterator[None]:
    """Attention by its formula, and linear layers through `product`, for the length of a `with` block.

    Raises ValueError for a model whose attention transformers cannot replace.
    """
    before = model.config._attn_implementation
    ours = not model.config.is_encoder_decoder
    if not ours and before not in TWICE:
        raise ValueError(f"second derivatives need attention of kind {' or '.join(TWICE)}; this model has {before!r}")
    if ours:
        model.set_attn_implementation("lesion-twice")
    patched = [m for m in model.modules() if class_of(m) is nn.Linear and "forward" not in m.__dict__]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = product(x, self.weight)
        return y if self.bias is None else y + self.bias

    for module in patched:
        module.__dict__["forward"] = types.MethodType(forward, module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]
        if ours:
            model.set_attn_implementation(before)


def chosen(model: Any, site: str) -> dict[str, nn.Parameter]:
    """The whole matrices of a site, by name. Raises ValueError where a site means a part of one, or what is held as another
    type than float32 or float64: second derivatives in sixteen bits are noise."""
    named, sizes = dict(model.named_parameters()), dict[str, int]()
    for view in resolve(model, site):
        sizes[view.name] = sizes.get(view.name, 0) + view.tensor.numel()
    for name, size in sizes.items():
        if size != named[name].numel():
            raise ValueError(f"curvature is of whole matrices, and {site!r} is a part of {name} in this family")
        if named[name].dtype not in (torch.float32, torch.float64):
            kind = str(named[name].dtype).removeprefix("torch.")
            raise ValueError(f"second derivatives need float32 weights or better; {name} is held in {kind}")
    return {name: named[name] for name in named if name in sizes}


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


class Curvature:
    """The loss of one fixed batch around the weights that a model has now, as an operator on flat vectors [N] of the chosen
    parameters: `gradient()`, and `times(v)`, symmetric. A `with` block, in which the weights must not change.

    Rows are computed `rows` at a time; all their graphs are kept, or with `keep=False` built anew for each product, which takes
    half as long again and a fraction of the memory. Raises ValueError for a batch without targets, and before any compute for
    attention that cannot be differentiated twice.
    """

    def __init__(
        self,
        model: Any,
        parameters: dict[str, nn.Parameter],
        batch: Batch,
        operator: Operator = "hessian",
        *,
        rows: int = 0,
        keep: bool = True,
    ):
        if not parameters:
            raise ValueError("curvature over no parameters: the site is empty")
        check_attention(model)
        self.model, self.names, self.operator, self.keep = model, list(parameters), operator, keep
        self.parameters = list(parameters.values())
        self.size, self.products = sum(p.numel() for p in self.parameters), 0
        self.targets = int((batch[1] != IGNORE).sum())
        if not self.targets:
            raise ValueError("a batch without targets has no loss, and so no curvature")
        rows = rows or len(batch[0])
        self._pieces: list[Batch] = list(
            zip(*([None] * -(-len(batch[0]) // rows) if x is None else x.split(rows) for x in batch), strict=True)
        )
        self._graphs: list[Any] = []

    def __enter__(self) -> Curvature:
        inside = {id(p) for p in self.parameters}
        self._wanted = [(p, p.requires_grad) for p in self.model.parameters()]
        for p, _ in self._wanted:
            p.requires_grad_(id(p) in inside)
        self._training = self.model.training
        self.model.eval()
        try:
            if self.keep:
                with torch.enable_grad():
                    self._graphs = [self._graph(piece) for piece in self._pieces]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._graphs = []
        self.model.train(self._training)
        for p, wanted in self._wanted:
            p.requires_grad_(wanted)

    def _logits(self, piece: Batch) -> torch.Tensor:
        ids, _, mask, at = (x.to(self.model.device) if x is not None else None for x in piece)
        found: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False).logits
        return found

    def _graph(self, piece: Batch) -> tuple[Any, ...]:
        """What a product goes back through: the gradient, or of Gauss-Newton the logits and ⟨Jᵀu⟩ as a function of u."""
        logits, target = self._logits(piece), piece[1].to(self.model.device)
        if self.operator == "hessian":
            grads = torch.autograd.grad(loss_of(logits, target) / self.targets, self.parameters, create_graph=True)
            return (grads,)
        scored = logits[target != IGNORE]
        u = torch.zeros_like(scored, requires_grad=True)
        pulled = torch.autograd.grad(scored, self.parameters, grad_outputs=u, create_graph=True)
        return scored, u, pulled

    def gradient(self) -> torch.Tensor:
        """∂L/∂θ [N]."""
        total = torch.zeros(self.size, dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        if self.operator == "hessian" and self._graphs:
            for (grads,) in self._graphs:
                total += flat([g.detach() for g in grads])
            return total
        with torch.enable_grad():
            for piece in self._pieces:
                loss = loss_of(self._logits(piece), piece[1].to(self.model.device)) / self.targets
                total += flat(torch.autograd.grad(loss, self.parameters))
        return total

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """H v or G v [N]. Raises ValueError for a vector of another length."""
        if v.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} numbers, got {tuple(v.shape)}")
        self.products += 1
        parts = [
            x.view_as(p) for x, p in zip(v.split([p.numel() for p in self.parameters]), self.parameters, strict=True)
        ]
        total = torch.zeros_like(v)
        with torch.enable_grad():
            for number, piece in enumerate(self._pieces):
                graph = self._graphs[number] if self.keep else self._graph(piece)
                total += self._through(graph, parts)
        return total

    def _through(self, graph: tuple[Any, ...], v: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.operator == "hessian":
            (grads,) = graph
            found = torch.autograd.grad(
                grads, self.parameters, v, retain_graph=self.keep, allow_unused=True, materialize_grads=True
            )
            return flat(found)
        scored, u, pulled = graph
        (moved,) = torch.autograd.grad(pulled, u, v, retain_graph=True)  # J v
        p = scored.detach().softmax(-1)
        above = p * (moved - (p * moved).sum(-1, keepdim=True)) / self.targets
        return flat(torch.autograd.grad(scored, self.parameters, above, retain_graph=self.keep))


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Σ −ln p(target) over targets that are not IGNORE, twice differentiable: the loss of `lesion.loss`, with all its logits."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(kind).flatten(0, 1), target.flatten(), reduction="sum", ignore_index=IGNORE)


def check_attention(model: Any) -> None:
    """Raises ValueError for attention without a second derivative."""
    kind = model.config._attn_implementation
    if kind not in TWICE:
        raise ValueError(
            f"attention of kind {kind!r} has no second derivative; use `with twice_differentiable(model)`, or load the model "
            "with attn_implementation='eager'"
        )
