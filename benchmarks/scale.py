"""A lab of a hundred thousand readings and a million rows: how long it takes to plan, to resume and to sum up.

    python benchmarks/scale.py [--trials 100000] [--writers 2000]
    python benchmarks/scale.py --growth [--trials 1000000]     1,000 to 1,000,000, and by how much each cost grows

The trials are those of a large sweep: noise at site × dose × seed on a subject without a model, one measure of ten items
each. The rows are of the shape and length of short answers, and are written through `Store` as a run writes them, once by
one writer and once by many that open the lab together, as the jobs of an array do, each taking its share. No model is
run. Every part is timed in a process of its own (in brackets: seconds of processor time), whose largest resident memory
is reported; importing is not timed, the machine's cache is warm.

With `--growth` a writer has fifty readings, so the labs differ in the number of their writers too; memory is what is
added to that of the imports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lesion.forest import forest
from lesion.jobs import arrays, tasks
from lesion.measures.generation import Generation
from lesion.steps.noise import Noise
from lesion.store import Seal, Store
from lesion.trial import Reading, Specimen, Subject, Trial

SITES = ("attention.value", "mlp", "embedding", "attention.query", "mlp.out")
DOSES = tuple(round(0.05 * step, 2) for step in range(1, 21))
ROWS = 10
WORDS = ("the", "of", "to", "and", "a", "was", "her", "I", "not", "she", "it", "be", "had", "as", "he", "you", "for")


class Nothing(Subject):
    """A subject that is only ever spoken of."""

    def outline(self) -> Any:
        raise NotImplementedError

    def load(self, device: str = "cpu") -> Specimen:
        raise NotImplementedError


def readings(trials: int) -> list[Reading]:
    """Noise at site × dose × seed, each read by a generation of that seed."""
    intact, found = Trial(subject=Nothing()).pin(), []
    for seed in range(trials // (len(SITES) * len(DOSES))):
        measure = Generation(prompts=ROWS, seed=seed).pin()
        for site in SITES:
            for dose in DOSES:
                trial = intact >> Noise(site=site, sigma=dose, seed=seed)
                found.append(Reading(trial=trial, measure=measure))
    return found


def answers(number: int) -> list[dict[str, Any]]:
    """Ten rows as `Generation` makes them."""
    chance = np.random.default_rng(number)
    return [
        {
            "item": f"prompt-{item:02d}#0",
            "prompt": f"prompt-{item:02d}",
            "group": "arithmetic",
            "asked": "What is 12 + 13?",
            "text": " ".join(WORDS[i] for i in chance.integers(len(WORDS), size=24)),
            "tokens": 24,
            "stop": "length",
            "logprob": float(chance.normal()),
            "correct": bool(chance.integers(2)),
            "duration": float(chance.random()),
        }
        for item in range(ROWS)
    ]


def changed(site: str) -> list[str]:
    """Names as a ledger has them, of a model of thirty layers."""
    part = "mlp" if site.startswith("mlp") else "self_attn"
    names = {"mlp": ("gate_proj", "up_proj", "down_proj")}.get(site, (site.split(".")[-1],))
    return [f"model.layers.{layer}.{part}.{name}.weight" for layer in range(30) for name in names]


def write(store: Store, asked: Sequence[Reading], ready: Sequence[list[dict[str, Any]]]) -> None:
    """What a run writes of these readings."""
    for number, reading in enumerate(asked):
        trial, rows = reading.trial, ready[number % len(ready)]
        step = trial.steps[-1]
        first = {"subject": trial.subject.to_json(), "tied": {}, "after": "0" * 32}
        entry = {
            "step": step.to_json(),
            "before": "0" * 32,
            "after": "1" * 32,
            "changed": changed(step.site),
            "facts": {},
        }
        store.add_state(trial.key, trial.to_json(), [first, entry])
        store.add_rows(reading.key, 0, rows)
        share = sum(row["correct"] for row in rows) / len(rows)
        measure = reading.measure.to_json()
        store.seal(Seal(reading.key, 0, trial.key, measure, ROWS, {"accuracy": share}, 0.1, store.writer))


# ---------------------------------------------------------------------- the parts, each in a process of its own


def plan(lab: Path, trials: int, writers: int) -> dict[str, float]:
    """Builds the readings and asks an empty lab what is missing."""

    def work() -> None:
        store = Store(lab)
        assert sum(store.next_take(reading.key) is not None for reading in readings(trials)) == trials

    return timed(work)


def tree(lab: Path, trials: int, writers: int) -> dict[str, float]:
    """Orders the readings as the walk visits them."""
    asked = readings(trials)
    assert all(reading.key for reading in asked)

    def work() -> None:
        (root,) = forest(asked)
        assert len(root.children) == trials

    return timed(work)


def jobs(lab: Path, trials: int, writers: int) -> dict[str, float]:
    """Divides the readings among as many jobs as there are writers."""
    asked, store = readings(trials), Store(lab)
    assert all(reading.key for reading in asked)

    def work() -> None:
        found = tasks(asked, store, writers)
        assert len(found) == writers and sum(len(array.tasks) for array in arrays(found)) == writers

    return timed(work)


def build(lab: Path, trials: int, writers: int) -> dict[str, float]:
    """Fills a lab, by one writer or by many that open it together and close it one after the other."""
    asked, ready = readings(trials), [answers(number) for number in range(500)]
    share = -(-trials // writers)

    def work() -> None:
        stores = deque(Store(lab) for _ in range(writers))
        for number in range(writers):
            store = stores.popleft()
            write(store, asked[number * share : (number + 1) * share], ready)
            store.close()

    return timed(work)


def resume(lab: Path, trials: int, writers: int) -> dict[str, float]:
    """Opens the lab and finds that of all readings none is missing."""
    asked = readings(trials)

    def work() -> None:
        store = Store(lab)
        assert all(store.next_take(reading.key) is None for reading in asked)

    return timed(work)


def summarise(lab: Path, trials: int, writers: int) -> dict[str, float]:
    """Opens the lab and reduces all rows to the share of right answers of each state."""

    def work() -> None:
        store = Store(lab)
        states = pl.DataFrame(
            [(seal.reading, seal.state) for seal in store.index.seals.values()], ["reading", "state"], orient="row"
        )
        table = store.table().join(states, on="reading")
        found = table.group_by("state").agg(pl.col("correct").mean(), pl.len())
        assert found.height == trials and found["len"].sum() == trials * ROWS

    return timed(work)


def stream(lab: Path, trials: int, writers: int) -> dict[str, float]:
    """The same from rows as they come, one at a time, which is how a study answers."""

    def work() -> None:
        store, sums = Store(lab), dict[str, list[int]]()
        for row in store.rows():
            found = sums.setdefault(row["reading"], [0, 0])
            found[0] += row["correct"]
            found[1] += 1
        assert len(sums) == trials and all(count == ROWS for _, count in sums.values())

    return timed(work)


PARTS: dict[str, Callable[[Path, int, int], dict[str, float]]] = {
    f.__name__: f for f in (plan, tree, jobs, build, resume, summarise, stream)
}


def largest_mib() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


def timed(act: Callable[[], object]) -> dict[str, float]:
    started, busy = time.perf_counter(), time.process_time()
    act()
    return {"seconds": time.perf_counter() - started, "busy": time.process_time() - busy}


def measured(part: str, lab: Path, trials: int, writers: int) -> dict[str, float]:
    """Runs a part in a fresh process: its seconds, and its largest resident memory in MiB."""
    line = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--lab",
        str(lab),
        "--trials",
        str(trials),
        "--writers",
        str(writers),
    ]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def table(trials: int, writers: int) -> Iterator[tuple[str, str, str]]:
    """What, its bar, and what was measured."""
    rows = trials * ROWS

    def said(found: dict[str, float]) -> str:
        return f"{found['seconds']:.1f} s ({found['busy']:.1f} s), {found['mib']:.0f} MiB"

    with tempfile.TemporaryDirectory() as folder:
        one, many = Path(folder) / "one", Path(folder) / "many"
        yield f"plan {trials:,} trials", "5 s", said(measured("plan", one, trials, 1))
        yield f"order {trials:,} trials as a tree", "", said(measured("tree", one, trials, 1))
        for lab, count in ((one, 1), (many, writers)):
            by = f"{count:,} writer{'s' if count > 1 else ''}"
            yield f"write {rows:,} rows, {by}", "", said(measured("build", lab, trials, count))
            sizes = [path.stat().st_size for path in lab.rglob("*") if path.is_file()]
            yield f"files, {by}", "100", f"{len(sizes)}, {sum(sizes) / 2**20:.0f} MiB"
            yield f"resume over {trials:,} readings, {by}", "5 s", said(measured("resume", lab, trials, count))
            yield f"summarise {rows:,} rows, {by}", "10 s, 2048 MiB", said(measured("summarise", lab, trials, count))
            yield f"read {rows:,} rows one by one, {by}", "", said(measured("stream", lab, trials, count))


EACH = 50  # readings of a writer, where costs are compared
TITLES = {
    "plan": "plan",
    "tree": "order as a tree",
    "jobs": "divide into jobs",
    "build": "write",
    "resume": "open, find nothing missing",
    "summarise": "sum up as a table",
    "stream": "read row by row",
}


def growth(largest: int) -> Iterator[list[str]]:
    """A line for each cost: what it is for 1,000 readings, for ten times as many, and the ratio of the two, and so on."""
    sizes = [size for size in (10**3, 10**4, 10**5, 10**6) if size <= largest]
    found: dict[str, list[float]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            lab = Path(folder) / "lab"
            for part, title in TITLES.items():
                got = measured(part, lab, size, size // EACH)
                found.setdefault(f"{title}, s of processor time", []).append(got["busy"])
                found.setdefault(f"{title}, MiB of memory", []).append(got["added"])
            files = [path.stat().st_size for path in lab.rglob("*") if path.is_file()]
            found.setdefault("files", []).append(len(files))
            found.setdefault("MiB on disk", []).append(sum(files) / 2**20)
    yield ["", *(text for size in sizes for text in ("×", f"{size:,}"))]
    for what in sorted(found, key=lambda what: (what.endswith("memory"), what.startswith(("files", "MiB")))):
        ratios = ["", *(f"{b / a:.1f}" if a else "" for a, b in itertools.pairwise(found[what]))]
        yield [what, *(text for n, r in zip(found[what], ratios, strict=True) for text in (r, f"{n:,.4g}"))]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trials", type=int, default=100_000, help="a multiple of 100; with --growth the largest lab")
    options.add_argument("--writers", type=int, default=2_000)
    options.add_argument("--growth", action="store_true", help="what ten times as many readings cost")
    options.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options.add_argument("--lab", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.part:
        before = largest_mib()
        found = PARTS[chosen.part](chosen.lab, chosen.trials, chosen.writers)
        print(json.dumps({**found, "mib": largest_mib(), "added": largest_mib() - before}))
        return
    if chosen.growth:
        for what, *numbers in growth(chosen.trials):
            print(f"{what:45}" + "".join(f"{n:>{6 if i % 2 == 0 else 11}}" for i, n in enumerate(numbers)), flush=True)
        return
    print(f"{'':50}{'bar':>16}{'measured (busy)':>26}   ({os.cpu_count()} cores)")
    for what, bar, found in table(chosen.trials, chosen.writers):
        print(f"{what:50}{bar:>16}{found:>26}", flush=True)


if __name__ == "__main__":
    main()
