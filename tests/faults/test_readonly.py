"""A lab that can only be read: what takes nothing works, and what would take something is refused by name."""

import errno
import os

import pytest

from faults import labs
from faults.jobs import NO_MOUNTS
from faults.test_full import STUDY
from lesion.cli import FAILED, OK, WRONG_INPUT
from lesion.store import Store

server = labs.server
REFUSED = os.strerror(errno.EROFS)


@pytest.fixture(scope="module")
def lab(server, tmp_path_factory):
    """A lab in which one reading of two is there."""
    made = tmp_path_factory.mktemp("made") / "lab"
    assert server.run("command", made, *STUDY, "--measures", "perplexity").code == OK
    return made


def looked_at(server, lab, *words):
    """A command on the lab, mounted for reading only; where there are no mounts the C library says so at every call."""
    end = server.run("read_only", lab, *words)
    if end.code == NO_MOUNTS:
        end = server.run("command", lab, *words, mode="from then on", at=1, error=errno.EROFS)
    return end


def everything(lab):
    return {path: path.read_bytes() for path in sorted(lab.rglob("*")) if path.is_file()}


def test_what_only_reads_works(server, lab, fault):
    before = everything(lab)
    key = next(iter(Store(lab).index.states))
    asked = (["status"], ["show", key], ["export", "rows", "-"], ["plan", *STUDY[1:]])
    for words in asked:
        end = looked_at(server, lab, *words)
        assert end.code == OK, end
        if words[0] == "export":
            assert end.said.encode() == b"".join(Store(lab).canonical())
    assert everything(lab) == before
    fault("read-only lab", "status, show, export, plan", "done as ever", len(asked))


@pytest.mark.parametrize("shim", [False, True], ids=["mount", "shim"])
def test_what_would_write_is_refused(server, lab, shim, fault):
    before = everything(lab)
    for words in (STUDY, ["report", *STUDY[1:], "--measures", "perplexity"]):
        if shim:
            end = server.run("command", lab, *words, mode="from then on", at=1, error=errno.EROFS)
        else:
            end = looked_at(server, lab, *words)
        assert end.code in (FAILED, WRONG_INPUT), end
        assert REFUSED in end.said and "Traceback" not in end.said, end
    assert everything(lab) == before
    end = server.run("command", lab, *STUDY)
    assert end.code == OK, end
    fault("read-only lab", "run, report", "refused by name", 2)


def test_a_place_where_no_lab_can_be_made(server, tmp_path, fault):
    end = server.run("command", tmp_path / "lab", *STUDY, mode="from then on", at=1, error=errno.EROFS)
    assert end.code in (FAILED, WRONG_INPUT) and REFUSED in end.said, end
    assert not (tmp_path / "lab").exists()
    fault("read-only place for a new lab", "every call refused", "refused by name")
