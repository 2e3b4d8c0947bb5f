"""Thousands of jobs on a cluster that loses nodes, kills, preempts and doubles them: the lab of one plain walk, byte for byte.

The cluster is simulated (`simulation.py`), the walk, the store, the leases and the tasks are the real ones, and so is the
lab. The study has cheap steps and kept ones, readings that quote others across segments, kept steps that quote readings,
and some steps and measures that really fail.
"""

import json
from types import SimpleNamespace
from typing import ClassVar

import torch

from faults.simulation import FATES, Cluster
from lesion import log
from lesion.forest import quoted
from lesion.jobs import closure, kept_states
from lesion.store import Store
from lesion.trial import Reading, Specimen, Subject, Trial
from lesion.walk import Walk
from words import TestBreaks, TestFails, TestNorms, TestQuotes, TestShift, TestTrains

FAMILIES, WIDTH, ROUNDS = 240, 3, 12  # about two thousand jobs; benchmarks/cluster.py has ten thousand


class Speck(torch.nn.Module):
    """A model of six numbers."""

    device = torch.device("cpu")

    def __init__(self, size):
        super().__init__()
        self.config = SimpleNamespace()
        for number in range(3):
            self.register_parameter(f"w{number}", torch.nn.Parameter(torch.arange(2.0) + number + size))


class TestSpeck(Subject):
    name = "test-speck"
    size: int = 1

    def outline(self):
        return Speck(self.size)

    def load(self, device="cpu"):
        return Specimen(Speck(self.size), None, Trial(subject=self))


class TestPairs(TestQuotes):
    """Two rows at a time, and what another reading said of them is taken off."""

    name = "test-pairs"
    chunk = 2


class TestLearns(TestTrains):
    """A kept step that goes by what a reading says."""

    name = "test-learns"
    keeps: ClassVar[bool] = True
    by_what: Reading

    def apply(self, specimen):
        total = sum(row["norm"] for row in specimen.recall(self.by_what))
        with torch.no_grad():
            for parameter in specimen.model.parameters():
                parameter.add_(total)
        return {"total": total}


class TestCrashes(TestBreaks):
    """A kept step that fails whenever it is tried."""

    name = "test-crashes"
    keeps: ClassVar[bool] = True
    seed: int = 0


class TestHalf(TestFails):
    """A measure that fails at its second chunk."""

    name = "test-half"
    chunk = 2


def study(families):
    """Each family: a trained state, what is read around it, and a state that learns from that; neighbours quote each other."""
    found, norms, neighbour = [], TestNorms(), None
    for number in range(families):
        root = Trial(subject=TestSpeck(size=1 + number % 3))
        found += [Reading(trial=root, measure=norms), Reading(trial=root >> TestShift(by=number), measure=norms)]
        trained = root >> (TestCrashes(seed=number) if number % 40 == 7 else TestTrains(seed=number))
        base = Reading(trial=trained, measure=TestHalf() if number % 40 == 19 else norms)
        found += [base, *(Reading(trial=trained >> TestShift(by=by), measure=norms) for by in (1, 2))]
        if number % 10 == 3:
            found.append(Reading(trial=trained >> TestBreaks() >> TestShift(), measure=norms))
        if neighbour is not None:
            found.append(Reading(trial=trained >> TestShift(by=9), measure=TestPairs(other=neighbour)))
        neighbour = Reading(trial=trained >> TestShift(by=1), measure=norms)
        learned = trained >> TestLearns(seed=number, by_what=base)
        found += [Reading(trial=learned >> TestShift(by=by), measure=norms) for by in (0, 1)]
    return found


def dependants(readings, store):
    """Readings and kept states that wait in vain for what really fails."""
    found = set()
    for key, reading in closure(readings).items():
        if any(q.key not in store.index.seals for q in quoted(reading)):
            found.add(key)
        if any(kept.key in store.index.failures for kept in kept_states(reading.trial)):
            found.add(key)
        for kept in kept_states(reading.trial):
            if any(q.key not in store.index.seals for step in kept.steps for q in step.quotes()):
                found.add(kept.key)
    return found


def missing(store, readings):
    return {key for key in closure(readings) if key not in store.index.seals}


def campaign(cluster, readings, width, fails, rounds=ROUNDS):
    """Submits, and submits again what is missing, until that is only what really fails. Returns the sizes."""
    sizes = []
    while missing(Store(cluster.lab), readings) != fails:
        assert len(sizes) < rounds, f"after {rounds} submissions there is still something missing"
        sizes.append(cluster.submit(readings, width))
    return sizes


def rows_of(lab):
    """Row → the writers that said it."""
    found, writer = {}, None
    for _, _, text in log.read(lab / "log"):
        record = json.loads(text)
        if record["is"] == "open":
            writer = record["writer"]
        elif record["is"] == "row":
            found.setdefault((record["reading"], record["take"], record["item"]), []).append(writer)
    return found


def doubled(rows, cluster):
    """Rows that were said again by others than those who were cut off while they were about to say them."""
    return [row for row, writers in rows.items() if sum(writer not in cluster.slept for writer in writers) > 1]


def test_a_campaign_with_every_misfortune_leaves_the_lab_of_one_plain_walk(tmp_path, monkeypatch, fault):
    readings = study(FAMILIES)
    plain = Store(tmp_path / "plain")
    Walk(plain).take(readings)
    plain.close()
    failed = missing(plain, readings)
    assert failed and len(failed) < len(readings) / 5

    with monkeypatch.context() as patch:
        cluster = Cluster(tmp_path / "lab", seed=1)
        cluster.take_over(patch)
        sizes = campaign(cluster, readings, WIDTH, failed)
    assert sizes[0] > 1_600 and sizes[-1] < sizes[0] / 10

    store = Store(tmp_path / "lab")
    assert missing(store, readings) == failed, "all that can be read was read, and healthy subtrees went on"
    expected, found = list(plain.canonical()), list(store.canonical())
    assert set(found) <= set(expected)
    rows = rows_of(tmp_path / "lab")
    assert rows.keys() == rows_of(tmp_path / "plain").keys() and not doubled(rows, cluster)
    vain = dependants(readings, plain)
    assert vain and not vain & cluster.started, "no dependant of what really fails is ever started"
    assert len(list(store.log.iterdir())) < 150

    Walk(store).take(readings)  # what was cancelled is found to be impossible, as in the plain walk
    store.close()
    assert list(Store(tmp_path / "lab").canonical()) == expected
    for fate in FATES:
        assert cluster.count[fate]
        fault("cluster, simulated", fate, "finished, byte-identical", cluster.count[fate])
    fault("cluster, simulated", "a step or a measure that really fails", "its dependants cancelled", len(failed))
