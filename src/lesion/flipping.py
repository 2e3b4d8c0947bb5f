"""The manners in which the tokens of a passage are flipped (Ebrahimi et al. 2018, section 3), and when that is a success.

    described   one gradient; the positions with the largest one, each with its first-order best token; no look at the loss
    iterative   a gradient for each flip; first-order candidates of all positions; the one of largest true loss, if it is larger
    random      random positions and random allowed tokens, several draws of which the best is kept: what any change does
    query       as iterative, but with random candidates and no gradient: where it does better, gradients were masked
                (Athalye et al. 2018, section 3)

Every flip is at another position, so after n flips n tokens are changed in each manner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lesion.flips import candidates, gradients, score, table
from lesion.passages import Passage
from lesion.stats import generator

TRIES = 16  # tokens of a position that are tried, where a text has to stay stable, before it is left alone

Flip = tuple[int, int]  # position in the attacked part, new id


@dataclass(frozen=True)
class Reach:
    """What an attack may do: flip the tokens at `positions` to ids of `may` (bool [V]), as long as `keeps` is content with the
    changed tokens."""

    positions: tuple[int, ...]
    may: torch.Tensor
    keeps: Callable[[Sequence[int]], bool] | None = None

    def without(self, position: int) -> Reach:
        return replace(self, positions=tuple(p for p in self.positions if p != position))

    def allows(self, tokens: Sequence[int], flip: Flip) -> bool:
        return self.keeps is None or self.keeps(flipped(tokens, [flip]))


@dataclass
class Attack:
    """The flips in their order, and what was spent on finding them: true losses computed, and gradients."""

    flips: list[Flip] = field(default_factory=list)
    scorings: int = 0
    gradients: int = 0
    draws: list[list[Flip]] | None = None  # all of them, where there were several


def flipped(tokens: Sequence[int], flips: Sequence[Flip]) -> list[int]:
    changed = list(tokens)
    for position, id in flips:
        changed[position] = id
    return changed


def curve(model: Any, passage: Passage, flips: Sequence[Flip]) -> list[float]:
    """The loss after 0, 1, …, len(flips) flips, in nats a target token."""
    variants = [flipped(passage.attacked, flips[:n]) for n in range(len(flips) + 1)]
    return score(model, passage, torch.tensor(variants)).tolist()


def first_order(
    gradient: torch.Tensor, rows: torch.Tensor, tokens: Sequence[int], may: torch.Tensor, k: int
) -> list[tuple[float, int, int]]:
    """(gain, place, id) of the k best ids of each place, the largest gain (e_id − e_token)·gradient first, in nats.

    gradient [P, d], rows [V, d] of the embedding, tokens [P], may [V].
    """
    ids = candidates(gradient, rows, tokens, may, min(k, int(may.sum()) - 1))
    present = rows[torch.tensor(tokens, device=rows.device)]
    gains = ((rows[ids] - present[:, None]) * gradient[:, None]).sum(-1, dtype=torch.float64)
    found = zip(gains.flatten().tolist(), range(gains.numel()), ids.flatten().tolist(), strict=True)
    return sorted(((gain, n // ids.shape[1], id) for gain, n, id in found), key=lambda one: -one[0])


def _first_order(model: Any, passage: Passage, reach: Reach, k: int) -> list[tuple[float, int, int]]:
    """The same of a model, with positions of the passage for places."""
    at, tokens = list(reach.positions), passage.attacked
    gradient = gradients(model, passage)[at]
    found = first_order(gradient, table(model), [tokens[i] for i in at], reach.may, k)
    return [(gain, at[place], id) for gain, place, id in found]


def described(model: Any, passage: Passage, reach: Reach, flips: int) -> Attack:
    at, tokens = list(reach.positions), passage.attacked
    if not at:
        return Attack()
    gradient = gradients(model, passage)[at]
    tries = min(TRIES if reach.keeps else 1, int(reach.may.sum()) - 1)
    best = candidates(gradient, table(model), [tokens[i] for i in at], reach.may, tries).tolist()
    made: list[Flip] = []
    for place in gradient.norm(dim=-1).argsort(descending=True, stable=True).tolist():
        present = flipped(tokens, made)
        made += [(at[place], id) for id in best[place] if reach.allows(present, (at[place], id))][:1]
        if len(made) == flips:
            break
    return Attack(made, gradients=1)


def iterative(model: Any, passage: Passage, reach: Reach, flips: int, width: int, each: int) -> Attack:
    """`width` candidates of a flip are scored, at most `each` of them at one position. It ends early where none of them
    raises the loss."""
    found = Attack(scorings=1)
    best = curve(model, passage, [])[0]
    for _ in range(flips):
        if not reach.positions:
            break
        present = passage.changed(flipped(passage.attacked, found.flips))
        found.gradients += 1
        ranked = ((at, id) for _, at, id in _first_order(model, present, reach, each))
        some = _first(width, (flip for flip in ranked if reach.allows(present.attacked, flip)))
        loss, flip = _best(model, present, some)
        found.scorings += len(some)
        if flip is None or loss <= best:
            break
        best, reach = loss, reach.without(flip[0])
        found.flips.append(flip)
    return found


def query(
    model: Any, passage: Passage, reach: Reach, flips: int, width: int, each: int, place: tuple[object, ...]
) -> Attack:
    """As many candidates as `iterative` scores, drawn at random (`place` keys their stream). A round of which none raises the
    loss flips nothing."""
    found = Attack(scorings=1)
    best, before = curve(model, passage, [])[0], len(reach.positions)
    for n in range(min(flips, before)):
        present = passage.changed(flipped(passage.attacked, found.flips))
        drawn = _drawn(reach, present.attacked, ("query", *place, n))
        some = _first(min(width, each * (before - n)), drawn)
        loss, flip = _best(model, present, some)
        found.scorings += len(some)
        if flip is not None and loss > best:
            best, reach = loss, reach.without(flip[0])
            found.flips.append(flip)
    return found


def at_random(model: Any, passage: Passage, reach: Reach, flips: int, draws: int, place: tuple[object, ...]) -> Attack:
    """The best of `draws` changes of so many tokens, and all of them."""
    drawn: list[list[Flip]] = []
    for n in range(draws):
        made: list[Flip] = []
        left = reach
        while len(made) < flips and left.positions:
            flip = next(_drawn(left, flipped(passage.attacked, made), ("random flips", *place, n, len(made))), None)
            if flip is None:
                break
            made.append(flip)
            left = left.without(flip[0])
        drawn.append(made)
    last = score(model, passage, torch.tensor([flipped(passage.attacked, made) for made in drawn])).tolist()
    best = max(range(draws), key=lambda n: last[n] if math.isfinite(last[n]) else -math.inf)
    return Attack(drawn[best], scorings=draws, draws=drawn)


def _drawn(reach: Reach, tokens: Sequence[int], place: tuple[object, ...]) -> Iterator[Flip]:
    """Random flips within reach, each to another token; where the text has to stay stable the stream may end."""
    stream, ids = generator(*place), reach.may.nonzero()[:, 0]
    refused = 0
    while reach.positions and refused < TRIES * len(reach.positions):
        flip = (reach.positions[stream.integers(len(reach.positions))], int(ids[stream.integers(len(ids))]))
        if tokens[flip[0]] != flip[1] and reach.allows(tokens, flip):
            yield flip
        else:
            refused += 1


def _first(n: int, some: Iterator[Flip]) -> list[Flip]:
    return [flip for _, flip in zip(range(n), some, strict=False)]


def _best(model: Any, passage: Passage, some: Sequence[Flip]) -> tuple[float, Flip | None]:
    """The largest true loss among flips, and its flip. One that makes the model not finite is none."""
    if not some:
        return -math.inf, None
    found = score(model, passage, torch.tensor([flipped(passage.attacked, [flip]) for flip in some]))
    found = torch.where(found.isfinite(), found, -torch.inf)
    top = int(found.argmax())
    return float(found[top]), some[top]


def success(losses: Sequence[float], flips: int, threshold: float, relative: bool) -> bool:
    """Whether the loss has risen by the threshold after so many flips, or after the last there is: losses[n] is that after n.

    relative: losses[n] ≥ (1 + threshold)·losses[0]; else losses[n] ≥ losses[0] + threshold, in nats. Raises ValueError for a
    threshold that is not positive, which a loss that did not rise would reach.
    """
    if not losses or flips < 0:
        raise ValueError(f"expected losses after 0, 1, … flips, and a number of flips, got {list(losses)} and {flips}")
    if not threshold > 0:
        raise ValueError(f"a threshold is a positive rise of the loss, not {threshold}")
    rise = losses[min(flips, len(losses) - 1)] - losses[0]
    return rise > 0 and rise >= threshold * (losses[0] if relative else 1)
