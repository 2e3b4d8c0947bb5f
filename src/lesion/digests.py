"""sha256 of files. A study pins its texts and models once for each of its sentences, so what was hashed is remembered.

A file is taken for unchanged while its inode, size, time of modification and time of change stay the same. Clocks of file
systems are coarse: two writes within one tick look alike, so a file that was changed a moment ago is hashed again (git
treats its index in the same way).
"""

from __future__ import annotations

import hashlib
import os
import time
from functools import lru_cache
from pathlib import Path

SETTLED_NS = 2 * 10**9  # FAT, the coarsest of them, keeps times in steps of two seconds


def of_file(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal. Raises OSError where it cannot be read."""
    state = path.stat()
    changed = max(state.st_mtime_ns, state.st_ctime_ns)
    if time.time_ns() - changed < SETTLED_NS:
        return _read(path)
    return _remembered(os.path.realpath(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, changed)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=4096)
def _remembered(path: str, *state: int) -> str:
    return _read(Path(path))
