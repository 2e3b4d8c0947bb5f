"""Pickles: a canary that leaves a mark when it is opened lies wherever weights are looked for, and no mark is ever left."""

import json
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from lesion import Lab
from lesion.cli import run
from lesion.fit import fit
from lesion.subjects import Directory, Scratch
from lesion.trial import Reading, Trial
from oracles.test_fit import HOW, Killed, data, kill_at, model, same, weights
from words import TestNorms, TestTrains

NEVER = "refused by name, never opened"


class Canary:
    """What unpickles to a file of this name."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture
def mark(tmp_path):
    """Where the canary leaves its mark. It is proved here that it would."""
    mark = tmp_path / "opened"
    pickle.loads(canary(mark)).close()
    mark.unlink()
    yield mark
    assert not mark.exists()


def canary(mark):
    return pickle.dumps(Canary(str(mark)))


def zipped(path, data):
    """A pickle as torch.save writes it: data.pkl in an archive."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)


def refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=str(folder)) as caught:
        Directory(path=str(folder)).pin().load()
    study = ["run", "degrade", "--subject", str(folder), "--doses", "0", "--lab", str(tmp_path / "lab")]
    assert run([*study, "--verbosity", "quiet"]) == 2
    assert str(folder) in capsys.readouterr().err and not (tmp_path / "lab").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "tf_model.h5"]
)
@pytest.mark.parametrize("write", [lambda path, data: path.write_bytes(data), zipped], ids=["plain", "zipped"])
def test_alone(folder, mark, tmp_path, name, write, capsys, fault):
    (folder / "model.safetensors").unlink()
    write(folder / name, canary(mark))
    assert name in refused(folder, tmp_path, capsys)
    fault("pickled weights", f"{name} alone", NEVER)


@pytest.mark.parametrize("write", [lambda path, data: path.write_bytes(data), zipped], ids=["plain", "zipped"])
def test_renamed_to_safetensors(folder, mark, tmp_path, write, capsys, fault):
    write(folder / "model.safetensors", canary(mark))
    assert "model.safetensors is not a whole safetensors file" in refused(folder, tmp_path, capsys)
    fault("pickled weights", "renamed to model.safetensors", NEVER)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_inside_an_index(folder, mark, tmp_path, index, capsys, fault):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(canary(mark))
    places = dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert "pytorch_model-00001-of-00001.bin" in refused(folder, tmp_path, capsys)
    fault("pickled weights", f"in a {index}", NEVER)


def test_a_shard_renamed_to_safetensors(folder, mark, tmp_path, capsys, fault):
    names = sorted(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes(canary(mark))
    places = {**dict.fromkeys(names[1:], "one.safetensors"), names[0]: "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert "two.safetensors is not a whole safetensors file" in refused(folder, tmp_path, capsys)
    fault("pickled weights", "a shard renamed to safetensors", NEVER)


def test_beside_safetensors_it_is_not_looked_at(folder, mark, fault):
    plain = Lab(folder.parent / "plain").take([Reading(trial=Directory(path=str(folder)).pin(), measure=TestNorms())])
    beside = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.ckpt")
    for name in beside:
        (folder / name).write_bytes(canary(mark))
    lab = Lab(folder.parent / "lab").take([Reading(trial=Directory(path=str(folder)).pin(), measure=TestNorms())])
    assert list(lab.canonical()) == list(plain.canonical())
    fault("pickles beside safetensors", "weights, optimizer, scheduler, …", "not opened, byte-identical", len(beside))


def test_in_the_place_of_a_kept_state(mark, tmp_path, fault):
    trial = Trial(subject=Scratch()) >> TestTrains()
    lab = Lab(tmp_path / "lab")
    folder = lab.take([Reading(trial=trial, measure=TestNorms())]).state_folder(trial.key)
    for write in (lambda path, data: path.write_bytes(data), zipped):
        (folder / "model.safetensors").unlink()
        write(folder / "model.safetensors", canary(mark))
        store = lab.take([Reading(trial=trial, measure=TestNorms(power=2.0))])
        (failure,) = store.index.failures.values()
        assert f"the kept state {folder} cannot be read" in failure["error"] and len(store.index.seals) == 1
    fault("pickled weights", "as a kept state", NEVER, 2)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_in_the_place_of_a_checkpoint(mark, tmp_path, file, caplog, fault):
    whole = model()
    fit(whole, data(), HOW, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        fit(model(), data(), HOW, folder=tmp_path / "torn", tell=kill_at(10))
    newest = tmp_path / "torn" / "step-00000008"
    (newest / file).write_bytes(canary(mark))
    torch.save({"step": 8}, newest / "optimizer.pt")
    again = model()
    fit(again, data(), HOW, folder=tmp_path / "torn")
    assert same(weights(again), weights(whole)) and "step-00000008 is damaged" in caplog.text
    fault("pickled weights", f"as {file} of a checkpoint", "never opened, the one before it used, bit-identical")


def test_in_a_folder_that_is_copied_over_a_lab(mark, tmp_path, fault):
    """A lab is read by a pattern of names, and no name is a pickle's."""
    lab = Lab(tmp_path / "lab")
    before = list(lab.take([Reading(trial=Scratch(), measure=TestNorms())]).canonical())
    for place in ("log", "states", "studies"):
        (lab.path / place).mkdir(exist_ok=True)
        for name in ("index.pkl", "cache.pt", "rows.pickle"):
            (lab.path / place / name).write_bytes(canary(mark))
    assert list(lab.take([Reading(trial=Scratch(), measure=TestNorms())]).canonical()) == before
    assert run(["status", "--lab", str(lab.path)]) == 0
    shutil.rmtree(lab.path)
    fault("pickles in a lab's folders", "in log, states and studies", "not opened, byte-identical", 9)
