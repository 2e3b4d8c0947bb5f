"""Surprisal: what a model makes of the texts that another one wrote, −Σ ln p(token | prompt, tokens before), in nats.

Read on the healthy model, of the answers of a damaged one, this says how far its language has left the healthy one's: a
number between "would have written this itself" and noise. A loop is cheap to predict, so it is to be read beside
the share of looping texts (Holtzman et al. 2020, section 3).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from lesion.likelihood import Window, scored
from lesion.trial import MeasureOfTexts, Row, Specimen


class Surprisal(MeasureOfTexts):
    """Negative log-likelihood of stored generations, given their prompts, under the model on the bench, which reads them
    with its own tokenizer."""

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("surprisal of a text is defined for causal models, and this one is encoder-decoder")
        assert specimen.tokenizer is not None
        written = self.written(specimen)
        rows: dict[str, Row] = {}
        started, tokens, todo = time.perf_counter(), {}, []
        asking: Any = self.of.measure
        for item in items:
            before = list(asking.tokenise(specimen, written[item]["asked"]))
            after = specimen.tokenizer(written[item]["text"], add_special_tokens=False, verbose=False)["input_ids"]
            rows[item] = {"item": item, "nll": None, "tokens": len(after), "outcome": "scored" if after else "empty"}
            if after:
                tokens[item] = before + after
                todo.append(Window(item, 0, len(before), len(before) + len(after)))
        for window, nll in scored(specimen.model, todo, tokens):
            rows[window.item] |= {"nll": nll} if math.isfinite(nll) else {"outcome": "not finite"}
        return [{**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows.values()]

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        scored = [row for row in rows if row["nll"] is not None]
        tokens = sum(row["tokens"] for row in scored)
        return {
            "surprisal": math.fsum(row["nll"] for row in scored) / tokens if tokens else None,
            "tokens": tokens,
            "empty": sum(row["outcome"] == "empty" for row in rows),
            "not_finite": sum(row["outcome"] == "not finite" for row in rows),
        }
