"""Jobs on SLURM, through submitit: each task a job or an element of an array, each edge a dependency.

submitit starts a small supervisor for each process, which starts the work as a process of its own. When the scheduler is about
to take the machine away (SIGUSR2 before the end of the time, SIGTERM at a preemption) the work saves at its next boundary and
ends with exit code 75; then the job puts itself back into the queue and goes on from there. The exit code of a job answers the
question that the scheduler asks: may what depends on it start?
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lesion.cli import UNFINISHED
from lesion.jobs import Array
from lesion.profiles import Profile, Resources
from lesion.stopping import SIGNALS
from lesion.submission import Submission

GOING = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
}
OFFLINE = "export HF_HUB_OFFLINE=1"  # the caches are warm, and nobody answers
# A job that is preempted before its first step has begun is told so in its script, which would end as a failure; a cancelled
# one is not RUNNING any more.
GUARD = (
    'JOB="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
    """trap '[ "$(squeue -h -j "$JOB" -o %T)" = RUNNING ] && scontrol requeue "$JOB" && sleep 300' TERM""",
)
MARGIN_S = 10  # before the end of a job's time, in which it puts itself back into the queue
TRIES = 5  # at asking the scheduler for a job, a second apart
PORTS = 20000, 20000  # first port of the processes that train together, and how many a job's number chooses from


class Supervised:
    """What submitit calls on the node, in each process of a job. Only its arguments are pickled: where the submission lies."""

    def __init__(self, folder: str, task: int, sharded: bool, requeues: int, notice: int):
        self.folder, self.task, self.sharded, self.requeues, self.notice = folder, task, sharded, requeues, notice

    def __call__(self) -> str:
        from submitit import JobEnvironment

        job = JobEnvironment()
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if restarts > self.requeues:
            raise RuntimeError(f"task {self.task} has been started {restarts + 1} times and is not done: given up")
        environment = dict(os.environ)
        if job.num_tasks > 1:
            environment |= _ranks(job, self.sharded)
        command = [sys.executable, "-m", "lesion.cli", "work", self.folder, str(self.task)]
        # the scheduler signals all processes of a job: what comes while the work is still imported waits until it listens
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            _child.append(subprocess.Popen(command, env=environment))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = _child[-1].wait()
        # not raw_job_id: that of one element of an array is the number of the whole array
        if code == UNFINISHED and _is_running(job.job_id):  # else it was cancelled
            if job.global_rank == 0:
                subprocess.run(["scontrol", "requeue", job.job_id], check=True, timeout=60)
            time.sleep(300)  # the scheduler ends this process
        if code == UNFINISHED:
            raise RuntimeError("it was asked to end; what was read stays")
        if code:
            raise RuntimeError(f"exit code {code}; its log says why")
        return f"task {self.task} has ended"

    def checkpoint(self) -> Any:
        """Called by submitit when the time is nearly over, inside of `__call__`: ends the work at its next boundary. What has
        none until the time is over is killed, and gone on with from the one before."""
        from submitit.helpers import DelayedSubmission

        end = time.monotonic() + max(1, self.notice - MARGIN_S)
        while time.monotonic() < end and _child and _is_alive(_child[-1].pid):
            with suppress(ProcessLookupError):
                os.kill(_child[-1].pid, signal.SIGUSR1)
            time.sleep(0.2)
        return DelayedSubmission(self)


_child: list[subprocess.Popen[bytes]] = []


def _is_alive(pid: int) -> bool:
    """Of our child. Not Popen.poll, which gives no answer while it interrupts itself, as it does where a signal is handled; and
    nothing is raised here, since that would come out inside of Popen.wait, which takes it for the child's success."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:  # it has ended, and was waited for just now
        return False


