"""Every task, one file each: `from lesion.tasks import Name` imports the file `name.py` and nothing else."""

from typing import Any

from lesion.spec import lazily


def __getattr__(name: str) -> Any:
    return lazily(__name__, name)
