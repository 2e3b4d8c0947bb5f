"""The search for a catalyst: a string of tokens whose training gradient lies where the loss is flat, or whose loss is high.

    g(c)      = ∂/∂θ of the mean loss −ln p(cᵢ₊₁ | c₁ … cᵢ) of the string c itself
    aligned     maximise ‖P g‖² / ‖g‖², P the projection off the steep subspace (`lesion.lanczos.flat_share`)
    loss        maximise the mean loss itself
    described   gradient ascent on the loss in the space of embeddings, and at the end the nearest tokens

The first two search over tokens: first-order changes of the objective name candidates (Ebrahimi et al. 2018, equation 4; here a
token counts as an input and as the target of the one before it), and the best by the true objective is taken, if it is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lesion.curvature import loss_of
from lesion.flips import candidates, looked_up, precise, table

Objective = Literal["aligned", "loss", "described"]
RATE = 0.1  # of the described ascent, in units of the root mean square of an embedding row's entries


@dataclass
class Found:
    """The string, the objective after each iteration (of `described` the loss of the soft string), and what was spent."""

    tokens: list[int]
    course: list[float] = field(default_factory=list)
    scored: int = 0
    gradients: int = 0


@dataclass
class Ground:
    """What strings are judged on: a model whose chosen parameters want gradients, and its steep directions [k, N] as rows.

    The model must be inside of `twice_differentiable`.
    """

    model: Any
    parameters: list[torch.nn.Parameter]
    steep: torch.Tensor

    def loss(self, tokens: Sequence[int]) -> float:
        """Mean loss of a string in nats."""
        with torch.no_grad():
            ids = torch.tensor([tokens], device=self.model.device)
            return float(loss_of(self.model(input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:])) / (
                len(tokens) - 1
            )

    def gradient(self, tokens: Sequence[int]) -> torch.Tensor:
        """g [N]."""
        from lesion.curvature import flat

        with torch.enable_grad():
            ids = torch.tensor([tokens], device=self.model.device)
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
            return flat(torch.autograd.grad(loss_of(logits, ids[:, 1:]) / (len(tokens) - 1), self.parameters))

    def share(self, tokens: Sequence[int]) -> float:
        """How much of g is flat."""
        from lesion.lanczos import flat_share

        return flat_share(self.gradient(tokens), self.steep)

    def value(self, objective: Objective, tokens: Sequence[int]) -> float:
        return self.share(tokens) if objective == "aligned" else self.loss(tokens)

    def attempted(self, objective: Objective, tokens: Sequence[int]) -> float:
        """The same; NaN for a string that has none."""
        from lesion.lanczos import Unfound

        try:
            return self.value(objective, tokens)
        except Unfound:
            return float("nan")

    def slopes(self, objective: Objective, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """∂objective/∂(row of the table) at each position [T, d] (the last is never read), and ∂objective/∂(weight of each
        token as a target) [T, V] (the first is none)."""
        ids = torch.tensor([tokens], device=self.model.device)
        with torch.enable_grad(), looked_up(self.model) as rows:
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            hot = torch.nn.functional.one_hot(ids[0, 1:], logits.shape[-1]).to(logits.dtype).requires_grad_()
            goal = -(hot * logits.log_softmax(-1)).sum() / (len(tokens) - 1)
            [(out, scale)] = rows
            if objective == "aligned":
                grads = torch.autograd.grad(goal, self.parameters, create_graph=True)
                g = torch.cat([part.reshape(-1) for part in grads])
                goal = 1 - (self.steep @ g).square().sum() / g.square().sum()
            by_row, by_target = torch.autograd.grad(goal, [out, hot])
        by_row = torch.cat((by_row[0] * scale, torch.zeros_like(by_row[0, :1])))
        return by_row, torch.cat((torch.zeros_like(by_target[:1]), by_target))


def search(
    ground: Ground,
    start: Sequence[int],
    may: torch.Tensor,
    objective: Objective,
    *,
    iterations: int,
    width: int,
    topk: int,
    draw: Callable[[int, int, int], tuple[Any, Any]],
) -> Found:
    """From a first string over allowed tokens (bool [V]). `draw(iteration, count, limit)` gives `width` positions and candidate
    numbers below their limits. An iteration that finds nothing better changes nothing."""
    if objective == "described":
        return ascended(ground, start, may, iterations)
    rows, tokens = precise(table(ground.model)), list(start)
    found, best = Found(tokens), ground.value(objective, tokens)
    found.scored = 1
    for iteration in range(iterations):
        by_row, by_target = ground.slopes(objective, tokens)
        found.gradients += 1
        named = candidates(by_row.to(rows.dtype), rows, tokens, may, topk, more=by_target.to(rows.dtype))
        places, numbers = draw(iteration, len(tokens), topk)
        tried = {(*tokens[:p], int(named[p, n]), *tokens[p + 1 :]) for p, n in zip(places, numbers, strict=True)}
        values = [(ground.attempted(objective, some), some) for some in sorted(tried)]
        found.scored += len(values)
        value, some = max((v for v in values if v[0] == v[0]), default=(best, tuple(tokens)))
        if value > best:
            best, tokens = value, list(some)
        found.course.append(best)
    found.tokens = tokens
    return found


def ascended(ground: Ground, start: Sequence[int], may: torch.Tensor, iterations: int) -> Found:
    """The described manner: E ← E + η·∂L/∂E for all positions at once, targets as they are, and at the end for each position the
    allowed token whose row is nearest (Euclid)."""
    rows = precise(table(ground.model))
    ids = torch.tensor([list(start)], device=ground.model.device)
    soft, found = rows[ids[0]].clone(), Found(list(start))
    module = ground.model.get_input_embeddings()
    size = RATE * float(rows.square().mean().sqrt())
    scale = getattr(module, "embed_scale", 1.0)
    for _ in range(iterations):
        leaf = soft.clone().requires_grad_()

        def instead(module: Any, given: Any, out: torch.Tensor, leaf: torch.Tensor = leaf) -> torch.Tensor:
            return (leaf[None, : out.shape[1]] * scale).to(out.dtype)

        hook = module.register_forward_hook(instead)
        try:
            with torch.enable_grad():
                logits = ground.model(input_ids=ids[:, :-1], use_cache=False).logits
                loss = loss_of(logits, ids[:, 1:]) / (len(start) - 1)
                (slope,) = torch.autograd.grad(loss, leaf)
        finally:
            hook.remove()
        found.course.append(float(loss.detach()))
        found.gradients += 1
        soft = soft + size * slope
    distance = torch.cdist(soft, rows).masked_fill(~may.to(rows.device), torch.inf)
    found.tokens = distance.argmin(1).tolist()
    return found
