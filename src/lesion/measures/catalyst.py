"""Catalysts: strings that are to push a training model along flat directions, and how flat their gradients really are.

    flat_share = ‖P g‖² / ‖g‖²       g: gradient of the string's own mean loss, P: projection off the steep subspace

One string is sought (`lesion.catalysts`) and stands beside random tokens and real text of the same length, which nobody sought.
`poison` trains on the string of a reading of this measure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

from pydantic import Field

from lesion.steepness import OfCurvature
from lesion.texts import corpus_digest
from lesion.trial import Row, Specimen

CATALYST = "catalyst"
SAID = "string_ids", "tokens", "text", "stable", "loss", "gradient_norm", "flat_share", "directions"
OF_ONE = "objective", "changed", "course", "scored", "gradients", "start_share"  # of the string that was sought


class Catalyst(OfCurvature):
    """A row for the catalyst, and one for each string of random tokens and of text."""

    objective: Literal["aligned", "loss", "described"] = Field(
        default="aligned", description="what is maximised: the flat share, the loss, or the loss of a soft string"
    )
    length: int = Field(default=64, ge=2, description="tokens of each string")
    iterations: int = Field(default=30, ge=0, description="of the search")
    width: int = Field(
        default=8, ge=1, description="strings that are tried in an iteration, each with one token replaced"
    )
    topk: int = Field(default=32, ge=1, description="candidates that a first-order change names for a position")
    controls: int = Field(default=4, ge=1, description="random strings, and as many of text")
    text: str = Field(default="novels", description="corpus that text is taken from; never what is read afterwards")
    draw: int = Field(default=0, ge=0, description="seed of the search, and of the controls")
    text_sha256: str | None = Field(default=None, description="digest of that corpus; filled in when pinned")

    def pin(self) -> Self:
        return super().pin().with_digest(f"corpus {self.text!r}", corpus_digest(self.text), "text_sha256")

    def _names(self) -> list[str]:
        return [CATALYST, *(f"{kind}/{i}" for kind in ("random", "text") for i in range(self.controls))]

    def items(self, specimen: Specimen) -> list[str]:
        return self._names()

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """All at once: the steep subspace is found once."""
        yield list(items)

    def size(self) -> tuple[int, int]:
        tried = self.iterations * ((1 if self.objective == "described" else 3 * self.width) + 6) + 6 * self.controls
        found = 4 * self.products_expected() * self.documents * self.tokens
        return len(self._names()), found + tried * self.length

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion.lanczos import Unfound
        from lesion.likelihood import context_of

        context = context_of(specimen.model.config.get_text_config())
        if context and self.length > context:
            raise ValueError(f"a catalyst of {self.length} tokens is longer than the context of {context}")
        began = time.perf_counter()
        try:
            rows = self._rows(specimen, items)
        except Unfound as nothing:
            rows = [{"item": item, "outcome": nothing.outcome} for item in items]
        spent = (time.perf_counter() - began) / len(rows)
        return [{**dict.fromkeys((*SAID, *OF_ONE)), "outcome": "measured", **row, "duration": spent} for row in rows]

    def _rows(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion.catalysts import Ground, search

        pairs = self.steep(specimen)
        with self.operated(specimen, graphs=False) as operator:
            ground = Ground(specimen.model, operator.parameters, pairs.vectors)
            may, strings = self._may(specimen), self.strings(specimen)
            start = strings[f"random/{self.controls}"]
            how: dict[str, Any] = {"iterations": self.iterations, "width": self.width, "topk": self.topk}
            found = search(ground, start, may, self.objective, **how, draw=self._draw)
            rows = []
            for item in items:
                tokens = found.tokens if item == CATALYST else strings[item]
                row: Row = {"item": item, "directions": len(pairs.vectors), **self._judged(specimen, ground, tokens)}
                if item == CATALYST:
                    row["changed"] = sum(a != b for a, b in zip(start, tokens, strict=True))
                    row |= {"objective": self.objective, "course": found.course, "scored": found.scored}
                    row |= {"gradients": found.gradients, "start_share": ground.share(start)}
                rows.append(row)
        return rows

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind in (CATALYST, "random", "text"):
            some = [row for row in rows if row["item"].partition("/")[0] == kind]
            for field in ("flat_share", "loss"):
                known = [row[field] for row in some if row[field] is not None]
                found[f"{field}, {kind}"] = math.fsum(known) / len(known) if known else None
        lost = sum(row["outcome"] != "measured" for row in rows)
        return found | {"changed": rows[0]["changed"], "not_measured": lost}

    def _judged(self, specimen: Specimen, ground: Any, tokens: Sequence[int]) -> Row:
        from lesion.flips import stable, written
        from lesion.lanczos import Unfound, flat_share

        gradient = ground.gradient(tokens)
        norm, loss = float(gradient.norm()), ground.loss(tokens)
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise Unfound("not finite", f"the loss of a string is {loss} and its gradient's norm {norm}")
        return {
            "string_ids": list(tokens),
            "tokens": len(tokens),
            "text": written(specimen.tokenizer, tokens),
            "stable": stable(specimen.tokenizer, tokens),
            "loss": loss,
            "gradient_norm": norm,
            "flat_share": flat_share(gradient, ground.steep),
        }

    def _may(self, specimen: Specimen) -> Any:
        from lesion.flips import allowed, table

        return allowed(specimen.tokenizer, len(table(specimen.model)))

    def strings(self, specimen: Specimen) -> dict[str, list[int]]:
        """Random strings, one more than controls (the search begins with it), and strings of text, by item."""
        from lesion.strings import random_strings, windows_of

        drawn = random_strings(self._may(specimen), self.length, self.controls + 1, "random string", self.draw)
        texts = windows_of(specimen, self.text, self.length, self.controls, "text string", self.draw)
        found = {f"random/{i}": tokens for i, tokens in enumerate(drawn)}
        return found | {f"text/{i}": tokens for i, tokens in enumerate(texts)}

    def _draw(self, iteration: int, positions: int, choices: int) -> tuple[Any, Any]:
        from lesion.stats import generator

        stream = generator("catalyst", self.draw, iteration)
        return stream.integers(positions, size=self.width), stream.integers(choices, size=self.width)
