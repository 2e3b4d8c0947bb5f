"""Verifiers: a number for each solution, whose σ is the chance that it is right (Cobbe et al. 2021, section 4).

    decoder    a linear head on the model's own trunk, read at the last token
    encoder    a small bidirectional transformer of its own over the same tokens, read as the mean over tokens

The head is a part of the model, `verifier`, so it is saved, digested and undone like any other tensor. It begins at zero, where
the loss is ln 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesion.likelihood import padded
from lesion.loss import IGNORE, Objective
from lesion.trial import Reading, Row, Specimen

Trunk = Literal["decoder", "encoder"]
WIDTH, LAYERS, HEADS = 128, 2, 4  # of the encoder
Judged = tuple[list[int], int]  # tokens of a problem with its solution, and whether that is right


class Encoder(nn.Module):
    """Embeddings of tokens and places, LAYERS transformer layers, a mean over tokens, a linear head."""

    def __init__(self, vocabulary: int, length: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(length, WIDTH)
        how: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **how) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Logits [B] of ids [B, T], of which those are there that `there` [B, T] says."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~there)
        weight = there[..., None].to(x.dtype)
        found: torch.Tensor = self.head((x * weight).sum(1) / weight.sum(1))[:, 0]
        return found


def attach(model: Any, trunk: Trunk, length: int, seed: int) -> None:
    """Puts a verifier beside a model; for an encoder nothing else is trained. Raises ValueError where there is one."""
    if "verifier" in model._modules:
        raise ValueError("this model has a verifier already")
    config = model.config.get_text_config()
    where = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if where.type != "meta" else "meta"):
        torch.default_generator.manual_seed(seed)
        made: nn.Module
        if trunk == "encoder":
            made = Encoder(config.vocab_size, length)
            model.requires_grad_(False)
            head: Any = made.head
        else:
            made = head = nn.Linear(config.hidden_size, 1)
            if (
                out := model.get_output_embeddings()
            ) is not None and out.weight is not model.get_input_embeddings().weight:
                out.requires_grad_(False)  # nothing is asked of it, and what several processes train must be asked for
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    model.verifier = made.to(where).train(model.training)


def verdicts(model: Any, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Logits [B] of ids [B, T] that end at the places `last` [B]."""
    verifier = model._modules.get("verifier")
    if verifier is None:
        raise ValueError("this model has no verifier; the step `verifier` trains one")
    if isinstance(verifier, Encoder):
        found: torch.Tensor = verifier(ids, torch.arange(ids.shape[1], device=ids.device) <= last[:, None])
        return found
    hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
    read: torch.Tensor = verifier(hidden[torch.arange(len(ids), device=ids.device), last].float())[:, 0]
    return read


def longest(model: Any) -> int | None:
    """Most tokens that a model's verifier reads; None: any."""
    from lesion.likelihood import context_of

    verifier = model._modules.get("verifier")
    if isinstance(verifier, Encoder):
        return verifier.places.num_embeddings
    return context_of(model.config.get_text_config())


class Correctness(Objective):
    """−ln of the chance that the verifier gives to what is the case; a unit is a solution."""

    def total(self, model: Any, *batch: Any) -> torch.Tensor:
        """ids [B, T] and targets [B, T]: 1 or 0 at a solution's last token, IGNORE elsewhere."""
        ids, targets = batch[:2]
        last = (targets != IGNORE).int().argmax(1)
        right = targets.gather(1, last[:, None])[:, 0]
        logits = verdicts(model, ids, last).float()
        return F.binary_cross_entropy_with_logits(logits, right.float(), reduction="sum").double()


def solutions(specimen: Specimen, samples: Reading, rows: Sequence[Row]) -> list[tuple[str, list[int], int]]:
    """Item, tokens of problem and solution, and whether that is right, of each reply that was graded."""
    from lesion import asking

    measure: Any = samples.measure
    examples = {e.id: e for e in measure.task.examples(measure.part)}
    found = []
    for row in rows:
        if row["correct"] is not None and row["text"]:
            text = asking.prompt(specimen, measure.task, examples[row["example"]], measure.chat)
            text += asking.reply(specimen, measure.task, row["text"], measure.chat)
            found.append((row["item"], text, int(row["correct"])))
    return found


def collate(some: Sequence[Judged]) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    ids = padded([text for text, _ in some])
    targets = torch.full_like(ids, IGNORE)
    for row, (text, right) in enumerate(some):
        targets[row, len(text) - 1] = right
    return ids, targets, None, None


def auroc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """The chance that a right solution is scored above a wrong one, ties counted half (Mann & Whitney 1947); None where either is
    missing."""
    from scipy.stats import rankdata

    good, bad = sum(right), len(right) - sum(right)
    if not good or not bad:
        return None
    ranks = rankdata(scores)
    above = float(sum(rank for rank, is_right in zip(ranks, right, strict=True) if is_right)) - good * (good + 1) / 2
    return above / (good * bad)


def calibration_error(chances: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): Σ over bins of |share right − mean chance|, weighted by the bin's size."""
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(chances) if min(int(c * bins), bins - 1) == b]
        if inside:
            total += abs(sum(right[i] for i in inside) - sum(chances[i] for i in inside))
    return total / len(chances)
