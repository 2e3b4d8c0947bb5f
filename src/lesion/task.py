"""Tasks: examples with answers, how they are asked, and how a reply is graded. One task, one file in `lesion/tasks`.

    prompt(example) + " " + answer(example)        what a model is taught, and what it is asked to continue
    grade(example, reply)                          columns of a row, the task's `metric` first

The same task is prompted with, trained on (`finetune`) and read of damaged models. Examples to train on and examples to be
tested with never overlap: where a source has one set only, it is divided by the hash of each example's id.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from lesion.spec import Spec, find, words
from lesion.texts import refuse_duplicates

Part = Literal["train", "test"]
GAP = "\n\n"  # between the examples of a prompt


@dataclass(frozen=True)
class Example:
    """One question. `answer` is the right reply; where replies are to be ranked, `choices` has all and `label` the right one."""

    id: str
    asked: str
    answer: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    turns: tuple[tuple[str, str], ...] = ()  # roles and words of a conversation, where it is one: for chat templates


class AnyTask(Spec):
    """Base of every task."""

    family: ClassVar[str] = "task"
    metric: ClassVar[str] = "correct"  # the column of a row that says how good a reply is
    new_tokens: ClassVar[int] = 32  # that a reply has at most, unless another number is asked for
    line: ClassVar[bool] = True  # whether a reply ends with its line

    sha256: str | None = Field(default=None, description="digest of all examples; filled in when it is pinned")

    @abstractmethod
    def load(self) -> Mapping[Part, Sequence[Example]]:
        """All examples, by part."""

    @abstractmethod
    def prompt(self, example: Example) -> str:
        """What is asked, up to where the reply begins (without the space before it)."""

    @abstractmethod
    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        """What there is to say of a reply, under names of columns; `metric` is one of them, as a number or a bool."""

    def seq2seq(self, example: Example) -> str:
        """The same question as an encoder reads it."""
        return self.prompt(example)

    def examples(self, part: Part) -> Sequence[Example]:
        """Raises ValueError where they are no longer those that were pinned, or where there are none."""
        found = loaded(self)
        if self.sha256 is not None:
            self.with_digest(f"task {self.called!r}", digest_of(self))
        if not found[part]:
            raise ValueError(f"task {self.called!r} has no examples to {part} with")
        return found[part]

    @property
    def called(self) -> str:
        """What messages call it."""
        return self.name

    def stamp(self) -> Any:
        """Another one asks for its examples to be read again."""
        return None

    def pin(self) -> Self:
        return self.with_digest(f"task {self.called!r}", digest_of(self))


class FromHub(AnyTask):
    """Base of tasks whose examples are a dataset of the hub, or packaged ones that stand in for it."""

    family: ClassVar[str] = "task"
    dataset: ClassVar[tuple[str, str | None]]  # repository and configuration
    source: Literal["packaged", "hub"] = Field(default="packaged", description="where examples come from")
    revision: str | None = Field(default=None, description="commit of the hub's dataset; filled in when it is pinned")

    @abstractmethod
    def packaged(self) -> Mapping[Part, Sequence[Example]]:
        """The examples that need no hub."""

    @abstractmethod
    def of_hub(self, splits: Mapping[str, Any]) -> Mapping[Part, Sequence[Example]]:
        """The examples of the hub's dataset."""

    def load(self) -> Mapping[Part, Sequence[Example]]:
        from lesion import harness

        if self.source == "packaged":
            if self.revision is not None:
                raise ValueError(f"revision={self.revision!r} names a commit of the hub, but source is 'packaged'")
            return self.packaged()
        where = {"dataset_path": self.dataset[0], "dataset_name": self.dataset[1]}
        commit = self.revision if harness.is_commit(self.revision) else harness.hub_commit(where, self.revision)
        return self.of_hub(harness.hub_documents(where, commit))

    def pin(self) -> Self:
        from lesion import harness

        pinned = self
        if self.source == "hub" and not harness.is_commit(self.revision):
            commit = harness.hub_commit({"dataset_path": self.dataset[0]}, self.revision)
            pinned = self.model_copy(update={"revision": commit})
        return pinned.with_digest(f"task {self.name!r}", digest_of(pinned))


