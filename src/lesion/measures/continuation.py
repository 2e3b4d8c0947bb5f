"""Continuation: what a model writes after so much of a text, up to many times the length it was trained on.

Sampling draws from a stream of its own for each item, as in `generation`, whose rows these are: what reads texts (`prose`,
`surprisal`) reads these too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from lesion.longtexts import OfLongTexts
from lesion.trial import Row, Specimen

SHOWN = 240  # characters of a context that a row holds: the last ones


class Continuation(OfLongTexts):
    """Texts sampled after contexts of 1, 2, 4, … times `length` tokens of a corpus."""

    stretches: int = Field(default=8, ge=1, description=OfLongTexts.model_fields["stretches"].description)
    new_tokens: int = Field(default=48, ge=1, description="at most so many tokens are generated")
    temperature: float = Field(default=0.8, ge=0, description="0: greedy")
    top_k: int = Field(default=0, ge=0, description="0: all tokens")
    top_p: float = Field(default=0.95, gt=0, le=1, description="1: all tokens")
    seed: int = Field(default=0, ge=0, description="of the sampling noise")
    batch: int = Field(default=16, ge=1, description="rows at a time")

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """Contexts of one length together, so that none is padded."""
        for k in self.times:
            some = [item for item in items if self.where(item)[1] == k]
            for start in range(0, len(some), self.batch):
                yield some[start : start + self.batch]

    def size(self) -> tuple[int, int]:
        rows, tokens = super().size()
        return rows, tokens + rows * self.new_tokens

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion import decode
        from lesion.sampling import Sampling

        begin, stretches = self.begin(specimen), self.cut(specimen, self.new_tokens)
        asked = []
        for item in items:
            number, k = self.where(item)
            asked.append(decode.Prompt(item, (*begin, *stretches[number][: k * self.length])))
        found = decode.continue_texts(
            specimen.model,
            asked,
            Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p),
            new_tokens=self.new_tokens,
            ends=frozenset({specimen.tokenizer.eos_token_id} - {None}),  # type: ignore[union-attr]
            seed=self.seed,
            batch=self.batch,
        )
        return [self._row(specimen, stretches, c) for c in found]

    def _row(self, specimen: Specimen, stretches: Sequence[Sequence[int]], found: Any) -> Row:
        tokenizer = specimen.tokenizer
        assert tokenizer is not None
        number, k = self.where(found.item)
        end = k * self.length
        follows = stretches[number][end : end + self.new_tokens]
        return {
            "item": found.item,
            "prompt": f"{self.corpus}/{number:03d}",
            "group": f"{k} × {self.length}",
            "times": k,
            "asked": "…" + tokenizer.decode(stretches[number][max(0, end - SHOWN) : end])[-SHOWN:],
            "text": tokenizer.decode(found.tokens, skip_special_tokens=True),
            "written": tokenizer.decode(follows),  # what the author wrote there
            "tokens": len(found.tokens),
            "stop": found.stop,
            "logprob": math.fsum(found.logprobs) / len(found.logprobs) if found.logprobs else None,
            "correct": None,
            "duration": found.duration,
        }

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        logs = [row["logprob"] for row in rows if row["logprob"] is not None]
        return {
            "tokens": sum(row["tokens"] for row in rows),
            "logprob": math.fsum(logs) / len(logs) if logs else None,
            "ended": sum(row["stop"] == "end" for row in rows) / len(rows),
            "not_finite": sum(row["stop"] == "not finite" for row in rows),
        }
