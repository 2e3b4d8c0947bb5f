"""The grammar: subject → step, step, … → measure, measure, …

    intact  = SmolLM2()
    damaged = intact >> Noise(site="mlp", sigma=0.3, seed=1)      a Trial: one sentence
    Reading(trial=damaged, measure=Perplexity(corpus="austen"))   what is asked of it

A `Step` changes a model and a `Measure` reads one; neither knows the other. Both may hold a `Trial` or a `Reading` as a
field (a teacher, another arm's trigger): the sentence is then quoted, and the walk takes it first.
"""

from __future__ import annotations

import re
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from lesion.spec import Spec, key_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


class NotThere(ValueError):
    """A quoted reading is not in the lab; `why` is what its failure, or that of its state, was recorded as, where it failed."""

    def __init__(self, said: str, why: str):
        super().__init__(said + (f": {why}" if why else ""))
        self.why = why


class Unfinished(BaseException):
    """A long step was asked to end and has saved what it has: the same run goes on from there. No failure, so it passes
    through whatever records failures."""


Row = dict[str, Any]  # one observation; "item" is its stable id


class Subject(Spec):
    """What can lie on the bench."""

    family: ClassVar[str] = "subject"

    @abstractmethod
    def outline(self) -> PreTrainedModel:
        """The model without weights, on the meta device: enough to plan with and to resolve addresses."""

    @abstractmethod
    def load(self, device: str = "cpu") -> Specimen:
        """Brings the model to the bench, always with the same bits."""

    def fetch(self) -> Path | None:
        """Brings what `load` needs into the caches of this machine, and says where; None where nothing is needed."""
        return None

    def __rshift__(self, step: Step) -> Trial:
        return Trial(subject=self) >> step


class Step(Spec):
    """What changes a model. Doses and seeds are fields; `apply` is a pure function of them and the weights it finds."""

    family: ClassVar[str] = "step"
    keeps: ClassVar[bool] = False  # True: expensive, its state is kept on disk; False: applied in place and undone

    def attach(self, model: PreTrainedModel) -> None:
        """Builds the structure that this step adds (an adapter, a parametrization), without data: a kept state is
        loaded by attaching every step of its sentence and filling in the saved tensors."""

    @abstractmethod
    def touches(self, specimen: Specimen) -> list[str]:
        """Names of the tensors that an in-place step may change. They are copied before and restored after."""

    @abstractmethod
    def apply(self, specimen: Specimen) -> dict[str, Any]:
        """Does the work on the model, in place, and returns facts for the ledger (JSON)."""


class Measure(Spec):
    """What reads a model and changes nothing. One row an item; an item's id says what it is, not where it stands."""

    family: ClassVar[str] = "measure"
    chunk: ClassVar[int] = 64
    on_bench: ClassVar[bool] = True  # False: reads the rows of quoted readings only, and no model is loaded for it

    @abstractmethod
    def items(self, specimen: Specimen) -> list[str]:
        """Ids of all items, in their order: a pure function of the spec and the subject."""

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """Items that are computed together: a function of the whole list, because rounding depends on who shares a
        batch. A chunk with anything missing is computed again whole."""
        for start in range(0, len(items), self.chunk):
            yield list(items[start : start + self.chunk])

    def size(self) -> tuple[int, int] | None:
        """Items, and tokens that pass through the model, both roughly: what `lesion plan` multiplies. None: unknown."""
        return None

    @abstractmethod
    def read(self, specimen: Specimen, items: Sequence[str]) -> Iterable[Row]:
        """One row for each of these items, under its id in "item". A value that is missing is None, never NaN."""

    @abstractmethod
    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Reduces all rows of a reading to a few numbers."""


class Trial(Spec):
    """One sentence up to its measures: a subject and the steps applied to it, in order."""

    family: ClassVar[str] = "trial"
    name: ClassVar[str] = "trial"
    subject: Subject
    steps: tuple[Step, ...] = ()

    def __rshift__(self, step: Step) -> Trial:
        if not isinstance(step, Step):
            raise ValueError(f"a trial goes on with a step, not with {step!r}")
        return Trial.model_construct(subject=self.subject, steps=(*self.steps, step))  # whose parts are valid already

    @cached_property
    def key(self) -> str:
        """State key, chained, so that a prefix of a sentence is the key of its state."""
        key = key_of({"subject": self.subject.key})
        for step in self.steps:
            key = state_key(key, step)
        return key

    def pin(self) -> Trial:
        return Trial(subject=self.subject.pin(), steps=tuple(step.pin() for step in self.steps))

    def passed(self) -> list[str]:
        """Keys of the states on its way, from the subject's to its own."""
        return [Trial(subject=self.subject, steps=self.steps[:n]).key for n in range(len(self.steps) + 1)]

    def __str__(self) -> str:
        return " >> ".join(describe(part) for part in (self.subject, *self.steps))


