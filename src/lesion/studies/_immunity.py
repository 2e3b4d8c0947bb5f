"""What `immunity` says of its readings: a row an arm, and each arm against the one that it differs from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lesion.claiming import averaged, decided, tested, untested
from lesion.studies._told import Array, crossed
from lesion.trial import Row

if TYPE_CHECKING:
    from lesion.studies.immunity import Immunity

AGAINST = {"monotone": "trained on", "healed": "trained on"}  # which were trained for as long
CALLED = {"trained on": "Further training", "monotone": "Having been monotone", "healed": "Having been healed"}
CALLED |= {"int8": "int8", "nf4": "nf4"}
NATS = "nats a token"


@dataclass
class Told:
    """A study and the rows of its readings, by reading and item."""

    study: Immunity
    rows: Mapping[str, Mapping[str, Row]]

    def array(self, arm: str, done: str, name: str, value: Callable[[Row], float | None]) -> Array:
        """[seeds, items], NaN where there is none."""
        seeds = self.study.seeds
        items = {item: None for seed in seeds for item in self._of("plain", "nothing", name, seed)}
        return crossed([self._of(arm, done, name, seed) for seed in seeds], value, items)

    def _of(self, arm: str, done: str, name: str, seed: int) -> Mapping[str, Row]:
        reading = self.study.cells.get((arm, done, seed), {}).get(name)
        return {} if reading is None else self.rows.get(reading.key, {})

    def loss(self, arm: str, done: str) -> Array:
        return self.array(arm, done, "loss", lambda row: None if row["nll"] is None else row["nll"] / row["tokens"])

    def harm(self, arm: str, kind: str) -> Array:
        """How many nats a token a poison costs an arm."""
        return self.loss(arm, kind) - self.loss(arm, "nothing")

    def flipped(self, arm: str, manner: str) -> Array:
        """How many nats a token of its target an attack costs an arm."""
        return self.array(arm, "nothing", manner, lambda row: row["losses"] and row["losses"][-1] - row["losses"][0])


def summary(told: Told) -> pl.DataFrame:
    rows = []
    for arm in told.study.arms:
        row: Row = {"arm": arm, **averaged(told.loss(arm, "nothing"), "loss")}
        for kind in ("random", "text"):
            for done, where in (
                (kind, ""),
                (f"{kind} held", ", constraint held"),
                (f"{kind} beside", " into adapters"),
            ):
                if (arm, done, told.study.seed) in told.study.cells:
                    row |= averaged(told.harm(arm, done), f"{kind} poison{where}")
        for manner, name in (("iterative", "HotFlip"), ("query", "without gradients"), ("random", "random flips")):
            row |= averaged(told.flipped(arm, manner), name)
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def claims(told: Told) -> pl.DataFrame:
    """First that poison and attacks do harm at all, wherever that is to be shielded against; then of each arm that they do less,
    and of poison that the arm is also the better one after it."""
    from lesion.studies.immunity import CODED, MONOTONE, PLAIN

    found, least = [], told.study.margin

    def less(text: str, mine: Array, theirs: Array) -> None:
        found.append(tested(text, mine, theirs, NATS, text, direction=-1, smallest=least))

    others = {
        arm: AGAINST[arm] if AGAINST.get(arm) in told.study.arms else PLAIN for arm in told.study.arms if arm in CALLED
    }
    done = {arm: " beside" if arm in CODED else "" for arm in others}
    for kind in ("random", "text"):
        for other, how in sorted({(others[arm], done[arm]) for arm in others}):
            text = f"Poison ({kind}{' of adapters' if how else ''}) raises the loss of {other}"
            after, before = told.loss(other, kind + how), told.loss(other, "nothing")
            found.append(tested(text, after, before, NATS, text, direction=1, smallest=least))
    text = f"HotFlip does more to {PLAIN} than random flips"
    found.append(tested(text, told.flipped(PLAIN, "iterative"), told.flipped(PLAIN, "random"), NATS, text, direction=1))
    for arm, other in others.items():
        for kind in ("random", "text"):
            name, poison = CALLED[arm], f"{kind} poison{' of adapters' if arm in CODED else ''}"
            shields, better = (
                f"{name} shields against {poison}, beside {other}",
                f"{arm} predicts better than {other} after {poison}",
            )
            harm, against = told.harm(arm, kind + done[arm]), told.harm(other, kind + done[arm])
            if np.isfinite(against).any() and np.nanmean(against) <= least:
                why = f"it costs {other} {np.nanmean(against):+.3f} {NATS}, no more than the margin: nothing to shield against"
                found += [untested(text, NATS, why) for text in (shields, better)]
                continue
            less(shields, harm, against)
            less(better, told.loss(arm, kind + done[arm]), told.loss(other, kind + done[arm]))
        called = "A monotone mlp" if arm == MONOTONE else CALLED[arm]
        for manner, attack in (("iterative", "HotFlip"), ("query", "an attack without gradients")):
            less(f"{called} shields against {attack}, beside {other}", *(told.flipped(a, manner) for a in (arm, other)))
        text = f"{arm} predicts worse than {other} before anything is done to it"
        found.append(tested(text, told.loss(arm, "nothing"), told.loss(other, "nothing"), NATS, text, direction=1))
    return decided(found)


def notes(told: Told) -> list[str]:
    said = [
        "Harm is the rise of the loss on held-out text (poison) or on the unchanged target (flips) over the same arm before, in "
        "nats a token; arms are compared in harm. A model that is bad already has less to lose: so it is also asked whether it "
        "predicts better after the poison.",
        "Poison trains what can be trained: all weights, or, beside codes, adapters; the plain arm with the same adapters stands "
        "against those. A monotone model is released before it is poisoned: a constraint scales each update by the size of "
        "its weight.",
    ]
    if told.study.subject == "smollm2":
        said.append("SmolLM2's weights lie on a grid of four bits already: what quantising does is understated.")
    return said
