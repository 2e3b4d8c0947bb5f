"""The walk: all sentences form a prefix tree of steps, and every state is visited once.

A cheap step is applied in place, its children are visited, and then it is undone bit-exactly: the tensors it touched are
copied back and the digest of the whole model proves it. An expensive step keeps its state on disk; its subtree is a
segment of its own that starts from there, in this process or in another job. One model is in memory at a time.

Several processes may walk over one lab: each reading and each kept state is leased by whoever makes it, and what another one
is at work on is left to it, and looked for at the end.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from lesion.bench import Bench, Changed
from lesion.forest import Node, forest, in_order, states
from lesion.leases import Lost
from lesion.log import Unwritable
from lesion.stopping import heed, listening
from lesion.store import Seal, Store
from lesion.trial import Measure, NotThere, Reading, Row, Specimen, Trial, describe, state_key

Tell = Callable[..., None]  # told of what happens: tell("read", node=…, measure=…, done=…, items=…)
POLL_S = 0.05, 2.0  # the first and the longest pause between looks at what others are at work on


class WrongInput(ValueError):
    """An address or option that no amount of computing can make right: the whole run stops before it starts."""


class Busy(Exception):
    """Another process is at work on a state that is needed here. `key`: of the state."""

    def __init__(self, key: str):
        super().__init__(f"another process is making state {key}")
        self.key = key


STOPS = WrongInput, Unwritable  # what is no failure of a reading, and ends the run


class Walk:
    """Takes readings. What fails is recorded with its trace and the rest goes on."""

    def __init__(self, store: Store, device: str = "cpu", tell: Tell | None = None):
        self.store, self.device = store, device
        self.tell: Tell = tell or (lambda *_, **__: None)
        self.leads = os.environ.get("RANK", "0") == "0"  # of the processes that train together
        self._forced: set[str] = set()
        self._settled: set[str] = set()  # sealed or failed in this run
        self._busy: set[str] = set()  # what others are at work on
        self._careful = False  # once something has changed a model that must not
        self._second: tuple[str, Specimen] | None = None

    def take(self, readings: Iterable[Reading], force: bool = False) -> None:
        """Takes every reading that is not in the store yet, or with `force` every one again.

        Raises Unfinished, at a boundary, once this process is asked to end; Unwritable where the disk is full.
        """
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                "readings are taken by one process, and WORLD_SIZE says that there are several: `lesion submit` with "
                "`processes` in [training] of its profile lets several train together, and one read"
            )
        wanted = list(readings)
        self._forced = {reading.key for reading in wanted} if force else set()
        self._settled = set()
        with listening():
            for some in in_order(wanted):
                while missing := {r.key: r for r in some if self._is_missing(r)}:
                    self._busy = set()
                    self._walk({key: r for key, r in missing.items() if r.measure.on_bench})
                    for key, reading in missing.items():
                        if not reading.measure.on_bench:
                            self._from_rows(key, reading)
                    if self._busy:
                        self._wait()
            heed("all that was asked for is in the lab")
        self._second = None

    def make(self, trial: Trial) -> bool:
        """Makes a state that is kept, where it is not there yet. Returns whether it is there now."""
        with listening():
            while self.store.state_folder(trial.key) is None:
                try:
                    self.materialise(trial)
                except Busy as busy:
                    self._busy = {busy.key}
                    self._wait()
                except STOPS:
                    raise
                except Exception as error:
                    if self.leads:
                        self._fail(trial.key, error)
                    else:
                        traceback.print_exception(error)
                    return False
                if not self.leads:
                    return True
        return True

    def _is_missing(self, reading: Reading) -> bool:
        return self._next_take(reading.key) is not None and self._settled.isdisjoint((*states(reading), reading.key))

    def _wait(self) -> None:
        """Until another process is done, or dead, with something that was left to it. What it failed at is not tried again."""
        self.store.release_all()  # it may wait for us too
        self.tell("waiting", busy=len(self._busy))
        before = dict(self.store.index.failures)
        pause, longest = POLL_S
        while waited := {key for key in self._busy if not self._is_sealed(key)}:
            if any(self.store.is_free(key) for key in waited):  # to be gone on from, or to be done by us
                break
            heed("waiting for another process")
            time.sleep(pause)
            pause = min(longest, 1.5 * pause)
            self.store.refresh()
        for key in self._busy:
            failure = self.store.index.failures.get(key)
            if failure is not None and failure is not before.get(key):
                self._settled.add(key)
                self.tell("failure", of=key, error=failure["error"])

    def _is_sealed(self, key: str) -> bool:
        return key in self.store.index.seals and key not in self._forced

    def _walk(self, missing: dict[str, Reading]) -> None:
        """Takes readings of models."""
        while segments := forest(missing.values()):
            again = False
            while segments:
                root = segments.pop()
                try:
                    segments += reversed(self._segment(root))
                except STOPS:
                    raise
                except Busy as busy:
                    self._busy.add(busy.key)
                except Changed as error:  # start from a fresh model
                    if self._careful:  # without the culprit
                        self._fail(error.of, error)
                    self._careful = again = True  # else to find it: what was read last may not be to blame
                    break
                except Exception as error:  # the subject does not load, or an expensive step failed
                    self._fail(root.key, error)
            over = self._settled | self._busy
            rest = {key: r for key, r in missing.items() if over.isdisjoint((*states(r), key))}
            assert again or len(rest) < len(missing), "every round settles something, or leaves it to others"
            missing = rest

    def _from_rows(self, key: str, reading: Reading) -> None:
        """Takes a reading of readings: nothing lies on the bench."""
        self._try(key, reading.measure, Specimen(None, None, reading.trial, recall=self._recall))

    def _next_take(self, key: str) -> int | None:
        return self.store.next_take(key, key in self._forced)

    def _segment(self, root: Node) -> list[Node]:
        """Visits a root and all that is reached from it in place; returns the kept states to go on from."""
        bench = Bench(self.materialise(root.trial), self._careful)
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
            if not step.keeps or not self.leads:
                bench.apply(step)
                continue
            if not self.store.claim([key]):
                raise Busy(key)
            try:
                if self.store.state_folder(key):  # somebody else was faster
                    return self.materialise(trial)
                bench.apply(step)
                self.store.keep(key, specimen)
                self.store.clear_workplace(key)
            finally:
                self.store.release(key)
        return specimen

    def _check_addresses(self, root: Node, specimen: Specimen) -> None:
        """Resolves every address once, before any work: a wrong one is the user's to mend, now. What comes behind a step that
        builds structure is looked at when that stands."""
        seen: set[tuple[type, Any]] = set()
        for node in root.alike():
            if node.step is not None and not node.step.keeps and hasattr(node.step, "site"):
                sign = (type(node.step), node.step.site)
                if sign not in seen:
                    seen.add(sign)
                    try:
                        node.step.touches(specimen)
                    except ValueError as error:
                        raise WrongInput(str(error)) from error

    def _visit(self, node: Node, bench: Bench) -> list[Node]:
        for reading in self._ours(node.measures):
            self._try(reading, node.measures[reading], bench.specimen, bench)
        kept = []
        for child in node.children.values():
            assert child.step is not None
            heed(f"all that was read of {node.trial} is in the lab")
            if child.step.keeps:
                kept.append(child)
                continue
            if not child.children and not self._ours(child.measures):
                continue  # nothing is left to do there
            self.tell("step", step=child.step)
            entered = False
            try:
                with bench.applied(child.step):
                    entered = True
                    kept += self._visit(child, bench)
            except (Changed, *STOPS):
                raise
            except Exception as error:
                assert not entered, "failures inside a subtree are recorded there"
                self._fail(child.key, error)
                for reading in child.measures:
                    self.store.release(reading)
        return kept

    def _ours(self, readings: Iterable[str]) -> list[str]:
        """Those of these readings that are ours to take now: nobody else is at them, and nobody has taken them meanwhile."""
        asked, ours = list(readings), []
        claimed = self.store.claim(asked)
        self._busy.update(reading for reading in asked if reading not in claimed)
        for reading in claimed:
            if reading in self._settled or self._next_take(reading) is None:
                self._settled.add(reading)
                self.store.release(reading)
            else:
                ours.append(reading)
        return ours

    def _try(self, reading: str, measure: Measure, specimen: Specimen, bench: Bench | None = None) -> None:
        """Takes a reading that is ours, or records why it cannot be taken. Either way the model must be what it was."""
        if not self._ours([reading]):
            return
        try:
            self._read(reading, measure, specimen, bench)
        except STOPS:
            raise
        except Changed:
            self.store.void(reading)
            self.store.release(reading)
            raise
        except Busy as busy:  # a state that is to be compared with
            self._busy |= {busy.key, reading}
        except Lost:
            self._busy.add(reading)
        except Exception as error:
            if bench is not None:
                bench.verify(describe(measure), reading)
                self._record(specimen)
            self._fail(reading, error)
        self.store.release(reading)

    def _record(self, specimen: Specimen) -> None:
        """Enters a state as it lies on the bench, once something is known of it."""
        self.store.add_state(specimen.trial.key, specimen.trial.to_json(), specimen.ledger)

    def _read(self, reading: str, measure: Measure, specimen: Specimen, bench: Bench | None) -> None:
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
            if done < len(items):
                heed(f"{done} of {len(items)} items of {describe(measure)} are in the lab")
        if bench is not None:  # what is not sealed yet can still be taken again
            bench.verify(describe(measure), reading)
            self._record(specimen)
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
        """Rows of a quoted reading. Raises `NotThere` where it failed: what quotes it cannot be done either."""
        pinned, failures = reading.pin(), self.store.index.failures
        if (key := pinned.key) not in self.store.index.seals:
            failure = failures.get(key) or failures.get(pinned.trial.key) or {"error": ""}
            quoted = f"the quoted reading of {reading.trial} by {describe(reading.measure)} is not in the lab"
            raise NotThere(quoted, failure["error"])
        return list(self.store.rows([key]))

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
