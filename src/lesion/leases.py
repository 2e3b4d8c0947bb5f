"""Leases: who is at work on what, so that two processes on one lab never do the same thing twice.

    lab/leases/<writer>        one file for each process at work; touched every BEAT_S seconds, gone when it ends
    lab/leases/<key>.<n>       a reading or a state that is being made: a second name (hard link) of its owner's file

`link` either makes a name or finds it taken, also on NFS, where advisory locks mean little; and since a lease *is* its
owner's file, one touch keeps all its leases alive, whatever their number. An owner is dead when its process is known to be
gone, or when its file has not been touched for DEAD_S seconds by the watcher's own clock: no two clocks are ever compared.

A dead owner's lease is not removed, since two watchers could do that at different times, but followed by the next
number: of those who want `<key>.1` only one gets it. An owner that was thought dead and is not finds its lease followed or
gone, and drops what it has (`Lost`). A lease is let go once what it was held for is on disk.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

BEAT_S = 10.0
DEAD_S = 120.0  # some caches of network file systems show an old time of change for a minute
ABANDONED_S = 24 * 3600.0  # age at which what is left of the dead goes; no owner is silent for so long


class Lost(RuntimeError):
    """Somebody has taken over what this process was at work on: it was silent for too long. Its work is dropped."""


class Leases:
    """The leases of one process. Nothing is created before the first is asked for."""

    def __init__(self, folder: Path, writer: str):
        self.folder, self.writer = folder, writer
        self._own = folder / writer
        self._file: int | None = None
        self._inode = -1
        self._held: dict[str, int] = {}  # key → number
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}  # owner's file as last seen to change, and when
        self._ended = threading.Event()

    def take(self, key: str) -> bool:
        """Whether this process may work on `key` now; if it may, nobody else may until it lets go."""
        self._enter()
        number = 0
        while True:
            path = self.folder / f"{key}.{number}"
            try:
                os.link(self._own, path)
            except FileExistsError:
                try:
                    found = path.stat()
                except FileNotFoundError:  # let go just now
                    number = 0
                    continue
                if found.st_ino != self._inode:  # else the answer to our own request was lost, and it was asked twice
                    if not self._is_dead(path, found):
                        return False
                    number += 1
                    continue
            if number and not self._follows_the_dead(key, number):
                path.unlink(missing_ok=True)
                number = 0
                continue
            self._held[key] = number
            return True

    def check(self, key: str) -> None:
        """Raises Lost where a lease that was taken is another's by now."""
        if (number := self._held.get(key)) is None:
            return
        with suppress(FileNotFoundError):
            if (self.folder / f"{key}.{number}").stat().st_ino == self._inode and not os.path.lexists(
                self.folder / f"{key}.{number + 1}"
            ):
                return
        raise Lost(f"{key} was taken over by another process, because this one was silent for too long")

    def holds(self, key: str) -> bool:
        """Whether a lease was taken, and not let go; `check` tells whether it still counts."""
        return key in self._held

    def let_go(self, key: str) -> None:
        """Lowest number first: whoever is just following a dead owner sees that it is gone."""
        if (number := self._held.pop(key, None)) is None:
            return
        with suppress(FileNotFoundError):
            if (self.folder / f"{key}.{number}").stat().st_ino != self._inode:
                return
        for low in range(number + 1):
            (self.folder / f"{key}.{low}").unlink(missing_ok=True)

    def is_free(self, key: str) -> bool:
        """Whether nobody who is alive works on it. An answer for those who wait, not a lease."""
        number = 0
        while True:
            path = self.folder / f"{key}.{number}"
            try:
                found = path.stat()
            except FileNotFoundError:
                return True
            if found.st_ino != self._inode and not self._is_dead(path, found):
                return False
            number += 1

    def let_go_of_all(self) -> None:
        for key in list(self._held):
            self.let_go(key)

    def close(self) -> None:
        self.let_go_of_all()
        self._ended.set()
        if self._file is not None:
            os.close(self._file)
            self._file, self._inode = None, -1
            self._own.unlink(missing_ok=True)
            self._sweep()

    # ------------------------------------------------------------------ who is alive

    def _enter(self) -> None:
        if self._file is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(self._file, json.dumps(whoami()).encode())
        self._inode = os.fstat(self._file).st_ino
        self._ended.clear()
        threading.Thread(target=self._beat, args=(self._file,), daemon=True, name="leases").start()

    def _beat(self, file: int) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):  # a server that is away for a while: whoever sees no beat will follow
                os.utime(file)

    def _is_dead(self, path: Path, found: os.stat_result) -> bool:
        """Of the owner of a lease, or of an owner's own file."""
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False  # let go: the caller looks again
        if (known := is_gone(owner)) is not None:
            return known
        state, now = (found.st_ino, found.st_mtime_ns), time.monotonic()
        name = f"{owner['host']} {owner['process']}"
        if self._seen.get(name, (None, 0.0))[0] != state:
            self._seen[name] = state, now
        return now - self._seen[name][1] > DEAD_S

    def _follows_the_dead(self, key: str, number: int) -> bool:
        """Whether the leases before this one are still those of the dead. Where their follower has let go of them in the
        meantime, somebody may have begun anew with number 0."""
        for low in range(number):
            path = self.folder / f"{key}.{low}"
            try:
                if not self._is_dead(path, path.stat()):
                    return False
            except FileNotFoundError:
                return False
        return True

    def _sweep(self) -> None:
        """Removes files that the dead have left."""
        with suppress(FileNotFoundError):
            for path in list(self.folder.iterdir()):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > ABANDONED_S or _is_gone_by_name(path.name):
                        path.unlink()


def _is_gone_by_name(name: str) -> bool:
    """Of a process's own file: its name holds host and process, whatever has become of its content."""
    parts = name.split("-")
    return len(parts) == 4 and parts[1] == host_word() and not psutil.pid_exists(int(parts[2]))


def host_word() -> str:
    """The name of this host as it stands in the names of files."""
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())


def whoami() -> dict[str, Any]:
    """What tells one process from all others."""
    process = psutil.Process()
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return {
        "host": socket.gethostname(),
        "process": [process.pid, process.create_time()],
        "job": [job, int(restart)] if job else None,
    }


def is_gone(owner: dict[str, Any]) -> bool | None:
    """Whether a process is: known of those on this host, and of an earlier start of this very job. None: not known."""
    mine = whoami()
    if owner.get("job") and mine["job"] and owner["job"][0] == mine["job"][0] and owner["job"][1] < mine["job"][1]:
        return True
    if owner["host"] != mine["host"]:
        return None
    pid, born = owner["process"]
    try:
        found = psutil.Process(pid)
        return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - born) >= 2.0
    except psutil.NoSuchProcess:
        return True
