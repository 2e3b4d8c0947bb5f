"""Trackers: the metrics of trainings also go to TensorBoard, trackio or Weights & Biases, through accelerate.

They are listeners of the walk, as the progress bar is: what is trained does not know of them, and no key depends on them. The
record itself is `metrics.jsonl`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lesion.trial import describe

TRACKERS = {"tensorboard": ("TensorBoardTracker", "tensorboard"), "trackio": ("TrackioTracker", "trackio")}
TRACKERS |= {"wandb": ("WandBTracker", "wandb")}
TOLD = ("loss", "lr", "norm", "held_out", "rate")


class Tracker:
    """A run of a tracker for each training. Raises ValueError for an unknown name and for one that is not installed."""

    def __init__(self, name: str, folder: Path):
        if name not in TRACKERS:
            raise ValueError(f"no tracker {name!r}; there are: {', '.join(TRACKERS)}")
        self.kind, package = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the tracker {name} needs the package {package}: pip install {package}")
        self.folder, self.step, self.number = folder, "", 0
        self.run: Any = None

    def tell(self, what: str, **told: Any) -> None:
        if what == "step":
            self.close()
            self.step = describe(told["step"])
        elif what == "train":
            if self.run is None:
                self.run = self._begun(told)
            self.run.log({name: told[name] for name in TOLD if name in told}, step=told["step"])

    def _begun(self, told: dict[str, Any]) -> Any:
        from accelerate import PartialState, tracking

        PartialState(cpu=True)  # trackers speak from the first process only, and ask this which it is
        self.number += 1
        name, kind = f"training-{self.number}", getattr(tracking, self.kind)
        if kind.requires_logging_directory:
            self.folder.mkdir(parents=True, exist_ok=True)
            run = kind(name, logging_dir=str(self.folder))
        else:
            run = kind("lesion")
        if hasattr(run, "start"):
            run.start()
        run.store_init_configuration({"step": self.step, "steps": told["steps"]})
        return run

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
        self.run = None


def both(*listeners: Callable[..., None]) -> Callable[..., None]:
    """One listener that tells several."""

    def tell(what: str, **told: Any) -> None:
        for listener in listeners:
            listener(what, **told)

    return tell
