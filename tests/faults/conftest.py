"""What the tests of faults share: a tiny llama as a folder, and a copy of it to break."""

import shutil

import pytest

from lesion.subjects import Scratch


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A tiny llama as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("sound")
    specimen = Scratch(seed=1).load()
    specimen.model.save_pretrained(folder)
    specimen.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")
