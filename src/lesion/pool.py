"""Jobs on this machine: a few processes at a time, each with its share of the GPUs, in the order that dependencies allow.

    lesion submit STUDY --on local --workers 2

A process of its own, the keeper, starts them and writes down what has become of each in `pool.json`, beside its own process
number; it outlives the terminal, and ends when nothing is left to do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lesion.cli import OK, UNFINISHED
from lesion.leases import is_gone, whoami
from lesion.profiles import Profile
from lesion.ranks import environment
from lesion.submission import Submission

GOING = {"PENDING", "RUNNING"}
POLL_S = 0.1


def start(submission: Submission, workers: int, gpus: Sequence[int], profile: Profile | None) -> None:
    """Starts the keeper, which lets go of this terminal."""
    how = profile.of(True) if profile is not None else None
    together = f"{how.processes if how is not None else 1},{how.sharded if how is not None else False}"
    submission.add_jobs({work.number: f"local-{work.number}" for work in submission.works})
    _write(submission.folder, {work.number: "PENDING" for work in submission.works}, None)
    command = [
        sys.executable,
        "-m",
        "lesion.pool",
        str(submission.folder),
        str(workers),
        ",".join(map(str, gpus)),
        together,
    ]
    with (submission.folder / "keeper.out").open("ab") as out:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, check=True)


def keep(folder: Path, workers: int, gpus: Sequence[int], processes: int, sharded: bool) -> None:
    """Runs every task of a submission; a training on `processes` processes, which count as one worker. A task that fails takes
    those along that wait for it, and no others."""
    submission = Submission(folder)
    works = {work.number: work for work in submission.works}
    states = dict.fromkeys(works, "PENDING")
    running: dict[int, tuple[list[subprocess.Popen[bytes]], int]] = {}  # task → its processes and its worker
    asked: list[int] = []  # signals that came
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    told: dict[int, str] = {}
    stopping = False
    while any(state in GOING for state in states.values()):
        if asked and not stopping:
            stopping = True
            states |= {task: "CANCELLED" for task, state in states.items() if state == "PENDING"}
            for team, _ in running.values():
                for process in team:
                    process.send_signal(signal.SIGTERM)
        for task, (team, _) in list(running.items()):
            codes = [process.poll() for process in team]
            if any(code not in (None, OK, UNFINISHED) for code in codes):
                for process in team:  # the others would wait for it
                    process.kill()
                    process.wait()
            elif None in codes:
                continue
            del running[task]
            again = "CANCELLED" if stopping else "PENDING"
            done = all(code == OK for code in codes)
            states[task] = "COMPLETED" if done else again if set(codes) <= {OK, UNFINISHED} else "FAILED"
        for task, state in states.items():
            before = [states[number] for number in works[task].after]
            if state != "PENDING":
                continue
            if any(b in ("FAILED", "CANCELLED") for b in before):
                states[task] = "CANCELLED"
            elif len(running) < workers and all(b == "COMPLETED" for b in before):
                worker = min(set(range(workers)) - {worker for _, worker in running.values()})
                together = processes if works[task].makes is not None else 1
                gpu = gpus[worker % len(gpus)] if gpus and together == 1 else None
                running[task] = _start(folder, task, gpu, together, sharded), worker
                states[task] = "RUNNING"
        if states != told:
            _write(folder, states, whoami())
            told = dict(states)
        time.sleep(POLL_S)
    _write(folder, states, None)


def _start(folder: Path, task: int, gpu: int | None, processes: int, sharded: bool) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "lesion.cli", "work", str(folder), str(task)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = []
    for rank in range(processes):
        own = dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
        if processes > 1:
            own |= environment(rank, processes, (rank, processes), "127.0.0.1", port, sharded)
        with (folder / f"local-{task}_{rank}_log.out").open("ab") as out:
            team.append(subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
    return team


def _write(folder: Path, states: dict[int, str], keeper: dict[str, Any] | None) -> None:
    aside = folder / ".pool.json"
    aside.write_text(json.dumps({"keeper": keeper, "at": time.time(), "states": states}), encoding="utf-8")
    aside.rename(folder / "pool.json")


def states(submission: Submission) -> dict[str, str]:
    """Job → state; where the keeper is dead, what it left undone is lost."""
    path = submission.folder / "pool.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    keeper = found["keeper"]
    dead = is_gone(keeper) if keeper is not None else time.time() - found["at"] > 60
    lost = {"PENDING": "LOST", "RUNNING": "LOST"} if dead else {}
    return {f"local-{task}": lost.get(state, state) for task, state in found["states"].items()}


def cancel(submission: Submission) -> None:
    keeper = json.loads((submission.folder / "pool.json").read_text(encoding="utf-8"))["keeper"]
    if keeper is not None and is_gone(keeper) is False:
        os.kill(keeper["process"][0], signal.SIGTERM)


if __name__ == "__main__" and os.fork() == 0:  # whoever started us need not wait
    many, shared = sys.argv[4].split(",")
    keep(
        Path(sys.argv[1]), int(sys.argv[2]), [int(n) for n in sys.argv[3].split(",") if n], int(many), shared == "True"
    )
