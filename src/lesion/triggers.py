"""The search for a universal trigger: one string of tokens that raises the loss of every text it is put in front of.

Two manners of naming candidates for a position, and one of choosing among them, by the true mean loss over the texts:

    gradient     the k tokens of largest (e_v − e_t) · ḡ, ḡ the gradient averaged over the texts (Wallace et al. 2019, equation 2)
    coordinate   k tokens drawn from all that are allowed: coordinate ascent without gradients

Positions are tried one after the other, and a beam of the best triggers goes on (Wallace et al. 2019, section 2.2). The targets
are tokens of the texts, never of the trigger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lesion.flips import candidates, gradients_of, precise, score, stable, table
from lesion.inference import inference
from lesion.passages import Passage
from lesion.stats import generator

TRIES = 1000  # draws of a token that survives being written out, behind those that are there


@dataclass(frozen=True)
class Text:
    """A text that a trigger is put into: what stands before the trigger (a start token), and what follows, of which the
    tokens from `scored` on are targets. An encoder reads all of that, and the decoder's `target` is scored instead."""

    item: str
    before: tuple[int, ...]
    rest: tuple[int, ...]
    scored: int = 0
    target: tuple[int, ...] | None = None

    def passage(self, trigger: Sequence[int] = ()) -> Passage:
        start = (*self.before, *trigger)
        if self.target is not None:
            return Passage(self.item, self.target, source=(*start, *self.rest))
        return Passage(self.item, (*start, *self.rest), len(start) + self.scored)


@dataclass
class Found:
    """A restart: its trigger, the mean loss over all texts, that of each iteration, and how many triggers were scored."""

    trigger: list[int]
    loss: float
    losses: list[float] = field(default_factory=list)
    scored: int = 0


def mean_losses(model: Any, texts: Sequence[Text], triggers: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean over the texts of their mean target loss behind each trigger, all of one length: float64 [n], nats."""
    total = torch.zeros(len(triggers), dtype=torch.float64)
    several = torch.tensor(triggers)
    for text in texts:
        passage = text.passage(triggers[0])
        variants = torch.tensor(passage.attacked).repeat(len(triggers), 1)
        variants[:, len(text.before) : len(text.before) + several.shape[1]] = several
        total += score(model, passage, variants)
    return total / len(texts)


def ascend(
    model: Any,
    texts: Sequence[Text],
    trigger: list[int],
    may: torch.Tensor,
    *,
    manner: Literal["gradient", "coordinate"],
    iterations: int,
    topk: int,
    beam: int,
    draw: Callable[[int], Any],
    keeps: Callable[[Sequence[int]], bool],
) -> Found:
    """Iterations from one trigger. `draw(iteration)` gives a numpy generator; `keeps` says which triggers may be chosen.

    A loss never falls: the trigger that is there competes with its candidates. With gradients, an iteration that changes
    nothing is the last, because every other would be the same.
    """
    with inference(model):
        found = Found(trigger, float(mean_losses(model, texts, [trigger])[0]), scored=1)
        for iteration in range(iterations):
            before = found.trigger
            named = propose(model, texts, found.trigger, may, manner, topk, draw(iteration))
            best = [(found.loss, tuple(found.trigger))]
            for position in range(len(trigger)):
                fresh: dict[tuple[int, ...], float] = {tokens: loss for loss, tokens in best}
                tried = [
                    (*tokens[:position], token, *tokens[position + 1 :])
                    for _, tokens in best
                    for token in named[position]
                ]
                tried = [tokens for tokens in dict.fromkeys(tried) if tokens not in fresh and keeps(tokens)]
                if tried:
                    fresh.update(zip(tried, mean_losses(model, texts, tried).tolist(), strict=True))
                    found.scored += len(tried)
                finite = [(loss, tokens) for tokens, loss in fresh.items() if loss == loss]
                best = sorted(finite, key=lambda one: -one[0])[:beam]
                if not best:
                    return found
            found.loss, found.trigger = best[0][0], list(best[0][1])
            found.losses.append(found.loss)
            if manner == "gradient" and found.trigger == before:
                break
    return found


def propose(
    model: Any, texts: Sequence[Text], trigger: list[int], may: torch.Tensor, manner: str, k: int, stream: Any
) -> list[list[int]]:
    """k candidates for each position of the trigger."""
    if manner == "coordinate":
        ids = may.nonzero()[:, 0]
        return [ids[torch.from_numpy(stream.integers(len(ids), size=k))].tolist() for _ in trigger]
    total = torch.zeros(())
    for text, found in zip(texts, gradients_of(model, [t.passage(trigger) for t in texts]), strict=True):
        total = total + found[len(text.before) : len(text.before) + len(trigger)].double()
    if not total.isfinite().all():
        return [[] for _ in trigger]
    rows = table(model)
    return candidates((total / len(texts)).to(precise(rows[:1]).dtype), rows, trigger, may, k).tolist()


def drawn(purpose: str, seed: int, number: int, length: int, may: torch.Tensor, tokenizer: Any = None) -> list[int]:
    """A random trigger of allowed tokens; with a tokenizer one that is the same tokens after being written out and read again.

    Raises ValueError where no such trigger turns up.
    """
    stream, ids = generator(purpose, seed, number), may.nonzero()[:, 0]
    found: list[int] = []
    for _ in range(TRIES * length):
        token = int(ids[int(stream.integers(len(ids)))])
        if tokenizer is None or stable(tokenizer, [*found, token]):
            found.append(token)
        if len(found) == length:
            return found
    raise ValueError(f"no random trigger of {length} tokens survives being written out and read again")
