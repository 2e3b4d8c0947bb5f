"""Displacement: how far a damaged model has moved from the healthy one, in its weights, its layers and its predictions.

Equal doses are not equal damage: 0.3 of an embedding is not 0.3 of an mlp. These three distances are what components can be
compared at. All are relative to the healthy model, on healthy text:

    weights    √(Σ‖W' − W‖² / Σ‖W‖²) over all parameters, a tied one once
    layer l    √(Σ‖h'ₗ − hₗ‖² / Σ‖hₗ‖²) over tokens, h the residual stream behind layer l; the first token of a document is
               left out, since its huge norm in most models would drown the others (Sun et al. 2024, "Massive activations")
    kl         Σ p·ln(p / p') of the next-token distributions, healthy p, in nats a token (Kullback & Leibler 1951)

Rows are one for the weights and one for each document, with sums, so that they can be averaged over any set of documents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from lesion.contents import layers
from lesion.likelihood import padded
from lesion.texts import corpus, corpus_digest
from lesion.trial import Measure, Row, Specimen, Trial

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights"
REMEMBERED = 4  # chunks of healthy outputs, of about 100 MB each for a vocabulary of 50,000


class Displacement(Measure):
    """Relative weight error, relative error of every layer's output, and KL from the healthy model."""

    chunk = 4

    reference: Trial = Field(description="the healthy model")
    corpus: str = Field(default="austen", description="healthy text: packaged corpus, or a .txt, .jsonl or .csv file")
    documents: int = Field(default=4, ge=0, description="first so many documents; 0: all")
    tokens: int = Field(default=128, ge=2, description="first so many tokens of each document")
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    def pin(self) -> Self:
        return super().pin().with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def _documents(self) -> dict[str, str]:
        return {d.id: d.text for d in corpus(self.corpus)[: self.documents or None]}

    def items(self, specimen: Specimen) -> list[str]:
        return [WEIGHTS, *self._documents()]

    def size(self) -> tuple[int, int]:
        n = len(self._documents())
        return n + 1, 2 * n * self.tokens

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        assert specimen.bring is not None, "the walk can bring a second model"
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("displacement on a text is defined for causal models, and this one is encoder-decoder")
        healthy = specimen.bring(self.reference)
        started, rows = time.perf_counter(), []
        if WEIGHTS in items:
            rows.append({"item": WEIGHTS, **weight_error(healthy.model, specimen.model)})
        if texts := [item for item in items if item != WEIGHTS]:
            rows += self._texts(specimen, healthy, texts)
        return [{**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows]

    def _texts(self, specimen: Specimen, healthy: Specimen, items: Sequence[str]) -> list[Row]:
        documents = self._documents()
        assert specimen.tokenizer is not None
        tokens = {i: specimen.tokenizer(documents[i], verbose=False)["input_ids"][: self.tokens] for i in items}
        if short := [item for item in items if len(tokens[item]) < 2]:
            raise ValueError(f"document {short[0]!r} has fewer than two tokens, so nothing in it is predicted")
        rows, place = [], f"displacement {tokens}"
        before = healthy.memo.get(place) or outputs(healthy, list(tokens.values()))
        if len(healthy.memo) < REMEMBERED:  # the next damaged model is compared with the same
            healthy.memo[place] = before
        after = outputs(specimen, list(tokens.values()))
        for item, ids, (states, logits), (moved, said) in zip(items, tokens.values(), before, after, strict=True):
            errors = [squares(h, m) for h, m in zip(states, moved, strict=True)]
            kl = divergence(logits, said)
            fine = math.isfinite(kl) and all(math.isfinite(x) for pair in errors for x in pair)
            rows.append(
                {
                    "item": item,
                    "outcome": "compared" if fine else "not finite",
                    "tokens": len(ids) - 1,
                    "kl": kl if fine else None,
                    "same_top": int((logits.argmax(-1) == said.argmax(-1)).sum()) if fine else None,
                    "change": [change for change, _ in errors] if fine else None,
                    "norm": [norm for _, norm in errors] if fine else None,
                }
            )
        return rows

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        weights = next(row for row in rows if row["item"] == WEIGHTS)
        texts = [row for row in rows if row["item"] != WEIGHTS and row["outcome"] == "compared"]
        tokens = sum(row["tokens"] for row in texts)
        changes, norms = (zip(*(row[name] for row in texts), strict=True) for name in ("change", "norm"))
        errors = [math.sqrt(math.fsum(c) / math.fsum(n)) for c, n in zip(changes, norms, strict=True)]
        return {
            "weights": weights["relative"],
            "layers": errors,
            "output": errors[-1] if errors else None,
            "kl": math.fsum(row["kl"] for row in texts) / tokens if tokens else None,
            "same_top": sum(row["same_top"] for row in texts) / tokens if tokens else None,
            "not_finite": len(rows) - 1 - len(texts),
        }


def weight_error(healthy: Any, damaged: Any) -> Row:
    """Σ‖W' − W‖² and Σ‖W‖² over all parameters, each once, and √ of their ratio."""
    change = norm = 0.0
    others = dict(damaged.named_parameters())
    for name, weight in healthy.named_parameters():
        more, size = squares(weight.detach(), others[name].detach())
        change, norm = change + more, norm + size
    fine = math.isfinite(change)
    return {
        "outcome": "compared" if fine else "not finite",
        "weight_change": change if fine else None,
        "weight_norm": norm,
        "relative": math.sqrt(change / norm) if fine else None,
    }


def squares(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Σ(after − before)² and Σ before², in float64."""
    import torch

    moved = (after.float() - before.float()).square().sum(dtype=torch.float64)
    return float(moved), float(before.float().square().sum(dtype=torch.float64))


def divergence(healthy: torch.Tensor, damaged: torch.Tensor) -> float:
    """Σ over tokens of KL(p ‖ p') in nats, from logits [T, V]: float32 log-softmax, float64 sums."""
    import torch

    p, q = (logits.float().log_softmax(-1) for logits in (healthy, damaged))
    # an impossible token (p = 0) adds nothing, whatever the other model thinks of it
    return float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(dtype=torch.float64))


def outputs(specimen: Specimen, tokens: Sequence[Sequence[int]]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """For each text the residual stream behind every layer, without its first token [T − 1, D], and the logits of the
    tokens that come next [T − 1, V].

    The layers are listened to here and not by `output_hidden_states`, which leaves hooks in the model for good.
    """
    from lesion.inference import inference

    ids = padded(tokens)
    states: list[torch.Tensor] = []

    def listen(module: Any, given: Any, out: Any) -> None:
        states.append(out[0] if isinstance(out, tuple) else out)

    with inference(specimen.model):
        hooks = [layer.register_forward_hook(listen) for layer in layers(specimen.model)]
        try:
            logits = specimen.model(input_ids=ids.to(specimen.model.device), use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
    return [
        ([state[row, 1 : len(text)] for state in states], logits[row, : len(text) - 1])
        for row, text in enumerate(tokens)
    ]
