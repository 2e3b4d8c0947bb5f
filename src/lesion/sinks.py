"""Attention with a window and sinks (Xiao et al. 2023, "Efficient streaming language models with attention sinks").

Three different things go by this name, and each is an option of its own:

    cache    the first tokens stay in the cache beside a rolling window; positions are those inside the cache
    tokens   the same, and the first tokens are learned ones that every training sample begins with (section 3.3 there)
    logit    a learned logit for each head in the softmax's denominator, so that a head may attend to nothing (as in GPT-OSS)

Queries and keys come without rotation, because a sink's position depends on who looks at it. Legend: B rows, H heads, T
queries, S keys, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache


def rotate(x_BHTD: torch.Tensor, at_BT: torch.Tensor, frequencies_D2: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021) in the half-split layout: the pair (x_d, x_{d + D/2}) turns by at·frequency_d."""
    return turn(x_BHTD, *angles(at_BT, frequencies_D2, x_BHTD.dtype))


def angles(at_BT: torch.Tensor, frequencies_D2: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of at·frequency, [B, 1, T, D], each pair twice."""
    angle = at_BT[:, None, :, None].float() * frequencies_D2
    cos, sin = (torch.cat((part, part), -1).to(kind) for part in (angle.cos(), angle.sin()))
    return cos, sin


def turn(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x_BHTD.shape[-1] // 2
    return x_BHTD * cos + torch.cat((-x_BHTD[..., half:], x_BHTD[..., :half]), -1) * sin


def attend(
    query_BHTD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    at_BT: torch.Tensor,
    key_at_BS: torch.Tensor,
    seen: torch.Tensor | None,
    frequencies: torch.Tensor,
    window: int | None = None,
    sinks: int = 0,
    sink_logit: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, T, H, D] and probabilities [B, H, T, S]; softmax in float32.

    A query at i sees keys at j ≤ i with i − j < window, and those with j < sinks. To a query at i ≥ sinks + window, whose
    cache holds the sinks and the last `window` tokens, its own position is sinks + window − 1, so a sink lies
    sinks + window − 1 − j behind it, however long the text is. seen: further restriction, broadcast to [B, 1, T, S].
    With a sink logit z: p_j = exp(s_j) / (exp(z) + Σ exp(s)).
    """
    heads, groups = query_BHTD.shape[1], key_BGSD.shape[1]
    key = rotate(key_BGSD, key_at_BS, frequencies).repeat_interleave(heads // groups, 1)
    value = value_BGSD.repeat_interleave(heads // groups, 1)
    scale = query_BHTD.shape[-1] ** -0.5
    scores = rotate(query_BHTD, at_BT, frequencies) @ key.transpose(2, 3) * scale
    i, j = at_BT[:, None, :, None], key_at_BS[:, None, None, :]
    allowed = j <= i if seen is None else (j <= i) & seen
    if window is not None:
        near, sink = i - j < window, j < sinks
        inside = at_BT.clamp(max=sinks + window - 1)
        from_inside = rotate(query_BHTD, inside, frequencies) @ key.transpose(2, 3) * scale
        scores = torch.where(near, scores, from_inside)
        allowed = allowed & (near | sink)
    scores = scores.float().masked_fill(~allowed, torch.finfo(torch.float32).min)
    if sink_logit is not None:
        nothing = sink_logit.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, nothing), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = (weights * allowed).to(value.dtype)  # a row that sees nothing (padding) gives zeros
    return (weights @ value).transpose(1, 2), weights


class RollingCache(Cache):
    """Keys without rotation and values of the sinks and of the last window − 1 tokens, with their positions.

    Its size does not grow with the text: what a new token can no longer see is dropped after it was seen for the last time.
    """

    def __init__(self, sinks: int, window: int):
        super().__init__(layers=[])
        self.sinks, self.window, self.seen = sinks, window, 0
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.at: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **more: Any) -> Any:
        """Returns keys and values [B, H, S, D] that the new tokens may see; `key_positions` says where they lie."""
        new = key_states.shape[2]
        if layer_idx == 0:
            self.seen += new
        at = torch.arange(self.seen - new, self.seen, device=key_states.device)
        if layer_idx == len(self.held):
            keys, values = key_states, value_states
            self.held.append((keys, values))
            self.at.append(at)
        else:
            keys, values = (
                torch.cat(pair, 2) for pair in zip(self.held[layer_idx], (key_states, value_states), strict=True)
            )
            at = torch.cat((self.at[layer_idx], at))
        self._latest = at
        stays = (at < self.sinks) | (at > self.seen - self.window)
        self.held[layer_idx] = keys[:, :, stays], values[:, :, stays]
        self.at[layer_idx] = at[stays]
        return keys, values

    def key_positions(self) -> torch.Tensor:
        """Positions [S] of the keys that the last `update` returned."""
        return self._latest

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.seen, 0
