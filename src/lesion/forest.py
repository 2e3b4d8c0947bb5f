"""The forest: readings as prefix trees of steps, one for each subject, and the order in which quoted sentences come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lesion.trial import Measure, Reading, Step, Trial, state_key


@dataclass
class Node:
    """A state that must be visited: what to measure there, and the states one step further."""

    trial: Trial
    key: str
    step: Step | None = None
    measures: dict[str, Measure] = field(default_factory=dict)  # by reading key; only what is missing
    children: dict[str, Node] = field(default_factory=dict)  # by state key

    def __iter__(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            yield from child

    def alike(self) -> Iterator[Node]:
        """This node and all below it whose models have the same structure."""
        yield self
        for child in self.children.values():
            assert child.step is not None
            if type(child.step).attach is Step.attach:
                yield from child.alike()


def forest(readings: Iterable[Reading]) -> list[Node]:
    """The prefix trees of these readings, one for each subject."""
    roots: dict[str, Node] = {}
    for reading in readings:
        trial = reading.trial
        start = Trial(subject=trial.subject)
        node = roots.setdefault(start.key, Node(start, start.key))
        for step in trial.steps:
            key = state_key(node.key, step)
            if key not in node.children:
                node.children[key] = Node(node.trial >> step, key, step)
            node = node.children[key]
        node.measures[reading.key] = reading.measure
    return list(roots.values())


def quotes(reading: Reading) -> Iterator[Reading | Trial]:
    """What the steps and the measure of a reading hold as fields, and what the steps of those trials hold, at any depth."""

    def look(parts: Iterable[Step | Measure]) -> Iterator[Reading | Trial]:
        for part in parts:
            for quote in part.quotes():
                if isinstance(quote, Reading):
                    yield quote
                elif isinstance(quote, Trial):
                    yield quote
                    yield from look(quote.steps)

    yield from look((*reading.trial.steps, reading.measure))


def quoted(reading: Reading) -> list[Reading]:
    """Readings that this one holds as fields of its steps or its measure, and that must be taken before it."""
    return list({quote.key: quote for quote in quotes(reading) if isinstance(quote, Reading)}.values())


def in_order(readings: Iterable[Reading]) -> list[list[Reading]]:
    """These readings and all that they quote, each once, in rounds: what quotes comes in a later round than what it
    quotes, and everything as early as it can."""
    rounds: dict[str, int] = {}
    found: dict[str, Reading] = {}

    def settle(reading: Reading) -> int:
        if reading.key not in rounds:
            rounds[reading.key] = max((1 + settle(quote.pin()) for quote in quoted(reading)), default=0)
            found[reading.key] = reading
        return rounds[reading.key]

    last = max((settle(reading) for reading in readings), default=-1)
    return [[found[key] for key, number in rounds.items() if number == wanted] for wanted in range(last + 1)]


def states(reading: Reading) -> Iterator[str]:
    """Keys of all states on the way to a reading."""
    yield (key := Trial(subject=reading.trial.subject).key)
    for step in reading.trial.steps:
        yield (key := state_key(key, step))
