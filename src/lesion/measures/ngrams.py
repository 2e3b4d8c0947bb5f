"""The yardstick: what counting gives on the same tokens of the same documents (Chen & Goodman 1998).

An interpolated n-gram model is counted on the text that a model was trained on, in the model's own tokens, and scores the
documents that `perplexity` scores, under the same ids. So a trained model is compared with it document by document.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self

from pydantic import Field

from lesion.documents import OfDocuments
from lesion.ngrams import NGram
from lesion.texts import corpus, corpus_digest
from lesion.trial import Row, Specimen


class Ngrams(OfDocuments):
    """Negative log-likelihood of documents under an interpolated Kneser-Ney model in the specimen's tokens."""

    order: int = Field(default=3, ge=1, description="tokens of a gram; 3: what a trained model must beat")
    counted: str = Field(default="novels", description="corpus that is counted: what the model was trained on")
    skip: int = Field(default=0, ge=0, description="first so many documents of it are not counted")
    counted_sha256: str | None = Field(default=None, description="its digest; filled in when the reading is pinned")

    def pin(self) -> Self:
        counted = f"corpus {self.counted!r}"
        return super().pin().with_digest(counted, corpus_digest(self.counted), "counted_sha256")

    def size(self) -> tuple[int, int]:
        return len(self.chosen()), 0

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        started, documents = time.perf_counter(), self.chosen()
        tokenizer = specimen.tokenizer
        assert tokenizer is not None
        end = tokenizer.eos_token_id
        if end is None:
            raise ValueError("this tokenizer has no end token, which stands between documents")
        model = _counted(self.counted, self.counted_sha256, self.skip, self.order, end, tokenizer)
        begin, rows = len(tokenizer("")["input_ids"]), []
        for item in items:
            ids, first, size = self.tokenise(specimen, documents[item])
            nll = model.nll(ids[begin:], skip_first=False)[first - begin :]
            rows.append({"item": item, "nll": float(nll.sum()), "tokens": len(nll), "bytes": size, "outcome": "scored"})
        each = (time.perf_counter() - started) / len(rows)
        return [{**row, "duration": each} for row in rows]


@lru_cache(maxsize=2)
def _counted(name: str, sha256: str | None, skip: int, order: int, end: int, tokenizer: Any) -> NGram:
    texts = [d.text for d in corpus(name)[skip:]]
    tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return NGram(tokens, order, len(tokenizer), end)
