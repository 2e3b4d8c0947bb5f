"""Whether a study fits: memory, time, disk, and what its models and data are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lesion.jobs import Task
from lesion.profiles import Profile
from lesion.store import Store
from lesion.study import Study
from lesion.trial import Reading


def check_fits(tasks: Sequence[Task], store: Store, profile: Profile | None, asked: Study) -> None:
    return


def fetch(readings: Sequence[Reading]) -> Iterator[str]:
    yield ""
