"""Perplexity of held-out documents: exp of the mean negative log-likelihood, weighted by tokens (Jelinek et al. 1977).

    NLL(document) = −Σᵢ ln p(tᵢ | at least window − stride tokens before it, from the same document)
    perplexity    = exp(Σ NLL / Σ tokens)          bits per byte = Σ NLL / (ln 2 · Σ bytes)

The protocol moves a perplexity by more than most damage does, so window and stride are part of the question. The first
token of a document has nothing before it and is not scored, unless the tokenizer itself puts a start token there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from lesion.likelihood import scored, windows
from lesion.texts import Document, corpus, corpus_digest
from lesion.trial import Measure, Row, Specimen


class Perplexity(Measure):
    """Token-weighted perplexity and bits per byte of a corpus, one row a document."""

    chunk = 8

    corpus: str = Field(default="austen", description="packaged corpus, or a .txt, .jsonl or .csv file")
    window: int = Field(default=512, ge=2, description="tokens a model sees at once")
    stride: int = Field(default=256, ge=1, description="tokens by which the window moves; at most window − 1")
    documents: int = Field(default=0, ge=0, description="first so many documents; 0: all")
    tokens: int = Field(default=0, ge=0, description="first so many tokens of each document; 0: all")
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    @model_validator(mode="after")
    def _overlaps(self) -> Self:
        if self.stride >= self.window:
            raise ValueError(f"a stride of {self.stride} leaves tokens of a window of {self.window} without history")
        return self

    def pin(self) -> Self:
        return self.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def _documents(self) -> dict[str, Document]:
        return {d.id: d for d in corpus(self.corpus)[: self.documents or None]}

    def items(self, specimen: Specimen) -> list[str]:
        return list(self._documents())

    def size(self) -> tuple[int, int]:
        lengths = [len(d.text) // 4 for d in self._documents().values()]  # four characters are a token, roughly
        tokens = sum(min(length, self.tokens or length) for length in lengths)
        return len(lengths), tokens * (self.window // self.stride if max(lengths) > self.window else 1)

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("perplexity of a text is defined for causal models, and this one is encoder-decoder")
        started, documents = time.perf_counter(), self._documents()
        tokens: dict[str, list[int]] = {}
        rows: dict[str, Row] = {}
        for item in items:
            tokens[item], size = self._tokenise(specimen, documents[item])
            rows[item] = {"item": item, "nll": 0.0, "tokens": len(tokens[item]) - 1, "bytes": size}
        todo = [w for item in items for w in windows(item, len(tokens[item]), self.window, self.stride)]
        for window, nll in scored(specimen.model, todo, tokens):
            rows[window.item]["nll"] += nll
        for row in rows.values():
            row["outcome"] = "scored" if math.isfinite(row["nll"]) else "not finite"
            row["nll"] = row["nll"] if math.isfinite(row["nll"]) else None
            row["duration"] = (time.perf_counter() - started) / len(rows)
        return list(rows.values())

    def _tokenise(self, specimen: Specimen, document: Document) -> tuple[list[int], int]:
        """Token ids, and the bytes of the text that the scored ones stand for."""
        assert specimen.tokenizer is not None
        coded = specimen.tokenizer(document.text, return_offsets_mapping=True, verbose=False)
        ids, spans = coded["input_ids"], coded["offset_mapping"]
        if self.tokens:
            ids, spans = ids[: self.tokens], spans[: self.tokens]
        scored = [span for span in spans[1:] if span[1] > span[0]]
        if not scored:
            raise ValueError(
                f"document {document.id!r} scores no token: it has {len(ids)} of them, and the first has no history"
            )
        return ids, len(document.text[scored[0][0] : scored[-1][1]].encode())

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        good = [row for row in rows if row["nll"] is not None]
        if not good:
            return {"perplexity": None, "nll": None, "bits_per_byte": None, "tokens": 0, "not_finite": len(rows)}
        nll, tokens = math.fsum(row["nll"] for row in good), sum(row["tokens"] for row in good)
        return {
            "perplexity": math.exp(nll / tokens) if nll / tokens < 700 else None,
            "nll": nll / tokens,
            "bits_per_byte": nll / math.log(2) / sum(row["bytes"] for row in good),
            "tokens": tokens,
            "not_finite": len(rows) - len(good),
        }
