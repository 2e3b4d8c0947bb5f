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

from pydantic import Field

from lesion.likelihood import Window, batches, negative_log_likelihood
from lesion.trial import Measure, Reading, Row, Specimen


class Surprisal(Measure):
    """Negative log-likelihood of stored generations, given their prompts, under the model on the bench."""

    of: Reading = Field(description="the generations; this model reads them with its own tokenizer")

    def items(self, specimen: Specimen) -> list[str]:
        return [row["item"] for row in self._written(specimen)]

    def size(self) -> tuple[int, int] | None:
        return self.of.measure.size()

    def _written(self, specimen: Specimen) -> list[Row]:
        assert specimen.recall is not None, "the walk recalls what is quoted"
        return specimen.recall(self.of)

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion.inference import inference

        if specimen.model.config.is_encoder_decoder:
            raise ValueError("surprisal of a text is defined for causal models, and this one is encoder-decoder")
        assert specimen.tokenizer is not None
        written = {row["item"]: row for row in self._written(specimen)}
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
        with inference(specimen.model):
            for batch in batches(todo):
                for window, nll in zip(batch, negative_log_likelihood(specimen.model, batch, tokens), strict=True):
                    fine = math.isfinite(nll)
                    rows[window.item] |= {"nll": nll} if fine else {"outcome": "not finite"}
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
