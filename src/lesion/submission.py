"""A submission: a study's tasks on disk, so that jobs find them and people can ask what has become of them.

    lab/jobs/<study>-<key>/<when>/study.json     the study, its profile, where its jobs run
    lab/jobs/<study>-<key>/<when>/tasks.jsonl    a line a task: what it makes or takes, what it waits for
    lab/jobs/<study>-<key>/<when>/jobs.jsonl     a line a task: the scheduler's job, as it was submitted
    …                                            job scripts and logs

Whether something is done is the store's to say, and what still runs the scheduler's: nothing here is ever rewritten.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lesion.jobs import Task, closure, kept_states, trials_of
from lesion.store import Store
from lesion.study import Study
from lesion.trial import Reading, Trial


@dataclass(frozen=True)
class Work:
    """A task as it stands on disk: keys only."""

    number: int
    makes: str | None
    readings: list[str]
    after: list[int]
    needed: list[str]
    said: str

    def is_done(self, store: Store) -> bool:
        """Made, or all taken."""
        if self.makes is not None:
            return store.state_folder(self.makes) is not None
        return all(key in store.index.seals for key in self.readings)

    def failures(self, store: Store) -> list[str]:
        """What was said of what failed here."""
        of = [self.makes] if self.makes is not None else self.readings
        return [store.index.failures[key]["error"] for key in of if key in store.index.failures]


class Submission:
    """One call of `lesion submit`, on disk."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @classmethod
    def write(cls, store: Store, asked: Study, tasks: Sequence[Task], where: str, how: dict[str, Any]) -> Submission:
        stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        folder = jobs_folder(store.root, asked) / stamp
        folder.mkdir(parents=True)
        about = {"study": asked.to_json(), "lab": str(store.root.resolve()), "where": where, **how}
        (folder / "study.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        with (folder / "tasks.jsonl").open("w", encoding="utf-8") as file:
            for task in tasks:
                line = {
                    "number": task.number,
                    "makes": task.makes.key if task.makes is not None else None,
                    "readings": [reading.key for reading in task.readings],
                    "after": sorted(task.after),
                    "needed": sorted(task.needed),
                    "said": str(task),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return cls(folder)

    @cached_property
    def about(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / "study.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} is no submission: {error}") from None
        return dict(found)

    @cached_property
    def works(self) -> list[Work]:
        with (self.folder / "tasks.jsonl").open(encoding="utf-8") as file:
            return [Work(**json.loads(line)) for line in file]

    def study(self) -> Study:
        found = Study.from_json(self.about["study"])
        assert isinstance(found, Study)
        return found

    def add_jobs(self, jobs: dict[int, str]) -> None:
        """Task → the scheduler's job."""
        with (self.folder / "jobs.jsonl").open("a", encoding="utf-8") as file:
            for task, job in jobs.items():
                file.write(json.dumps({"task": task, "job": job}) + "\n")

    @property
    def jobs(self) -> dict[int, str]:
        path = self.folder / "jobs.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return {line["task"]: line["job"] for line in map(json.loads, lines)}

    def task(self, number: int) -> tuple[Work, Trial | None, list[Reading]]:
        """A task and the sentences it speaks of. Raises ValueError where this version of the study has others: it was
        submitted by another version, or what it reads has changed since."""
        work = self.works[number]
        all_of_them = closure(self.study().readings())
        if gone := [key for key in work.readings if key not in all_of_them]:
            raise ValueError(_stale(f"{len(gone)} of {len(work.readings)} readings", self.folder))
        if work.makes is None:
            return work, None, [all_of_them[key] for key in work.readings]
        for reading in all_of_them.values():
            for trial in trials_of(reading):
                for kept in kept_states(trial):
                    if kept.key == work.makes:
                        return work, kept, []
        raise ValueError(_stale("the state", self.folder))


def _stale(what: str, folder: Path) -> str:
    return (
        f"{what} of this job are not what the study asks for now (another version of lesion, of a file or of a model than "
        f"when {folder.name} was submitted); nothing was done: submit it again"
    )


def jobs_folder(root: Path, asked: Study) -> Path:
    return root / "jobs" / f"{asked.name}-{asked.key[:8]}"


def submissions(root: Path, beginning: str = "") -> list[Submission]:
    """All of a lab whose name begins so, oldest first."""
    found = sorted((root / "jobs").glob("*/*/tasks.jsonl"), key=lambda path: path.parent.name)
    return [s for path in found if (s := Submission(path.parent)).name.startswith(beginning)]
