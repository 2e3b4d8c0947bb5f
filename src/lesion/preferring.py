"""Pairs of replies as tensors, and the loss of direct preference optimisation (Rafailov et al. 2023, equation 7).

    z = (ln π(y⁺) − ln r(y⁺)) − (ln π(y⁻) − ln r(y⁻)),     loss = −(1 − ε)·ln σ(βz) − ε·ln σ(−βz)

π is the model, r the reference, y⁺ the preferred reply and y⁻ the rejected one, their end tokens included; prompts are read and
not scored. At π = r the loss is ln 2. With `average` log-probabilities are a token's (length-normalised). ε: label smoothing
(Chowdhury et al. 2024, before its rescaling).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lesion import asking
from lesion.likelihood import padded
from lesion.loss import IGNORE, Objective, head_of
from lesion.task import AnyTask, Example
from lesion.trial import Specimen

Replies = tuple[list[int], list[int], list[int]]  # tokens of a prompt, of the better and of the worse reply


class Preference(Objective):
    """The loss above; a unit is a pair. Without dropout, as the reference was read: else the loss at π = r would not be ln 2."""

    dropout = False

    def __init__(self, beta: float, smoothing: float, average: bool):
        self.beta, self.smoothing, self.average = beta, smoothing, average

    def total(self, model: Any, *batch: Any) -> torch.Tensor:
        """ids and targets [B, 2, T], no mask, positions [B, 2, T], log-probabilities of the reference [B, 2]."""
        ids, targets, _, at, reference = batch
        found = log_probabilities(model, ids.flatten(0, 1), targets.flatten(0, 1), at.flatten(0, 1), self.average)
        gained = found.view_as(reference) - reference
        z = self.beta * (gained[:, 0] - gained[:, 1])
        return -((1 - self.smoothing) * F.logsigmoid(z) + self.smoothing * F.logsigmoid(-z)).sum()

    def count(self, batch: Sequence[Any]) -> int:
        return len(batch[0])


def log_probabilities(
    model: Any, ids: torch.Tensor, targets: torch.Tensor, at: torch.Tensor, average: bool
) -> torch.Tensor:
    """Σ ln p of each row's scored targets, or their mean: float64 [N], differentiable. ids, targets, at [N, T]."""
    scored = targets != IGNORE
    row = scored.nonzero()[:, 0]
    given = {"input_ids": ids, "position_ids": at, "use_cache": False}
    if (found := head_of(model)) is not None:
        stack, weight = found
        logits = F.linear(stack(**given).last_hidden_state[scored], weight)
    else:
        logits = model(**given).logits[scored]
    each = -F.cross_entropy(logits.float(), targets[scored], reduction="none").double()
    total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device).index_add(0, row, each)
    return total / scored.sum(1) if average else total


def replies(
    specimen: Specimen, task: AnyTask, examples: Sequence[Example], chat: asking.Chat, cut: int
) -> list[Replies]:
    """Tokens of each pair. A reply longer than `cut` tokens (0: any) is read so far and has no end token.

    Raises ValueError where an example has not two choices, the better one first."""
    last = asking.end(specimen, chat)
    found = []
    for e in examples:
        if len(e.choices) != 2 or e.label != 0:
            raise ValueError(f"example {e.id!r} of task {task.name!r} is no pair of replies with the better one first")
        both = [[*asking.reply(specimen, task, text, chat), last] for text in e.choices]
        better, worse = ([*part[:cut]] if cut else part for part in both)
        found.append((asking.prompt(specimen, task, e, chat), better, worse))
    return found


def differ(pair: Replies) -> bool:
    """Whether the replies of a pair are still two, after they were cut."""
    return pair[1] != pair[2]


def rows(pairs: Sequence[Replies]) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor]:
    """ids, targets, no mask and positions, [B, 2, T]: of each pair the better reply, then the worse."""
    texts = [[*prompt, *reply] for prompt, *both in pairs for reply in both]
    ids = padded([text[:-1] for text in texts])
    targets = torch.full_like(ids, IGNORE)
    for row, (text, first) in enumerate(zip(texts, (len(p) for p, *_ in pairs for _ in range(2)), strict=True)):
        targets[row, first - 1 : len(text) - 1] = torch.tensor(text[first:])
    at = torch.arange(ids.shape[1]).expand(len(ids), -1)
    shape = len(pairs), 2, -1
    return ids.view(shape), targets.view(shape), None, at.reshape(shape)


def collate(pairs: Sequence[tuple[list[int], list[int], list[int], float, float]]) -> tuple[Any, ...]:
    """A batch of pairs with the log-probabilities of the reference."""
    reference = torch.tensor([pair[3:] for pair in pairs], dtype=torch.float64)
    return (*rows([(p, better, worse) for p, better, worse, *_ in pairs]), reference)
