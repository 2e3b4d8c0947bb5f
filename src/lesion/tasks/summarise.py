"""Summaries, judged by ROUGE-1, 2 and L against the written one (Lin 2004; by the package `rouge-score`, with its stemmer).

From the hub the dialogues of SAMSum (Gliwa et al. 2019). Packaged are 1,000 news articles of XSum with their one-sentence
summaries (Narayan et al. 2018), of which 300 are tested with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import Field

from lesion import packagedfiles
from lesion.task import Example, FromHub, Part, divided

TESTED = 300
KINDS = ("rouge1", "rouge2", "rougeL")


class Summarise(FromHub):
    """Summaries of news or dialogues."""

    metric: ClassVar[str] = "rougeL"
    new_tokens: ClassVar[int] = 60
    dataset: ClassVar[tuple[str, str | None]] = ("knkarthick/samsum", None)

    words: int = Field(default=160, ge=8, description="first so many words of a text that are shown")

    def packaged(self) -> Mapping[Part, Sequence[Example]]:
        with packagedfiles.path(packagedfiles.SUMMARIES).open(encoding="utf-8") as lines:
            rows = [row for line in lines if (row := json.loads(line))["document"].strip()]
        return divided([self._example(f"xsum/{r['id']}", r["document"], r["summary"]) for r in rows], TESTED)

    def of_hub(self, splits: Mapping[str, Any]) -> Mapping[Part, Sequence[Example]]:
        def of(split: str) -> list[Example]:
            rows = (row for row in splits[split] if row["dialogue"])
            return [self._example(f"samsum/{row['id']}", row["dialogue"], row["summary"]) for row in rows]

        test = of("test")
        asked = {e.asked for e in test}
        return {"train": [e for e in of("train") if e.asked not in asked], "test": test}

    def _example(self, id: str, text: str, summary: str) -> Example:
        found = list(re.finditer(r"\S+", text))
        end = found[min(self.words, len(found)) - 1].end() if found else 0
        return Example(id, text[:end].strip(), " ".join(summary.split()))

    def prompt(self, example: Example) -> str:
        return f"Text: {example.asked}\nSummary in one sentence:"

    def seq2seq(self, example: Example) -> str:
        return f"summarize: {example.asked}"

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        return rouge(example.answer, reply)


def rouge(written: str, reply: str) -> dict[str, float]:
    """F1 of each kind."""
    found = _scorer().score(written, reply)
    return {kind: float(found[kind].fmeasure) for kind in KINDS}


@lru_cache(maxsize=1)
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ValueError(
            f"ROUGE needs rouge-score, and {error.name} is not installed: pip install 'lesion[tasks]'"
        ) from error
    return RougeScorer(KINDS, use_stemmer=True)
