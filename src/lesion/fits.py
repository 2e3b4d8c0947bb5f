"""Whether a study fits where it is sent: memory, time, disk and quota, models and data. What cannot fit is refused by name."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lesion.estimates import PROCESS_BYTES, duration, memory, parameters, sizes_of, training
from lesion.fit import Training
from lesion.jobs import Task, trials_of
from lesion.plan import ROW_BYTES, kept_of, size_of, span, state_bytes
from lesion.profiles import Profile
from lesion.store import Store
from lesion.trial import Reading

GB = 2**30
START_S = 10  # of a process, with all it imports
CHECKPOINTS = 3  # that a training has on disk at the most, while one is being written: weights and Adam's states


def check_fits(tasks: Sequence[Task], store: Store, profile: Profile | None) -> list[str]:
    """Lines to print. Raises ValueError that says what does not fit, by how much, and which entry of the profile says so."""
    lines = []
    readings = [reading for task in tasks for reading in task.readings]
    if profile is not None:
        if readings:
            lines += [_check_readings(tasks, store, profile)]
        if runs := [task for task in tasks if task.makes is not None and isinstance(task.makes.steps[-1], Training)]:
            lines += [_check_trainings(runs, profile)]
    kept = kept_of(readings, store)
    sizes = sizes_of(readings)
    rows = sum(size[0] for r in readings if (size := sizes[r.measure.key]))
    working = CHECKPOINTS * max((12 * parameters(subject) for subject, _ in kept.values()), default=0)  # float32
    parallel = profile.parallel if profile is not None else 1
    needed = rows * ROW_BYTES + state_bytes(kept) + working * min(parallel, max(1, len(kept)))
    check_disk(store.root, needed, files=8 * len(tasks) + 4 * len(kept))
    return [*lines, f"disk: about {size_of(needed)} in {store.root}, and there is room"]


def _check_readings(tasks: Sequence[Task], store: Store, profile: Profile) -> str:
    how = profile.of(False)
    reading = [task for task in tasks if task.readings]
    most = memory([r for task in reading for r in task.readings], "cuda" if how.gpus else "cpu")
    _check_memory("the largest job that reads", most.total, how.memory, how.gpu_memory if how.gpus else None)
    sizes = sizes_of([r for task in reading for r in task.readings])
    times = [duration(task.readings, sizes, store)[0] for task in reading]
    longest = max((seconds for seconds in times if seconds is not None), default=None)
    said = "an unknown time" if longest is None else f"about {span(START_S + longest)} on a processor like this"
    if longest is not None and not how.gpus:
        _check_time("the longest job that reads", longest / how.cpus * (os.cpu_count() or 1), how.time, profile)
    return f"reading: {len(reading)} jobs, the largest about {size_of(most.total)} of {how.memory:g} GB and {said}"


def _check_trainings(runs: Sequence[Task], profile: Profile) -> str:
    how = profile.of(True)
    world = how.nodes * how.processes
    costs = [training(t.makes.subject, t.makes.steps[-1], world, how.sharded) for t in runs if t.makes is not None]
    most, longest = max(cost[2] for cost in costs), max(cost[1] for cost in costs)
    if how.gpus:  # the machine itself holds what is loaded and what is saved
        most_parameters = max(parameters(t.makes.subject) for t in runs if t.makes is not None)
        node = (PROCESS_BYTES + 8.0 * most_parameters) * how.processes
        _check_memory("the largest training", node, how.memory, None)
        if how.gpu_memory is not None and most > how.gpu_memory * GB:
            raise ValueError(
                f"a training needs about {size_of(most)} of each GPU, and gpu_memory is {how.gpu_memory:g} GB"
            )
    else:
        node = most * how.processes
        _check_memory("the largest training", node, how.memory, None)
        _check_time("the longest training", longest / (how.cpus * world) * (os.cpu_count() or 1), how.time, profile)
    return f"training: {len(runs)} jobs, the largest about {size_of(node)} of {how.memory:g} GB a node"


def _check_memory(what: str, needed: float, memory: float, gpu: float | None) -> None:
    if needed > memory * GB:
        raise ValueError(f"{what} needs about {size_of(needed)}, and the profile's memory is {memory:g} GB")
    if gpu is not None and needed > gpu * GB:
        raise ValueError(f"{what} needs about {size_of(needed)}, and the profile's gpu_memory is {gpu:g} GB")


def _check_time(what: str, seconds: float, minutes: int, profile: Profile) -> None:
    """A job that is not done in its time goes on in its next, so only what no number of them holds is refused."""
    allowed = minutes * 60 * (profile.requeues + 1)
    if seconds > allowed:
        allows = f"{profile.requeues + 1} times {minutes} min (requeues, time)"
        raise ValueError(f"{what} takes about {span(seconds)}, and the profile allows {allows}")


def check_disk(folder: Path, needed: int, files: int) -> None:
    """Asks the file system for the room, and gives it back: a quota answers as a full disk does. Where it cannot reserve, its
    free space is asked for instead. Raises ValueError."""
    there = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"the lab {folder} cannot be written: no right to write in {there}")
    free, state = shutil.disk_usage(there).free, os.statvfs(there)
    if needed > free:
        raise ValueError(f"the study needs about {size_of(needed)} of disk, and {there} has {size_of(free)} left")
    if state.f_files and files > state.f_favail:
        raise ValueError(f"the study makes about {files} files, and {there} has room for {state.f_favail} more")
    probe = there / f".room-{secrets.token_hex(4)}"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        allocate = ctypes.CDLL(None, use_errno=True).fallocate  # the C library's own falls back to writing everything
        code = allocate(handle, 0, ctypes.c_long(0), ctypes.c_long(max(needed, 1)))
        said = ctypes.get_errno() if code else 0
    finally:
        os.close(handle)
        probe.unlink()
    if said in (errno.EDQUOT, errno.ENOSPC):
        why = "your quota there does not allow it" if said == errno.EDQUOT else "it does not give it"
        raise ValueError(f"the study needs about {size_of(needed)} of disk in {there}, and {why}")


def fetch(readings: Sequence[Reading]) -> Iterator[str]:
    """Brings models and data into the caches of this machine, and says what is there."""
    for subject in {t.subject.key: t.subject for r in readings for t in trials_of(r)}.values():
        place = subject.fetch()
        yield f"{subject.name}: {place}" if place is not None else f"{subject.name}: needs nothing"
    for measure in {r.measure.key: r.measure for r in readings}.values():
        size = measure.size()
        yield f"{measure.name}: " + (f"{size[0]} items" if size else "there")
