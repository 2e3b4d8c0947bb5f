"""What the commands do that speak of jobs. Each takes the parsed options and returns an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lesion.cli import FAILED, OK, parse_study
from lesion.terminal import say

if TYPE_CHECKING:
    from lesion.jobs import Array
    from lesion.profiles import Profile
    from lesion.store import Store
    from lesion.study import Study
    from lesion.submission import Submission, Work

    # states of its jobs (None: no scheduler answers), or the name of the submission that took its place
    Scheduled = list[tuple[Submission, dict[str, str] | str | None]]

LISTED = 12  # tasks of a submission that `status` lists before it is asked for all
DRAWN = 40  # tasks that `submit --dry-run` draws


def submit(options: argparse.Namespace, rest: list[str]) -> int:
    asked = parse_study(options, rest)
    for name, why in (
        ("force", "jobs take what is missing"),
        ("track", "metrics of jobs lie in the lab"),
        ("threads", "cpus says it"),
    ):
        if getattr(options, name):
            raise ValueError(f"--{name} is for `lesion run`: {why}")
    return _submit(options, asked)


def resubmit(options: argparse.Namespace, rest: list[str]) -> int:
    """Submits what is missing of what was submitted before, with its profile unless another is given."""
    found = _one(options)
    if options.profile is None:
        options.profile = found.folder / "profile.toml" if (found.folder / "profile.toml").is_file() else None
    options.on = options.on or found.about["where"]
    for name in ("workers", "device"):
        if getattr(options, name) is None:
            setattr(options, name, found.about.get(name))
    return _submit(options, found.study())


def _submit(options: argparse.Namespace, asked: Study) -> int:
    from lesion.fits import check_fits
    from lesion.fits import fetch as fetch_all
    from lesion.jobs import arrays, tasks
    from lesion.plan import check
    from lesion.profiles import load
    from lesion.store import Store
    from lesion.submission import Submission

    local = options.on == "local"
    profile = None if local and options.profile is None else load(options.profile)
    store = Store(options.lab)
    going = [s.name for s in _of_study(store, asked) if _going(s)]
    if going:
        raise ValueError(
            f"jobs of {going[-1]} are still at work or waiting: `lesion status` shows them, `lesion cancel` ends them"
        )
    readings = asked.readings()
    asked.check(store)
    width = profile.array if profile is not None else options.workers or 1
    found = tasks(readings, store, width)
    if not found:
        say(f"nothing to do: all {len(readings)} readings are in the lab")
        return OK
    made = arrays(found)
    _draw(made)
    for _ in fetch_all(readings):  # nodes may reach no hub
        pass
    check([reading for task in found for reading in task.readings])
    for line in check_fits(found, store, profile):
        say(line)
    if not local and (not options.dry_run or shutil.which("sbatch")):
        from lesion.slurm import check_cluster

        assert profile is not None
        check_cluster(profile, options.lab.resolve())
    if options.dry_run:
        for number, text in enumerate(
            _scripts(store, asked, profile, made) if profile is not None and not local else [], 1
        ):
            say(f"\n── script of JOB{number}", style="bold")
            print(text)
        return OK
    how = {"workers": options.workers, "device": options.device}
    submission = Submission.write(store, asked, found, "local" if local else "slurm", how)
    if profile is not None:
        (submission.folder / "profile.toml").write_text(options.profile.read_text(encoding="utf-8"), encoding="utf-8")
    if local:
        from lesion.pool import start

        start(submission, options.workers or 1, _gpus(options.device), profile)
    else:
        from lesion.slurm import Slurm

        assert profile is not None
        jobs = Slurm(submission, profile).submit(made)
        say(f"jobs {', '.join(dict.fromkeys(job.split('_')[0] for job in jobs.values()))}")
    say(
        f"submitted {submission.name}: {len(found)} tasks; `lesion status`, `lesion logs` and `lesion cancel` speak of them"
    )
    return OK


def _scripts(store: Store, asked: Study, profile: Profile, made: Sequence[Array]) -> list[str]:
    from lesion.slurm import Slurm
    from lesion.submission import Submission, jobs_folder

    return Slurm(Submission(jobs_folder(store.root.resolve(), asked) / "WHEN"), profile).scripts(made)


def work(options: argparse.Namespace, rest: list[str]) -> int:
    """One task of a submission: what a job runs."""
    from lesion import commands
    from lesion.lab import Lab
    from lesion.progress import Progress
    from lesion.ranks import part
    from lesion.stopping import listening
    from lesion.submission import Submission
    from lesion.walk import Walk

    submission = Submission(options.folder)
    profile = _profile(submission)
    work, made, readings = submission.task(options.number)
    how = profile.of(made is not None) if profile is not None else None
    options.threads = (
        how.cpus if how is not None else max(1, (os.cpu_count() or 1) // (submission.about["workers"] or 1))
    )
    commands._threads(options)
    device = submission.about["device"] or ("cuda" if how is not None and how.gpus else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    commands._check_device(device)
    with Progress("normal") as progress, listening():
        logging.getLogger("lesion").info("task %d: %s", work.number, work.said)
        store = Lab(submission.about["lab"], device=device).open()
        try:
            walk = Walk(store, device, progress.tell)
            if made is not None:
                done = walk.make(made)
            else:
                walk.take(progress.start(store, readings, False))
                done = all(key in store.index.seals for key in (work.needed or work.readings))
        finally:
            store.close()
    if done:
        part()
    return OK if done else FAILED


def asked_of_schedulers(store: Store, verbosity: str) -> Scheduled:
    """Each submission with the states of its jobs, or the name of the one that took its place. Whoever reads the store after
    this sees what every job that is over by now has written."""
    from lesion.submission import submissions

    found: Scheduled = []
    for submission in (all_of_them := submissions(store.root)):
        newer = [
            s.name for s in all_of_them if s.folder.parent == submission.folder.parent and s.name > submission.name
        ]
        found.append((submission, newer[-1] if newer and verbosity != "verbose" else _states(submission)))
    return found


def status_of_jobs(store: Store, scheduled: Scheduled, verbosity: str) -> None:
    """What has become of each submission: the store's word on what is done, the scheduler's on what still runs."""
    for submission, states in scheduled:
        if isinstance(states, str):
            say(f"{submission.name}: submitted again as {states}")
            continue
        jobs = submission.jobs
        if states is None:
            say(f"{submission.name}: no scheduler answers here, so what still runs is not known")
            states = dict.fromkeys(jobs.values(), "UNKNOWN")
        words = {work.number: _word(work, store, states.get(jobs.get(work.number, ""))) for work in submission.works}
        count = Counter(word.split(",")[0] for word in words.values())
        if set(count) == {"done"} and verbosity != "verbose":
            say(f"{submission.name}: all {len(words)} tasks are done")
            continue
        say(f"{submission.name}: " + ", ".join(f"{n} {word}" for word, n in count.items()))
        odd = [work for work in submission.works if words[work.number] != "done" or verbosity == "verbose"]
        for work in odd if verbosity == "verbose" else odd[:LISTED]:
            job = jobs.get(work.number, "no job")
            style = "red" if words[work.number].startswith(("failed", "lost", "ended")) else ""
            say(f"  {job:<10} {words[work.number]:<28} {work.said}", style=style)
            for error in dict.fromkeys(work.failures(store)):
                say(f"  {'':<10} {error}", style="red")
        if len(odd) > LISTED and verbosity != "verbose":
            say(f"  … {len(odd) - LISTED} tasks more: --verbosity verbose lists them")
        if any(word.startswith(("failed", "lost", "cancelled", "ended")) for word in words.values()):
            say(f"  `lesion logs JOB` shows why, `lesion resubmit {submission.name}` submits what is missing")


def _word(work: Work, store: Store, state: str | None) -> str:
    """What has become of a task."""
    if work.is_done(store):
        return "done"
    there = sum(key in store.index.seals for key in work.readings)
    share = f", {there} of {len(work.readings)} readings" if there else ""
    match (state or "").split(",")[0]:
        case "RUNNING" | "COMPLETING":
            return f"running{share}"
        case "PENDING" | "CONFIGURING" | "REQUEUED" | "SUSPENDED" | "STOPPED":
            why = (state or "").partition(", ")[2]
            return "waiting" + (f", {why}" if why else share)
        case "CANCELLED" | "PREEMPTED":
            return f"cancelled{share}"
        case "UNKNOWN":
            return f"not done{share}"
        case _ if work.failures(store):
            return f"failed{share}"
        case "":
            return f"lost{share}"  # neither done nor known to the scheduler
        case "COMPLETED":
            return f"ended, and not done{share}"
        case other:
            return f"failed, {other.lower()}{share}"


def cancel(options: argparse.Namespace, rest: list[str]) -> int:
    """Ends what still runs or waits. Everything that was read stays."""
    from lesion import pool, slurm

    found = [s for s in _some(options) if _going(s)]
    for submission in found:
        if submission.about["where"] == "local":
            pool.cancel(submission)
        else:
            slurm.cancel(
                [job for job, state in (_states(submission) or {}).items() if state.split(",")[0] in slurm.GOING]
            )
        say(f"cancelled {submission.name}; what was read stays, `lesion resubmit` submits the rest")
    if not found:
        say("nothing is running or waiting")
    return OK


def logs(options: argparse.Namespace, rest: list[str]) -> int:
    """The ends of the logs of jobs: of one job, or of all that are not done."""
    from lesion.submission import submissions

    store = _existing(options)
    found: list[Path] = []
    last = {s.folder.parent: s for s in submissions(store.root)}
    for submission in submissions(store.root) if options.job else last.values():
        jobs = submission.jobs
        for work in submission.works:
            job = jobs.get(work.number, "")
            named = options.job in (job, job.split("_")[0], submission.name) if options.job else not work.is_done(store)
            if named and job:
                found += sorted(submission.folder.glob(f"{job}_*_log.out"))
    if not found:
        if options.job:
            raise ValueError(f"no log of job {options.job}; `lesion status --verbosity verbose` lists jobs")
        say("every job that has begun is done")
    for path in found:
        say(f"== {path}", style="bold")
        text = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
        sys.stdout.write("".join(f"{line}\n" for line in text[-options.lines :]))
    return OK


def fetch(options: argparse.Namespace, rest: list[str]) -> int:
    """Brings models and data of a study into this machine's caches, for nodes that reach no hub."""
    asked = parse_study(options, rest)
    from lesion.fits import fetch as bring

    for line in dict.fromkeys(bring(asked.readings())):
        say(line)
    return OK


