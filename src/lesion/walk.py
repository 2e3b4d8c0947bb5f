"""The walk: all sentences form a prefix tree of steps, and every state is visited once.

A cheap step is applied in place, its children are visited, and then it is undone bit-exactly: the tensors it touched are
copied back and the digest of the whole model proves it. An expensive step keeps its state on disk; its subtree is a
segment of its own that starts from there, in this process or in another job. One model is in memory at a time.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lesion.digest import aliases, combined, digests, memory, named_tensors, tensor_digest
from lesion.store import Seal, Store
from lesion.threads import each
from lesion.trial import Measure, Reading, Row, Specimen, Step, Trial, describe, state_key
from lesion.vocabularies import tokenizer_digest

Tell = Callable[..., None]  # told of what happens: tell("read", node=…, measure=…, done=…, items=…)


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


def quoted(reading: Reading) -> list[Reading]:
    """Readings that this one holds as fields of its steps or its measure, and that must be taken before it."""
    found: dict[str, Reading] = {}
    for part in (*reading.trial.steps, reading.measure):
        for quote in part.quotes():
            if isinstance(quote, Reading):
                found[quote.key] = quote
            elif isinstance(quote, Trial):
                found |= {q.key: q for step in quote.steps for q in step.quotes() if isinstance(q, Reading)}
    return list(found.values())


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


class Undo:
    """Copies of tensors that steps are about to change.

    Siblings that touch the same tensors share one copy: after an undo the model is bit for bit what was copied, so a
    sweep over doses copies once.
    """

    def __init__(self) -> None:
        self._saved: dict[str, torch.Tensor] = {}

    def save(self, tensors: dict[str, torch.Tensor]) -> None:
        self._saved = {name: copy for name, copy in self._saved.items() if name in tensors}
        for name, tensor in tensors.items():
            if name not in self._saved:
                self._saved[name] = tensor.detach().clone()

    def restore(self, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        """Copies back. Returns the digests of what lies there then, each taken while the tensor is in the cache."""

        def one(name: str) -> str:
            tensor, saved = tensors[name], self._saved[name]
            if tensor.device.type == "cpu" and tensor.is_contiguous() and saved.is_contiguous():
                np.copyto(memory(tensor), memory(saved))  # on this thread; torch would call others
            else:
                tensor.detach().copy_(saved)
            return tensor_digest(tensor)

        return dict(zip(tensors, each(one, list(tensors)), strict=True))


class Changed(RuntimeError):
    """The model is not what it must be: a step or a measure changed more than it may. The specimen is worthless.

    `of` is the key of the state or reading that did it.
    """

    of: str = ""


class Bench:
    """A specimen and the steps that lie on it. Every change of the model goes through here."""

    def __init__(self, specimen: Specimen):
        self.specimen = specimen
        self._undos: list[Undo] = [Undo()]
        self._depth = 0
        if not specimen.digests:
            specimen.digests = digests(specimen.model)
            found = combined(specimen.digests)
            specimen.ledger.append(
                {"subject": specimen.trial.subject.to_json(), "tied": aliases(specimen.model), "after": found}
            )

    def apply(self, step: Step, names: list[str] | None = None) -> None:
        """Applies a step for good and enters it into the ledger."""
        specimen, before, tokenizer = self.specimen, self.specimen.digests, self.specimen.tokenizer
        config = dict(vars(specimen.model.config))
        facts = step.apply(specimen)
        options = {k: v for k, v in vars(specimen.model.config).items() if k not in config or config[k] != v}
        new: dict[str, Any] = {"configuration": options} if options else {}
        new |= {} if specimen.tokenizer is tokenizer else {"tokenizer": tokenizer_digest(specimen.tokenizer)}
        after = {**before, **digests(specimen.model, names)} if names is not None else digests(specimen.model)
        changed = [name for name in after if before.get(name) != after[name]]
        specimen.digests = after
        specimen.trial = specimen.trial >> step
        specimen.ledger = [
            *specimen.ledger,
            {
                "step": step.to_json(),
                "before": combined(before),
                "after": combined(after),
                "changed": changed,
                "facts": facts,
                **new,
            },
        ]

    @contextmanager
    def applied(self, step: Step) -> Iterator[None]:
        """Applies an in-place step for the length of a `with` block, and undoes it whatever happens inside."""
        specimen = self.specimen
        before = specimen.digests, specimen.trial, specimen.ledger
        tokenizer, config = specimen.tokenizer, dict(vars(specimen.model.config))
        tensors = dict(named_tensors(specimen.model))
        names = list(dict.fromkeys(step.touches(specimen)))
        if unknown := [name for name in names if name not in tensors]:
            raise ValueError(f"{step.name} wants to touch {unknown[0]!r}, which is no tensor of this model")
        touched = {name: tensors[name] for name in names}
        undo = self._undos[self._depth]
        undo.save(touched)
        self._depth += 1
        self._undos[self._depth :] = [Undo()]  # what was copied under another parent is of no use here
        ruined = False
        try:
            self.apply(step, names)
            yield
        except Changed:
            ruined = True  # nothing to prove any more: the model will be loaded afresh
            raise
        finally:
            self._depth -= 1
            restored = undo.restore(touched)
            specimen.digests, specimen.trial, specimen.ledger = before
            specimen.tokenizer = tokenizer
            vars(specimen.model.config).clear()
            vars(specimen.model.config).update(config)
            if not ruined:
                self.verify(f"undoing {describe(step)}", state_key(specimen.trial.key, step), restored)

    def verify(self, what: str, key: str, known: dict[str, str] | None = None) -> None:
        """Compares every bit of the model with what lies on record. `known`: digests taken already. Raises Changed."""
        known = known or {}
        rest = [name for name, _ in named_tensors(self.specimen.model) if name not in known]
        found = known | digests(self.specimen.model, rest)
        if found != self.specimen.digests:
            odd = [n for n in {**found, **self.specimen.digests} if found.get(n) != self.specimen.digests.get(n)]
            error = Changed(f"{what} left {len(odd)} tensors changed that must not be, such as {odd[:3]}")
            error.of = key
            raise error


class Walk:
    """Takes readings. What fails is recorded with its trace and the rest goes on."""

    def __init__(self, store: Store, device: str = "cpu", tell: Tell | None = None):
        self.store, self.device = store, device
        self.tell: Tell = tell or (lambda *_, **__: None)

    def take(self, readings: Iterable[Reading], force: bool = False) -> None:
        """Takes every reading that is not in the store yet, or with `force` every one again."""
        wanted = list(readings)
        self._forced = {reading.key for reading in wanted} if force else set()
        self._settled: set[str] = set()  # sealed or failed in this run
        self._second: tuple[str, Specimen] | None = None
        for some in in_order(wanted):
            missing = {r.key: r for r in some if self._next_take(r.key) is not None}
            self._walk({key: r for key, r in missing.items() if r.measure.on_bench})
            for key, reading in missing.items():
                if not reading.measure.on_bench:
                    self._from_rows(key, reading)
        self._second = None

    def _walk(self, missing: dict[str, Reading]) -> None:
        """Takes readings of models."""
        while segments := forest(missing.values()):
            while segments:
                root = segments.pop()
                try:
                    segments += reversed(self._segment(root))
                except WrongInput:
                    raise
                except Changed as error:  # start from a fresh model, without the culprit
                    self._fail(error.of, error)
                    break
                except Exception as error:  # the subject does not load, or an expensive step failed
                    self._fail(root.key, error)
            rest = {key: r for key, r in missing.items() if self._settled.isdisjoint((*states(r), key))}
            assert len(rest) < len(missing), "every round settles something"
            missing = rest

    def _from_rows(self, key: str, reading: Reading) -> None:
        """Takes a reading of readings: nothing lies on the bench."""
        trial = reading.trial
        try:
            self._read(key, reading.measure, Specimen(None, None, trial, recall=self._recall))
        except Exception as error:
            self._fail(key, error)

    def _next_take(self, key: str) -> int | None:
        return self.store.next_take(key, key in self._forced)

    def _segment(self, root: Node) -> list[Node]:
        """Visits a root and all that is reached from it in place; returns the kept states to go on from."""
        bench = Bench(self.materialise(root.trial))
        self._check_addresses(root, bench.specimen)
        return self._visit(root, bench)

    def materialise(self, trial: Trial) -> Specimen:
        """Brings a trial to the bench from its nearest kept ancestor, or from its subject."""
        kept, key = [0], Trial(subject=trial.subject).key
        keys = [key]
        for number, step in enumerate(trial.steps, 1):
            keys.append(key := state_key(key, step))
            if step.keeps and self.store.state_folder(key):
                kept.append(number)
        self.tell("load", trial=trial)
        specimen = trial.subject.load(self.device)
        specimen.recall, specimen.bring = self._recall, self._bring
        if kept[-1]:
            for step in trial.steps[: kept[-1]]:
                step.attach(specimen.model)
            self.store.restore(keys[kept[-1]], specimen)
            specimen.trial = Trial(subject=trial.subject, steps=trial.steps[: kept[-1]])
        bench = Bench(specimen)
        for number in range(kept[-1], len(trial.steps)):
            step, key = trial.steps[number], keys[number + 1]
            self.tell("step", step=step)
            specimen.tell, specimen.place = self.tell, self.store.workplace(key) if step.keeps else None
            bench.apply(step)
            if step.keeps:
                self.store.keep(key, specimen)
                self.store.clear_workplace(key)
        return specimen

    def _check_addresses(self, root: Node, specimen: Specimen) -> None:
        """Resolves every address of the segment once, before any work: a wrong one is the user's to mend, now."""
        seen: set[tuple[type, Any]] = set()
        for node in root:
            if node.step is not None and not node.step.keeps and hasattr(node.step, "site"):
                sign = (type(node.step), node.step.site)
                if sign not in seen:
                    seen.add(sign)
                    try:
                        node.step.touches(specimen)
                    except ValueError as error:
                        raise WrongInput(str(error)) from error

    def _visit(self, node: Node, bench: Bench) -> list[Node]:
        if node.measures:
            self.store.add_state(node.key, node.trial.to_json(), bench.specimen.ledger)
        for reading, measure in node.measures.items():
            try:
                self._read(reading, measure, bench.specimen)
            except Exception as error:
                self._fail(reading, error)
            bench.verify(describe(measure), reading)
        kept = []
        for child in node.children.values():
            assert child.step is not None
            if child.step.keeps:
                kept.append(child)
                continue
            self.tell("step", step=child.step)
            entered = False
            try:
                with bench.applied(child.step):
                    entered = True
                    kept += self._visit(child, bench)
            except Changed:
                raise
            except Exception as error:
                assert not entered, "failures inside a subtree are recorded there"
                self._fail(child.key, error)
        return kept

    def _read(self, reading: str, measure: Measure, specimen: Specimen) -> None:
        take = self._next_take(reading)
        assert take is not None
        started = time.perf_counter()
        items = measure.items(specimen)
        if not items:
            raise ValueError(f"{describe(measure)} has no items on {specimen.trial}")
        if len(set(items)) < len(items):
            raise ValueError(f"{describe(measure)} names an item twice")
        have: dict[str, Row] = dict(self.store.index.begun.get(reading, {}).get(take, {}))
        done = 0
        for chunk in measure.chunks(items):
            if missing := set(chunk).difference(have):
                rows = {row["item"]: row for row in measure.read(specimen, chunk)}
                if rows.keys() != set(chunk):
                    raise ValueError(
                        f"{describe(measure)} was asked for {len(chunk)} items and gave {len(rows)} others"
                    )
                self.store.add_rows(reading, take, [rows[item] for item in chunk if item in missing])
                have = dict(self.store.index.begun[reading][take])
            done += len(chunk)
            self.tell("rows", measure=measure, done=done, items=len(items))
        summary = measure.summarise([have[item] for item in items])
        self.store.seal(
            Seal(
                reading=reading,
                take=take,
                state=specimen.trial.key,
                measure=measure.to_json(),
                n=len(items),
                summary=summary,
                duration=time.perf_counter() - started,
                writer=self.store.writer,
            )
        )
        self._settled.add(reading)
        self.tell("seal", trial=specimen.trial, measure=measure, summary=summary)

    def _recall(self, reading: Reading) -> list[Row]:
        """Rows of a quoted reading. Raises ValueError where it failed: what quotes it cannot be done either."""
        if reading.pin().key not in self.store.index.seals:
            raise ValueError(f"the quoted reading of {reading.trial} by {describe(reading.measure)} is not in the lab")
        return list(self.store.rows([reading.pin().key]))

    def _bring(self, trial: Trial) -> Specimen:
        """A second model, to compare with the one on the bench. The last one stays in memory until the walk is over."""
        if self._second is None or self._second[0] != trial.key:
            self._second = None  # before the next one is loaded
            self._second = trial.key, self.materialise(trial)
        return self._second[1]

    def _fail(self, of: str, error: Exception) -> None:
        self._settled.add(of)
        trace = "".join(traceback.format_exception(error))
        self.store.fail(of, error, trace)
        self.tell("failure", of=of, error=error)


class WrongInput(ValueError):
    """An address or option that no amount of computing can make right: the whole run stops before it starts."""
