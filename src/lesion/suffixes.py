"""Greedy coordinate gradient: the search for a string that makes a model say a target (Zou et al. 2023, algorithm 1).

In each step the gradient names `topk` tokens for every position of the string; `search_width` strings, each with `n_replace`
of its tokens replaced by such candidates, are drawn and scored by their true loss; the best of them is the next string.

    loss = −(1/|target|) Σ ln p(target token | prompt, string, the target before it)        in nats

Steps and buffer are those of nanogcg, so that with the same draws both choose the same strings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lesion.flips import candidates, gradients, precise, score, table
from lesion.inference import inference
from lesion.passages import Passage

Draw = Callable[[int, int, int, int], tuple[Any, Any]]
"""(step, strings, positions, choices) → uniforms [strings, positions], whose order says which positions are replaced first,
and integers below `choices` [strings, positions]."""


@dataclass
class Frame:
    """A prompt around the string that is sought, and the target, as tokens."""

    item: str
    before: list[int]
    after: list[int]
    target: list[int]
    encoder: bool  # whether the prompt is read by an encoder

    def passage(self, string: Sequence[int]) -> Passage:
        prompt = (*self.before, *string, *self.after)
        if self.encoder:
            return Passage(self.item, tuple(self.target), source=prompt)
        return Passage(self.item, (*prompt, *self.target), len(prompt))

    def variants(self, strings: torch.Tensor) -> torch.Tensor:
        """The whole prompts [n, positions] around strings [n, P]."""
        around = (torch.tensor(part, dtype=torch.long).expand(len(strings), -1) for part in (self.before, self.after))
        before, after = around
        return torch.cat((before, strings, after), 1)


@dataclass
class Search:
    """What a search went through: the best loss of each step, the best string of all, and how many were scored."""

    start: float
    string: list[int]
    loss: float = math.inf
    losses: list[float] = field(default_factory=list)
    scored: int = 0
    outcome: str = "optimised"


def search(
    model: Any,
    frame: Frame,
    start: torch.Tensor,
    may: torch.Tensor,
    draw: Draw,
    *,
    steps: int,
    search_width: int,
    topk: int,
    n_replace: int = 1,
    buffer: int = 0,
    tokenizer: Any = None,
) -> Search:
    """Goes `steps` steps from the best of the strings `start` [n, P], over tokens that `may` (bool [V]) be used. With a
    tokenizer, only strings that survive being written out and read again are scored.

    It ends early, with the outcome "not finite", where no loss or gradient is a number. Raises ValueError where no string that is
    drawn survives being written out and read again.
    """
    rows, p, first = precise(table(model)), start.shape[1], len(frame.before)
    with inference(model):
        held = score(model, frame.passage(start[0].tolist()), frame.variants(start))
        kept = sorted(zip(held.tolist(), start.tolist(), strict=True), key=lambda one: one[0])
        found = Search(start=kept[0][0], string=kept[0][1])
        for step in range(steps):
            string = kept[0][1]
            gradient = gradients(model, frame.passage(string), first)[:p]
            if not gradient.isfinite().all():
                found.outcome = "not finite"
                break
            named = candidates(gradient, rows, string, may, topk, ascend=False, own=True).cpu()
            drawn = strings(torch.tensor(string), named, *draw(step, search_width, p, topk), n_replace)
            if tokenizer is not None:
                drawn = survivors(drawn, tokenizer)
            losses = score(model, frame.passage(string), frame.variants(drawn)).nan_to_num(nan=math.inf)
            best = int(losses.argmin())
            loss, string = float(losses[best]), drawn[best].tolist()
            found.scored += len(drawn)
            if not math.isfinite(loss):
                found.outcome = "not finite"
                break
            found.losses.append(loss)
            if loss < found.loss:
                found.loss, found.string = loss, string
            if buffer == 0 or loss < kept[-1][0]:
                kept = sorted([*kept[: max(buffer, 1) - 1], (loss, string)], key=lambda one: one[0])
    return found


def strings(string: torch.Tensor, named: torch.Tensor, order: Any, choice: Any, n_replace: int) -> torch.Tensor:
    """Strings [n, P] that differ from `string` [P] at `n_replace` positions: those that come first in `order` [n, P], with
    candidate number `choice` [n, P] of `named` [P, k] put there."""
    at = torch.as_tensor(order).argsort()[:, :n_replace]
    chosen = named[at].gather(2, torch.as_tensor(choice)[:, :n_replace, None]).squeeze(2)
    return string.repeat(len(at), 1).scatter_(1, at, chosen)


def survivors(drawn: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """The strings [n, P] that are the same tokens after being written out and read again."""
    ids = drawn.tolist()
    texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = torch.tensor([a == b for a, b in zip(ids, again, strict=True)])
    if not kept.any():
        raise ValueError(
            f"none of {len(ids)} strings survives being written out and read again; another start or filter_ids=False may help"
        )
    return drawn[kept]
