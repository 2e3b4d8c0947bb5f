"""Sampling: from logits and one uniform number to the next token.

temperature → top-k → top-p (nucleus, Holtzman et al. 2020) → inverse of the cumulative distribution, in the order and with the
meaning that transformers gives them. The candidates are laid out in the order of their ids, not of their
probabilities, so that rounding moves the boundaries by a hair and never swaps two neighbours.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

NUCLEUS_GUESS = 1024  # a nucleus rarely has more tokens; where it has, the whole vocabulary is sorted


class Sampling(BaseModel):
    """Settings of one generation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: float = Field(default=1.0, ge=0, description="0: greedy")
    top_k: int = Field(default=0, ge=0, description="0: all tokens")
    top_p: float = Field(default=1.0, gt=0, le=1)


def choose(logits: torch.Tensor, uniform: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token [B] and its log-probability [B] under the untempered distribution, in float64.

    logits [B, V]; uniform [B] in [0, 1). A row whose logits are not finite gives a log-probability that is NaN.
    """
    logits = logits.float()
    total = logits.logsumexp(-1)
    if how.temperature == 0:
        token = logits.argmax(-1)
    else:
        scaled, ids = _candidates(logits, how)
        if ids is not None:
            ids, order = ids.sort(-1)
            scaled = scaled.gather(-1, order)
        weight = (scaled - scaled.amax(-1, keepdim=True)).double().exp()
        mass = weight.cumsum(-1)
        place = torch.searchsorted(mass, uniform.double()[:, None] * mass[:, -1:], right=True)
        place = place.clamp_(max=mass.shape[-1] - 1)
        # a candidate of no weight at the very end would be reached only through rounding
        place = torch.where(weight.gather(-1, place) > 0, place, weight.argmax(-1, keepdim=True))
        token = (place if ids is None else ids.gather(-1, place)).squeeze(-1)
    return token, logits.gather(-1, token[:, None]).squeeze(-1).double() - total.double()


def _candidates(logits: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tempered logits of the tokens that may be drawn (-inf where they may not), and their ids (None: all, in order)."""
    vocabulary = logits.shape[-1]
    if 0 < how.top_k < vocabulary:
        values, ids = logits.topk(how.top_k)
        scaled = values / how.temperature
        return (_nucleus(scaled, scaled.logsumexp(-1), how.top_p), ids) if how.top_p < 1 else (scaled, ids)
    if how.top_p == 1:
        return logits / how.temperature, None
    total = (logits / how.temperature).logsumexp(-1)
    values, ids = logits.topk(min(NUCLEUS_GUESS, vocabulary))
    scaled = values / how.temperature
    if (scaled.logsumexp(-1) - total).exp().min() <= how.top_p:
        values, ids = logits.sort(-1, descending=True)
        scaled = values / how.temperature
    return _nucleus(scaled, total, how.top_p), ids


def _nucleus(descending: torch.Tensor, total: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keeps the smallest set of leading tokens whose probability reaches top_p."""
    probability = (descending - total[:, None]).exp()
    before = probability.cumsum(-1) - probability
    return descending.masked_fill(before >= top_p, float("-inf"))
