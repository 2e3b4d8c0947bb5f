"""Prose: what stored texts are like, whoever wrote them: length, loops, vocabulary, grammar, graphs of words, coherence.

No model lies on the bench for it, so it is cheap to read again after a change of mind. What the numbers are is told where
they are made: `lesion.prose`, `lesion.speech` (names that begin with "graph_"), `lesion.units` (the content units of the
packaged picture) and `lesion.encoder` (the coherence of consecutive sentences).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from lesion.trial import MeasureOfTexts, Row, Specimen

PICTURE = "picture"  # the group of prompts about the packaged drawing, whose content units are known


class Prose(MeasureOfTexts):
    """Numbers of each stored text, and of nothing else."""

    on_bench: ClassVar[bool] = False
    chunk = 256

    shuffles: int = Field(default=20, ge=2, description="shuffles of the words that a graph is compared with")
    seed: int = Field(default=0, ge=0, description="of the shuffles")
    encoder: Literal["none", "minilm"] = Field(
        default="none", description="minilm: also the similarity of consecutive sentences (fetches 80 MB once)"
    )

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion.prose import describe, truncate_loop, words
        from lesion.speech import graph

        started, written, rows = time.perf_counter(), self.written(specimen), []
        for item in items:
            source = written[item]
            text = source["text"]
            row: Row = {"item": item, **describe(text, finished=source["stop"] == "end")}
            found = graph(words(truncate_loop(text)[0]), shuffles=self.shuffles, seed=self.seed)
            row |= {f"graph_{name}": value for name, value in found.items()}
            if source["group"] == PICTURE:
                from lesion.units import found as units

                named = units(text)
                row |= {"units": sum(named.values()), "units_named": [name for name, there in named.items() if there]}
            rows.append(row)
        if self.encoder == "minilm":
            from lesion.encoder import coherences

            for row, value in zip(rows, coherences([written[item]["text"] for item in items]), strict=True):
                row["coherence"] = value
        return [{**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows]

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The mean of every number over the texts that have it."""
        found = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if isinstance(row.get(name), (bool, int, float))]
            if values and name != "duration":
                found[name] = math.fsum(values) / len(values)
        return {**found, "texts": len(rows)}
