"""Every call that changes a lab, one after another: the process dies before it, in the middle of it, or is refused. Then the same
command: the lab ends up byte for byte as if nothing had happened.

Calls are those of shim.c; the lab is that of `jobs.small_lab`. Safetensors renames its temporary file by a system call of its
own, past the C library: dying before that is the same as dying before the call after it.
"""

import errno
import os

import pytest

from faults import labs
from faults.labs import JOB, age, content, cut_power, killed, recovered, stray

server, corpus, whole = labs.server, labs.corpus, labs.whole
PORTIONS = 4  # so that processes of pytest share the work
PLACES = ("/log", "/states")
TORN = ("short once", "short from then on")  # a disk that is full takes half of a write, and refuses the next
REFUSALS = [
    (errno.ENOSPC, "from then on", 1),
    (errno.ENOSPC, "short once", 1),
    (errno.EIO, "once", 1),
    (errno.ENOSPC, "short from then on", 10),
    (errno.ENOSPC, "once", 10),
    (errno.EIO, "from then on", 10),
]
WRITES = {"write", "pwrite", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2"}
MEETS = {
    errno.ENOSPC: WRITES
    | {"open", "open64", "openat", "openat64", "mkdir", "ftruncate", "ftruncate64", "link", "linkat"},
    errno.EIO: WRITES,
}
CASES = [(*case, place) for case in REFUSALS for place in PLACES]


def numbered(whole, number):
    """A portion of the calls, with their numbers."""
    return list(enumerate(whole.calls, 1))[number::PORTIONS]


@pytest.mark.parametrize("number", range(PORTIONS))
def test_killed_before_every_call(server, corpus, whole, tmp_path, number, fault):
    wrong, done = [], 0
    for k, call in numbered(whole, number):
        lab = tmp_path / str(k)
        if killed(server, lab, corpus, k):
            done += 1
            wrong += [f"{k}, {call}: {problem}" for problem in recovered(server, lab, corpus, whole)]
    assert done and not wrong, "\n".join(wrong)
    fault("kill -9 before a call that changes the lab", "every call", "finished, byte-identical", done)


@pytest.mark.parametrize("number", range(PORTIONS))
def test_killed_before_a_call_and_again_during_recovery(server, corpus, whole, tmp_path, number, fault):
    wrong, done = [], 0
    for k, call in list(numbered(whole, number))[::7]:
        for again in range(1, len(whole.calls), 29):
            lab = tmp_path / f"{k}-{again}"
            killed(server, lab, corpus, k)
            if not (end := killed(server, lab, corpus, again)):
                break  # the recovery makes fewer calls
            done += 1
            what = f"{k}, {call}, then {again}, {end.calls[-1]}"
            wrong += [f"{what}: {problem}" for problem in recovered(server, lab, corpus, whole)]
    assert done and not wrong, "\n".join(wrong)
    fault(
        "kill -9 again, during the recovery",
        "every 7th call × every 29th of the next run",
        "finished, byte-identical",
        done,
    )


@pytest.mark.parametrize("number", range(PORTIONS))
def test_killed_in_the_middle_of_every_write(server, corpus, whole, tmp_path, number, fault):
    wrong, done = [], 0
    for k, call in numbered(whole, number):
        if call.writes:
            lab = tmp_path / str(k)
            if killed(server, lab, corpus, k, mode="torn"):
                done += 1
                wrong += [f"{k}, {call}: {problem}" for problem in recovered(server, lab, corpus, whole)]
    assert done and not wrong, "\n".join(wrong)
    fault("kill -9 in the middle of a write", "half of the bytes, every write", "finished, byte-identical", done)


@pytest.mark.parametrize("number", range(PORTIONS))
def test_the_power_is_cut_before_a_call(server, corpus, whole, tmp_path, number, fault):
    """What was written and not synced is gone as well."""
    wrong, done = [], 0
    for k, call in numbered(whole, number)[::3]:
        lab = tmp_path / str(k)
        if end := killed(server, lab, corpus, k):
            cut_power(lab, end.calls[:-1])
            done += 1
            wrong += [f"{k}, {call}: {problem}" for problem in recovered(server, lab, corpus, whole)]
    assert done and not wrong, "\n".join(wrong)
    fault(
        "power cut before a call that changes the lab", "what is not synced is lost", "finished, byte-identical", done
    )


@pytest.mark.parametrize(("error", "mode", "every", "place"), CASES)
def test_refused_at_every_call(server, corpus, whole, tmp_path, error, mode, every, place, fault):
    """The run says what it met, or it is as if nothing had been met; no row is ever wrong; the next run finishes."""
    wrong, done = [], 0
    for k, call in list(enumerate(whole.calls, 1))[::every]:
        if place not in call.path or call.name not in MEETS[error] or (mode in TORN and not call.writes):
            continue
        lab = tmp_path / str(k)
        end = server.run(JOB, lab, corpus, mode=mode, at=k, error=error)
        done += 1
        problems = [] if end.code in (0, 1) else [str(end)]
        if end.code == 1 and os.strerror(error) not in end.said:
            problems.append(f"the error is not named, {end}")
        if end.code == 0 and content(lab) != whole.content:
            problems.append("a success with something missing")
        problems += recovered(server, lab, corpus, whole)
        wrong += [f"{k}, {call}: {problem}" for problem in problems]
    assert done and not wrong, "\n".join(wrong)
    how = f"{mode}, every call" if every == 1 else f"{mode}, every {every}th call"
    fault(f"{errno.errorcode[error]} from the disk", how, "named, no wrong row, next run byte-identical", done)


@pytest.mark.parametrize("place", PLACES)
def test_what_killed_runs_leave_goes_in_the_end(server, corpus, whole, tmp_path, place, fault):
    """Unfinished files stay for a day, since their process may live on another machine; then any run removes them."""
    left, done = [], 0
    for k, call in list(enumerate(whole.calls, 1))[::7]:
        if place in call.path:
            lab = tmp_path / str(k)
            killed(server, lab, corpus, k)
            assert server.run(JOB, lab, corpus).code == 0
            age(lab, days=2)
            assert server.run(JOB, lab, corpus).code == 0
            done += 1
            left += [f"{k}, {call}: {name} stays" for name in stray(lab)]
            left += [f"{k}, {call}: no metrics" for _ in range(1 - len(list(lab.glob("states/[!.]*/metrics.jsonl"))))]
    assert not left, "\n".join(left)
    fault("files of killed runs", f"below {place[1:]}/, aged by two days", "gone after the next run", done)
