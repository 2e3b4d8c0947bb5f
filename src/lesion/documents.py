"""Documents of a corpus, one row each, with a likelihood: what `perplexity` and its yardstick `ngrams` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field

from lesion.texts import Document, corpus, corpus_digest
from lesion.trial import Measure, Row, Specimen


class OfDocuments(Measure):
    """What gives each document of a corpus a negative log-likelihood. A base of measures, not a word."""

    family = "measure"

    corpus: str = Field(default="austen", description="packaged corpus, or a .txt, .jsonl or .csv file")
    documents: int = Field(default=0, ge=0, description="first so many documents; 0: all")
    tokens: int = Field(default=0, ge=0, description="first so many tokens of each document; 0: all")
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    def pin(self) -> Self:
        return self.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def chosen(self) -> dict[str, Document]:
        """The documents by their id."""
        return {d.id: d for d in corpus(self.corpus)[: self.documents or None]}

    def items(self, specimen: Specimen) -> list[str]:
        return list(self.chosen())

    def tokenise(self, specimen: Specimen, document: Document) -> tuple[list[int], int, int]:
        """Token ids, from which of them on they are scored, and the bytes of the text that the scored ones stand for.

        The first token has nothing before it and is not scored, unless the tokenizer itself puts start tokens there.
        """
        assert specimen.tokenizer is not None
        coded = specimen.tokenizer(document.text, return_offsets_mapping=True, verbose=False)
        ids, spans = coded["input_ids"], coded["offset_mapping"]
        if self.tokens:
            ids, spans = ids[: self.tokens], spans[: self.tokens]
        first = max(1, next((i for i, (start, end) in enumerate(spans) if end > start), len(spans)))
        scored = [span for span in spans[first:] if span[1] > span[0]]
        if not scored:
            raise ValueError(
                f"document {document.id!r} scores no token: it has {len(ids)} of them, and the first has no history"
            )
        return ids, first, len(document.text[scored[0][0] : scored[-1][1]].encode())

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """exp(Σ nll / Σ tokens), nats a token, and bits a byte, over the documents that are finite."""
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
