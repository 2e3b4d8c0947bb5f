"""Progress for people: a bar with time left and memory in use on a terminal, plain lines elsewhere, and a log file."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from lesion.store import Store
from lesion.trial import Reading, describe

LINE_EVERY_S = 10.0
LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}
logger = logging.getLogger("lesion")


class Progress:
    """Listens to the walk. The unit is a reading; the time left is that of the readings still to take."""

    def __init__(self, verbosity: str = "normal", now: str = "opening the lab"):
        self.verbosity = verbosity
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal and verbosity != "quiet"
        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[memory]}"),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.done = self.total = 0
        self.failures: Counter[str] = Counter()  # by what was said of them
        self.now, self.spoke = now, 0.0

    def __enter__(self) -> Self:
        self.bar.__enter__()
        self.began = time.monotonic()
        self.task = self.bar.add_task(self.now, total=None, left="", memory="")
        self._handler = logging.StreamHandler(sys.stderr)
        self._handler.setLevel(LEVELS[self.verbosity])
        self._handler.setFormatter(logging.Formatter("%(message)s"))
        self._before = logger.level, logger.propagate
        logger.addHandler(self._handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.bar.__exit__(kind, *error)
        logger.removeHandler(self._handler)
        logger.setLevel(self._before[0])
        logger.propagate = self._before[1]
        if self.total and self.verbosity != "quiet" and kind in (None, KeyboardInterrupt):
            self._line(f"{self.done} of {self.total} readings in {_span(time.monotonic() - self.began)}")
            for text, times in self.failures.items():
                if times > 1:
                    self._line(f"{times} failures: {text}")

    def start(self, store: Store, readings: Sequence[Reading], force: bool) -> list[Reading]:
        """Says what is there already, and returns what is missing."""
        missing = [r for r in readings if store.next_take(r.key, force) is not None]
        self.total, there = len(missing), len(readings) - len(missing)
        if there and self.verbosity != "quiet":
            nothing = "" if missing else "nothing to do: "
            self._line(f"{nothing}{there} of {len(readings)} readings are in the lab already")
        self.bar.update(self.task, total=self.total)
        return missing

    def tell(self, what: str, **told: Any) -> None:
        match what:
            case "load":
                subject = re.sub(r"(sha256=\w{8})\w+", r"\1…", describe(told["trial"].subject))
                self.now = f"loading {subject}"
                logger.debug("%s", self.now)
            case "step":
                self.now = describe(told["step"])
                logger.debug("%s", self.now)
            case "train":
                loss, rate = told["loss"], told["rate"]
                left = _span(told["left"])
                self.now = f"training {told['step']}/{told['steps']}, loss {loss:.3f}, {rate:.0f} tokens/s, {left} left"
            case "rows":
                self.now = f"{told['measure'].name} {told['done']}/{told['items']}"
            case "waiting":
                self.now = f"waiting for another process, which is at work on {told['busy']} of these"
                logger.info("%s", self.now)
            case "seal":
                self.done += 1
                logger.debug("%s | %s | %s", told["trial"], describe(told["measure"]), told["summary"])
            case "failure":
                error = told["error"]  # ours, or as another process has recorded it
                text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
                text = " ".join(text.split("\n"))
                self.failures[text] += 1
                repeated = self.failures[text] > 1  # said once, counted at the end
                logger.log(logging.DEBUG if repeated else logging.ERROR, "failed: %s", text)
        left = self._left()
        self.bar.update(self.task, completed=self.done, description=self.now, left=left, memory=_memory())
        if not self.live and self.verbosity != "quiet" and time.monotonic() - self.spoke > LINE_EVERY_S:
            self.spoke = time.monotonic()
            self._line(f"{self.done}/{self.total} readings · {left or 'starting'} · {_memory()} · {self.now}")

    def _left(self) -> str:
        if not self.done:
            return ""
        seconds = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f"{_span(seconds)} left"

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _memory() -> str:
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