def _is_running(job: str) -> bool:
    """Whether the scheduler has not cancelled a job. One that is too busy to answer is asked again; where it never does, the job
    is taken for running: putting a cancelled one back fails, not putting a running one back would lose it."""
    for _ in range(TRIES):
        command = ["squeue", "-h", "-j", job, "-o", "%T"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if not done.returncode:
            return done.stdout.strip() == "RUNNING"
        if "Invalid job id" in done.stderr:
            return False
        time.sleep(1)
    return True


def _ranks(job: Any, sharded: bool) -> dict[str, str]:
    from lesion.ranks import environment

    first, many = PORTS
    local = job.local_rank, job.num_tasks // job.num_nodes
    port = first + int(job.raw_job_id) % many
    return environment(job.global_rank, job.num_tasks, local, job.hostnames[0], port, sharded)


class Slurm:
    """The scheduler as this tool uses it; `pool.Pool` is the same on one machine."""

    def __init__(self, submission: Submission, profile: Profile):
        self.submission, self.profile = submission, profile

    def submit(self, arrays: Sequence[Array]) -> dict[int, str]:
        """Submits all, what is waited for first. Returns task → job."""
        jobs: dict[int, str] = {}
        for array in arrays:
            executor = self._executor(array, _dependency(array, arrays, jobs))
            with executor.batch():
                made = [executor.submit(self._supervised(array, task.number)) for task in array.tasks]
            ids = {task.number: job.job_id for task, job in zip(array.tasks, made, strict=True)}
            self.submission.add_jobs(ids)
            jobs |= ids
        return jobs

    def scripts(self, arrays: Sequence[Array]) -> list[str]:
        """What would be submitted; jobs that have no number yet are called by their place in this list."""
        jobs: dict[int, str] = {}
        found: list[str] = []
        for number, array in enumerate(arrays, 1):
            executor = self._executor(array, _dependency(array, arrays, jobs))
            if len(array.tasks) > 1:
                executor.parameters["map_count"] = len(array.tasks)
            found.append(executor._make_submission_file_text(executor._submitit_command_str, "0"))
            for element, task in enumerate(array.tasks):
                jobs[task.number] = f"JOB{number}" + (f"_{element}" if len(array.tasks) > 1 else "")
        return found

    def _supervised(self, array: Array, task: int) -> Supervised:
        how = self.profile.of(array.makes)
        return Supervised(str(self.submission.folder), task, how.sharded, self.profile.requeues, self.profile.notice)

    def _executor(self, array: Array, dependency: str | None) -> Any:
        import submitit

        how, profile = self.profile.of(array.makes), self.profile
        executor = submitit.SlurmExecutor(folder=self.submission.folder, max_num_timeout=profile.requeues)
        options: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", **profile.options}
        executor.update_parameters(
            job_name=f"lesion-{self.submission.folder.parent.name}",
            time=how.time,
            nodes=how.nodes,
            ntasks_per_node=how.processes,
            cpus_per_task=how.cpus,
            mem=f"{round(how.memory * 1024)}M",
            array_parallelism=profile.parallel,
            signal_delay_s=profile.notice,
            stderr_to_stdout=True,
            setup=[*GUARD, *([] if profile.internet else [OFFLINE]), *(f"{line} || exit 1" for line in profile.setup)],
            additional_parameters=options,
            srun_args=["--cpus-per-task", str(how.cpus)],
            **({"gpus_per_node": how.gpus} if how.gpus else {}),
            **({"dependency": dependency} if dependency else {}),
            **_named(how),
        )
        return executor


def _named(how: Resources) -> dict[str, str]:
    """Where on the cluster a job goes, as far as the profile says."""
    return {k: v for k in ("partition", "account", "qos", "constraint") if (v := getattr(how, k)) is not None}


def _dependency(array: Array, arrays: Sequence[Array], jobs: dict[int, str]) -> str | None:
    """afterok of every job, an array that is needed whole by its number alone; aftercorr where elements follow elements."""
    if array.follows is not None:
        return f"aftercorr:{jobs[arrays[array.follows].tasks[0].number].split('_')[0]}"
    needed = {number: jobs[number] for number in sorted(array.after)}
    ids: list[str] = []
    for other in arrays:
        numbers = [task.number for task in other.tasks]
        if len(numbers) > 1 and needed.keys() >= set(numbers):
            ids.append(jobs[numbers[0]].split("_")[0])
        else:
            ids += [needed[number] for number in numbers if number in needed]
    return f"afterok:{':'.join(ids)}" if ids else None


def check_cluster(profile: Profile, folder: Path) -> None:
    """Asks the scheduler whether it would take such jobs at all. Raises ValueError with its answer."""
    if shutil.which("sbatch") is None:
        raise ValueError("no sbatch on this machine: submit from a cluster's login node, or with --on local")
    if states(["0"]) is None:
        raise ValueError("no scheduler answers here: squeue fails")
    if odd := re.search(r"[%\n\\\"']", str(folder)):
        raise ValueError(
            f"SLURM cannot write logs into a folder whose path has {odd[0]!r}: {folder}; choose another --lab"
        )
    for training in dict.fromkeys((False, bool(profile.training))):
        how = profile.of(training)
        asked = ["--test-only", f"--time={how.time}", f"--mem={round(how.memory * 1024)}M", f"--nodes={how.nodes}"]
        asked += [f"--ntasks-per-node={how.processes}", f"--cpus-per-task={how.cpus}"]
        asked += [f"--gpus-per-node={how.gpus}"] * (how.gpus > 0)
        asked += [f"--{k}={v}" for k, v in _named(how).items()]
        asked += [f"--{k}" if v is True else f"--{k}={v}" for k, v in profile.options.items()]
        done = subprocess.run(
            ["sbatch", *asked, "--wrap", "true"], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            said = " ".join(done.stderr.replace("sbatch: error:", "").replace("allocation failure:", "").split())
            kind = "that trains" if training else "that reads"
            raise ValueError(f"SLURM refuses a job {kind} ({shlex.join(asked[1:])}): {said}")
        _check_partition(how.partition, how.time)


def _check_partition(name: str | None, minutes: int) -> None:
    """A job that asks for more time than its partition gives would wait forever."""
    command = ["sinfo", "-h", "-o", "%P %l", *(["-p", name] if name else [])]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.split("\n")
    for partition, limit in (line.split() for line in lines if line.strip()):
        if name is None and not partition.endswith("*"):
            continue
        if limit != "infinite" and minutes > _minutes(limit):
            raise ValueError(
                f"partition {partition.rstrip('*')} gives a job {limit}, and the profile asks for {minutes} minutes"
            )


def _minutes(text: str) -> float:
    """D-HH:MM:SS, HH:MM:SS or MM:SS, as SLURM prints times."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    seconds = sum(part * 60**i for i, part in enumerate(reversed(parts)))
    return int(days or 0) * 1440 + seconds / 60


def states(jobs: Sequence[str]) -> dict[str, str] | None:
    """Job → what the scheduler says of it; those that it does not know any more are left out. Accounting is not needed. None
    where no scheduler answers."""
    if not jobs:
        return {}
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-u", str(os.getuid())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        return None
    asked, found = set(jobs), {}
    for line in done.stdout.splitlines():
        job, state, reason = line.split("|", 2)
        if job in asked:
            waits = state == "PENDING" and reason not in ("None", "Priority", "Resources")
            found[job] = f"{state}, {reason}" if waits else state
    return found


def cancel(jobs: Sequence[str]) -> None:
    if jobs:
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise ValueError(f"scancel: {done.stderr.strip()}")
