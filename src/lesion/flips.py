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
from functools import partial
from typing import Any

import torch
from torch import nn

from lesion.inference import inference
from lesion.likelihood import padded
from lesion.passages import Passage, answered, batches, check, losses, mean_loss, sources
from lesion.products import fits, times_transposed
from lesion.scoring import read_on, read_prefix, score
from lesion.vocabularies import tokenizer_digest

REMEMBERED = 4  # tokenizers
GRADIENT_TOKENS = 1024  # of one forward and backward
UNUSED = re.compile(r"[<\[]\|?(unused|reserved|extra_id|dummy)[^<\[]*[>\]]", re.IGNORECASE)


def allowed(tokenizer: Any, vocabulary_size: int) -> torch.Tensor:
    """Which ids may be put into a text: bool [V].

    Special, added, unused and padding ids may not, nor those that do not survive being written out and read again alone,
    since the attack would be another one in text. Asking every id takes seconds, so what a tokenizer said is remembered by its
    content: each state is loaded with a tokenizer of its own.
    """
    key = tokenizer_digest(tokenizer), vocabulary_size
    if key not in _allowed:
        while len(_allowed) >= REMEMBERED:
            _allowed.pop(next(iter(_allowed)))
        with torch.inference_mode(False):  # it outlasts whatever block it is asked in
            _allowed[key] = _asked(tokenizer, vocabulary_size)
    return _allowed[key].clone()  # a caller may forbid more


_allowed: dict[tuple[str, int], torch.Tensor] = {}


def _asked(tokenizer: Any, vocabulary_size: int) -> torch.Tensor:
    found = torch.zeros(vocabulary_size, dtype=torch.bool)
    known = min(len(tokenizer), vocabulary_size)
    texts = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    reserved = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for i, (text, ids) in enumerate(zip(texts, again, strict=True)):
        found[i] = ids == [i] and i not in reserved and not UNUSED.fullmatch(text.strip())
    return found


def written(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as text, with every space where it is."""
    text: str = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
    return text


def stable(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether tokens that are written out as text are read as the same tokens."""
    return list(tokenizer(written(tokenizer, tokens), add_special_tokens=False)["input_ids"]) == list(tokens)


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


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 at least. A search makes its table precise once, and not for each of its gradients."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gradients(model: Any, passage: Passage, start: int = 0) -> torch.Tensor:
    """∂(mean target loss)/∂(embedding row) at each position of `passage.attacked` from `start` on: [positions, d], nats per
    unit. What stands before `start` is read without a graph. No parameter's `.grad` moves."""
    check(model, [passage])
    if not 0 <= start < len(passage.attacked):
        raise ValueError(f"passage {passage.item!r} has positions 0 to {len(passage.attacked) - 1}, not {start}")
    if passage.source is not None or not start:
        return gradients_of(model, [passage])[0][start:]
    with inference(model):
        prefix = read_prefix(model, torch.tensor(passage.tokens[:start]))
    with differentiable(model), looked_up(model) as rows:
        ids = torch.tensor([passage.tokens[start:-1]], device=model.device)
        logits = read_on(model, ids, start, len(passage.targets), prefix)
        return descended(mean_loss(logits[0], passage.targets), rows)[0][: passage.target - start]


def gradients_of(model: Any, passages: Sequence[Passage]) -> list[torch.Tensor]:
    """The gradients of several passages, each of its own loss: [positions, d] for each."""
    check(model, passages)
    found: dict[int, torch.Tensor] = {}
    for batch in batches([len(p.attacked) + len(p.targets) for p in passages], GRADIENT_TOKENS):
        some = [passages[i] for i in batch]
        for i, rows in zip(batch, _gradients(model, some), strict=True):
            found[i] = rows[: len(passages[i].attacked)].clone()
    return [found[i] for i in range(len(passages))]


def _gradients(model: Any, passages: Sequence[Passage]) -> torch.Tensor:
    with differentiable(model):
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
        return descended(total, rows)


def descended(loss: torch.Tensor, rows: list[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    """∂loss/∂(rows of the table) [B, T, d] from what the embedding gave."""
    [(out, scale)] = rows
    return torch.autograd.grad(loss, out)[0] * scale


@contextmanager
def differentiable(model: Any) -> Iterator[None]:
    """A model computes in this block what can be differentiated by its input, also where it is arranged for inference: its own
    forward, with float32 products by oneDNN on a CPU, which take half the time."""
    lifted = [(m, m.__dict__.pop("forward")) for m in model.modules() if "forward" in m.__dict__]
    quick = [m for m in model.modules() if type(m) is nn.Linear and fits(m.weight)]
    for module in quick:
        module.__dict__["forward"] = partial(_through, module)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in quick:
            del module.__dict__["forward"]
        for module, forward in lifted:
            module.forward = forward


def _through(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Product.apply(x, module.weight.detach())
    return y if module.bias is None else y + module.bias.detach()


class _Product(torch.autograd.Function):
    """x · Wᵀ, differentiable in x only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return times_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Any:
        return times_transposed(above[0], ctx.weight.T), None


@contextmanager
def looked_up(model: Any) -> Iterator[list[tuple[torch.Tensor, Any]]]:
    """What the embedding gives in this block, as leaves of the graph, with the scale by which it multiplies its rows.

    Raises ValueError where it does anything but look up rows and scale them.
    """
    found: list[tuple[torch.Tensor, Any]] = []

    def listen(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        scale = getattr(module, "embed_scale", 1.0)
        scale = scale.to(out.dtype) if isinstance(scale, torch.Tensor) else scale
        rows = module.weight.detach()[given[0]] * scale
        if not torch.allclose(out.detach(), rows, rtol=0, atol=0, equal_nan=True):
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
    more: torch.Tensor | None = None,
) -> torch.Tensor:
    """For each position the k allowed ids whose first-order change of the loss is largest (or least, descending): ids [P, k],
    the best first. gradient [P, d], rows [V, d] of the embedding, tokens [P], may [V].

    A position's own token is a candidate only where `own` says so. `more` [P, V]: what a token changes beside its row.
    Raises ValueError where too few ids are allowed.
    """
    if not 1 <= k <= (most := int(may.sum()) - (not own)):
        raise ValueError(f"{k} candidates for a position were asked for; there are {most} allowed ids to choose from")
    change = gradient.to(precise(rows).dtype) @ precise(rows).T  # e_t·g is the same for all candidates of a position
    change = change if more is None else change + more
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
    "precise",
    "score",
    "stable",
    "table",
    "written",
]
