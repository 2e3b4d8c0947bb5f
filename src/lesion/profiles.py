"""A profile: what a cluster gives a job, in a small TOML file.

time = "4:00:00"            # of one job; what is not done by then is gone on with
memory = 24                 # GB
cpus = 8
gpus = 1
partition = "gpu"
account = "me"
setup = ["module load cuda"]

[training]                  # what differs for jobs that train
gpus = 4
processes = 4               # on each of `nodes`
time = "12:00:00"
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

EXAMPLE = 'time = "4:00:00", memory = 24, cpus = 8, partition = "…"'
SECRET = re.compile(r"\b(\w*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|APIKEY|CREDENTIAL)\w*)\s*=", re.IGNORECASE)


class Resources(BaseModel):
    """What one job is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: int = Field(description="minutes, or H:MM:SS, or D-HH:MM:SS", ge=1)
    memory: float = Field(description="GB a node", gt=0)
    cpus: int = Field(default=1, ge=1, description="processors of each process, and its threads")
    gpus: int = Field(default=0, ge=0, description="a node")
    gpu_memory: float | None = Field(
        default=None, gt=0, description="GB of one GPU, so that what cannot fit is refused"
    )
    nodes: int = Field(default=1, ge=1)
    processes: int = Field(default=1, ge=1, description="on each node: they train together")
    sharded: bool = Field(default=False, description="processes share out the weights (FSDP2) instead of copying them")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", value)
        if match is None:
            raise ValueError('expected a number of minutes, "H:MM:SS" or "D-HH:MM:SS"')
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return (days * 24 + hours) * 60 + minutes + (seconds > 0)


class Profile(Resources):
    """A cluster, as a user sees it."""

    training: dict[str, Any] = Field(default={}, description="what differs for jobs that train")
    setup: tuple[str, ...] = Field(
        default=(), description="shell commands before the work, such as module load …; one that fails ends the job"
    )
    array: int = Field(default=16, ge=1, description="most jobs into which the readings of one model are cut")
    parallel: int = Field(default=16, ge=1, description="jobs of an array that run at the same time")
    notice: int = Field(
        default=90, ge=10, description="seconds before the end of its time at which a job is told to save"
    )
    requeues: int = Field(default=100, ge=0, description="how often a job may go on after its time is over")
    internet: bool = Field(default=False, description="whether the nodes reach the hubs of models and data")
    options: dict[str, str | int | bool] = Field(default={}, description="further options of sbatch")

    @field_validator("setup", mode="before")
    @classmethod
    def _lines(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError('expected a list of shell commands, such as ["module load cuda"]')
        return value

    @field_validator("setup")
    @classmethod
    def _no_secrets(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        """Job scripts lie in the lab and on the scheduler, for others to read."""
        if found := [match[1] for line in lines if (match := SECRET.search(line))]:
            raise ValueError(f"a setup line sets {found[0]}, and job scripts can be read: export it where you submit")
        return lines

    @model_validator(mode="after")
    def _training_is_right(self) -> Profile:
        try:
            self.of(True)
        except ValidationError as error:
            from lesion.cli import in_words

            known = ", ".join(Resources.model_fields)
            raise ValueError(f"[training]: {in_words(error)} (there its entries are: {known})") from None
        if self.processes > 1 or self.nodes > 1:
            raise ValueError("only training runs on several processes or nodes: set them in [training]")
        return self

    def of(self, training: bool) -> Resources:
        """What a job that trains, or one that reads, is given."""
        given = {name: getattr(self, name) for name in Resources.model_fields if getattr(self, name) is not None}
        return Resources.model_validate({**given, **(self.training if training else {})})


def load(path: Path | None) -> Profile:
    """Reads a profile. Raises ValueError that names the file, the entry and what was expected."""
    if path is None:
        raise ValueError(f"a cluster needs a profile: --profile FILE, a TOML file such as: {EXAMPLE}")
    try:
        return Profile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"no profile {path}; it is a TOML file such as: {EXAMPLE}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML file: {error}") from None
    except ValidationError as error:
        from lesion.cli import in_words

        known = ", ".join(Profile.model_fields)
        raise ValueError(f"{path}: {in_words(error)} (entries are: {known})") from None
