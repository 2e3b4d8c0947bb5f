"""Passages whose tokens are attacked, and the loss that an attack is after: that of tokens which nobody changed.

    loss = −(1/|targets|) Σ ln p(target | what stands before it)          in nats

A causal passage is one text: what stands before `target` may be attacked, what follows is scored. A passage of an
encoder-decoder is a source, which may be attacked, and the decoder's tokens, all of them scored. A loss in which replaced
tokens were counted as targets would rise by the replacing alone (Wallace et al. 2019 score the answer, never the trigger).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lesion.inference import inference
from lesion.likelihood import BATCH_TOKENS, Window, context_of, padded, scored


@dataclass(frozen=True)
class Passage:
    """One text with its target. Causal: `tokens[target:]` are scored and `tokens[:target]` may be attacked. Encoder-decoder:
    `source` may be attacked, and all of `tokens` are scored (`target` is 0).

    Raises ValueError where nothing could be attacked or scored.
    """

    item: str
    tokens: tuple[int, ...]
    target: int = 0
    source: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.source is None and self.target < 1:
            raise ValueError(f"passage {self.item!r}: the target begins at {self.target}, so nothing stands before it")
        if self.source is not None and (self.target or not self.source):
            raise ValueError(f"passage {self.item!r}: a source needs a token, and all tokens behind it are the target")
        if len(self.tokens) <= self.target:
            raise ValueError(f"passage {self.item!r}: its target has no tokens")

    @property
    def attacked(self) -> tuple[int, ...]:
        """The tokens that an attack may change: those before the target, or the source."""
        return self.tokens[: self.target] if self.source is None else self.source

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[self.target :]

    def changed(self, attacked: Sequence[int]) -> Passage:
        """The same passage with other tokens in place of the attacked ones; there may be more or fewer of them."""
        if self.source is not None:
            return replace(self, source=tuple(attacked))
        return replace(self, tokens=(*attacked, *self.targets), target=len(attacked))


def check(model: Any, passages: Sequence[Passage]) -> None:
    """Raises ValueError where a passage is not of the model's kind, or longer than its context."""
    both = model.config.is_encoder_decoder
    text = model.config.get_text_config(decoder=False)
    context = None if both else context_of(text)
    for passage in passages:
        if (passage.source is not None) != both:
            kind, need = ("an encoder-decoder", "a source") if both else ("a causal model", "no source")
            raise ValueError(f"passage {passage.item!r}: {kind} reads passages with {need}")
        if context and len(passage.tokens) > context:
            raise ValueError(
                f"passage {passage.item!r} has {len(passage.tokens)} tokens, more than the context of {context}"
            )


def losses(model: Any, passages: Sequence[Passage]) -> list[float]:
    """Mean −ln p over each passage's targets, in nats: float32 log-softmax, float64 sums."""
    check(model, passages)
    if not model.config.is_encoder_decoder:
        todo = [Window(str(i), 0, p.target, len(p.tokens)) for i, p in enumerate(passages)]
        sums = scored(model, todo, {str(i): list(p.tokens) for i, p in enumerate(passages)})
        return [nll / len(passages[int(w.item)].targets) for w, nll in sorted(sums, key=lambda one: int(one[0].item))]
    found: dict[int, float] = {}
    with inference(model):
        for batch in batches([len(p.attacked) + len(p.tokens) for p in passages]):
            logits = answered(model, [passages[i] for i in batch])
            for i, row in zip(batch, logits, strict=True):
                found[i] = float(mean_loss(row[: len(passages[i].tokens)], passages[i].targets))
    return [found[i] for i in range(len(passages))]


def batches(lengths: Sequence[int], most: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of texts of similar length together, the longest first, up to `most` tokens with the padding counted."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def mean_loss(logits: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
    """Mean over targets of −ln p from logits [T, V] that predict them: float32 log-softmax (float64 for float64), summed in
    float64."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    lost = F.cross_entropy(logits.to(kind), torch.tensor(targets, device=logits.device), reduction="none")
    return lost.double().mean()


def answered(model: Any, passages: Sequence[Passage], encoded: Any = None) -> torch.Tensor:
    """Logits [B, T, V] of an encoder-decoder that predict each passage's tokens, given the encoder's output or asked for it.

    The decoder reads its start token and then all tokens but the last.
    """
    source, seen = sources(passages, model.device)
    encoded = encoded if encoded is not None else model.get_encoder()(input_ids=source, attention_mask=seen)
    tokens = padded([p.tokens for p in passages]).to(model.device)
    first = torch.full_like(tokens[:, :1], model.config.decoder_start_token_id)
    ids = torch.cat((first, tokens[:, :-1]), 1)
    found: torch.Tensor = model(
        encoder_outputs=encoded, attention_mask=seen, decoder_input_ids=ids, use_cache=False
    ).logits
    return found


def sources(passages: Sequence[Passage], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Source ids [B, S], padded on the right, and which of them are seen [B, S]."""
    lengths = torch.tensor([len(p.attacked) for p in passages])
    ids = padded([p.attacked for p in passages])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
