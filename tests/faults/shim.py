"""Faults of the system below us: a shim over the C library, and a server that forks a child for each injection.

    server = Server(folder)                                     builds shim.c, starts `python -m faults.shim` behind it
    end = server.run("steps", lab, arguments, fault=Kill(17))   one child: killed before its 17th call that changes the lab

The server has imported everything once and does nothing else, so a child costs a fork. It speaks JSON, a line each way.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("shim.c")
MODES = ("count", "kill", "torn", "once", "from then on", "short once", "short from then on")  # the order of shim.c
PATIENCE_S = 120


@dataclass
class Call:
    """A call that changes the lab: write, fsync, rename, …; its path below the lab; bytes that are written, or of the file
    that is synced; the path that a file had before it was renamed."""

    name: str
    path: str
    size: int
    old: str

    @property
    def writes(self) -> bool:
        return self.name in ("write", "pwrite", "pwrite64", "writev") and self.size > 1

    def __str__(self) -> str:
        return f"{self.name} {self.path} {self.size}"


@dataclass
class End:
    """How a child ended: its exit code (−9: killed), what it said, and the calls that it made."""

    code: int
    said: str
    calls: list[Call] = field(default_factory=list)

    def __str__(self) -> str:
        return f"exit code {self.code} after {len(self.calls)} calls, the last {self.calls[-1:]}:\n{self.said}"


class Server:
    """The side of the tests."""

    def __init__(self, folder: Path):
        self.folder = folder
        library = folder / "shim.so"
        if sys.platform != "linux" or (compiler := shutil.which("cc")) is None:
            raise NoShim("the shim needs Linux and a C compiler `cc`")
        made = subprocess.run(
            [compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        paths = [path for path in sys.path if path]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "faults.shim", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._answer() == "ready"

    def run(self, job: str, lab: Path, *arguments: Any, mode: str = "count", at: int = 0, error: int = 0) -> End:
        """Runs a job of `faults.jobs` in a child, with a fault at the `at`-th call that changes the lab."""
        asked = {
            "job": job,
            "lab": str(lab),
            "arguments": arguments,
            "mode": MODES.index(mode),
            "at": at,
            "error": error,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        status = self._answer()
        lines = (self.folder / "journal").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        calls = [Call(name, path, int(size), old) for name, path, size, old in (line.split("\t") for line in lines)]
        said = (self.folder / "said").read_text(encoding="utf-8", errors="replace")
        return End(os.waitstatus_to_exitcode(status), said, calls)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server ended with {self.process.wait()}"
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()


class NoShim(Exception):
    """There is none on this machine."""


# ---------------------------------------------------------------------- the side of the server


def serve(folder: Path) -> None:
    from faults import jobs

    with contextlib.redirect_stdout(sys.stderr):
        jobs.prepare(folder)
    gc.freeze()  # what a child never touches it never copies
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _child(folder, jobs, **json.loads(line))
        print(json.dumps(os.waitpid(pid, 0)[1]), flush=True)


def _child(folder: Path, jobs: Any, job: str, lab: str, arguments: list[Any], mode: int, at: int, error: int) -> None:
    """Runs the job and ends the process with what it returns."""
    signal.alarm(PATIENCE_S)
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    journal = os.open(folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    code = 1
    try:
        shim = ctypes.CDLL(None)
        shim.shim_arm(os.fsencode(lab), ctypes.c_long(at), mode, error, journal)
        code = getattr(jobs, job)(Path(lab), *arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
