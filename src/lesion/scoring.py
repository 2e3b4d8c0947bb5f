"""The true losses of many variants of one passage, as quickly as they can be had.

Variants of an attack differ in few tokens, so most of what a model would compute for them is the same. What stands before the
first changed token is read once, and its keys and values are shared by all variants (the prefix of a KV cache, Pope et al.
2023); variants are sorted by where they first differ, so that each batch goes on from as late as it can; the head sees only
the targets; and a variant that comes twice is scored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from lesion.inference import inference
from lesion.likelihood import BATCH_TOKENS
from lesion.passages import Passage, check, losses

LOGITS = 2**25  # of one batch, at most: 128 MB in float32


class Prefix(Cache):
    """Keys and values of one text, [1, H, S, D] for each layer, from which any number of rows go on.

    It is written by the first forward. Rows that go on from its first `length` tokens see those, and leave nothing behind.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.length = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """The prefix and the new keys and values [B, H, T, D] behind it: [B, H, length + T, D]."""
        if layer_idx == len(self.kept):
            self.kept.append((key_states, value_states))
            return key_states, value_states
        kept = (part[:, :, : self.length].expand(len(key_states), -1, -1, -1) for part in self.kept[layer_idx])
        return tuple(torch.cat(both, 2) for both in zip(kept, (key_states, value_states), strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0


def score(model: Any, passage: Passage, variants: torch.Tensor) -> torch.Tensor:
    """Mean target loss in nats, float64 [n], of each variant [n, positions] of `passage.attacked`: float32 log-softmax, float64
    sums. The less a variant differs from the passage and the later, the less it costs.

    Raises ValueError for variants of another length.
    """
    check(model, [passage])
    if variants.dim() != 2 or variants.shape[1] != len(passage.attacked):
        raise ValueError(
            f"variants of passage {passage.item!r} are ids [n, {len(passage.attacked)}], not {list(variants.shape)}"
        )
    if not len(variants):
        return torch.zeros(0, dtype=torch.float64)
    different, where = variants.cpu().unique(dim=0, return_inverse=True)
    if passage.source is not None:
        found = torch.tensor(losses(model, [passage.changed(v) for v in different.tolist()]), dtype=torch.float64)
    else:
        with inference(model):
            found = _causal(model, passage, different)
    return found.clone()[where]


def _causal(model: Any, passage: Passage, variants: torch.Tensor) -> torch.Tensor:
    device, targets = model.device, torch.tensor(passage.targets)
    read = torch.tensor(passage.tokens[:-1])  # nothing is asked of the last token
    changed = variants != read[: passage.target]
    first = torch.where(changed.any(1), changed.int().argmax(1), passage.target - 1).clamp(max=passage.target - 1)
    prefix = Prefix()
    if (shared := int(first.max())) > 0:
        model(input_ids=read[None, :shared].to(device), past_key_values=prefix, use_cache=True, logits_to_keep=1)
    found = torch.zeros(len(variants), dtype=torch.float64)
    rows = LOGITS // (len(targets) * model.config.get_text_config().vocab_size)
    for batch in _batches(first, len(read), max(1, rows)):
        start = int(first[batch].min())
        prefix.length = start
        ids = torch.cat((variants[batch, start:], targets[:-1].expand(len(batch), -1)), 1).to(device)
        logits = model(
            input_ids=ids,
            position_ids=torch.arange(start, len(read), device=device)[None],
            past_key_values=prefix if start else None,
            use_cache=bool(start),
            logits_to_keep=len(targets),
        ).logits
        kind = torch.promote_types(logits.dtype, torch.float32)
        lost = F.cross_entropy(logits.flatten(0, 1).to(kind), targets.repeat(len(batch)).to(device), reduction="none")
        found[batch] = lost.view(len(batch), -1).double().mean(1).cpu()
    return found


def _batches(first: torch.Tensor, width: int, rows: int) -> Iterator[torch.Tensor]:
    """Indices of variants that go on from similar places, up to BATCH_TOKENS and so many rows, the earliest first."""
    order = first.argsort(stable=True)
    while len(order):
        count = min(rows, max(1, BATCH_TOKENS // (width - int(first[order[0]]))))
        yield order[:count]
        order = order[count:]
