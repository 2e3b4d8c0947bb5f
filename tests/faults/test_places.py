"""Labs under odd names, and clocks that go backwards: the same rows, and a report that opens."""

import time

import pytest

from lesion.cli import run
from lesion.store import Store

STUDY = ["run", "degrade", "--subject", "tiny-llama", "--doses", "0", "0.5", "--site", "mlp", "--repeats", "1"]
STUDY += ["--prompts", "3", "--new-tokens", "4", "--documents", "2", "--tokens", "32", "--verbosity", "quiet"]
NAMES = ["a lab", 'it\'s "quoted"', "two\nlines", "ünï–çødé 実験", "-dash", "%s {x} $HOME", "a" * 200]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    lab = tmp_path_factory.mktemp("plain") / "lab"
    assert run([*STUDY, "--lab", str(lab)]) == 0
    return list(Store(lab).canonical())


@pytest.mark.parametrize("name", NAMES)
def test_a_lab_under_any_name_holds_the_same(tmp_path, plain, name, fault):
    lab = tmp_path / name
    assert run([*STUDY, "--lab", str(lab)]) == 0
    assert list(Store(lab).canonical()) == plain
    (page,) = lab.glob("studies/*/report.html")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(["status", "--lab", str(lab)]) == 0
    target = tmp_path / f"{name[:20]} out"
    assert run(["export", "rows", str(target), "--lab", str(lab)]) == 0
    assert target.read_bytes() == b"".join(plain)
    fault("odd lab path", "spaces, quotes, newline, unicode, 200 letters", "finished, byte-identical")


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, plain, monkeypatch, fault):
    real, calls = time.time, []

    def backwards():
        calls.append(None)
        return real() - 3600 * len(calls)

    monkeypatch.setattr(time, "time", backwards)
    lab = tmp_path / "lab"
    assert run([*STUDY, "--measures", "perplexity", "--lab", str(lab)]) == 0  # a part of it first
    assert run([*STUDY, "--lab", str(lab)]) == 0
    assert list(Store(lab).canonical()) == plain and len(calls) > 2
    fault("clock going backwards", "an hour at every look", "finished, byte-identical", len(calls))
