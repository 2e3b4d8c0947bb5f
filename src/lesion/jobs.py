"""A walk as jobs: which process makes which kept state, which takes which readings, and what must be over before.

Each kept state is a task of its own: it needs other resources than reading, and whatever follows it needs nothing else. Each
segment (all that is reached in place from a subject or a kept state) is cut along its tree into at most `width` tasks that
read. What quotes a reading of another task comes after it. Tasks that are alike and wait for the same form an array; so do
those that wait, one by one, for the elements of another array.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lesion.forest import Node, forest, in_order, quoted, quotes
from lesion.store import Store
from lesion.trial import Reading, Trial

SHORT = 24  # letters of a field's value that are shown
LARGEST = 1000  # elements of an array, SLURM's own bound


@dataclass
class Task:
    """What one process does. `after`: numbers of tasks that must have succeeded; `needed`: readings that others wait for."""

    number: int
    makes: Trial | None = None
    readings: list[Reading] = field(default_factory=list)
    after: frozenset[int] = frozenset()
    needed: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        if self.makes is not None:
            return f"make {short(self.makes)}"
        trials = {reading.trial.key: reading.trial for reading in self.readings}
        names = dict.fromkeys(reading.measure.name for reading in self.readings)
        of = "1 state" if len(trials) == 1 else f"{len(trials)} states, from"
        return f"{', '.join(names)} of {of} {short(next(iter(trials.values())))}"


@dataclass
class Array:
    """Tasks that are submitted together. `follows`: an array whose elements they wait for one by one; else each of them
    waits for all tasks of `after`."""

    tasks: list[Task]
    after: frozenset[int] = frozenset()
    follows: int | None = None

    @property
    def makes(self) -> bool:
        return self.tasks[0].makes is not None


def short(trial: Trial) -> str:
    """A sentence on one line: what is long or a default is left out."""
    said = []
    for part in (trial.subject, *trial.steps):
        fields = {
            name: getattr(part, name) for name, f in type(part).model_fields.items() if getattr(part, name) != f.default
        }
        words = [
            f"{name}={v}" for name, v in fields.items() if isinstance(v, str | int | float) and len(str(v)) <= SHORT
        ]
        said.append(f"{part.name}({', '.join(words)})" if words else part.name)
    return " >> ".join(said)


def closure(readings: Iterable[Reading]) -> dict[str, Reading]:
    """These readings and all that they quote, by key; what is quoted comes first."""
    return {reading.key: reading for some in in_order(readings) for reading in some}


def kept_states(trial: Trial) -> Iterator[Trial]:
    """The kept states on the way to a trial, itself among them, first ones first."""
    for number, step in enumerate(trial.steps, 1):
        if step.keeps:
            yield Trial(subject=trial.subject, steps=trial.steps[:number])


def trials_of(reading: Reading) -> list[Trial]:
    """The trials that a reading needs on the bench: its own, and those that it or a step on the way compares with."""
    needed = (reading.trial, *(quote for quote in quotes(reading) if isinstance(quote, Trial)))
    return list({trial.key: trial for trial in needed}.values())


def tasks(readings: Sequence[Reading], store: Store, width: int) -> list[Task]:
    """All tasks that lead to these readings from what the store has, each after those it waits for."""
    missing = {key: r for key, r in closure(readings).items() if key not in store.index.seals}
    made: dict[str, Task] = {}  # kept state → who makes it
    makers: dict[str, frozenset[int]] = {}  # trial → who makes its last kept state
    found: list[Task] = []
    place: dict[str, tuple[str, int]] = {}  # reading → segment and part of it
    for segment, nodes in segments(missing.values()).items():
        for part, some in enumerate(parts(nodes, width)):
            place |= {reading: (segment, part) for node in some for reading in node.measures}
    level: dict[str, int] = {}  # of readings: those of one part and one level are one task, so nothing waits for itself
    made_level: dict[int, int] = {}  # of tasks that make: above what they quote, and not above what needs them
    taken: dict[tuple[str, int, int], Task] = {}  # segment, part, level → who takes
    who: dict[str, int] = {}  # reading → number of its task
    waits: dict[int, set[int]] = defaultdict(set)  # task that takes → those it waits for

    def add(task: Task) -> Task:
        found.append(task)
        return task

    def make(trial: Trial) -> frozenset[int]:
        """Who makes the last kept state of a trial, where it is not there."""
        last: frozenset[int] = frozenset()
        on_the_way = list(kept_states(trial))
        there = [number for number, kept in enumerate(on_the_way, 1) if store.state_folder(kept.key) is not None]
        for kept in on_the_way[max(there, default=0) :]:  # those before it are needed no more
            if kept.key not in made:
                asked = {q.pin().key for step in kept.steps for q in step.quotes() if isinstance(q, Reading)}
                compared = [make(q) for step in kept.steps for q in step.quotes() if isinstance(q, Trial)]
                after = last.union({who[q] for q in asked if q in who}, *compared)
                made[kept.key] = task = add(Task(len(found), makes=kept, after=after))
                made_at = [made_level[number] for number in after if number in made_level]
                made_level[task.number] = max([*made_at, *(level[q] + 1 for q in asked if q in level)], default=0)
            last = frozenset({made[kept.key].number})
        return last

    for key, reading in missing.items():  # whatever is quoted was here before
        asked = [q.pin().key for q in quoted(reading)]
        here = place[key]
        for trial in trials_of(reading):
            if trial.key not in makers:
                makers[trial.key] = make(trial)
        before = frozenset[int]().union(*(makers[trial.key] for trial in trials_of(reading)))
        above = [level[q] + (place[q] != here) for q in asked if q in level]
        level[key] = max([*above, *(made_level[number] for number in before)], default=0)
        if (*here, level[key]) not in taken:
            taken[*here, level[key]] = add(Task(len(found)))
        task = taken[*here, level[key]]
        task.readings.append(reading)
        who[key] = task.number
        others = {who[q] for q in asked if q in who} - {task.number}
        waits[task.number] |= before | others
        for q in asked:
            if q in who and who[q] != task.number:
                found[who[q]].needed.add(q)
    for number, after in waits.items():
        found[number].after = frozenset(after)
    return _in_order(found)


def _in_order(found: list[Task]) -> list[Task]:
    """Each task after those it waits for, numbered anew."""
    from graphlib import TopologicalSorter

    order = list(TopologicalSorter({task.number: sorted(task.after) for task in found}).static_order())
    new = {old: number for number, old in enumerate(order)}
    tasks = [found[old] for old in order]
    for task in tasks:
        task.number, task.after = new[task.number], frozenset(new[old] for old in task.after)
    return tasks


def segments(readings: Iterable[Reading]) -> dict[str, list[Node]]:
    """Segment (key of the subject's or the kept state's trial) → its nodes that are measured, in the order of the walk."""
    found: dict[str, list[Node]] = defaultdict(list)

    def visit(node: Node, segment: str) -> None:
        if node.step is not None and node.step.keeps:
            segment = node.key
        if node.measures:
            found[segment].append(node)
        for child in node.children.values():
            visit(child, segment)

    for root in forest(readings):
        visit(root, root.key)
    return found


def parts(nodes: Sequence[Node], width: int) -> list[list[Node]]:
    """Nodes in at most `width` runs of about the same number of readings, in their order: neighbours share steps."""
    total, done = sum(len(node.measures) for node in nodes), 0
    found: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        found[int((done + len(node.measures) / 2) / total * width)].append(node)
        done += len(node.measures)
    return list(found.values())


def arrays(tasks: Sequence[Task]) -> list[Array]:
    """Tasks as arrays, each after those it waits for."""
    groups: dict[tuple[bool, frozenset[int]], list[Task]] = defaultdict(list)
    place: dict[int, tuple[int, int]] = {}  # task → array and element
    found: list[Array] = []
    for task in tasks:
        groups[task.makes is not None, task.after].append(task)
    waiting = [
        (makes, after, some[start : start + LARGEST])
        for (makes, after), some in groups.items()
        for start in range(0, len(some), LARGEST)
    ]
    while waiting:
        ready = [group for group in waiting if group[1] <= place.keys()]
        assert ready, "tasks wait for each other in a ring"
        waiting = [group for group in waiting if not group[1] <= place.keys()]
        single: dict[tuple[bool, int], dict[int, Task]] = defaultdict(dict)  # (kind, followed array) → element → task
        for makes, after, some in ready:
            if len(some) == 1 and len(after) == 1:
                array, element = place[next(iter(after))]
                single[makes, array][element] = some[0]
                continue
            found.append(Array(some, after))
        for (_, array), by_element in single.items():
            whole = len(by_element) == len(found[array].tasks) > 1
            if whole:
                found.append(Array([by_element[i] for i in range(len(by_element))], follows=array))
            else:
                found += [Array([task], task.after) for task in by_element.values()]
        for number, made in enumerate(found):
            place |= {task.number: (number, element) for element, task in enumerate(made.tasks)}
    return found
