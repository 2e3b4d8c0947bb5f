"""Long texts: a corpus joined to one stream, as a packing joins it, and cut into stretches of one length.

A stretch may be longer than any training row, and than any document: documents follow each other with an end token between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Self

from pydantic import Field, model_validator

from lesion.texts import corpus, corpus_digest
from lesion.trial import Measure, Specimen


class OfLongTexts(Measure):
    """What reads stretches of a corpus after 1, 2, 4, … times a length of context. A base of measures, not a word."""

    family = "measure"

    corpus: str = Field(default="austen", description="packaged corpus, or a .txt, .jsonl or .csv file")
    length: int = Field(default=256, ge=2, description="tokens of the training rows: the unit of context")
    times: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16), min_length=1, description="contexts, in units of length")
    stretches: int = Field(default=16, ge=1, description="stretches of the corpus, each as long as the longest context")
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.times[0] < 1 or list(self.times) != sorted(set(self.times)):
            raise ValueError(f"contexts must grow from 1, got {self.times}")
        return self

    def pin(self) -> Self:
        return self.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def items(self, specimen: Specimen) -> list[str]:
        return [f"{self.corpus}/{n:03d}@{k}" for k in self.times for n in range(self.stretches)]

    def where(self, item: str) -> tuple[int, int]:
        """Number of the stretch, and how many times `length` its context is."""
        number, _, times = item.rpartition("/")[2].partition("@")
        return int(number), int(times)

    def begin(self, specimen: Specimen) -> tuple[int, ...]:
        """What the tokenizer puts before any text."""
        assert specimen.tokenizer is not None
        return tuple(specimen.tokenizer("")["input_ids"])

    def cut(self, specimen: Specimen, further: int = 0) -> list[tuple[int, ...]]:
        """The stretches, each with so many further tokens. Raises ValueError where the corpus has too few."""
        tokenizer = specimen.tokenizer
        assert tokenizer is not None
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("long texts are read by causal models, and this one is encoder-decoder")
        stream = _stream(self.corpus, self.sha256, tokenizer)
        size = self.times[-1] * self.length + further
        if len(stream) < size * self.stretches:
            raise ValueError(
                f"{self.corpus} has {len(stream)} tokens here: {len(stream) // size} stretches of {size}, "
                f"not {self.stretches}"
            )
        return [stream[n * size : (n + 1) * size] for n in range(self.stretches)]

    def size(self) -> tuple[int, int]:
        return len(self.times) * self.stretches, sum(self.times) * self.length * self.stretches


@lru_cache(maxsize=2)
def _stream(name: str, sha256: str | None, tokenizer: object) -> tuple[int, ...]:
    """All documents with an end token behind each. The digest is part of the question, so that a changed file is read."""
    coded: Sequence[Sequence[int]] = tokenizer(  # type: ignore[operator]
        [d.text for d in corpus(name)], add_special_tokens=False, verbose=False
    )["input_ids"]
    end: int | None = tokenizer.eos_token_id  # type: ignore[attr-defined]
    between = () if end is None else (end,)
    return tuple(token for document in coded for token in (*document, *between))
