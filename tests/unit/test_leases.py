"""Leases: one owner at a time, the dead are followed, and whoever was thought dead and is not gives way."""

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from lesion import leases
from lesion.leases import Leases, Lost, is_gone, whoami

KEY = "0123456789abcdef" * 2


class Dies(BaseException):
    """What a kill looks like from inside: nothing is cleaned up."""


def lease(folder, writer):
    """Leases of a process, as `lesion.store` names it."""
    return Leases(folder / "leases", f"20260101T000000-{leases.host_word()}-{os.getpid()}-{writer}")


def elsewhere(monkeypatch, folder, writer, **more):
    """Leases of a process on another host, whose file nobody touches."""
    with monkeypatch.context() as patch:
        patch.setattr(leases, "whoami", lambda: {**whoami(), "host": "elsewhere", **more})
        found = lease(folder, writer)
        assert found.take(KEY)
    return found


def names(folder):
    return sorted(path.name for path in (folder / "leases").iterdir() if "-" not in path.name)


def run(work):
    """Runs work in a forked child, which ends without any farewell; returns its process id once it is gone."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_one_wins_and_the_other_gets_it_afterwards(tmp_path):
    first, second = lease(tmp_path, "a"), lease(tmp_path, "b")
    assert first.take(KEY) and not second.take(KEY) and first.take(KEY), "asking twice is no second owner"
    assert not second.is_free(KEY) and first.is_free(KEY)
    second.let_go(KEY)
    first.check(KEY)
    first.let_go(KEY)
    assert second.is_free(KEY) and second.take(KEY) and not first.take(KEY)
    second.close()
    first.close()
    assert list((tmp_path / "leases").iterdir()) == []


def test_nothing_is_created_before_the_first_is_asked_for(tmp_path):
    some = lease(tmp_path, "a")
    assert some.is_free(KEY) and not some.holds(KEY)
    some.close()
    assert not (tmp_path / "leases").exists()


@pytest.mark.parametrize("times", [1, 3])
def test_the_dead_of_this_host_are_followed_at_once(tmp_path, times):
    for number in range(times):
        run(lambda n=number: lease(tmp_path, f"dead{n}").take(KEY))
    some = lease(tmp_path, "a")
    assert some.is_free(KEY) and some.take(KEY)
    assert names(tmp_path) == [f"{KEY}.{n}" for n in range(times + 1)]
    some.check(KEY)
    other = lease(tmp_path, "b")
    assert not other.take(KEY)
    some.let_go(KEY)
    assert names(tmp_path) == []
    other.close()
    some.close()
    assert list((tmp_path / "leases").iterdir()) == [], "the files of the dead go too"


def test_an_owner_on_another_host_is_dead_once_its_file_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "DEAD_S", 0.1)
    owner, some = elsewhere(monkeypatch, tmp_path, "far"), lease(tmp_path, "a")
    for _ in range(4):  # it beats
        time.sleep(0.05)
        os.utime(owner._own)
        assert not some.take(KEY) and not some.is_free(KEY)
    time.sleep(0.15)
    assert not lease(tmp_path, "b").take(KEY), "whoever looks for the first time has not waited yet"
    assert some.take(KEY)
    with pytest.raises(Lost):
        owner.check(KEY)


def test_two_files_of_one_silent_process_are_each_watched(tmp_path, monkeypatch):
    """A process may have opened the lab twice; that is no sign of life when its files are seen in turn."""
    monkeypatch.setattr(leases, "DEAD_S", 0.1)
    one, two = elsewhere(monkeypatch, tmp_path, "far1"), None
    with monkeypatch.context() as patch:
        patch.setattr(leases, "whoami", lambda: {**whoami(), "host": "elsewhere"})
        two = lease(tmp_path, "far2")
        assert two.take(KEY[::-1])
    some = lease(tmp_path, "a")
    for _ in range(2):
        assert not some.take(KEY) and not some.take(KEY[::-1])
        time.sleep(0.06)
    assert some.take(KEY) and some.take(KEY[::-1]) and one and two


def test_no_clock_is_compared_with_another(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "DEAD_S", 0.1)
    owner, some = elsewhere(monkeypatch, tmp_path, "far"), lease(tmp_path, "a")
    for year in (1971, 2400):  # as that host's clock has it
        os.utime(owner._own, ((year - 1970) * 31556952,) * 2)
        assert not some.take(KEY), year
    time.sleep(0.15)
    assert some.take(KEY)


def test_an_earlier_start_of_this_very_job_is_dead_on_any_host(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    elsewhere(monkeypatch, tmp_path, "far", job=["77", 0])
    assert lease(tmp_path, "a").take(KEY)


@pytest.mark.parametrize("job", [["77", 2], ["77", 1], ["78", 0], None])
def test_of_any_other_job_it_is_not_known(monkeypatch, job):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_gone({**whoami(), "host": "elsewhere", "job": job}) is None


def test_a_process_number_that_was_given_out_again_is_another_process():
    me = whoami()
    assert is_gone(me) is False
    assert is_gone({**me, "start": "another-boot 1"}) is True
    assert is_gone({**me, "start": None, "process": [os.getpid(), me["process"][1] - 60]}) is True
    assert is_gone({"host": me["host"], "process": me["process"], "job": None}) is False, "written by an older version"
    assert is_gone({**me, "process": [2**22 + 1, 0.0]}) is True


def test_a_clock_that_was_set_makes_nobody_a_ghost(monkeypatch):
    """A process's time of birth, as the system tells it, moves with the clock; a living owner must not be taken for dead."""
    me = whoami()
    born = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: born(self) + 3600)
    assert is_gone(me) is False


