"""A mixture of experts in the place of an mlp (Shazeer et al. 2017; top-k routing and losses as in Fedus et al. 2021 and
Zoph et al. 2022, "ST-MoE").

Tokens are sorted by expert and go through all experts in one batched product, without a loop over experts. The router is
computed in float32. Legend: N tokens, E experts, K experts a token, C places of an expert, D hidden, F inner.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def route(logits_NE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts of each token [N, K] and their weights [N, K]: softmax over all experts, renormalised over the k."""
    weights, chosen = logits_NE.float().softmax(-1).topk(k, -1)
    return chosen, weights / weights.sum(-1, keepdim=True)


def places(
    chosen_NK: torch.Tensor, experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where every (token, expert) pair goes: table [E, C] of pairs n·K + k (−1: empty), how many pairs each expert was
    given [E], and how many were dropped. An expert's places go to its pairs in the order of the tokens; C is the capacity,
    or without one the largest load, so that nothing is dropped."""
    flat = chosen_NK.reshape(-1)
    order = flat.argsort(stable=True)
    load = torch.bincount(flat, minlength=experts)
    size = int(load.max()) if capacity is None else capacity
    first = load.cumsum(0) - load
    rank = torch.arange(len(flat), device=flat.device) - first[flat[order]]
    fits = rank < size
    table = torch.full((experts, size), -1, dtype=torch.long, device=flat.device)
    table[flat[order][fits], rank[fits]] = order[fits]
    return table, load, (~fits).sum()


def balance_loss(logits_NE: torch.Tensor, chosen_NK: torch.Tensor) -> torch.Tensor:
    """E·Σᵢ fᵢ·pᵢ, f the share of pairs sent to expert i and p its mean probability: 1 where all are used alike."""
    experts = logits_NE.shape[1]
    share = torch.bincount(chosen_NK.reshape(-1), minlength=experts) / chosen_NK.numel()
    return experts * (share * logits_NE.float().softmax(-1).mean(0)).sum()


def z_loss(logits_NE: torch.Tensor) -> torch.Tensor:
    """Mean of logsumexp², which keeps the router's logits small."""
    return logits_NE.float().logsumexp(-1).square().mean()


class Experts(nn.Module):
    """E gated mlps, K of which each token goes through. `losses` and `counts` are those of the last forward."""

    def __init__(self, hidden: int, inner: int, experts: int, k: int, capacity_factor: float | None):
        super().__init__()
        self.experts, self.k, self.capacity_factor = experts, k, capacity_factor
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.losses: dict[str, torch.Tensor] = {}
        self.counts: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.router.weight.float())
        chosen, weights = route(logits_NE, self.k)
        factor = self.capacity_factor
        capacity = None if factor is None else math.ceil(factor * chosen.numel() / self.experts)
        table, load, dropped = places(chosen, self.experts, capacity)
        self.losses = {"balance": balance_loss(logits_NE, chosen), "z": z_loss(logits_NE)}
        self.counts = {"load": load, "dropped": dropped}
        there = table >= 0
        token = table.clamp(min=0) // self.k
        x_ECD = x_ND[token] * there[..., None]
        gate, up = (x_ECD @ self.gate_up_proj.transpose(1, 2).to(x.dtype)).chunk(2, -1)
        y_ECD = (F.silu(gate) * up) @ self.down_proj.transpose(1, 2).to(x.dtype)
        share = weights.reshape(-1)[table.clamp(min=0)] * there
        y_ND = torch.zeros_like(x_ND).index_add(
            0, token.reshape(-1), (y_ECD * share[..., None].to(x.dtype)).flatten(0, 1)
        )
        return y_ND.view_as(x)
