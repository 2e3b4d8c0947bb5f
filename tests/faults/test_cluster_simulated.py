"""Thousands of jobs on a cluster that loses nodes, kills, preempts and doubles them: the lab of one plain walk, byte for byte.

The cluster is simulated (`simulation.py`), the walk, the store, the leases and the tasks are the real ones, and so is the
lab. The study has cheap steps and kept ones, readings that quote others across segments, kept steps that quote readings,
and some steps and measures that really fail.
"""

import json
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import torch

from faults.simulation import FATES, Cluster
from lesion import log
from lesion.jobs import closure
from lesion.store import Store
from lesion.trial import Reading, Specimen, Subject, Trial
from lesion.walk import Walk
from words import TestBreaks, TestFails, TestNorms, TestQuotes, TestShift, TestTrains

FAMILIES, WIDTH, ROUNDS = 210, 3, 12


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
        found += [base, *(Reading(trial=trained >> TestShift(by=by), measure=norms) for by in range(1, 5))]
        if number % 10 == 3:
            found.append(Reading(trial=trained >> TestBreaks() >> TestShift(), measure=norms))
        if neighbour is not None:
            found.append(Reading(trial=trained >> TestShift(by=9), measure=TestPairs(other=neighbour)))
        neighbour = Reading(trial=trained >> TestShift(by=1), measure=norms)
        learned = trained >> TestLearns(seed=number, by_what=base)
        found += [Reading(trial=learned >> TestShift(by=by), measure=norms) for by in range(4)]
    return found


def missing(store, readings):
    return {key for key in closure(readings) if key not in store.index.seals}


def campaign(cluster, readings, width, rounds=ROUNDS):
    """Submits, and submits again what is missing, until no job ends but by its own fault. Returns the sizes."""
    sizes, befell = [], Counter()
    for _ in range(rounds):
        sizes.append(cluster.submit(readings, width))
        if not any(state == "killed" for state in cluster.state.values()):
            return sizes
    raise AssertionError(f"after {rounds} submissions there is still something missing: {befell}")


def raw_rows(lab):
    """How often each row stands in the log, and who wrote it."""
    found = {}
    for path in sorted((lab / "log").iterdir()):
        for _, text in log.lines(path):
            if text.startswith(b'{"is":"row"'):
                row = json.loads(text)
                found.setdefault((row["reading"], row["take"], row["item"]), []).append(path)
    return found


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
        sizes = campaign(cluster, readings, WIDTH)
    print(sizes, cluster.count)
    store = Store(tmp_path / "lab")
    assert missing(store, readings) == failed
    expected, found = list(plain.canonical()), list(store.canonical())
    assert set(found) <= set(expected)
    Walk(store).take(readings)  # what was cancelled is found to be impossible, as in the plain walk
    store.close()
    assert list(Store(tmp_path / "lab").canonical()) == expected
    for fate in FATES:
        assert cluster.count[fate]
        fault("cluster, simulated", fate, "finished, byte-identical", cluster.count[fate])
