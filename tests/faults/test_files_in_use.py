"""Files that somebody writes to while they are read: the model on the bench is not in them any more, a state is kept once, and
nothing is saved over what is there. What might kill the process runs in forked children."""

import os
import shutil
import time
import traceback
from pathlib import Path

import pytest
import torch

from lesion import Lab
from lesion.cli import run
from lesion.store import Store
from lesion.subjects import Directory, Scratch
from lesion.trial import Reading, Trial
from words import TestNorms, TestShift, TestTrains

UNTOUCHED = "finished, byte-identical"


def forked(work, *given):
    """Runs in a child of its own, which it may kill; returns the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        work(*given)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finished(*pids):
    """Exit codes; a signal's number is negative."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def overwrite(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(4000)
        file.write(b"\xff" * 200_000)


def save_over(folder):
    """As the library that made the folder writes: the file is shortened to nothing first."""
    Scratch(seed=2).load().model.save_pretrained(folder)


HARM = {
    "overwritten in place": overwrite,
    "shortened to nothing": lambda folder: os.truncate(folder / "model.safetensors", 0),
    "saved over": save_over,
    "another file renamed over it": lambda folder: (folder / "config.json").rename(folder / "model.safetensors"),
    "removed": lambda folder: (folder / "model.safetensors").unlink(),
    "the whole folder removed": shutil.rmtree,
}


class TestHarms(TestNorms):
    """A measure during which somebody does something to a folder."""

    name = "test-harms"
    how: str
    folder: str

    def read(self, specimen, items):
        if self.items(specimen)[0] in items:
            HARM[self.how](Path(self.folder))
        return super().read(specimen, items)


def readings(folder, first):
    subject = Directory(path=str(folder)).pin()
    trials = [Trial(subject=subject), subject >> TestShift(), subject >> TestShift(by=2)]
    return [Reading(trial=trials[0], measure=first), *(Reading(trial=trial, measure=TestNorms()) for trial in trials)]


@pytest.mark.parametrize("how", HARM)
def test_the_file_of_a_model_on_the_bench(folder, tmp_path, how, fault):
    harmed = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    work = lambda path, where: Lab(path).take(readings(where, TestHarms(how=how, folder=str(harmed))))  # noqa: E731
    assert finished(forked(work, tmp_path / "plain", folder)) == [0]  # where what is harmed is not what is read
    shutil.rmtree(harmed, ignore_errors=True)
    shutil.copytree(folder, harmed)
    assert finished(forked(work, tmp_path / "lab", harmed)) == [0]
    whole, found = (Store(tmp_path / lab) for lab in ("plain", "lab"))
    assert len(whole.index.seals) == 4 and not found.index.failures
    rows = lambda store: sorted((r["reading"], r["item"], r["norm"]) for r in store.rows())  # noqa: E731
    assert rows(found) == rows(whole)
    fault("the file of a model on the bench", how, UNTOUCHED)


PROCESSES, ROUNDS = 3, 4
TRAINED = [Scratch(seed=n) >> TestTrains() >> TestShift() >> TestTrains(seed=1) for n in range(ROUNDS)]


def test_a_state_that_others_keep_and_restore_at_the_same_time(tmp_path, fault):
    asked = [
        Reading(trial=Trial(subject=trial.subject, steps=trial.steps[:end]), measure=TestNorms())
        for trial in TRAINED
        for end in (1, 2, 3)
    ]
    work = lambda path: Lab(path).take(asked)  # noqa: E731
    assert finished(forked(work, tmp_path / "alone")) == [0]
    start = time.monotonic()
    assert finished(*(forked(work, tmp_path / "lab") for _ in range(PROCESSES))) == [0] * PROCESSES
    assert time.monotonic() - start < 60
    alone, lab = tmp_path / "alone", tmp_path / "lab"
    assert not Store(lab).index.failures
    assert b"".join(Store(lab).canonical()) == b"".join(Store(alone).canonical())
    files = [
        {str(p.relative_to(place)): p.read_bytes() for p in (place / "states").rglob("*") if p.is_file()}
        for place in (alone, lab)
    ]
    assert files[0] == files[1] and len(files[0]) == 3 * 2 * ROUNDS, "nothing half written, nothing left over"
    fault("a state kept by several processes at once", f"{PROCESSES} processes", UNTOUCHED, 2 * ROUNDS)


TARGETS = {
    "the folder itself": lambda folder: folder,
    "its file of weights": lambda folder: folder / "model.safetensors",
    "a link to it": lambda folder: folder.parent / "link",
    "a link to nowhere": lambda folder: folder.parent / "dangling",
    "the folder by another way": lambda folder: folder / ".." / folder.name,
}


@pytest.mark.parametrize("what", ["a state", "rows"])
@pytest.mark.parametrize("how", TARGETS)
def test_nothing_is_saved_over_what_is_read(folder, tmp_path, how, what, capsys, fault):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    trial = Directory(path=str(folder)).pin() >> TestShift()
    Lab(tmp_path / "lab").take([Reading(trial=trial, measure=TestNorms())])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = sorted(path.name for path in tmp_path.iterdir())
    target = TARGETS[how](folder)
    key = trial.key if what == "a state" else "rows"
    assert run(["export", key, str(target), "--lab", str(tmp_path / "lab")]) == 2
    assert "exists already; nothing was overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    fault("saving onto a file that is being read", f"{what} onto {how}", "refused by name, nothing written")