# ---------------------------------------------------------------------- small things


def _draw(made: Sequence[Array]) -> None:
    """The tree, an array a paragraph."""
    names = {
        task.number: f"JOB{n}" + (f"_{i}" if len(a.tasks) > 1 else "")
        for n, a in enumerate(made, 1)
        for i, task in enumerate(a.tasks)
    }
    drawn = 0
    for number, array in enumerate(made, 1):
        if array.follows is not None:
            after = f", each after its own of JOB{array.follows + 1}"
        else:
            waits = list(dict.fromkeys(names[n].split("_")[0] for n in sorted(array.after)))
            after = f", after {', '.join(waits[:6])}{', …' if len(waits) > 6 else ''}" if waits else ""
        many = f" × {len(array.tasks)}" if len(array.tasks) > 1 else ""
        say(f"JOB{number}{many}{after}", style="bold")
        for task in array.tasks[: max(1, min(len(array.tasks), DRAWN - drawn, 4))]:
            say(f"  {names[task.number]:<8} {task}")
        if len(array.tasks) > 4:
            say(f"  … {len(array.tasks) - 4} more")
        drawn += 4


def _profile(submission: Submission) -> Profile | None:
    from lesion.profiles import load

    path = submission.folder / "profile.toml"
    return load(path) if path.is_file() else None


