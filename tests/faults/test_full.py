"""A disk that is full: a real one, one that says so at any call of a whole command, and one that nothing can be printed to."""

import errno
import os

import pytest

from faults import labs
from faults.jobs import NO_MOUNTS
from faults.labs import content
from lesion.cli import FAILED, OK, WRONG_INPUT
from lesion.store import Store

server, corpus, whole = labs.server, labs.corpus, labs.whole
STUDY = ["run", "degrade", "--subject", "tiny-llama", "--doses", "0", "0.5", "--site", "mlp", "--repeats", "1"]
STUDY += ["--measures", "perplexity", "--documents", "2", "--tokens", "16", "--verbosity", "quiet"]
EVERY, PORTIONS = 3, 2
FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize("kilobytes", [8, 48, 300, 600, 700])
def test_a_disk_that_is_too_small_and_then_grows(server, corpus, whole, tmp_path, kilobytes, fault):
    lab = tmp_path / "disk"
    lab.mkdir()
    end = server.run("on_a_small_disk", lab, corpus, kilobytes)
    if end.code == NO_MOUNTS:
        pytest.skip("this machine gives a process no mounts of its own")
    assert end.code == 0 and "ends: 1 0" in end.said, end
    assert FULL in end.said, "the error is named"
    assert content(tmp_path / "copy") == whole.content
    fault("disk full, then larger", "tmpfs of 8 to 700 kB", "named, next run byte-identical")


@pytest.fixture(scope="module")
def study(server, tmp_path_factory):
    """The calls of a whole command, report and all, and what it leaves."""
    lab = tmp_path_factory.mktemp("study") / "lab"
    end = server.run("command", lab, *STUDY)
    assert end.code == OK, end
    return end.calls, b"".join(Store(lab).canonical()), derived(lab)


def derived(lab):
    """The files of the study that have no timings in them."""
    found = {str(path.relative_to(lab)): path for path in lab.glob("studies/**/*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if path.suffix in (".csv", ".svg") or "study.json" in name
    }


@pytest.mark.parametrize("first", range(PORTIONS))
def test_a_command_that_meets_a_full_disk(server, study, tmp_path, first, fault):
    """Log, run log, tables, figures, page: whatever is refused, the exit code is not 0 and the next command makes all of it."""
    calls, canonical, files = study
    wrong, done = [], 0
    for k in range(1 + first * EVERY, len(calls) + 1, EVERY * PORTIONS):
        if calls[k - 1].name.startswith(("unlink", "rmdir")):
            continue
        lab = tmp_path / str(k)
        end = server.run("command", lab, *STUDY, mode="from then on", at=k, error=errno.ENOSPC)
        done += 1
        last = end.said.splitlines()[-1:]  # before it a run log that cannot be written may have complained
        if end.code not in (FAILED, WRONG_INPUT) or not any(
            line.startswith("lesion: ") and FULL in line for line in last
        ):
            wrong.append(f"{k}, {calls[k - 1]}: {end}")
        again = server.run("command", lab, *STUDY)
        if again.code != OK or b"".join(Store(lab).canonical()) != canonical or derived(lab) != files:
            wrong.append(f"{k}, {calls[k - 1]}: the next run, {again}")
    assert done and not wrong, "\n".join(wrong)
    fault("ENOSPC in a whole command", f"from then on, every {EVERY}rd call", "named, next run byte-identical", done)


@pytest.mark.parametrize(
    "words", [["status"], ["export", "rows", "-"], ["report", *STUDY[1:]]], ids=lambda words: words[0]
)
def test_nothing_can_be_printed(server, study, tmp_path, words, fault):
    lab = tmp_path / "lab"
    assert server.run("command", lab, *STUDY).code == OK
    end = server.run("to_a_full_device", lab, *words)
    assert end.code == FAILED and FULL in end.said, end
    assert "Traceback" not in end.said and b"".join(Store(lab).canonical()) == study[1]
    fault("output to a full device", "/dev/full", "refused by name")
    end = server.run("to_a_closed_pipe", lab, *words)
    assert end.code == OK and "rror" not in end.said, end
    fault("output that nobody reads", "a closed pipe, as of | head", "ended without a word")
