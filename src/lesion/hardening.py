"""Adversarial training on tokens: rows of a batch are attacked with the weights of the moment, and learned so (Goodfellow et al.
2015, "Explaining and harnessing adversarial examples", with the substitutions of Ebrahimi et al. 2018).

    gain(v at i) = (e_v − e_t) · ∂L/∂eᵢ        L: the row's summed loss, t: the token at i, e: rows of the embedding

The positions of largest gain get their best token, all in one step, since each is only a guess to first order. What is to be
predicted stays the clean text, except for the replaced tokens: to predict those would be to learn the attack.
"""

from __future__ import annotations

from typing import Any

import torch

from lesion.flips import candidates, looked_up, table
from lesion.loss import IGNORE, sum_of_losses
from lesion.ranks import Alone, Shards
from lesion.stats import generator


def hardened(
    ids: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor, may: torch.Tensor, flips: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row with at most `flips` tokens replaced, and its targets, of which the replaced ones are not scored.

    ids and targets [T], targets[t] being what follows ids[t] or IGNORE; gradient [T, d] of the loss by the looked-up rows; rows
    [V, d]; may [V]: ids that may be put in, and that may be replaced. A replacement must raise the loss to first order.
    """
    best = candidates(gradient, rows, ids.tolist(), may, 1)[:, 0]
    gains = ((rows[best] - rows[ids]) * gradient).sum(-1, dtype=torch.float64)
    gains = torch.where(may[ids] & (gains > 0), gains, -torch.inf)  # a gain that is NaN is none
    at = gains.argsort(descending=True, stable=True)[:flips]
    at = at[gains[at].isfinite()]
    ids, targets = ids.clone(), targets.clone()
    ids[at] = best[at]
    targets[at[at > 0] - 1] = IGNORE
    return ids, targets


def row_gradients(model: Any, batch: list[torch.Tensor | None], autocast: bool) -> torch.Tensor:
    """∂(Σ −ln p)/∂(looked-up row) of each row of a batch: [B, T, d]. No `.grad` moves, no random number is drawn."""
    kind, was = next(model.parameters()).device.type, model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:  # their gradients would be computed too, and thrown away
        p.requires_grad_(False)
    model.eval()  # dropout would draw
    try:
        with torch.enable_grad(), looked_up(model) as found, torch.autocast(kind, torch.bfloat16, enabled=autocast):
            loss = sum_of_losses(model, *batch)  # type: ignore[arg-type]
            (out, scale), *others = found
            assert not others, "the embedding is looked up once"
            gradient: torch.Tensor = torch.autograd.grad(loss, out)[0] * scale
        return gradient
    finally:
        model.train(was)
        for p in wanted:
            p.requires_grad_(True)


def attacked_rows(seed: int, step: int, batch: int, share: float) -> list[int]:
    """Which rows of a step are attacked: round(share·batch) of them, drawn for each step."""
    return sorted(generator("attacked rows", seed, step).permutation(batch)[: round(share * batch)].tolist())


def harden(
    team: Alone, batch: list[Any], chosen: list[int], flips: int, may: torch.Tensor, autocast: bool, part: int
) -> list[Any]:
    """A batch of `Packed` with the chosen rows attacked, `part` of them at a time. Every process attacks all of them, so that
    the tokens to be scored are counted alike.

    Raises ValueError where the weights are shared out among processes: none of them could attack alone.
    """
    if isinstance(team, Shards):
        raise ValueError("hardening attacks with all weights, which here are shared out; train on copies (DDP)")
    ids, targets = batch[0].clone(), batch[1].clone()
    rows, may = table(team.model), may.to(team.device)
    for start in range(0, len(chosen), part):
        some = chosen[start : start + part]
        given = [None if x is None else x[some].to(team.device) for x in batch]
        for row, gradient in zip(some, row_gradients(team.model, given, autocast), strict=True):
            made = hardened(ids[row].to(team.device), targets[row].to(team.device), gradient.float(), rows, may, flips)
            ids[row], targets[row] = (x.cpu() for x in made)
    return [ids, targets, *batch[2:]]