class Reading(Spec):
    """What one measure says of one trial."""

    family: ClassVar[str] = "trial"
    name: ClassVar[str] = "reading"
    trial: Trial
    measure: Measure

    @field_validator("trial", mode="before")
    @classmethod
    def _of_a_subject(cls, value: Any) -> Any:
        return Trial(subject=value) if isinstance(value, Subject) else value

    def pin(self) -> Reading:
        return Reading(trial=self.trial.pin(), measure=self.measure.pin())

    @cached_property
    def key(self) -> str:
        return reading_key(self.trial.key, self.measure)


class MeasureOfTexts(Measure):
    """What reads the texts of a generation: one row a text, under the same id."""

    family: ClassVar[str] = "measure"  # a base of the grammar, not a word of it
    of: Reading = Field(description="the texts: a generation")

    def written(self, specimen: Specimen) -> dict[str, Row]:
        """The generation's rows, by item."""
        assert specimen.recall is not None, "the walk recalls what is quoted"
        return {row["item"]: row for row in specimen.recall(self.of)}

    def items(self, specimen: Specimen) -> list[str]:
        return list(self.written(specimen))

    def size(self) -> tuple[int, int] | None:
        found = self.of.measure.size()
        return (found[0], found[1] if self.on_bench else 0) if found else None


def state_key(parent: str, step: Step) -> str:
    return key_of({"state": parent, "step": step.key})


def reading_key(state: str, measure: Measure) -> str:
    return key_of({"state": state, "measure": measure.key})


def describe(spec: Spec) -> str:
    """A spec as a person writes it: noise(site=mlp, sigma=0.3, seed=1), defaults left out."""
    fields = type(spec).model_fields
    said = [f"{n}={_written(getattr(spec, n))}" for n, f in fields.items() if getattr(spec, n) != f.default]
    return f"{spec.name}({', '.join(said)})" if said else spec.name


def _written(value: Any) -> str:
    """A field of a spec: one that is a spec itself as such, what is quoted by its key, digests by their beginning."""
    match value:
        case str() if re.fullmatch("[0-9a-f]{64}", value):
            return value[:8]
        case Reading():
            return f"{describe(value.measure)} of {value.trial.key[:8]}"
        case Trial():
            return value.key[:8]
        case Spec():
            return describe(value)
        case tuple() if any(isinstance(part, Spec) for part in value):
            return f"[{', '.join(map(_written, value))}]"
    return str(value)


@dataclass
class Specimen:
    """The model on the bench, with all that belongs to it.

    `digests` are those of its tensors as it lies there; `ledger` has one entry for the loading and one for each step,
    with the digest before and after.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    trial: Trial
    processor: ProcessorMixin | None = None
    digests: dict[str, str] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    recall: Callable[[Reading], list[Row]] | None = None  # rows of a quoted reading
    bring: Callable[[Trial], Specimen] | None = None  # a second model: that of a quoted trial
    tell: Callable[..., None] | None = None  # told of a long step's progress
    place: Path | None = None  # where a long step may save what it has, to go on from there if it is interrupted
    memo: dict[str, Any] = field(default_factory=dict)  # what measures remember of a second model, which nobody changes

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """Its place, or a folder that is gone afterwards, where nobody will come back."""
        if self.place is not None:
            yield self.place
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