@pytest.mark.parametrize("content", [b"", b'{"host": "els', b"\xff\xfe"])
def test_an_owner_whose_file_cannot_be_read_is_dead_once_it_is_silent(tmp_path, monkeypatch, content):
    monkeypatch.setattr(leases, "DEAD_S", 0.05)
    owner, some = elsewhere(monkeypatch, tmp_path, "far"), lease(tmp_path, "a")
    owner._own.write_bytes(content)
    assert not some.take(KEY)
    time.sleep(0.1)
    assert some.take(KEY)


def test_a_disk_that_is_full_leaves_no_owner_without_a_name(tmp_path, monkeypatch):
    def full(file, content):
        raise OSError(28, "No space left on device")

    some = lease(tmp_path, "a")
    with monkeypatch.context() as patch:
        patch.setattr(leases.os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            some.take(KEY)
    assert list((tmp_path / "leases").iterdir()) == []
    assert some.take(KEY)


def test_an_owner_that_was_thought_dead_and_wakes_up_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "DEAD_S", 0.0)
    sleeper, some = elsewhere(monkeypatch, tmp_path, "far"), lease(tmp_path, "a")
    assert not some.take(KEY)
    time.sleep(0.01)
    assert some.take(KEY)
    with pytest.raises(Lost, match="silent for too long"):
        sleeper.check(KEY)
    some.check(KEY)
    some.let_go(KEY)
    with pytest.raises(Lost):
        sleeper.check(KEY)
    assert some.take(KEY)
    sleeper.let_go(KEY)
    some.check(KEY)
    assert names(tmp_path) == [f"{KEY}.0"], "it does not take away what is another's now"


def test_the_lowest_number_goes_first_and_a_death_in_between_blocks_nobody(tmp_path, monkeypatch):
    run(lambda: lease(tmp_path, "dead").take(KEY))

    def follows_and_dies():
        unlink, gone = Path.unlink, []

        def dies(self, missing_ok=False):
            if gone:
                os._exit(0)
            gone.append(self.name)
            unlink(self, missing_ok=missing_ok)

        some = lease(tmp_path, "follower")
        assert some.take(KEY)
        monkeypatch.setattr(Path, "unlink", dies)
        some.let_go(KEY)

    run(follows_and_dies)
    assert names(tmp_path) == [f"{KEY}.1"]
    some = lease(tmp_path, "a")
    assert some.is_free(KEY) and some.take(KEY)
    some.check(KEY)
    assert not lease(tmp_path, "b").take(KEY)
    some.let_go(KEY)
    assert names(tmp_path) == []


def test_who_finds_a_higher_number_held_takes_its_own_back(tmp_path):
    """The owner of number 1 has begun to let go of number 0; who comes now waits, and leaves nothing in the way."""
    run(lambda: lease(tmp_path, "dead").take(KEY))
    owner, some = lease(tmp_path, "owner"), lease(tmp_path, "a")
    assert owner.take(KEY)
    (tmp_path / "leases" / f"{KEY}.0").unlink()
    assert not some.take(KEY)
    owner.check(KEY)
    assert names(tmp_path) == [f"{KEY}.1"]
    owner.let_go(KEY)
    assert some.take(KEY) and names(tmp_path) == [f"{KEY}.0"]


