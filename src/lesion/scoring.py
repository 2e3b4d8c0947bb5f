"""The true losses of many variants of one passage."""

from __future__ import annotations

from typing import Any

import torch

from lesion.passages import Passage, losses


def score(model: Any, passage: Passage, variants: torch.Tensor) -> torch.Tensor:
    """Mean target loss in nats, float64 [n], of each variant [n, positions] of `passage.attacked`."""
    return torch.tensor(losses(model, [passage.changed(v) for v in variants.tolist()]), dtype=torch.float64)
