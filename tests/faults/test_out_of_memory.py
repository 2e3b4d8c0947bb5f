"""Memory that runs out in the middle of a grid: that reading is a recorded failure, the model is put back, all others come out
byte-identical, and the same command takes what failed and nothing else."""

import importlib
import json
import random

import pytest
import torch

from lesion import Lab
from lesion.studies.degrade import Degrade
from lesion.subjects import Scratch
from lesion.trial import Reading
from words import TestNorms

STUDY = {
    "subject": "tiny-llama",
    "doses": (0.0, 0.9),
    "site": ("attention.value", "embedding"),
    "repeats": 1,
    "prompts": 3,
    "new_tokens": 4,
    "documents": 9,  # two chunks
    "tokens": 24,
}
ERRORS = {
    "torch.OutOfMemoryError": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 0 left"
    ),
    "MemoryError": MemoryError(),
    "CUDA out of memory": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the CPU's allocator": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "any text": RuntimeError("\x00 ☃ %s {x}\r\n\u2028 'quoted\" \x1b[31m" + "long " * 1000),
}
PLACES = {  # what raises → where its name is looked up
    "a step, once it has changed the model": "lesion.steps.noise:Noise.apply",
    "perplexity": "lesion.measures.perplexity:Perplexity.read",
    "displacement": "lesion.measures.displacement:Displacement.read",
    "generation": "lesion.measures.generation:Generation.read",
    "surprisal": "lesion.measures.surprisal:Surprisal.read",
    "prose": "lesion.measures.prose:Prose.read",
    "a forward": "lesion.likelihood:negative_log_likelihood",
    "a summary": "lesion.measures.generation:Generation.summarise",
    "the loading": "lesion.subjects:Scratch.load",
    "the copies for an undo": "lesion.bench:Undo.save",
}


class Place:
    """A function that counts its calls and raises once, at the one that is asked for, after it has done its work."""

    def __init__(self, monkeypatch, address):
        module, _, name = address.partition(":")
        owner = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        real = getattr(owner, last)
        self.calls, self.at, self.error = 0, None, None

        def counted(*given, **named):
            self.calls += 1
            found = real(*given, **named)
            if self.calls == self.at:
                raise self.error
            return found

        monkeypatch.setattr(owner, last, counted)


def take(path):
    return Lab(path).take(Degrade(**STUDY).readings())


def lines(store):
    found = [json.loads(text) for text in store.canonical()]
    return {json.dumps(line) for line in found if line["is"] != "failure"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the lab holds where memory suffices, and how often each place is passed."""
    with pytest.MonkeyPatch.context() as patch:
        places = {where: Place(patch, address) for where, address in PLACES.items()}
        store = take(tmp_path_factory.mktemp("undisturbed") / "lab")
    assert all(place.calls for place in places.values())
    return list(store.canonical()), lines(store), {where: place.calls for where, place in places.items()}


@pytest.mark.parametrize("where", PLACES)
def test_memory_runs_out_somewhere_in_the_grid(undisturbed, tmp_path, monkeypatch, where, fault):
    (whole, everything, count), chance = undisturbed, random.Random(where)
    place, number = Place(monkeypatch, PLACES[where]), list(PLACES).index(where)
    for name in (list(ERRORS)[number % 5], list(ERRORS)[(number + 2) % 5])[: 2 - number % 2]:
        lab, error = tmp_path / name, ERRORS[name]
        place.calls, place.at, place.error = 0, chance.randint(1, count[where]), error
        store = take(lab)
        assert store.index.failures, "a failure is recorded"
        for failure in store.index.failures.values():
            if not failure["error"].startswith("NotThere: the quoted reading"):
                assert failure["error"] == f"{type(error).__name__}: {error}" and "Traceback" in failure["trace"]
        there = lines(store)
        assert there < everything, "what was taken is what it would have been"
        sealed = set(store.index.seals)
        place.at = None
        again = take(lab)
        assert list(again.canonical()) == whole
        taken = {s.reading for s in again.index.seals.values() if s.writer == again.writer}
        assert taken == set(again.index.seals) - sealed, "only what failed is taken"
        fault(f"out of memory in {where}", name, "recorded, put back, the others byte-identical; then only it taken")


def test_a_generation_goes_on_with_half_its_rows_and_says_so(undisturbed, tmp_path, monkeypatch, caplog, fault):
    from lesion import decode

    run, sizes = decode._run, []

    def narrow(*args):
        slots = args[-1]
        sizes.append(slots)
        if slots > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*args)

    monkeypatch.setattr(decode, "_run", narrow)
    store = take(tmp_path / "lab")
    assert not store.index.failures and sizes[:3] == [3, 2, 1]
    assert "going on with 2 rows at a time" in caplog.text and "going on with 1 rows at a time" in caplog.text
    text = [json.loads(line) for line in undisturbed[0]]
    before = {(row["reading"], row["item"]): row["text"] for row in text if "text" in row}
    assert {(row["reading"], row["item"]): row["text"] for row in store.rows() if "text" in row} == before
    fault(
        "out of memory in generation", "with more than one row at a time", "said aloud, the same texts, fewer rows", 1
    )


class TestSpeaks(TestNorms):
    """A measure that fails in letters that no UTF-8 has, as an operating system names a file."""

    name = "test-speaks"

    def read(self, specimen, items):
        raise ValueError("cannot read 'caf\udce9.txt'")


def test_an_error_in_letters_that_no_utf8_has_is_recorded_too(lab, fault):
    readings = [Reading(trial=Scratch(), measure=measure) for measure in (TestSpeaks(), TestNorms())]
    store = lab.take(readings)
    assert len(store.index.seals) == 1
    assert "cannot read" in store.index.failures[readings[0].key]["error"]
    fault("an error of any text", "a lone surrogate", "recorded, the others taken")
