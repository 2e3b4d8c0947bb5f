"""Sign structures: which entries of an FFN may stay, so that it is monotone in some order and loses the least.

With signs s ∈ {±1}^D of the residual stream and orientations o ∈ {±1}^M of the hidden units, an FFN with an increasing activation
is monotone in the order x ≤ₛ y ⇔ s ⊙ (y − x) ≥ 0 where every entry of its first matrices has sign(A[j, i]) = oⱼ·sᵢ, and
of its last one sign(B[k, j]) = sₖ·oⱼ. Entries that disagree are set to 0. Non-negative weights are the case s = o = 1,
which keeps half of the mass of a symmetric matrix; the best signs are a maximum cut of a bipartite graph,

    maximise oᵀ·Q·s,   Q[j, i] = Σ a·|a| over the entries a that join unit j and coordinate i,

and the mass that is kept is ½ + ½·max / Σ a². Maximum cut is hard (Karp 1972); alternating s ← sign(Qᵀo), o ← sign(Qs)
rises until neither changes, from the leading singular vectors and from random starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lesion.stats import generator


@dataclass(frozen=True, eq=False)
class Signature:
    """units: o [M], stream: s [D], both ±1; kept: share of Σ a² that agrees with them."""

    units: torch.Tensor
    stream: torch.Tensor
    kept: float


def signature(matrices: Sequence[torch.Tensor], starts: int = 8, seed: int = 0) -> Signature:
    """The best signs found for matrices that are all turned to [M units, D coordinates], in float64.

    The result is never worse than s = o = 1, from which one of the starts begins.
    """
    q = sum((a.double() * a.double().abs() for a in matrices), torch.zeros((), dtype=torch.float64))
    total = float(sum(a.double().square().sum() for a in matrices))
    if not (total > 0 and torch.isfinite(q).all()):
        raise ValueError("a sign structure needs finite weights that are not all zero")
    drawn = generator("signature", seed)
    beginnings = [torch.ones(q.shape[0], dtype=q.dtype), _leading(q)]
    beginnings += [torch.from_numpy(drawn.choice([-1.0, 1.0], q.shape[0])) for _ in range(starts)]
    best: tuple[float, torch.Tensor, torch.Tensor] | None = None
    for units in beginnings:
        value, units, stream = _climb(q, units.to(q.device))
        if best is None or value > best[0]:
            best = value, units, stream
    assert best is not None
    return Signature(best[1], best[2], 0.5 + 0.5 * best[0] / total)


def _climb(q: torch.Tensor, units: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    value = -1.0
    while True:
        stream = _signs(q.t() @ units)
        units = _signs(q @ stream)
        found = float(units @ q @ stream)
        if found <= value:
            return value, units, stream
        value = found


def _leading(q: torch.Tensor) -> torch.Tensor:
    """Signs of the leading left singular vector, by power iteration: what rounding relaxes the cut to."""
    v = torch.ones(q.shape[1], dtype=q.dtype, device=q.device)
    for _ in range(30):
        u = q @ v
        v = q.t() @ (u / u.norm().clamp(min=1e-300))
    return _signs(q @ v)


def _signs(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
