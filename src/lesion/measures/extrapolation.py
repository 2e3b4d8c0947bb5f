"""Extrapolation: how well a model predicts far beyond the length it was trained on (Press et al. 2021, section 2; Xiao et al.
2023, section 3).

    NLL(stretch, k) = −Σ ln p(tᵢ | t₁ … tᵢ₋₁)   over the last length/2 tokens of the first k·length ones

Every token sees all that its model's attention lets it see of the whole text before it, so at k = 1 a model reads what it was
trained for, and at k = 16 it has come sixteen times as far. With `fresh` only the last `length` tokens are read, as if the text
began there: what the same model can do with the same tokens when nothing is kept (the sliding window with recomputation of
Xiao et al.). Texts differ along a stretch, so models are compared at equal items.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from lesion.likelihood import Window, scored
from lesion.longtexts import OfLongTexts
from lesion.trial import Row, Specimen


class Extrapolation(OfLongTexts):
    """Negative log-likelihood of the last tokens of contexts of 1, 2, 4, … times `length`."""

    chunk = 10

    fresh: bool = Field(default=False, description="read only the last `length` tokens of every context")

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        started, begin, stretches = time.perf_counter(), self.begin(specimen), self.cut(specimen)
        tokens, todo = {}, []
        for item in items:
            number, k = self.where(item)
            start = (k - 1) * self.length if self.fresh else 0
            tokens[item] = [*begin, *stretches[number][start : k * self.length]]
            todo.append(Window(item, 0, len(tokens[item]) - self.length // 2, len(tokens[item])))
        found = {window.item: (nll, window.end - window.scored) for window, nll in scored(specimen.model, todo, tokens)}
        each = (time.perf_counter() - started) / len(items)
        return [self._row(item, *found[item], each) for item in items]

    def _row(self, item: str, nll: float, tokens: int, duration: float) -> Row:
        number, k = self.where(item)
        finite = math.isfinite(nll)
        return {
            "item": item,
            "stretch": number,
            "times": k,
            "nll": nll if finite else None,
            "tokens": tokens,
            "outcome": "scored" if finite else "not finite",
            "duration": duration,
        }

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for k in self.times:
            good = [row for row in rows if row["times"] == k and row["nll"] is not None]
            mean = math.fsum(row["nll"] for row in good) / sum(row["tokens"] for row in good) if good else None
            found[f"nll_{k}"] = mean
        return {**found, "not_finite": sum(row["nll"] is None for row in rows)}
