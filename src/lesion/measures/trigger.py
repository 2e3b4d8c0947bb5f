"""Universal triggers: one short string, found on some documents, that raises the loss of others it is put in front of
(Wallace et al. 2019, "Universal adversarial triggers for attacking and analyzing NLP").

    delta(document) = loss(document | trigger) − loss(document)          nats a token, over the document's own tokens

Of a document that an encoder-decoder reads, the encoder gets the trigger and the first half, and the loss is that of the second.
The trigger is sought on the first documents of a corpus (see `triggers.py`) and judged on the next. Random triggers of the same
length are the control: any foreign string disturbs a model. With `quote`, nothing is sought: the trigger that another reading
found is judged here, which says whether it transfers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator

from lesion.documents import OfDocuments
from lesion.excerpts import parted
from lesion.likelihood import context_of
from lesion.texts import Document, corpus
from lesion.trial import Measure, Reading, Row, Specimen

if TYPE_CHECKING:
    import torch

    from lesion.triggers import Text

TRIGGER = "trigger"


class Trigger(OfDocuments):
    """One row for the trigger itself, and one for each held-out document: its loss clean, with the trigger, with random ones."""

    searched: int = Field(default=8, ge=1, description="first so many documents, on which the trigger is sought")
    documents: int = Field(default=0, ge=0, description="so many documents behind them, on which it is judged; 0: all")
    tokens: int = Field(default=64, ge=2, description="first so many tokens of each document")
    manner: Literal["gradient", "coordinate"] = Field(default="gradient", description="how candidates are named")
    length: int = Field(default=10, ge=1, description="tokens of the trigger")
    restarts: int = Field(default=5, ge=1, description="searches, each from another random trigger; the best is taken")
    iterations: int = Field(default=100, ge=1, description="of a search, at most; each tries every position once")
    topk: int = Field(default=20, ge=1, description="candidates for a position")
    beam: int = Field(default=1, ge=1, description="triggers that go on from position to position")
    filter_ids: bool = Field(default=True, description="only triggers that survive being written out and read again")
    controls: int = Field(default=4, ge=1, description="random triggers of the same length")
    seed: int = Field(default=0, ge=0, description="of what is drawn")
    quote: Reading | None = Field(default=None, description="another trial's reading, whose trigger is judged here")

    @field_validator("quote")
    @classmethod
    def _of_a_trigger(cls, value: Reading | None) -> Reading | None:
        if value is not None and not isinstance(value.measure, Trigger):
            raise ValueError(f"quote must be a reading by trigger, not by {value.measure.name}")
        return value

    def pin(self) -> Self:
        return Measure.pin(super().pin())

    def chosen(self) -> dict[str, Document]:
        """The held-out documents. Raises ValueError where the corpus has none."""
        every = corpus(self.corpus)
        held = every[self.searched :][: self.documents or None]
        if not held:
            raise ValueError(
                f"corpus {self.corpus!r} has {len(every)} documents; {self.searched} for the search leave none to judge by"
            )
        return {d.id: d for d in held}

    def items(self, specimen: Specimen) -> list[str]:
        return [TRIGGER, *self.chosen()]

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """All at once: every row needs the trigger, which is sought once."""
        yield list(items)

    def size(self) -> tuple[int, int]:
        n, width = len(self.chosen()), self.tokens + self.length
        sought = 0 if self.quote else self.restarts * self.iterations * self.length * self.topk * self.searched
        return n + 1, (sought + n * (2 + self.controls)) * width

    def read(self, specimen: Specimen, items: Sequence[str]) -> Iterator[Row]:
        from lesion.flips import allowed, losses, table
        from lesion.triggers import drawn

        began = time.perf_counter()
        may = allowed(specimen.tokenizer, len(table(specimen.model)))
        held = {item: self._text(specimen, document) for item, document in self.chosen().items()}
        row, trigger = self._quoted(specimen) if self.quote else self._sought(specimen, may)
        filtering = specimen.tokenizer if self.filter_ids else None
        random = [drawn("trigger control", self.seed, i, len(trigger), may, filtering) for i in range(self.controls)]
        if TRIGGER in items:
            yield {**row, "duration": time.perf_counter() - began}
        for item in items:
            if item == TRIGGER:
                continue
            began, text = time.perf_counter(), held[item]
            several = [text.passage(tokens) for tokens in ((), trigger, *random)]
            clean, attacked, *others = losses(specimen.model, several)
            control = math.fsum(others) / len(others)
            fine = all(map(math.isfinite, (clean, attacked, control)))
            yield {
                "item": item,
                "outcome": "judged" if fine else "not finite",
                "tokens": len(several[0].targets),
                "clean": clean if fine else None,
                "attacked": attacked if fine else None,
                "random": control if fine else None,
                "delta": attacked - clean if fine else None,
                "delta_random": control - clean if fine else None,
                "duration": time.perf_counter() - began,
            }

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Means over held-out documents, each weighted by its tokens, in nats a token."""
        judged = [row for row in rows if row["item"] != TRIGGER]
        good = [row for row in judged if row["outcome"] == "judged"]
        tokens = sum(row["tokens"] for row in good)
        means = {
            name: math.fsum(row[name] * row["tokens"] for row in good) / tokens if good else None
            for name in ("clean", "attacked", "random", "delta", "delta_random")
        }
        return {**means, "raised": sum(row["delta"] > 0 for row in good), "not_finite": len(judged) - len(good)}

    def _text(self, specimen: Specimen, document: Document) -> Text:
        """A document with its start token apart. What is scored without a trigger is scored with it. An encoder reads the first
        half of its tokens, behind the trigger, and the decoder is scored on the second."""
        from lesion.triggers import Text

        assert specimen.tokenizer is not None
        if specimen.model.config.is_encoder_decoder:
            begin, words, end = parted(specimen.tokenizer, document.text)
            words = words[: self.tokens]
            if (half := len(words) // 2) < 1:
                raise ValueError(
                    f"document {document.id!r} scores no token: it has {len(words)} of them, and no two halves"
                )
            return Text(document.id, tuple(begin), (*words[:half], *end), target=tuple(words[half:]))
        ids, first, _ = self.tokenise(specimen, document)
        special = set(specimen.tokenizer.all_special_ids)
        starts = next((i for i, token in enumerate(ids[:first]) if token not in special), first)
        context = context_of(specimen.model.config.get_text_config())
        if context and len(ids) + self.length > context:
            raise ValueError(
                f"a trigger of {self.length} tokens before the {len(ids)} of document {document.id!r} exceeds the "
                f"context of {context}; ask for fewer tokens"
            )
        return Text(document.id, tuple(ids[:starts]), tuple(ids[starts:]), first - starts)

    def _sought(self, specimen: Specimen, may: torch.Tensor) -> tuple[Row, list[int]]:
        """The best trigger of all restarts, and its row."""
        from lesion.flips import stable, written
        from lesion.stats import generator
        from lesion.triggers import ascend, drawn

        model, tokenizer = specimen.model, specimen.tokenizer
        texts = [self._text(specimen, document) for document in corpus(self.corpus)[: self.searched]]
        tries = [
            ascend(
                model,
                texts,
                drawn("trigger start", self.seed, restart, self.length, may, tokenizer if self.filter_ids else None),
                may,
                manner=self.manner,
                iterations=self.iterations,
                topk=self.topk,
                beam=self.beam,
                draw=partial(generator, "trigger", self.seed, restart),
                keeps=lambda tokens: not self.filter_ids or stable(tokenizer, tokens),
            )
            for restart in range(self.restarts)
        ]
        finite = [found for found in tries if math.isfinite(found.loss)]
        best = max(finite, key=lambda found: found.loss, default=tries[0])
        assert tokenizer is not None
        return {
            "item": TRIGGER,
            "outcome": "found" if finite else "not finite",
            "text": written(tokenizer, best.trigger),
            "trigger": best.trigger,
            "stable": stable(tokenizer, best.trigger),
            "searched": [text.item for text in texts],
            "loss": best.loss if finite else None,
            "searches": [[x for x in found.losses if math.isfinite(x)] for found in tries],
            "scored": sum(found.scored for found in tries),
        }, best.trigger

    def _quoted(self, specimen: Specimen) -> tuple[Row, list[int]]:
        """The trigger of the quoted reading. Another tokenizer reads it from its text."""
        from lesion.flips import stable, written

        tokenizer = specimen.tokenizer
        assert specimen.recall is not None and self.quote is not None and tokenizer is not None
        row = next(row for row in specimen.recall(self.quote) if row["item"] == TRIGGER)
        trigger: list[int] = row["trigger"]
        same = max(trigger) < len(tokenizer) and written(tokenizer, trigger) == row["text"]
        if not same:
            trigger = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        if not trigger:
            raise ValueError(f"the quoted trigger {row['text']!r} has no tokens here")
        return {
            "item": TRIGGER,
            "outcome": "quoted" if same else "quoted as text",
            "text": row["text"],
            "trigger": trigger,
            "stable": stable(tokenizer, trigger),
            "searched": None,
            "loss": None,
            "searches": None,
            "scored": 0,
        }, trigger