def _states(submission: Submission) -> dict[str, str] | None:
    from lesion import pool, slurm

    if submission.about["where"] == "local":
        return pool.states(submission)
    return slurm.states(list(submission.jobs.values()))


def _going(submission: Submission) -> bool:
    from lesion import pool, slurm

    states = _states(submission)
    if states is None:
        raise ValueError(f"no scheduler answers here, so whether jobs of {submission.name} still run is not known")
    going = pool.GOING if submission.about["where"] == "local" else slurm.GOING
    return any(state.split(",")[0] in going for state in states.values())


def _of_study(store: Store, asked: Study) -> list[Submission]:
    from lesion.submission import jobs_folder, submissions

    return submissions(store.root, f"{jobs_folder(store.root, asked).name}/")


def _some(options: argparse.Namespace) -> list[Submission]:
    from lesion.submission import submissions

    found = submissions(_existing(options).root, options.name or "")
    if not found:
        raise ValueError(
            f"no submission {options.name!r} in {options.lab}"
            if options.name
            else f"nothing was submitted in {options.lab}"
        )
    return found


def _one(options: argparse.Namespace) -> Submission:
    """The newest that is meant."""
    found = _some(options)
    studies = {s.folder.parent.name for s in found}
    if len(studies) > 1:
        raise ValueError(f"several studies were submitted: {', '.join(sorted(studies))}; name one")
    return found[-1]


def _existing(options: argparse.Namespace) -> Store:
    from lesion import commands

    return commands._existing(options)


def _gpus(device: str | None) -> list[int]:
    import torch

    return list(range(torch.cuda.device_count())) if device == "cuda" else []
