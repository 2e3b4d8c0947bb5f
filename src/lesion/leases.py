"""Leases: who is at work on what, so that two processes on one lab never do the same thing twice.

    lab/leases/<writer>        one file for each process at work; touched every BEAT_S seconds, gone when it ends
    lab/leases/<key>.<n>       a reading or a state that is being made: a second name (hard link) of its owner's file

`link` either makes a name or finds it taken, also on NFS, where advisory locks mean little; and since a lease *is* its
owner's file, one touch keeps all its leases alive, whatever their number. An owner is dead when its process is known to be
gone, or when its file has not been touched for DEAD_S seconds by the watcher's own clock: no two clocks are ever compared.

A dead owner's lease is not removed, since two watchers could do that at different times, but followed by the next
number: of those who want `<key>.1` only one gets it. Only the highest number counts: a process that dies while it takes or
lets go may leave any of its numbers behind, and they are followed too. An owner that was thought dead and is not finds its
lease followed or gone, and drops what it has (`Lost`). A lease is let go once what it was held for is on disk.
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
        self._seen: dict[int, tuple[int, float]] = {}  # inode → time of change of the file, and when we first saw that
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
                        self._drop(key, number)
                        return False
                    number += 1
                    continue
            if number and not self._follows_the_dead(key, number):
                path.unlink(missing_ok=True)
                number = 0
                continue
            if os.path.lexists(self.folder / f"{key}.{number + 1}"):  # left by the dead, or another one is just looking
                number += 1
                continue
            self._held[key] = number
            return True

    def _drop(self, key: str, below: int) -> None:
        """Takes back what was taken of a key before a higher number was found to be another's."""
        for low in range(below):
            with suppress(FileNotFoundError):
                if (path := self.folder / f"{key}.{low}").stat().st_ino == self._inode:
                    path.unlink()

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
        file = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(file, json.dumps(whoami()).encode())
            os.fsync(file)  # else other hosts may see an empty file
        except BaseException:
            os.close(file)
            self._own.unlink()
            raise
        self._file, self._inode = file, os.fstat(file).st_ino
        self._ended = threading.Event()
        threading.Thread(target=self._beat, args=(file, self._ended), daemon=True, name="leases").start()

    @staticmethod
    def _beat(file: int, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            with suppress(OSError):  # a server that is away for a while: whoever sees no beat will follow
                os.utime(file)

    def _is_dead(self, path: Path, found: os.stat_result) -> bool:
        """Of the owner of a lease, or of an owner's own file."""
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False  # let go: the caller looks again
        except ValueError:  # a power cut took the content: who it was is not known any more
            owner = None
        if owner is not None and (known := is_gone(owner)) is not None:
            return known
        now = time.monotonic()
        if self._seen.get(found.st_ino, (None, 0.0))[0] != found.st_mtime_ns:
            self._seen[found.st_ino] = found.st_mtime_ns, now
        return now - self._seen[found.st_ino][1] > DEAD_S

    def _follows_the_dead(self, key: str, number: int) -> bool:
        """Whether the leases before this one are still those of the dead, or our own. Where their follower has let go of them
        in the meantime, somebody may have begun anew with number 0."""
        for low in range(number):
            path = self.folder / f"{key}.{low}"
            try:
                found = path.stat()
                if found.st_ino != self._inode and not self._is_dead(path, found):
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
        "start": _start(process.pid),
        "job": [job, int(restart)] if job else None,
    }


def _start(pid: int) -> str | None:
    """When a process was started, in a form that no change of the clock moves: boot and ticks since then. None where the
    system does not say so. Raises FileNotFoundError where there is no such process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.is_file():
        return None
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return f"{boot.read_text(encoding='utf-8').strip()} {fields[19]}"


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
        if found.status() == psutil.STATUS_ZOMBIE:
            return True
        if owner.get("start") and (start := _start(pid)):
            return bool(start != owner["start"])
        return abs(found.create_time() - born) >= 2.0
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True
