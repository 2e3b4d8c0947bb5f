"""What `modern-tasks` says of its readings: a table of ways, paired claims, and where the errors are."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lesion.claiming import averaged, decided, tested
from lesion.report.page import GENERATIONS
from lesion.report.tables import to_csv
from lesion.studies._told import Array, crossed, fell
from lesion.trial import Row

if TYPE_CHECKING:
    from lesion.store import Store
    from lesion.studies.modern_tasks import ModernTasks

SHOWN = 24  # replies of each way that the page has
WORST = 8  # wrong replies of each way in the table of errors
GROUPS = 3  # of questions by length
METRICS = {"correct": "accuracy", "rougeL": "ROUGE-L"}
MORE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2"}


@dataclass
class Told:
    """A study and the rows of its readings, by reading and item."""

    study: ModernTasks
    rows: Mapping[str, Mapping[str, Row]]
    states: Mapping[str, Mapping[str, Any]]

    def taught(self, task: str, way: str) -> tuple[int, int] | None:
        """How many examples a way was trained on, and how many were left out since they are longer than a row."""
        reading = self.study.cells.get((task, way, self.study.seeds[0]))
        ledger = self.states.get(reading.trial.key, {}).get("ledger", []) if reading is not None else []
        facts = next((e["facts"] for e in ledger if "left_out" in e.get("facts", {})), None)
        return None if facts is None else (facts["examples"], facts["left_out"])

    def of(self, task: str, way: str, seed: int) -> Mapping[str, Row]:
        """A way that is not trained has one reading for all seeds."""
        cells = self.study.cells
        reading = cells.get((task, way, seed)) or cells.get((task, way, self.study.seeds[0]))
        return {} if reading is None else self.rows.get(reading.key, {})

    def seeds(self, task: str, way: str) -> list[int]:
        return [seed for t, w, seed in self.study.cells if (t, w) == (task, way)]

    def items(self, task: str) -> list[str]:
        found: dict[str, None] = {}
        for way in self.study.ways:
            for seed in self.seeds(task, way):
                found |= dict.fromkeys(self.of(task, way, seed))
        return list(found)

    def array(self, task: str, way: str, column: str, seeds: list[int] | None = None) -> Array:
        """[seeds, items], NaN where there is none."""
        chosen = self.seeds(task, way) if seeds is None else seeds
        return crossed([self.of(task, way, seed) for seed in chosen], lambda row: row.get(column), self.items(task))

    def metric(self, task: str) -> str:
        return self.study.known[task].metric


def summary(told: Told) -> pl.DataFrame:
    """A row for each task and way."""
    rows = []
    for task in told.study.tasks:
        for way in told.study.ways:
            row: Row = {"task": task, "way": way, "questions": len(told.items(task))}
            row["trainings"] = len(told.seeds(task, way)) if way in ("LoRA", "full") else None
            row["taught with"], row["left out"] = told.taught(task, way) or (None, None)
            name = METRICS.get(told.metric(task), told.metric(task))
            row |= {
                "metric": name,
                **averaged(told.array(task, way, told.metric(task)), "value", told.metric(task) == "correct"),
            }
            for column, shown in MORE.items():
                values = told.array(task, way, column)
                row[shown] = float(np.nanmean(values)) if np.isfinite(values).any() else None
            row["macro-F1"] = _f1(told, task, way)
            nll, tokens = told.array(task, way, "nll"), told.array(task, way, "nll_tokens")
            there = np.isfinite(nll)
            row["loss of right replies"] = float(nll[there].sum() / tokens[there].sum()) if there.any() else None
            row["ended"] = _ended(told, task, way)
            rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _f1(told: Told, task: str, way: str) -> float | None:
    from lesion.measures.task import f1

    return f1(row for seed in told.seeds(task, way) for row in told.of(task, way, seed).values())


def _ended(told: Told, task: str, way: str) -> float | None:
    stops = [r["stop"] for s in told.seeds(task, way) for r in told.of(task, way, s).values() if r["stop"] is not None]
    return stops.count("end") / len(stops) if stops else None


def claims(told: Told) -> pl.DataFrame:
    """Each later way against each earlier one, question by question; of trainings the seeds are drawn again too."""
    found = []
    for task in told.study.tasks:
        metric = told.metric(task)
        unit = METRICS.get(metric, metric)
        for i, before in enumerate(told.study.ways):
            for after in told.study.ways[i + 1 :]:
                seeds = list(told.study.seeds) if {before, after} & {"LoRA", "full"} else [told.study.seeds[0]]
                a, b = (told.array(task, way, metric, seeds) for way in (after, before))
                text = f"{task}: {after} is better than {before}"
                found.append(tested(text, a, b, unit, text, direction=1))
                if any(row["nll_end"] is not None for row in told.of(task, before, seeds[0]).values()):  # it is written
                    text = f"{task}: right answers, with their form and end, are likelier by {after} than by {before}"
                    a, b = (
                        told.array(task, way, "nll", seeds) / told.array(task, way, "nll_tokens", seeds)
                        for way in (after, before)
                    )
                    found.append(tested(text, a, b, "nats a token", text, direction=-1))
    return decided(found)


def curves(told: Told, store: Store) -> pl.DataFrame:
    """The loss of each training as it fell, from the ledgers."""
    states = store.index.states
    trainings = (
        (f"training loss, {task}", f"{way}, seed {seed}", states[reading.trial.key]["ledger"][-1].get("facts", {}))
        for (task, way, seed), reading in told.study.cells.items()
        if way in ("LoRA", "full") and reading.trial.key in states
    )
    return fell(trainings)


def generations(told: Told) -> pl.DataFrame:
    found = []
    for task in told.study.tasks:
        for way in told.study.ways:
            seed = told.study.seeds[0]
            for row in list(told.of(task, way, seed).values())[:SHOWN]:
                right = row.get("correct")
                found.append(
                    {"site": f"{task}, {way}", "prompt": row["item"], "group": task, "asked": row["asked"]}
                    | {"text": row["text"] or "", "stop": row["stop"] or row["outcome"], "dose": 1.0, "logprob": None}
                    | {"seed": seed, "tokens": row["tokens"], "correct": None if right is None else bool(right)}
                )
    return pl.DataFrame(found, schema=GENERATIONS)


def errors(told: Told) -> dict[str, pl.DataFrame]:
    """Confusions, scores by the length of the question, and the worst replies."""
    confusions, lengths, worst = [], [], []
    for task in told.study.tasks:
        metric = told.metric(task)
        for way in told.study.ways:
            rows = [row for seed in told.seeds(task, way) for row in told.of(task, way, seed).values()]
            known = [row for row in rows if row.get(metric) is not None]
            pairs = Counter((row["answer"], row["text"]) for row in known if row["chosen"] is not None)
            for (right, said), count in sorted(pairs.items()):
                confusions.append({"task": task, "way": way, "right": right, "said": said, "replies": count})
            lengths += _by_length(task, way, known, metric)
            bad = sorted(known, key=lambda row: (float(row[metric]), -(row["nll"] or 0.0)))[:WORST]
            worst += [
                {"task": task, "way": way, "question": row["asked"], "right": row["answer"], "said": row["text"]}
                | {METRICS.get(metric, metric): float(row[metric])}
                for row in bad
                if float(row[metric]) < 1
            ]
    frames = {"confusion": confusions, "by length of the question": lengths, "worst replies": worst}
    return {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in frames.items() if rows}


def _by_length(task: str, way: str, rows: list[Row], metric: str) -> list[Row]:
    ordered = sorted(rows, key=lambda row: row["asked_characters"])
    size = math.ceil(len(ordered) / GROUPS) or 1
    found = []
    for start in range(0, len(ordered), size):
        some = ordered[start : start + size]
        value = sum(float(row[metric]) for row in some) / len(some)
        span = f"{some[0]['asked_characters']} to {some[-1]['asked_characters']}"
        found.append({"task": task, "way": way, "characters": span, "replies": len(some), "value": value})
    return found


def notes(told: Told) -> list[str]:
    """What a reader has to know."""
    said = [
        "All ways answer the same questions; claims pair them question by question. “loss of right replies” is that of the "
        "written answer, its end token included, in nats a token.",
        "Choices are ranked by their log-likelihood behind the question; other replies are written greedily and end with their "
        "line.",
    ]
    if told.study.subject == "smollm2":
        said.append(
            "SmolLM2 is an instructed model, asked here in plain words; it may have seen these tasks in its training."
        )
    if told.study.source == "packaged" and "sst2" in told.study.tasks:
        said.append(
            "SST-2 is taught with rated snippets of film reviews; those that share 24 letters in a row with a tested sentence, "
            "or hold a shorter one, are left out."
        )
    for task in told.study.tasks:
        counts = [taught for way in told.study.ways if (taught := told.taught(task, way))]
        if counts and (left := counts[0][1]):
            few, many = (
                f"{left} of {sum(counts[0])} examples of {task}",
                f"are longer than the {told.study.length} tokens of a row",
            )
            said.append(f"{few} {many} and were not taught.")
    if told.study.repeats == 1:
        said.append("One training of each: intervals speak of questions only, not of another training.")
    return said


def files(told: Told) -> dict[str, bytes]:
    """One file of results for each task, as evaluation scripts are used to write; of a task that is a file somewhere, by its name
    alone."""
    table = summary(told)
    found = {"results.csv": to_csv(table)}
    for task in told.study.tasks:
        rows = [row for row in table.to_dicts() if row["task"] == task]
        name, number = Path(task).stem, 1
        while (path := f"{name}.json" if number == 1 else f"{name}-{number}.json") in found:
            number += 1
        found[path] = (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()
    return found
