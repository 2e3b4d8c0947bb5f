"""What `monotone` says of its readings: arms in a table, curves flip by flip, answers; claims have a file of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from lesion.flipping import success
from lesion.report.page import CURVES, GENERATIONS
from lesion.stats import ratio
from lesion.studies._arms import PRETRAINED, Arms
from lesion.studies._told import Array, crossed
from lesion.trial import Row

Value = Callable[[Row], float | None]
THRESHOLD = 0.15  # described: a flip succeeds where it raises the loss by this share of it
NOTES = [
    "Losses are of tokens that no attack has changed, in nats a token. Weights are held to signs in every constrained arm; order "
    "itself is certified for `certified` only, whose activation rises too, for each feed-forward network in its own input. Norms "
    "and attention are not monotone, and nothing is claimed of the whole model. `certified` differs from `signature` in its form "
    "(projected) as well as in its activation.",
    "matched: the baseline with noise of the dose at which its clean loss on the held-out text is that of the main constraint. "
    "Robust and already bad look the same without it. What is attacked is a part of that text: a claim says whether the two are "
    "alike there.",
    "What hardly reads its prompt cannot be attacked through it: a claim says whether random flips, too, do less to the main "
    "constraint. Where they do, less harm by an attack is what a loss of function looks like, at whatever clean loss.",
    "Flips are such that the text, written out and read again, is the same tokens. HotFlip re-ranks by true loss, “without "
    "gradients” tries as many at random; “random, best draw” is the best of eight, of the baseline and of the main constraint. "
    "A trigger stands beside a random string of its length.",
    "Described for Pythia-1.4B: perplexity 10.2 (baseline), 15.8 (constrained), 10.9 (recovered); HotFlip success 55 % and 18 %; "
    "triggers +16 % and +11 % loss. Such runs really gave 6.7 to 6.9 and 24 to 42, and success 71.5 % and 83.5 %, or 69 % and "
    "42.5 %.",
]


def nll(row: Row) -> float | None:
    return None if row["nll"] is None else row["nll"] / row["tokens"]


def rise(row: Row) -> float | None:
    """Increase of the loss after all flips."""
    return row["losses"][-1] - row["losses"][0] if row["outcome"] == "attacked" else None


def succeeds(row: Row) -> float | None:
    if row["outcome"] != "attacked":
        return None
    return float(success(row["losses"], len(row["losses"]) - 1, THRESHOLD, True))


def target(row: Row) -> float | None:
    """Loss of the tokens that are scored, before any flip."""
    return row["losses"][0] if row["outcome"] == "attacked" else None


def mean_draw(row: Row) -> float | None:
    """Increase of the loss by random flips, of which `rise` is the best draw."""
    if row["outcome"] != "attacked":
        return None
    return math.fsum(losses[-1] - losses[0] for losses in row["draws"]) / len(row["draws"])


def delta(row: Row) -> float | None:
    """Of a document with a trigger before it."""
    return row.get("delta")


def by_chance(row: Row) -> float | None:
    """The same with a random string."""
    return row.get("delta_random")


def beyond_chance(row: Row) -> float | None:
    found, chance = delta(row), by_chance(row)
    return None if found is None or chance is None else found - chance


@dataclass
class Told:
    """One subject's readings, as far as they are there."""

    arms: Arms
    rows: Mapping[str, Mapping[str, Row]]
    states: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.arms.scale.subject

    def seeds(self, arm: str, stage: str) -> list[int]:
        return [seed for (a, s, seed) in self.arms.cells() if (a, s) == (arm, stage)]

    def read(self, arm: str, stage: str, seed: int, name: str) -> Mapping[str, Row]:
        reading = self.arms.cells().get((arm, stage, seed), {}).get(name)
        return {} if reading is None else self.rows.get(reading.key, {})

    def items(self, arm: str, stage: str, name: str) -> set[str]:
        return {item for seed in self.seeds(arm, stage) for item in self.read(arm, stage, seed, name)}

    def array(self, arm: str, stage: str, name: str, value: Value, items: Sequence[str] | None = None) -> Array:
        """Values [seeds, items], NaN where there is none. Arms that are compared are asked for the same items."""
        return crossed([self.read(arm, stage, seed, name) for seed in self.seeds(arm, stage)], value, items)

    def mean(self, arm: str, stage: str, name: str, value: Value) -> dict[str, Any]:
        """value, low and high of the mean over seeds and items, and how many of them there are."""
        found = self.array(arm, stage, name, value)
        known = np.isfinite(found)
        if not known.any():
            return dict.fromkeys(("value", "low", "high", "items", "seeds"))
        e = ratio(np.nan_to_num(found), known.astype(float), purpose=f"monotone {name}")
        return {"value": e.value, "low": e.low, "high": e.high, "items": e.items, "seeds": e.seeds}

    def refuse_sameness(self) -> None:
        """Raises ValueError where two seeds of an arm are one model: three readings of it are not three."""
        for arm in self.arms.scale.arms:
            known: dict[str, int] = {}
            for seed in self.seeds(arm, "after"):
                ledger = self.states.get(self.arms.trial(arm, seed).key, {}).get("ledger")
                if not ledger:
                    continue
                digest = ledger[-1]["after"]
                if digest in known:
                    raise ValueError(
                        f"seeds {known[digest]} and {seed} of {arm} on {self.name} are one model, digest {digest}: "
                        "they would be counted as two"
                    )
                known[digest] = seed


