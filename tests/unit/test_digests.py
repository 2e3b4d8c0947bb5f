"""Digests of files: remembered while the file is the same, and never longer."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from lesion import digests


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _aged(path: Path) -> None:
    """As if the file had been written an hour ago; its time of change cannot be set, so the clock goes on instead."""
    hour = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(hour, hour))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 10 * digests.SETTLED_NS)


def test_a_settled_file_is_read_once(tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    whole = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: read.append(path) or whole(path))
    file = tmp_path / "a.txt"
    file.write_bytes(b"one")
    assert [digests.of_file(file) for _ in range(3)] == [_sha256(b"one")] * 3
    assert len(read) == 1


def test_a_file_that_was_rewritten_with_its_size_and_its_time_kept_is_read_again(tmp_path: Path, later: None) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one")
    _aged(file)
    before = file.stat()
    assert digests.of_file(file) == _sha256(b"one")
    time.sleep(0.05)  # a tick of the file system's clock
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.of_file(file) == _sha256(b"two")


def test_two_writes_within_one_tick_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for number in range(50):
        file.write_bytes(b"%02d" % number)
        assert digests.of_file(file) == _sha256(b"%02d" % number)


def test_what_a_link_points_to_counts(tmp_path: Path, later: None) -> None:
    one, two, link = tmp_path / "1", tmp_path / "2", tmp_path / "link"
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    link.symlink_to(one)
    assert digests.of_file(link) == _sha256(b"one")
    link.unlink()
    link.symlink_to(two)
    assert digests.of_file(link) == _sha256(b"two")
