"""The one loss of training: −Σ ln p(target) over tokens, without ever holding all logits.

    z = h·Wᵀ,   loss = Σᵢ logsumexp(zᵢ) − zᵢ[tᵢ],   ∂loss/∂z = softmax(z) − onehot(t)

Logits are made and consumed a chunk of tokens at a time, and their gradients right with them, since the gradient of a sum is
known without waiting for the rest (the idea of Wijmans et al. 2024, "Cut your losses", in plain torch). Peak memory is a
chunk of logits instead of all of them twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from lesion.products import times_transposed

CHUNK_BYTES = 8 * 2**20  # of float32 logits that are held at a time: what a processor keeps near
LEAST = (
    256  # tokens of a chunk at the least, for the product's sake: with a large vocabulary its weights are the larger
)
IGNORE = -100  # a target that is not scored


def of_logits(logits: torch.Tensor, targets: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """−ln p of each target, 0 where it is not scored, in float32; and, where it is wanted, its gradient by the logits in
    their type. logits [N, V], targets [N]."""
    kind, scored = logits.dtype, targets != IGNORE
    logits = logits.float()
    lse = logits.logsumexp(-1)
    nll = torch.where(scored, lse - logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1), 0.0)
    if not wanted:
        return nll, None
    grad = (logits - lse[:, None]).exp_()
    hot = torch.where(scored, targets, 0)[:, None]
    grad.scatter_add_(1, hot, torch.full_like(hot, -1, dtype=grad.dtype))
    return nll, grad.mul_(scored[:, None]).to(kind)


_fused: Any = None  # `of_logits`, compiled, for the length of a `with fused()`


@contextmanager
def fused() -> Iterator[None]:
    """What is done to a chunk of logits is one loop over them, compiled for this processor."""
    global _fused  # noqa: PLW0603  a setting of the process, as torch's own are
    _fused = torch.compile(of_logits, dynamic=False)
    try:
        yield
    finally:
        _fused = None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        turned = weight.T.contiguous() if wants_hidden else weight
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            logits, wanted = times_transposed(h, weight), wants_hidden or wants_weight
            nll, grad = (_fused or of_logits)(logits, t, wanted)
            total += nll.sum(dtype=torch.float64)
            if grad is None:
                continue
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = times_transposed(grad, turned)
            if grad_weight is not None:
                grad_weight += times_transposed(grad.T, h.T).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = above
        hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        weight = None if grad_weight is None else (grad_weight * scale.float()).to(ctx.weight_dtype)
        return hidden, weight, None, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Σ −ln softmax(hidden·weightᵀ)[target] in nats, float64, over targets that are not IGNORE.

    hidden [..., D], weight [V, D], targets [...]. Under autocast the product is made in its type; softmax and sums in
    float32 and float64.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    scored = targets != IGNORE
    if _fused is None and not scored.all():  # prompts and padding have no logits; what is compiled is so for one shape
        hidden, targets = hidden[scored], targets[scored]
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden, weight = hidden.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
    rows = max(LEAST, CHUNK_BYTES // (4 * len(weight)))
    with torch.autocast(kind, enabled=False):
        return _Sum.apply(hidden, weight, targets, rows)


def head_of(model: Any) -> tuple[Any, torch.Tensor] | None:
    """The stack without its head and the head's weight, where logits are exactly hidden·weightᵀ; None elsewhere (a bias,
    soft caps, scaled logits): there the model's own logits are taken."""
    config, head = model.config, model.get_output_embeddings()
    capped = any(getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    plain = config.model_type in ("llama", "mistral", "qwen2", "gpt2", "gpt_neox", "lesion-decoder")
    if not plain or capped or type(head) is not torch.nn.Linear or head.bias is not None:
        return None
    return getattr(model, model.base_model_prefix), head.weight


def routers(model: Any) -> Any:
    """The model where its experts have losses of their own, which training adds; else None."""
    return model if getattr(model.config, "model_type", "") == "lesion-decoder" and model.config.experts else None


def sum_of_losses(
    model: Any, ids: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None, at: torch.Tensor
) -> torch.Tensor:
    """Σ −ln p over the scored targets of a batch [B, T], in nats. targets[b, t] is what follows ids[b, t], or IGNORE.
    Of an encoder-decoder ids [B, S] is what the encoder reads, mask [B, S] which of it there is, targets what the decoder writes.
    """
    if model.config.is_encoder_decoder:
        first = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)
        read = torch.cat((first, targets[:, :-1].clamp(min=0)), 1)  # what is not scored stands behind all that is
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=read, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE).double()
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": at, "use_cache": False}
    if (found := head_of(model)) is not None:
        stack, weight = found
        return linear_cross_entropy(stack(**given).last_hidden_state, weight, targets)
    logits = model(**given).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE).double()


class Objective:
    """What training lowers: a sum over the units of a batch, divided by their number in the whole step, however it is split.

    This one is language modelling: −ln p, and a unit is a scored token.
    """

    dropout = True  # whether the model is trained in training mode, with whatever dropout it has

    def total(self, model: Any, *batch: Any) -> torch.Tensor:
        """The sum over a batch, float64, differentiable."""
        return sum_of_losses(model, *batch)

    def count(self, batch: Sequence[Any]) -> int:
        """The units of a batch."""
        return int((batch[1] != IGNORE).sum())