def summary(told: Sequence[Told]) -> pl.DataFrame:
    """A row for each arm: loss, perplexity, what attacks add, what is certified."""
    rows = []
    for one in told:
        for arm, stage in dict.fromkeys((a, s) for a, s, _ in one.arms.cells()):
            row: dict[str, Any] = {"subject": one.name, "arm": arm, "recovery": stage if arm != PRETRAINED else "–"}
            loss = one.mean(arm, stage, "loss", nll)
            if loss["value"] is None:
                continue
            row |= {"loss": loss["value"], "loss_low": loss["low"], "loss_high": loss["high"]}
            row["perplexity"] = math.exp(loss["value"]) if loss["value"] < 700 else None
            for column, name, value in (
                ("HotFlip", "iterative", rise),
                ("without gradients", "query", rise),
                ("random, best draw", "random", rise),
                ("one-shot", "described", rise),
                ("its successes at 15 %", "described", succeeds),
                ("trigger", "trigger", delta),
                ("random string", "trigger", by_chance),
                ("trigger as described", "trigger described", delta),
                ("clean loss of targets", "iterative", target),
            ):
                found = one.mean(arm, stage, name, value)
                row |= {column: found["value"], f"{column}_low": found["low"], f"{column}_high": found["high"]}
            rows.append({**row, "seeds": loss["seeds"]})
    return pl.DataFrame(rows, infer_schema_length=None)


def curves(told: Sequence[Told]) -> pl.DataFrame:
    """The rise of the loss and the share of successes, flip by flip, for each arm and manner."""
    rows = []
    for one in told:
        for arm in one.arms.scale.arms:
            for manner in ("iterative", "query"):
                most = max((len(r["losses"]) - 1 for r in attacked(one, arm, manner)), default=0)
                for n in range(most + 1):

                    def value(row: Row, n: int = n) -> float | None:
                        if row["outcome"] != "attacked":
                            return None
                        return row["losses"][min(n, len(row["losses"]) - 1)] - row["losses"][0]

                    e = one.mean(arm, "after", manner, value)
                    said = {
                        "measure": f"rise of the loss, {manner}, {one.name}",
                        "unit": "nats a token",
                        "better": "lower",
                    }
                    rows.append({**dict.fromkeys(CURVES), **said, "site": arm, "dose": float(n), **e, "reference": 0.0})
    return pl.DataFrame(rows, schema=CURVES)


def attacked(one: Told, arm: str, manner: str) -> list[Row]:
    cells = (one.read(arm, "after", seed, manner) for seed in one.seeds(arm, "after"))
    return [row for rows in cells for row in rows.values() if row["outcome"] == "attacked"]


def generations(told: Sequence[Told]) -> pl.DataFrame:
    found = []
    for one in told:
        for arm, stage, seed in one.arms.cells():
            for name, dose in (("answers", 0.0), ("attacked answers", 1.0)):
                for row in one.read(arm, stage, seed, name).values():
                    kept = {
                        k: row[k] for k in ("prompt", "text", "correct", "stop", "tokens", "logprob", "asked", "group")
                    }
                    found.append({"site": f"{one.name}, {arm}", "dose": dose, "seed": seed, **kept})
    return pl.DataFrame(found, schema=GENERATIONS)
