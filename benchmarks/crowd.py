"""Several processes on one lab: how much of their number is gained, what a lease costs, and whether anything is done twice.

    python benchmarks/crowd.py [--readings 2000] [--work 0.02] [--processes 1 2 4 8]

Every process asks for the same readings, as two people do who start the same study; each reading is a pause of `--work` seconds,
which leaves the processors alone, and writes ten rows. Ideal is the time of one process without leases, divided by their number.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lesion import log
from lesion.lab import Lab
from lesion.leases import Leases
from lesion.store import Store
from lesion.trial import Measure, Reading, Row, Specimen, Subject, Trial

ROWS = 10


class Nothing(Subject):
    """A subject that is only ever spoken of."""

    def outline(self) -> Any:
        raise NotImplementedError

    def load(self, device: str = "cpu") -> Specimen:
        raise NotImplementedError


class Pause(Measure):
    """Waits, and writes rows."""

    on_bench = False
    number: int
    seconds: float

    def items(self, specimen: Specimen) -> list[str]:
        return [f"i{i}" for i in range(ROWS)]

    def read(self, specimen: Specimen, items: Sequence[str]) -> Iterator[Row]:
        time.sleep(self.seconds)
        return iter([{"item": item, "value": float(self.number)} for item in items])

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {}


def crowd(path: Path, readings: Sequence[Reading], processes: int) -> float:
    """Seconds until the last of them is done."""
    started, children = time.perf_counter(), []
    for _ in range(processes):
        if not (child := os.fork()):
            Lab(path).take(readings)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--readings", type=int, default=2000)
    options.add_argument("--work", type=float, default=0.02)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    given = options.parse_args()
    trial = Trial(subject=Nothing())
    readings = [Reading(trial=trial, measure=Pause(number=n, seconds=given.work)) for n in range(given.readings)]
    with tempfile.TemporaryDirectory() as folder:
        leases = Leases(Path(folder) / "leases", "writer-here-0-0")
        began = time.perf_counter()
        for reading in readings:
            assert leases.take(reading.key)
            leases.check(reading.key)
            leases.let_go(reading.key)
        print(f"a lease taken, checked and let go: {(time.perf_counter() - began) / len(readings) * 1e6:.0f} µs")
        leases.close()
        ideal = given.readings * given.work
        print(
            f"{'processes':>9} {'seconds':>8} {'of ideal':>8} {'rows':>7} {'twice':>6} {'lost':>5} {'leases left':>11}"
        )
        canonical = set()
        for number in given.processes:
            lab = Path(folder) / f"lab{number}"
            seconds = crowd(lab, readings, number)
            store = Store(lab)
            rows = sum(text.startswith(b'{"is":"row"') for _, _, text in log.read(store.log))
            twice, lost = max(0, rows - ROWS * len(readings)), ROWS * len(readings) - sum(1 for _ in store.rows())
            left = len(list((lab / "leases").iterdir()))
            print(
                f"{number:>9} {seconds:>8.2f} {ideal / number / seconds:>8.0%} {rows:>7} {twice:>6} {lost:>5} {left:>11}"
            )
            canonical.add(b"".join(store.canonical()))
        assert len(canonical) == 1, "every crowd leaves the same lab"


if __name__ == "__main__":
    main()
