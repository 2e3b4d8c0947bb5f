"""What the tests below the C library share: the server that forks children, an undisturbed lab, and what a lab holds.

A test module names the fixtures it uses: `server, corpus, whole = labs.server, labs.corpus, labs.whole`.
"""

import os
import re
import signal
from typing import NamedTuple

import pytest

from faults.jobs import write_corpus
from faults.shim import Call, NoShim, Server
from lesion.store import Store

JOB = "small_lab"
KILLED = -signal.SIGKILL
WHOLE = re.compile(r"log/[^/]+\.(jsonl|parquet)|states/[0-9a-f]{32}/.*|states/[0-9a-f]{32}")
DAY_S = 24 * 3600.0


class Whole(NamedTuple):
    """An undisturbed run."""

    calls: list[Call]
    content: tuple[bytes, dict[str, bytes]]

    @property
    def lines(self):
        return set(self.content[0].splitlines(keepends=True))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    try:
        started = Server(tmp_path_factory.mktemp("server"))
    except NoShim as error:
        pytest.skip(str(error))
    yield started
    started.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "words.jsonl"))


@pytest.fixture(scope="module")
def whole(server, corpus, tmp_path_factory):
    """The calls of an undisturbed run, and what it leaves."""
    lab = tmp_path_factory.mktemp("whole") / "lab"
    end = server.run(JOB, lab, corpus)
    assert end.code == 0, end
    assert len(end.calls) > 80 and len({call.name for call in end.calls}) >= 9, "the shim sees what is done"
    return Whole(end.calls, content(lab))


def content(lab):
    """Canonical bytes, and every file of every kept state but its metrics, which say how long things took."""
    files = sorted((lab / "states").glob("[!.]*/**/*"))
    kept = [path for path in files if path.is_file() and path.name != "metrics.jsonl"]
    return b"".join(Store(lab).canonical()), {str(path.relative_to(lab)): path.read_bytes() for path in kept}


def killed(server, lab, corpus, at, mode="kill"):
    """How a run ended that died at a call; None where it made fewer, since the log is also synced by the clock."""
    end = server.run(JOB, lab, corpus, mode=mode, at=at)
    assert end.code in (0, KILLED), end
    return end if end.code == KILLED else None


def recovered(server, lab, corpus, whole):
    """Runs the command without a fault. What was wrong before it and what is wrong after it, in words."""
    wrong = []
    try:
        rows = {line for line in Store(lab).canonical() if not line.startswith(b'{"error"')}
        if odd := rows - whole.lines:
            wrong.append(f"wrong rows, such as {min(odd)!r}")
        end = server.run(JOB, lab, corpus)
        if end.code:
            wrong.append(f"the next run fails, {end}")
        elif content(lab) != whole.content:
            wrong.append("the lab is another than the undisturbed one")
    except ValueError as error:
        wrong.append(f"the lab cannot be read any more, {error}")
    return wrong


def stray(lab):
    """Files and folders that do not belong to a lab at rest."""
    found = []
    for path in sorted(lab.rglob("*")):
        name = str(path.relative_to(lab))
        if name not in ("log", "states", "leases") and not WHOLE.fullmatch(name):
            found.append(name)
        elif path.suffix == ".jsonl" and path.parent.name == "log" and b"\n" not in path.read_bytes():
            found.append(name)  # a segment without a line
    return found


def age(lab, days):
    """Makes everything in a lab older."""
    for path in lab.rglob("*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - days * DAY_S))


def cut_power(lab, calls):
    """Takes from every file what was written after it was last synced: a rename may well outlive a power cut that the data
    of the renamed file does not."""
    synced: dict[str, int] = {}
    for call in calls:
        if "sync" in call.name:
            synced[call.path] = call.size
        elif call.old:
            for path in [path for path in synced if path == call.old or path.startswith(f"{call.old}/")]:
                synced[call.path + path.removeprefix(call.old)] = synced.pop(path)
    for path in lab.rglob("*"):
        if path.is_file():
            os.truncate(path, min(path.stat().st_size, synced.get(f"/{path.relative_to(lab)}", 0)))
