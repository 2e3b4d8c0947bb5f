"""kill -9 at any moment, then the same command: the lab ends up byte for byte as if nothing had happened.

The study runs in forked children, so that a run costs no import and a kill falls into the work.
"""

import os
import random
import signal
import time

import pytest
import torch

from lesion import Lab
from lesion.store import Store
from lesion.studies.degrade import Degrade

KILLS = 24
STUDY = {
    "subject": "tiny-llama",
    "doses": (0.0, 0.3, 0.9),
    "site": ("attention.value", "embedding"),
    "repeats": 2,
    "prompts": 12,
    "batch": 2,  # chunks of eight
    "new_tokens": 12,
    "documents": 10,
    "tokens": 48,
}


def child(path, pause):
    """One run of the command, forked; returns its process id. Writes are slowed, so that kills fall between them too."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        from lesion.log import Segment

        append = Segment.append
        if pause:
            Segment.append = lambda self, records: (time.sleep(pause), append(self, records), time.sleep(pause))[1]
        Lab(path).take(Degrade(**STUDY).readings())
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def finish(path, pause=0.0):
    assert os.waitpid(child(path, pause), 0)[1] == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "lab"
    started = time.monotonic()
    finish(path, pause=0.002)
    return b"".join(Store(path).canonical()), time.monotonic() - started


def test_twice_the_same(uninterrupted, tmp_path):
    finish(tmp_path / "lab")
    assert b"".join(Store(tmp_path / "lab").canonical()) == uninterrupted[0]


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_a_random_moment_and_finished_by_the_same_command(uninterrupted, tmp_path, seed, fault):
    whole, duration = uninterrupted
    path, chance = tmp_path / "lab", random.Random(seed)
    pid = child(path, pause=0.002)
    time.sleep(chance.uniform(0.02, 0.98) * duration)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    before = b"".join(Store(path).canonical())
    assert len(before) <= len(whole)
    finish(path)
    assert b"".join(Store(path).canonical()) == whole
    fault("kill -9 at a random moment", "of a study", "finished, byte-identical")


def test_killed_again_and_again(uninterrupted, tmp_path, fault):
    whole, duration = uninterrupted
    path, chance = tmp_path / "lab", random.Random(0)
    for _ in range(8):
        pid = child(path, pause=0.001)
        time.sleep(chance.uniform(0.1, 0.5) * duration)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    finish(path)
    assert b"".join(Store(path).canonical()) == whole
    fault("kill -9 at a random moment", "again and again", "finished, byte-identical", 8)


def test_a_segment_cut_at_any_byte_is_finished_by_the_same_command(uninterrupted, tmp_path, fault):
    finish(tmp_path / "whole")
    (source,) = (tmp_path / "whole" / "log").glob("*.jsonl")
    text, chance = source.read_bytes(), random.Random(1)
    inside = text.rindex(b"\xef\xbf\xbd") + 1  # of a character of three bytes
    for number, end in enumerate([inside, *(chance.randrange(len(text)) for _ in range(5))]):
        path = tmp_path / f"cut{number}"
        (path / "log").mkdir(parents=True)
        (path / "log" / source.name).write_bytes(text[:end])
        finish(path)
        assert b"".join(Store(path).canonical()) == uninterrupted[0]
    fault("torn last row", "cut inside of a character, and at random bytes", "finished, byte-identical", 6)
