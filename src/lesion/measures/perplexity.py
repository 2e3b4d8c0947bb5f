"""Perplexity of held-out documents: exp of the mean negative log-likelihood, weighted by tokens (Jelinek et al. 1977).

    NLL(document) = −Σᵢ ln p(tᵢ | at least window − stride tokens before it, from the same document)
    perplexity    = exp(Σ NLL / Σ tokens)          bits per byte = Σ NLL / (ln 2 · Σ bytes)

The protocol moves a perplexity by more than most damage does, so window and stride are part of the question. The first
token of a document has nothing before it and is not scored, unless the tokenizer itself puts a start token there.

A model with learned sink tokens reads each document whole, behind them: it has a rolling window of its own, and a window that
begins later in the text would have no sinks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from lesion.documents import OfDocuments
from lesion.likelihood import Window, scored, windows
from lesion.trial import Row, Specimen


class Perplexity(OfDocuments):
    """Token-weighted perplexity and bits per byte of a corpus, one row a document."""

    chunk = 8

    window: int = Field(default=512, ge=2, description="tokens a model sees at once")
    stride: int = Field(default=256, ge=1, description="tokens by which the window moves; at most window − 1")

    @model_validator(mode="after")
    def _overlaps(self) -> Self:
        if self.stride >= self.window:
            raise ValueError(f"a stride of {self.stride} leaves tokens of a window of {self.window} without history")
        return self

    def size(self) -> tuple[int, int]:
        lengths = [len(d.text) // 4 for d in self.chosen().values()]  # four characters are a token, roughly
        tokens = sum(min(length, self.tokens or length) for length in lengths)
        return len(lengths), tokens * (self.window // self.stride if max(lengths) > self.window else 1)

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("perplexity of a text is defined for causal models, and this one is encoder-decoder")
        started, documents = time.perf_counter(), self.chosen()
        tokens: dict[str, list[int]] = {}
        rows: dict[str, Row] = {}
        todo: list[Window] = []
        whole = getattr(specimen.model.config, "sinks", None) == "tokens"
        for item in items:
            tokens[item], first, size = self.tokenise(specimen, documents[item])
            length = len(tokens[item])
            rows[item] = {"item": item, "nll": 0.0, "tokens": length - first, "bytes": size}
            todo += windows(item, length, length if whole else self.window, self.stride, first)
        for window, nll in scored(specimen.model, todo, tokens):
            rows[window.item]["nll"] += nll
        for row in rows.values():
            row["outcome"] = "scored" if math.isfinite(row["nll"]) else "not finite"
            row["nll"] = row["nll"] if math.isfinite(row["nll"]) else None
            row["duration"] = (time.perf_counter() - started) / len(rows)
        return list(rows.values())