def test_what_a_watcher_saw_dead_may_have_been_followed_finished_and_begun_anew(tmp_path, monkeypatch):
    """The slow watcher sees a dead owner; before it follows, another one has followed, let go, and a third has begun anew."""
    run(lambda: lease(tmp_path, "dead").take(KEY))
    quick, third, slow = (lease(tmp_path, name) for name in ("quick", "third", "slow"))
    link, met = os.link, []

    def late(source, target):
        if target.name.endswith(".1") and not met:
            met.append(target)
            assert quick.take(KEY)
            quick.let_go(KEY)
            assert third.take(KEY)
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(leases.os, "link", late)
        assert not slow.take(KEY)
    third.check(KEY)
    assert met and names(tmp_path) == [f"{KEY}.0"]


def test_a_watcher_that_dies_before_it_looks_back_blocks_nobody(tmp_path, monkeypatch):
    """The same, but the slow one is killed with the wrong number in its hands: who owns number 0 must not be told for ever
    that it has lost."""
    run(lambda: lease(tmp_path, "dead").take(KEY))
    quick = lease(tmp_path, "quick")

    def slow():
        monkeypatch.setattr(Leases, "_follows_the_dead", lambda *_: os._exit(0))
        lease(tmp_path, "slow").take(KEY)

    assert quick.take(KEY)
    quick.let_go(KEY)
    run(lambda: lease(tmp_path, "dead again").take(KEY))
    run(slow)
    (tmp_path / "leases" / f"{KEY}.0").unlink()
    assert names(tmp_path) == [f"{KEY}.1"]
    some = lease(tmp_path, "a")
    assert some.take(KEY)
    some.check(KEY)


# ---------------------------------------------------------------------- a race

KEYS = [f"{number:032x}" for number in range(200)]


def racer(folder, number, seed):
    """Takes every key once, in an order of its own, and says when it began and ended to hold it."""
    some, chance = lease(folder, f"racer{number}"), random.Random(seed)
    stamps = os.open(folder / f"stamps{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    wanted = KEYS * 1
    chance.shuffle(wanted)
    while wanted:
        key = wanted.pop(0)
        if not some.take(key):
            wanted.append(key)
            time.sleep(0.0002)
            continue
        os.write(stamps, f"{key} + {time.monotonic_ns()}\n".encode())
        some.check(key)
        if chance.random() < 0.05:
            time.sleep(0.001)
        os.write(stamps, f"{key} - {time.monotonic_ns()}\n".encode())
        some.let_go(key)
    some.close()


def race(folder, kills):
    """Six racers; `kills` of them are killed in the run and others start in their place. Returns (key, start, end, who)."""
    chance, died, pids = random.Random(kills), {}, {}
    deadline = time.monotonic() + 60

    def start(number):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                racer(folder, number, number)
                code = 0
            finally:
                os._exit(code)
        pids[pid] = number

    for number in range(6):
        start(number)
    for number in range(6, 6 + kills):
        time.sleep(0.02 + 0.03 * chance.random())
        victim = chance.choice(list(pids))
        died[pids.pop(victim)] = time.monotonic_ns()
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        start(number)
    while pids and time.monotonic() < deadline:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            assert code == 0
            pids.pop(pid)
        time.sleep(0.005)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not pids, "somebody waits for ever"
    held = []
    for path in folder.glob("stamps*"):
        number, begun = int(path.name.removeprefix("stamps")), {}
        for key, sign, when in (line.split() for line in path.read_text().splitlines()):
            if sign == "+":
                begun[key] = int(when)
            else:
                held.append((key, begun.pop(key), int(when), number))
        held += [(key, when, max(when, died[number]), number) for key, when in begun.items()]
    return held


@pytest.mark.parametrize("kills", [0, 12])
def test_of_six_that_race_for_two_hundred_keys_each_is_held_by_one_at_a_time(tmp_path, kills):
    held = race(tmp_path, kills)
    assert len(held) >= 6 * len(KEYS)
    for key in KEYS:
        mine = sorted(some[1:] for some in held if some[0] == key)
        assert len({number for *_, number in mine}) >= 6
        for (_, end, one), (start, _, other) in itertools.pairwise(mine):
            assert end <= start, f"{key} was held by {one} and {other} at the same time"
    last = lease(tmp_path, "last")
    assert all(last.take(key) for key in KEYS), "nothing is blocked"
    for key in KEYS:
        last.check(key)
    last.close()
    assert [path.name for path in (tmp_path / "leases").iterdir()] == []


def test_an_owner_writes_who_it_is(tmp_path):
    some = lease(tmp_path, "a")
    some.take(KEY)
    assert json.loads((tmp_path / "leases" / f"{KEY}.0").read_text()) == whoami()
