"""A training whose newest checkpoint was torn or altered goes on from the one before it, says so, and ends with the same bits."""

import logging
import os

import pytest

from lesion.fit import fit
from oracles.test_fit import HOW, Killed, data, kill_at, metrics, model, same, weights


def flip(path):
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


DAMAGE = {
    "a flipped bit of a weight": lambda folder: flip(folder / "model.safetensors"),
    "a flipped bit of the optimizer's state": lambda folder: flip(folder / "optimizer.safetensors"),
    "a truncated file": lambda folder: os.truncate(folder / "model.safetensors", 900),
    "an empty file": lambda folder: os.truncate(folder / "optimizer.safetensors", 0),
    "a missing file": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "a missing digest": lambda folder: (folder / "digest").unlink(),
    "a header that claims more than there is": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 8),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made, folder = model(), tmp_path_factory.mktemp("whole")
    facts = fit(made, data(), HOW, folder=folder)
    return weights(made), metrics(folder), facts


def torn(folder):
    with pytest.raises(Killed):
        fit(model(), data(), HOW, folder=folder, tell=kill_at(10))  # checkpoints are at 4 and 8


@pytest.mark.parametrize("how", DAMAGE)
def test_the_one_before_it_is_used(tmp_path, whole, caplog, how, fault):
    torn(tmp_path)
    DAMAGE[how](tmp_path / "step-00000008")
    again = model()
    with caplog.at_level(logging.WARNING, "lesion"):
        facts = fit(again, data(), HOW, folder=tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "step-00000008 is damaged" in said and "going on from the one before it" in said
    assert same(weights(again), whole[0]) and metrics(tmp_path) == whole[1] and facts == whole[2]
    assert (tmp_path / "damaged-step-00000008-1").is_dir(), "it is kept aside, and a new one stands in its place"
    fault("newest checkpoint damaged", how, "said aloud, the one before it used, finished bit-identical")


def test_with_none_that_is_whole_it_begins_again(tmp_path, whole, caplog):
    torn(tmp_path)
    for step in (4, 8):
        flip(tmp_path / f"step-{step:08d}" / "model.safetensors")
    again = model()
    with caplog.at_level(logging.WARNING, "lesion"):
        fit(again, data(), HOW, folder=tmp_path)
    assert len(caplog.records) == 2
    assert same(weights(again), whole[0]) and metrics(tmp_path) == whole[1]


def test_a_checkpoint_that_was_never_renamed_is_no_checkpoint(tmp_path, whole, monkeypatch):
    from pathlib import Path

    rename = Path.rename

    def dies(self, target):
        if "step-00000008" in str(target):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(OSError, match="No space left"):
        fit(model(), data(), HOW, folder=tmp_path)
    monkeypatch.setattr(Path, "rename", rename)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000004"]
    again = model()
    fit(again, data(), HOW, folder=tmp_path)
    assert same(weights(again), whole[0]) and metrics(tmp_path) == whole[1]
