"""Attacked: what a model answers to questions that an attack has changed, beside what it answered to the clean ones.

A HotFlip reading changes words of the question (Ebrahimi et al. 2018), a trigger stands before it (Wallace et al. 2019). Both
were searched for by their loss; whether answers get worse, and right ones wrong, is another question, asked here. Sampling
draws from the streams of the clean generation, item by item, so an answer changes by the attack and not by luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from lesion.batteries import grade, without_echo
from lesion.excerpts import spoken
from lesion.trial import Measure, Reading, Row, Specimen

TRIGGER = "trigger"
ATTACKS = ("hotflip", TRIGGER)


class Attacked(Measure):
    """Answers to attacked questions, rows as those of a generation, with the clean answer and its grade."""

    clean: Reading = Field(description="a generation: the clean questions and answers, and how they are sampled")
    attack: Reading = Field(description="hotflip on these questions, or a trigger, which is put before each of them")
    flips: int = Field(default=0, ge=0, description="first so many flips of a question; 0: all")

    @model_validator(mode="after")
    def _of_an_attack(self) -> Self:
        if not hasattr(self.clean.measure, "rendered"):
            raise ValueError(f"clean questions are those of a generation, and {self.clean.measure.name!r} asks none")
        if self.attack.measure.name not in ATTACKS:
            raise ValueError(f"an attack is one of {', '.join(ATTACKS)}, not {self.attack.measure.name!r}")
        if self.flips and self.attack.measure.name != "hotflip":
            raise ValueError(f"{self.attack.measure.name!r} has no flips, so flips={self.flips} means nothing")
        return self

    @property
    def asking(self) -> Any:
        """The generation: how questions are asked and answers sampled."""
        return self.clean.measure

    def tokenise(self, specimen: Specimen, question: str) -> tuple[int, ...]:
        """A question as the model reads it; what reads stored texts (`surprisal`) asks for it. An attack that does not survive
        being written out (`stable`) is read as other tokens there."""
        found: tuple[int, ...] = self.asking.tokenise(specimen, question)
        return found

    def _recalled(self, specimen: Specimen, reading: Reading) -> list[Row]:
        assert specimen.recall is not None, "the walk recalls what is quoted"
        return specimen.recall(reading)

    def _attacks(self, specimen: Specimen) -> dict[str, Row]:
        """The clean rows that an attack changed, each with the attack's row under "attack"."""
        clean, found = self._recalled(specimen, self.clean), self._recalled(specimen, self.attack)
        if self.attack.measure.name == TRIGGER:
            sought = next(row for row in found if row["item"] == TRIGGER)
            return {row["item"]: {**row, "attack": sought} for row in clean}
        by_item = {row["item"]: row for row in found if row["outcome"] == "attacked"}
        both = {row["item"]: {**row, "attack": by_item[row["item"]]} for row in clean if row["item"] in by_item}
        if not both:
            raise ValueError("the attack has none of the clean questions: it must be a hotflip reading of them")
        return both

    def items(self, specimen: Specimen) -> list[str]:
        return list(self._attacks(specimen))

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        return self.asking.chunks(items)

    def size(self) -> tuple[int, int] | None:
        return self.asking.size()

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion import decode

        attacks, questions = self._attacks(specimen), self.asking.questions()
        changed = {item: self._changed(specimen, attacks[item]) for item in items}
        asked = [decode.Prompt(item, tuple(tokens)) for item, (tokens, _) in changed.items()]
        rows: list[Row] = self.asking.answers(specimen, questions, asked)
        return [self._row(specimen, row, attacks[row["item"]], questions, *changed[row["item"]]) for row in rows]

    def _changed(self, specimen: Specimen, row: Row) -> tuple[list[int], str]:
        """The attacked question: all tokens that the model reads, and the asker's words among them."""
        tokens, words = spoken(specimen, self.asking, row["asked"])
        attack, changed, end = row["attack"], list(tokens), words[-1] + 1
        if self.attack.measure.name == TRIGGER:
            changed[words[0] : words[0]] = attack["trigger"]
            end += len(attack["trigger"])
        else:
            if attack["text_ids"] != changed:
                raise ValueError(f"question {row['item']!r} is not the same tokens here as in the attack")
            made = zip(attack["positions"], attack["ids"], strict=True)
            for position, id in list(made)[: self.flips or None]:
                changed[position] = id
        assert specimen.tokenizer is not None
        said = specimen.tokenizer.decode(changed[words[0] : end], clean_up_tokenization_spaces=False)
        return changed, said

    def _row(self, specimen: Specimen, row: Row, clean: Row, questions: Any, tokens: list[int], said: str) -> Row:
        from lesion.flips import stable

        question = questions[row["item"]]
        # what is said of the attack's words is no answer, and how strange a reply may be, the clean question says
        correct = grade(question, without_echo(row["text"], said))
        return {
            **row,
            "asked": said,
            "correct": correct,
            "read_ids": tokens,
            "stable": stable(specimen.tokenizer, tokens),
            "clean_asked": clean["asked"],
            "clean_text": clean["text"],
            "clean_correct": clean["correct"],
        }

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """As of a generation; the clean accuracy on the same questions; the shares of them that went wrong and right."""
        both = [(row["clean_correct"], row["correct"]) for row in rows if row["correct"] is not None]

        def share(count: int) -> float | None:
            return count / len(both) if both else None

        return {
            **self.asking.summarise(rows),
            "clean_accuracy": share(sum(before for before, _ in both)),
            "lost": share(sum(before and not after for before, after in both)),
            "gained": share(sum(after and not before for before, after in both)),
            "same_text": sum(row["text"] == row["clean_text"] for row in rows) / len(rows),
            "stable": sum(row["stable"] for row in rows) / len(rows),
        }