def loaded(task: AnyTask) -> Mapping[Part, Sequence[Example]]:
    """All examples of a task, read once. Raises ValueError for two of one id, and for a question in both parts."""
    return _loaded(task, task.stamp())


def digest_of(task: AnyTask) -> str:
    return _digest_of(task, task.stamp())


@lru_cache(maxsize=16)
def _loaded(task: AnyTask, stamp: Any) -> Mapping[Part, Sequence[Example]]:
    found = task.load()
    refuse_duplicates(f"task {task.called!r}", [e.id for part in found.values() for e in part])
    seen = {folded(e.asked) for e in found["train"]}
    if both := [e.id for e in found["test"] if folded(e.asked) in seen]:
        raise ValueError(
            f"task {task.called!r}: {len(both)} questions are trained on and tested with, such as {both[0]}"
        )
    return found


@lru_cache(maxsize=16)
def _digest_of(task: AnyTask, stamp: Any) -> str:
    return digest(_loaded(task, stamp))


def folded(text: str) -> str:
    """What is the same of two questions that differ in capitals, spaces or the form of a letter alone."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(found: Mapping[Part, Sequence[Example]]) -> str:
    """sha256 of all examples, in their order."""
    text = json.dumps({part: [asdict(e) for e in some] for part, some in found.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def ranked(ids: Sequence[str], seed: int) -> list[int]:
    """Numbers of things in the order of sha256(seed, id): whether one is among the first n depends on its rank alone."""
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed} {ids[i]}".encode()).digest())


def divided(examples: Sequence[Example], tested: int) -> Mapping[Part, Sequence[Example]]:
    """`tested` examples to test with and the others to train on, by the hash of their ids. Equal questions stay together, with
    those that are tested."""
    order = ranked([e.id for e in examples], 0)
    chosen = set(order[:tested])
    words = [folded(e.asked) for e in examples]
    asked = {words[i] for i in chosen}
    found: dict[Part, list[Example]] = {"train": [], "test": []}
    for e, said in zip(examples, words, strict=True):
        found["test" if said in asked else "train"].append(e)
    return found


def sampled(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` examples at random, in their own order; 0: all. A larger sample of the same seed holds the smaller."""
    if not 0 < count < len(examples):
        return list(examples)
    return [examples[i] for i in sorted(ranked([e.id for e in examples], seed)[:count])]


def shots(task: AnyTask, count: int, seed: int) -> list[Example]:
    """The examples that stand before every question: drawn from those to train on, of each label equally many."""
    if not count:
        return []
    pool = task.examples("train")
    if len(pool) < count:
        raise ValueError(f"{count} examples were to stand before each question, and {task.called!r} has {len(pool)}")
    order = [pool[i] for i in ranked([e.id for e in pool], seed)]
    labels = sorted({e.label for e in pool if e.label is not None})
    if not labels or any(e.choices != pool[0].choices for e in pool[:100]):
        return order[:count]
    of = {label: [e for e in order if e.label == label] for label in labels}
    turns = [e for row in zip_longest(*of.values()) for e in row if e is not None][:count]
    return [turns[i] for i in ranked([e.id for e in turns], seed + 1)]  # not one label after the other


def before(task: AnyTask, count: int, seed: int, encoded: bool = False) -> str:
    """The same as text: questions with their answers; `encoded`: as an encoder reads them."""
    ask, gap = (task.seq2seq if encoded else task.prompt), " " if task.line else ""
    return "".join(f"{ask(e)}{gap}{e.answer}{GAP}" for e in shots(task, count, seed))


def parse(text: str) -> AnyTask:
    """A task as it is written on a command line: its name, or the path of a .jsonl file."""
    from lesion.tasks import Jsonl

    if text.endswith((".jsonl", ".csv")):
        return Jsonl(path=text)
    known = [name for name in words("task") if name != "jsonl"]
    if text not in known:
        raise ValueError(f"no task {text!r}; there are: {', '.join(known)}, or the path of a .jsonl or .csv file")
    found = find(f"task/{text}")
    assert issubclass(found, AnyTask)
    return found()
