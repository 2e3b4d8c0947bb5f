"""Distillation: a model learns from the whole distribution of another one (Hinton, Vinyals & Dean 2015), at temperature 1.

    loss = Σ over scored tokens of  (1 − λ)·(−ln q(t)) + λ·KL(p ‖ q),     p the teacher's, q the model's

Both models read the same batch. Logits are made a chunk of tokens at a time and made again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lesion.loss import IGNORE, Objective

CHUNK = 512  # tokens


def sum_of_mixed_losses(model: Any, teacher: Any, share: float, *batch: Any) -> torch.Tensor:
    """Over the scored targets of a batch (ids, targets, mask, positions), in nats, float64. `share`: λ."""
    ids, targets, mask, at = batch
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": at, "use_cache": False}
    chosen = targets.flatten() != IGNORE
    hidden = _hidden(model, given).flatten(0, 1)[chosen]
    with torch.no_grad():
        wanted = _hidden(teacher, given).flatten(0, 1)[chosen]
    kept = targets.flatten()[chosen]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(kept), CHUNK):
        part = slice(start, start + CHUNK)
        of = (model, teacher, share, hidden[part], wanted[part], kept[part])
        total = total + checkpoint(_chunk, *of, use_reentrant=False)
    return total


def _hidden(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """What the head reads: logits are a function of it, token by token."""
    found: torch.Tensor = getattr(model, model.base_model_prefix)(**given).last_hidden_state
    return found


def _logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    config = model.config.get_text_config()
    logits: torch.Tensor = model.get_output_embeddings()(hidden).float()
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _chunk(
    model: Any, teacher: Any, share: float, hidden: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    log_q = _logits(model, hidden).log_softmax(-1)
    nll = F.nll_loss(log_q, targets, reduction="sum")
    with torch.no_grad():
        log_p = _logits(teacher, wanted).log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return ((1 - share) * nll + share * kl).double()


class Distilled(Objective):
    """The mixed loss while the model is trained; language modelling alone where it is evaluated."""

    def __init__(self, teacher: Any, share: float):
        self.teacher, self.share = teacher, share

    def total(self, model: Any, *batch: Any) -> torch.Tensor:
        if model.training:
            return sum_of_mixed_losses(model, self.teacher, self.share, *batch)
        return super().total(model, *batch)
