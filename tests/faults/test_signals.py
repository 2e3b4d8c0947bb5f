"""SIGTERM and SIGUSR1 at any moment of a run: exit code 75 at the next boundary, and the same command goes on from there.

The process sends itself the signal within a backward pass, or within a reading, so the moment is chosen and not met by chance.
"""

import json
import signal
from pathlib import Path

import pytest

from faults import labs
from faults.labs import JOB, content
from lesion.cli import OK, UNFINISHED
from lesion.store import Store

server, corpus, whole = labs.server, labs.corpus, labs.whole
STEPS = 4  # of the training, each with one backward pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("nth", [(1,), (2,), (3,), (1, 2), (STEPS,)], ids=str)
def test_within_a_backward_pass(server, corpus, whole, tmp_path, number, nth, fault):
    lab = tmp_path / "lab"
    end = server.run("signalled", lab, corpus, int(number), "backward", nth)
    assert end.code == UNFINISHED, end
    if nth != (STEPS,):
        assert f"saved after step {nth[0]} of {STEPS}" in end.said
        (work,) = (lab / "states").glob(".*.work")
        assert (work / f"step-{nth[0]:08d}").is_dir()
        steps = [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, nth[0] + 1))
    assert not Store(lab).index.failures, "to end when asked is no failure"
    assert server.run(JOB, lab, corpus).code == 0
    assert content(lab) == whole.content
    fault(f"{number.name} within a backward pass", "sent by the pass itself", "exit code 75, finished bit-identical")


def test_at_every_step_anew(server, corpus, whole, tmp_path, fault):
    """A machine that is taken away again and again: each run does one step more."""
    lab, times = tmp_path / "lab", 0
    while (end := server.run("signalled", lab, corpus, int(signal.SIGTERM), "backward", (1,))).code == UNFINISHED:
        times += 1
        assert times < 2 * STEPS, "every run comes further"
    assert times >= STEPS - 1, end
    assert server.run(JOB, lab, corpus).code == 0
    assert content(lab) == whole.content
    fault("SIGTERM within a backward pass", "in every run anew", "exit code 75, finished bit-identical", times)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("nth", range(1, 8, 3))
def test_within_a_reading_it_ends_at_a_boundary(server, corpus, whole, tmp_path, number, nth, fault):
    lab = tmp_path / "lab"
    end = server.run("signalled", lab, corpus, int(number), "chunk", (nth,))
    assert end.code == UNFINISHED, end
    assert not Store(lab).index.failures and set(Store(lab).canonical()) <= whole.lines
    assert server.run(JOB, lab, corpus).code == 0
    assert content(lab) == whole.content
    fault(f"{number.name} within a reading", "sent by the measure itself", "exit code 75, finished byte-identical")


def test_a_whole_command(server, corpus, tmp_path, fault):
    """`lesion run` says that it is unfinished, and the same command goes on and reports."""
    held_out = tmp_path / "held_out.jsonl"
    lines = Path(corpus).read_text(encoding="utf-8").splitlines(keepends=True)
    held_out.write_text("".join(reversed(lines)), encoding="utf-8")  # another corpus, of the same texts
    words = [
        "run",
        "modern-lm",
        "--tier",
        "smoke",
        "--corpus",
        corpus,
        "--held-out",
        str(held_out),
        "--steps",
        str(STEPS),
    ]
    words += ["--length", "16", "--batch", "2", "--vocabulary", "272", "--samples", "2", "--new-tokens", "4"]
    words += ["--verbosity", "quiet"]
    assert server.run("command", tmp_path / "whole", *words).code == OK
    lab = tmp_path / "lab"
    for number, nth in ((signal.SIGTERM, 2), (signal.SIGUSR1, 1)):
        end = server.run("signalled", lab, corpus, int(number), "backward", (nth,), words)
        assert end.code == UNFINISHED and "the same command goes on from here" in end.said, end
    assert server.run("command", lab, *words).code == OK
    assert list(Store(lab).canonical()) == list(Store(tmp_path / "whole").canonical())
    assert len(list(lab.glob("studies/*/report.html"))) == 1
    fault("signals to lesion run", "within backward passes", "exit code 75, finished byte-identical", 2)
