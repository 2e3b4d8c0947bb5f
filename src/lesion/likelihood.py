"""The likelihood of tokens under a causal model, in windows over documents: the one place where predictions meet targets.

NLL = −Σᵢ ln p(tᵢ | the tokens before it in its window)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 1024  # tokens of one forward; a constant, because rounding depends on the shape of a batch


@dataclass(frozen=True)
class Window:
    """Tokens `start:end` of a document, of which those from `scored` on are scored."""

    item: str
    start: int
    scored: int
    end: int


def context_of(text: Any) -> int | None:
    """Most tokens that a model with this text configuration reads at once; None where it has no such limit, as with T5's relative
    positions, whatever length it was trained on."""
    if hasattr(text, "relative_attention_num_buckets"):
        return None
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def windows(item: str, length: int, window: int, stride: int, first: int = 1) -> Iterator[Window]:
    """Windows over one document: every token from `first` on is scored exactly once, with the longest history there is."""
    done = first
    for start in range(0, max(length, 1), stride):
        end = min(start + window, length)
        if end > done:
            yield Window(item, start, done, end)
        done = max(done, end)
        if end == length:
            return


def batches(todo: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows of similar length together, up to BATCH_TOKENS with the padding counted."""
    batch: list[Window] = []
    for window in sorted(todo, key=lambda w: w.start - w.end):  # stable: the longest first
        width = batch[0].end - batch[0].start if batch else 0
        if batch and width * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def beginning(texts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all texts begin with; each keeps at least one token of its own."""
    first, last = min(texts), max(texts)  # all others lie between them
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, min(map(len, texts)) - 1)


def padded(texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids [B, T], padded on the right, where a causal model cannot see it.

    A text is padded with its own last token. What is masked has the weight 0, and 0 · NaN is NaN: a token that a damaged model
    reads as NaN would reach every shorter text of the batch.
    """
    import torch

    width = max(map(len, texts))
    return torch.tensor([[*text, *[text[-1]] * (width - len(text))] for text in texts])


def scored(model: Any, todo: Sequence[Window], tokens: dict[str, list[int]]) -> list[tuple[Window, float]]:
    """Every window and the −ln p of its scored tokens, in nats."""
    from lesion.inference import inference

    found: list[tuple[Window, float]] = []
    with inference(model):  # a list and no generator: inference mode must not outlast this block
        for batch in batches(todo):
            found += zip(batch, negative_log_likelihood(model, batch, tokens), strict=True)
    return found


def negative_log_likelihood(model: Any, batch: Sequence[Window], tokens: dict[str, list[int]]) -> list[float]:
    """Sum over the scored tokens of each window of −ln p, in nats: float32 log-softmax, float64 sums.

    Padding is on the right, where a causal model cannot see it. The shift between logits and targets is here, and only here.
    """
    import torch.nn.functional as F

    ids = padded([tokens[w.item][w.start : w.end] for w in batch])
    width = ids.shape[1]
    unread = min(w.scored - w.start for w in batch) - 1  # leading predictions that nobody asks for
    logits: torch.Tensor = model(
        input_ids=ids.to(model.device), use_cache=False, logits_to_keep=width - unread if unread else 0
    ).logits
    sums = []
    for row, w in enumerate(batch):
        first = w.scored - w.start
        target = ids[row, first : w.end - w.start].to(logits.device)
        predicted = logits[row, first - 1 - unread : w.end - w.start - 1 - unread].float()
        sums.append(F.cross_entropy(predicted, target, reduction="none").double().sum().item())
    return sums
