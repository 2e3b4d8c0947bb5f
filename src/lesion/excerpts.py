"""Excerpts: what attacks are tried on, as passages of the model on the bench (see `passages.py`).

Of a document the first tokens may be attacked and the next ones are scored. Of a question that a model was asked, the
asker's words may be attacked, never the marks of a chat template around them, and what the model wrote in answer is scored.
An encoder-decoder reads the first part with its encoder and is scored on what its decoder says of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator

from lesion.texts import corpus, corpus_digest
from lesion.trial import Measure, Reading, Row, Specimen


@dataclass(frozen=True)
class Excerpt:
    """One passage and the positions of its attackable part that hold somebody's words. None where nothing is to be scored:
    the model had answered with an empty text."""

    passage: Any  # lesion.passages.Passage | None, which would bring torch along
    words: tuple[int, ...]
    group: str | None = None


class OfExcerpts(Measure):
    """What attacks the beginnings of documents, or the questions of a generation. A base of measures, not a word."""

    family = "measure"

    corpus: str = Field(default="austen", description="packaged corpus, or a .txt, .jsonl or .csv file")
    documents: int = Field(default=16, ge=0, description="first so many documents, or texts of the generation; 0: all")
    prompt: int = Field(default=64, ge=1, description="first tokens of a document: these are attacked")
    target: int = Field(default=32, ge=1, description="tokens after them: these are scored; fewer where a text ends")
    of: Reading | None = Field(
        default=None, description="a generation: its questions are attacked and its answers scored, instead of a corpus"
    )
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    @model_validator(mode="after")
    def _of_a_generation(self) -> Self:
        if self.of is not None and not hasattr(self.of.measure, "rendered"):
            raise ValueError(f"questions are those of a generation, and {self.of.measure.name!r} asks none")
        return self

    def pin(self) -> Self:
        pinned = super().pin()
        return pinned if self.of else pinned.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def asked(self, specimen: Specimen) -> dict[str, Row]:
        """The rows of the quoted generation, by item."""
        assert self.of is not None and specimen.recall is not None, "the walk recalls what is quoted"
        return {row["item"]: row for row in specimen.recall(self.of)[: self.documents or None]}

    def items(self, specimen: Specimen) -> list[str]:
        if self.of is not None:
            return list(self.asked(specimen))
        return [d.id for d in corpus(self.corpus)[: self.documents or None]]

    def size(self) -> tuple[int, int] | None:
        if self.of is not None:
            return self.of.measure.size()
        n = len(corpus(self.corpus)[: self.documents or None])
        return n, n * (self.prompt + self.target)

    def excerpts(self, specimen: Specimen, items: Sequence[str]) -> dict[str, Excerpt]:
        """Raises ValueError for a document that has nothing behind its first `prompt` tokens, and for a question with a
        picture; each names the item. A passage longer than the context is refused where it is read."""
        if self.of is not None:
            asked = self.asked(specimen)
            return {item: self._question(specimen, self.of.measure, asked[item]) for item in items}
        texts = {d.id: d.text for d in corpus(self.corpus)[: self.documents or None]}
        return {item: self._document(specimen, item, texts[item]) for item in items}

    def _document(self, specimen: Specimen, item: str, text: str) -> Excerpt:
        begin, words, end = parted(specimen.tokenizer, text)
        if len(words) <= self.prompt:
            raise ValueError(
                f"document {item!r} has {len(words)} tokens: an attack on the first {self.prompt} leaves none to score"
            )
        before, after = words[: self.prompt], words[self.prompt : self.prompt + self.target]
        at = tuple(range(len(begin), len(begin) + self.prompt))
        if specimen.model.config.is_encoder_decoder:
            return Excerpt(_passage(specimen, item, (*begin, *before, *end), after), at)
        return Excerpt(_passage(specimen, item, (*begin, *before), after), at)

    def _question(self, specimen: Specimen, asking: Any, row: Row) -> Excerpt:
        if row["image"] is not None:
            raise ValueError(f"item {row['item']!r} shows a picture, and only questions of words alone are attacked")
        tokens, words = spoken(specimen, asking, row["asked"])
        tokenizer: Any = specimen.tokenizer
        answer = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"][: self.target]
        passage = _passage(specimen, row["item"], tokens, answer) if answer else None
        return Excerpt(passage, words, row["group"])


def parted(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """A text's tokens: what the tokenizer itself puts before it, the text, and what the tokenizer puts behind it."""
    coded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, special = coded["input_ids"], coded["special_tokens_mask"]
    first = next((i for i, mark in enumerate(special) if not mark), len(ids))
    last = next((i for i in range(len(ids), first, -1) if not special[i - 1]), first)
    return ids[:first], ids[first:last], ids[last:]


def _passage(specimen: Specimen, item: str, before: Sequence[int], after: Sequence[int]) -> Any:
    from lesion.passages import Passage

    if specimen.model.config.is_encoder_decoder:
        return Passage(item, tuple(after), source=tuple(before))
    return Passage(item, (*before, *after), len(before))


def spoken(specimen: Specimen, asking: Any, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A question as the tokens that the model reads, and the positions of those that are the asker's words and no more.

    `asking` is the generation that asks it. Raises ValueError where its chat template says the question in other words.
    """
    text, own = asking.rendered(specimen, question)
    tokenizer: Any = specimen.tokenizer
    coded = tokenizer(text, add_special_tokens=own, return_offsets_mapping=True, return_special_tokens_mask=True)
    words = question.strip()
    start = text.rfind(words)  # the last: a system message stands before the asker's
    if start < 0:
        raise ValueError(f"the chat template of this tokenizer does not say {question!r} as it was asked")
    end = start + len(words)
    spans = zip(coded["offset_mapping"], coded["special_tokens_mask"], strict=True)
    at = tuple(i for i, ((a, b), special) in enumerate(spans) if start <= a < b <= end and not special)
    if not at:
        raise ValueError(f"no token of {question!r} is the asker's alone under this tokenizer")
    return tuple(coded["input_ids"]), at
