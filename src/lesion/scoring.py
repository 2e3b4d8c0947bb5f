"""The true losses of many variants of one passage, as quickly as they can be had.

Variants of an attack differ in few tokens, so most of what a model would compute for them is the same. What stands before the
first changed token is read once, and its keys and values are shared by all variants (the prefix of a KV cache, Pope et al.
2023); variants are sorted by where they first differ, and cut into batches that each go on from as late as they can; the head
sees only the targets; and a variant that comes twice is scored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from transformers.cache_utils import Cache

from lesion.inference import inference
from lesion.likelihood import BATCH_TOKENS
from lesion.passages import Passage, check, losses

LOGITS = 7 * 2**20  # of one batch on a CPU, at most: beyond 32 MB a C library asks the system for every page anew
AT_ONCE = 2**19  # logits whose softmax is taken at a time: they stay in the cache of a core
BATCH_COST = 48  # what a batch costs beside its tokens, in tokens: the weights are read once more
ON_ACCELERATORS = 64  # a batch may be so many times as large there, and costs as many times more in tokens


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


def read_on(model: Any, ids: torch.Tensor, start: int, targets: int, prefix: Prefix) -> torch.Tensor:
    """Logits [B, targets, V] behind the last tokens of ids [B, T], which go on from the first `start` of a prefix."""
    prefix.length = start
    found: torch.Tensor = model(
        input_ids=ids,
        position_ids=torch.arange(start, start + ids.shape[1], device=ids.device)[None],
        cache=prefix if start else None,
        use_cache=bool(start),
        logits_to_keep=targets,
    ).logits
    return found


def read_prefix(model: Any, tokens: torch.Tensor) -> Prefix:
    """The keys and values of tokens [S]."""
    prefix = Prefix()
    if len(tokens):
        model(input_ids=tokens[None].to(model.device), cache=prefix, use_cache=True, logits_to_keep=1)
    return prefix


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
    prefix = read_prefix(model, read[: int(first.max())])
    found = torch.zeros(len(variants), dtype=torch.float64)
    scale = ON_ACCELERATORS if device.type != "cpu" else 1
    logits = len(targets) * model.config.get_text_config().vocab_size
    most = max(1, scale * LOGITS // logits)
    for batch in _batches(first, len(read), most, scale * BATCH_TOKENS, scale * BATCH_COST):
        start = int(first[batch].min())
        ids = torch.cat((variants[batch, start:], targets[:-1].expand(len(batch), -1)), 1).to(device)
        answer = read_on(model, ids, start, len(targets), prefix)
        lost = negative_logs(answer.flatten(0, 1), targets.repeat(len(batch)).to(device))
        found[batch] = lost.view(len(batch), -1).double().mean(1).cpu()
    return found


def negative_logs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−ln p of targets [N] from logits [N, V], in float32 (float64 for float64): ln Σ exp(z − max) + max − z of the target.

    Nothing as large as the logits is made.
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, AT_ONCE * (ON_ACCELERATORS if logits.device.type != "cpu" else 1) // logits.shape[1])
    parts = []
    for some, target in zip(logits.split(rows), targets.split(rows), strict=True):
        z = some.to(kind, copy=True)
        wanted = z.gather(1, target[:, None])[:, 0]
        most = z.amax(1)
        parts.append(z.sub_(most[:, None]).exp_().sum(1).log_() + (most - wanted))
    return torch.cat(parts)


def _batches(first: torch.Tensor, width: int, rows: int, tokens: int, cost: int) -> Iterator[torch.Tensor]:
    """Indices of variants that go on from similar places, the earliest first, at most so many rows and tokens together.

    A batch starts where the first of its variants does. The cuts are those of the least Σ (rows · (width − start) + cost).
    """
    order = first.argsort(stable=True)
    starts, counts = first.sort().values.unique(return_counts=True)
    starts, before = starts.tolist(), [0, *counts.cumsum(0).tolist()]
    best: list[tuple[int, int]] = [
        (0, 0)
    ]  # least cost of the variants with the first i starts, and where the last cut is
    for end in range(1, len(starts) + 1):
        best.append(
            min((best[cut][0] + (before[end] - before[cut]) * (width - starts[cut]) + cost, cut) for cut in range(end))
        )
    ends = [len(starts)]
    while ends[-1]:
        ends.append(best[ends[-1]][1])
    for cut, end in pairwise(reversed(ends)):
        count = min(rows, max(1, tokens // (width - starts[cut])))
        yield from order[before[cut] : before[end]].split(count)
