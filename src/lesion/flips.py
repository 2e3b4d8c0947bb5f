"""Gradient-guided token substitution (Ebrahimi et al. 2018, "HotFlip", equation 4; Wallace et al. 2019, equation 2).

    L(v at i) − L(t at i) ≈ (e_v − e_t) · ∂L/∂eᵢ         e: rows of the embedding table, t: the token at position i

is a first-order guess, good for choosing candidates and for nothing else: whoever uses it computes the true loss of what it
chose (`score`). L is the mean loss of tokens that nobody changed, in nats (see `passages.py`). The gradient is that of the
looked-up row, so where a model multiplies its embeddings by a scale, the scale is part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lesion.likelihood import padded
from lesion.passages import Passage, answered, batches, check, losses, mean_loss, sources
from lesion.scoring import score

GRADIENT_TOKENS = 1024  # of one forward and backward
UNUSED = re.compile(r"[<\[]\|?(unused|reserved|extra_id|dummy)[^<\[]*[>\]]", re.IGNORECASE)


def allowed(tokenizer: Any, vocabulary_size: int) -> torch.Tensor:
    """Which ids may be put into a text: bool [V].

    Special, added, unused and padding ids may not, nor those that do not survive being written out and read again alone,
    since the attack would be another one in text.
    """
    found = torch.zeros(vocabulary_size, dtype=torch.bool)
    known = min(len(tokenizer), vocabulary_size)
    texts = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    reserved = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for i, (text, ids) in enumerate(zip(texts, again, strict=True)):
        found[i] = ids == [i] and i not in reserved and not UNUSED.fullmatch(text.strip())
    return found


def stable(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether tokens that are written out as text are read as the same tokens."""
    text = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) == list(tokens)


def attackable(passage: Passage, may: torch.Tensor) -> list[int]:
    """Positions of `passage.attacked` whose token may be replaced: those that `may` (bool [V], see `allowed`) has, so that a
    start token or the marks of a chat template stay."""
    return [i for i, token in enumerate(passage.attacked) if may[token]]


def embedding(model: Any) -> Any:
    """The module that looks up the attacked tokens: an encoder may have one of its own."""
    return (model.get_encoder() if model.config.is_encoder_decoder else model).get_input_embeddings()


def table(model: Any) -> torch.Tensor:
    """The embedding table [V, d] as it is looked up, without a graph."""
    found: torch.Tensor = embedding(model).weight.detach()
    return found


def gradients(model: Any, passage: Passage) -> torch.Tensor:
    """∂(mean target loss)/∂(embedding row) at each position of `passage.attacked`: [positions, d], nats per unit."""
    return gradients_of(model, [passage])[0]


def gradients_of(model: Any, passages: Sequence[Passage]) -> list[torch.Tensor]:
    """The gradients of several passages, each of its own loss: [positions, d] for each. No parameter's `.grad` moves."""
    check(model, passages)
    found: dict[int, torch.Tensor] = {}
    for batch in batches([len(p.attacked) + len(p.targets) for p in passages], GRADIENT_TOKENS):
        some = [passages[i] for i in batch]
        for i, rows in zip(batch, _gradients(model, some), strict=True):
            found[i] = rows[: len(passages[i].attacked)].clone()
    return [found[i] for i in range(len(passages))]


def _gradients(model: Any, passages: Sequence[Passage]) -> torch.Tensor:
    with torch.inference_mode(False), torch.enable_grad(), unpatched(model):
        if model.config.is_encoder_decoder:
            source, seen = sources(passages, model.device)
            with looked_up(model) as rows:
                encoded = model.get_encoder()(input_ids=source, attention_mask=seen)
            logits = answered(model, passages, encoded)
        else:
            ids = padded([p.tokens for p in passages]).to(model.device)
            unread = min(p.target for p in passages) - 1
            with looked_up(model) as rows:
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - unread).logits
        total = logits.new_zeros((), dtype=torch.float64)
        for row, passage in enumerate(passages):
            first = 0 if passage.source is not None else passage.target - 1 - unread
            total = total + mean_loss(logits[row, first : first + len(passage.targets)], passage.targets)
        (out, scale), *others = rows
        assert not others, "the embedding is looked up once"
        return torch.autograd.grad(total, out)[0] * scale


@contextmanager
def unpatched(model: Any) -> Iterator[None]:
    """A model that is arranged for inference computes, in this block, what can be differentiated: its own forward."""
    lifted = [(m, m.__dict__.pop("forward")) for m in model.modules() if "forward" in m.__dict__]
    try:
        yield
    finally:
        for module, forward in lifted:
            module.forward = forward


@contextmanager
def looked_up(model: Any) -> Iterator[list[tuple[torch.Tensor, Any]]]:
    """What the embedding gives in this block, as leaves of the graph, with the scale by which it multiplies its rows.

    Raises ValueError where it does anything but look up rows and scale them.
    """
    found: list[tuple[torch.Tensor, Any]] = []

    def listen(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        scale = getattr(module, "embed_scale", 1.0)
        scale = scale.to(out.dtype) if isinstance(scale, torch.Tensor) else scale
        if not torch.equal(out.detach(), module.weight.detach()[given[0]] * scale):
            raise ValueError(
                f"{type(module).__name__} does more than look up rows and scale them; its rows are unknown"
            )
        leaf = out.detach().requires_grad_()
        found.append((leaf, scale))
        return leaf

    hook = embedding(model).register_forward_hook(listen)
    try:
        yield found
    finally:
        hook.remove()


def candidates(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    tokens: Sequence[int],
    may: torch.Tensor,
    k: int,
    *,
    ascend: bool = True,
    own: bool = False,
) -> torch.Tensor:
    """For each position the k allowed ids whose first-order change of the loss is largest (or least, descending): ids [P, k],
    the best first. gradient [P, d], rows [V, d] of the embedding, tokens [P], may [V].

    A position's own token is a candidate only where `own` says so. Raises ValueError where too few ids are allowed.
    """
    if not 1 <= k <= (most := int(may.sum()) - (not own)):
        raise ValueError(f"{k} candidates for a position were asked for; there are {most} allowed ids to choose from")
    kind = torch.promote_types(gradient.dtype, torch.float32)
    change = gradient.to(kind) @ rows.to(kind).T  # e_t·g is the same for all candidates of a position
    change = change if ascend else -change
    change[:, ~may.to(change.device)] = -torch.inf
    if not own:
        change.scatter_(1, torch.tensor(tokens, device=change.device)[:, None], -torch.inf)
    found: torch.Tensor = change.topk(k).indices
    return found


__all__ = [
    "Passage",
    "allowed",
    "attackable",
    "candidates",
    "gradients",
    "gradients_of",
    "losses",
    "score",
    "stable",
    "table",
]
