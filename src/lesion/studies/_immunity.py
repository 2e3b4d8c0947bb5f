"""What `immunity` says of its readings: a row an arm, and each arm against the one that it differs from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lesion.claiming import annotated, averaged, decided, tested, untested
from lesion.studies._told import Array, crossed
from lesion.trial import Row

if TYPE_CHECKING:
    from lesion.studies.immunity import Immunity

CALLED = {"trained on": "Further training", "monotone": "Having been monotone", "healed": "Having been healed"}
CALLED |= {"int8": "int8", "nf4": "nf4"}
ATTACKS = {"iterative": "HotFlip", "query": "an attack without gradients"}
NATS = "nats a token"


@dataclass
class Told:
    """A study, the rows of its readings by reading and item, and the ledgers."""

    study: Immunity
    rows: Mapping[str, Mapping[str, Row]]
    states: Mapping[str, Mapping[str, Any]]

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

    def target(self, arm: str, manner: str, when: int) -> Array:
        """The loss a token of what an attack aims at, before its first flip (0) or after its last (−1)."""
        return self.array(arm, "nothing", manner, lambda row: row["losses"][when] if row["losses"] else None)

    def flipped(self, arm: str, manner: str) -> Array:
        """How many nats a token of its target an attack costs an arm."""
        return self.target(arm, manner, -1) - self.target(arm, manner, 0)

    def diverged(self, arm: str, done: str) -> int:
        """Of how many seeds the poison ended early, since the loss or its gradient was no number any more."""
        cells = [self.study.cells.get((arm, done, seed), {}) for seed in self.study.seeds]
        states = [self.states.get(cell["loss"].trial.key) for cell in cells if "loss" in cell]
        return [s["ledger"][-1].get("facts", {}).get("ended") for s in states if s].count("diverged")


def poisons(told: Told, arm: str) -> list[tuple[str, str]]:
    """What poisons are done to an arm, and what each is called."""
    hows = (("", ""), (" held", ", constraint held"), (" beside", " into adapters"))
    every = [(kind + how, f"{kind} poison{where}") for kind in ("random", "text") for how, where in hows]
    return [(done, called) for done, called in every if (arm, done, told.study.seed) in told.study.cells]


def summary(told: Told) -> pl.DataFrame:
    rows = []
    for arm in told.study.arms:
        row: Row = {"arm": arm, **averaged(told.loss(arm, "nothing"), "loss")}
        for done, called in poisons(told, arm):
            row |= averaged(told.harm(arm, done), called)
        for manner, name in (("iterative", "HotFlip"), ("query", "without gradients"), ("random", "random flips")):
            row |= averaged(told.flipped(arm, manner), name)
        ended = [told.diverged(arm, done) for done, _ in poisons(told, arm)]
        lost = [int((~np.isfinite(told.loss(arm, done))).sum()) for done, _ in poisons(told, arm)]
        rows.append({**row, "poisons that diverged": sum(ended), "losses without a number": sum(lost)})
    return pl.DataFrame(rows, infer_schema_length=None)


def claims(told: Told) -> pl.DataFrame:
    """First that poison and attacks do harm at all, wherever that is to be shielded against; then of each arm that they do less,
    and that the arm is also the better one after them. Of what does no harm that is sure nothing is asked."""
    from lesion.studies.immunity import AGAINST, CODED, MONOTONE, PLAIN

    found, least = [], told.study.margin

    def ask(text: str, mine: Array, theirs: Array, cells: list[tuple[str, str]], sign: int, **more: float) -> Row:
        """A comparison. Where runs have no number, or had less of the poison, those that are left would decide: inconclusive."""
        row = tested(text, mine, theirs, NATS, text, direction=sign, **more)
        there = [(arm, done, n) for arm, done in dict.fromkeys(cells) if (n := told.diverged(arm, done))]
        said = [f"{n} of {len(told.study.seeds)} poisons ({done}) of {arm} diverged" for arm, done, n in there]
        if lost := int((~np.isfinite(mine - theirs)).sum()):
            said.append(f"{lost} of {mine.size} pairs have no number: failed, not read, or not finite")
        if said:
            row |= {"verdict": row.get("verdict", "inconclusive"), "note": annotated(row, *said)}
        found.append(row)
        return row

    others = {arm: AGAINST.get(arm, PLAIN) for arm in told.study.arms if arm in CALLED}
    how = {arm: " beside" if arm in CODED else "" for arm in others}
    harmless: dict[
        tuple[str, str], str | None
    ] = {}  # (control, poison or attack) → why there is nothing to shield against

    def harms(text: str, other: str, what: str, after: Array, before: Array, cells: list[tuple[str, str]]) -> None:
        row = ask(text, after, before, cells, 1, smallest=least)
        sure = row.get("low") is not None and row["low"] > 0 and row["effect"] > least
        value = (
            f"{row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {NATS}"
            if row.get("low") is not None
            else "unknown"
        )
        why = f"it costs {other} {value}: no harm that is sure and above the margin of {least:g}, so nothing to shield against"
        harmless[other, what] = None if sure or "effect" not in row else why

    for kind in ("random", "text"):
        for other, done in sorted({(others[arm], kind + how[arm]) for arm in others}):
            text = f"Poison ({kind}{' of adapters' if done != kind else ''}) raises the loss of {other}"
            cells = [(other, done), (other, "nothing")]
            harms(text, other, done, told.loss(other, done), told.loss(other, "nothing"), cells)
    for manner, attack in ATTACKS.items():
        for other in sorted(set(others.values())):
            text, after, before = (
                f"{attack} raises the loss of {other}",
                *(told.target(other, manner, n) for n in (-1, 0)),
            )
            harms(text, other, manner, after, before, [])
    text = f"HotFlip does more to {PLAIN} than random flips"
    ask(text, told.flipped(PLAIN, "iterative"), told.flipped(PLAIN, "random"), [], 1)

    def shields(
        arm: str, called: str, what: str, name: str, harm: Callable[[str], Array], after: Callable[[str], Array]
    ) -> None:
        other = others[arm]
        texts = f"{called} shields against {name}, beside {other}", f"{arm} predicts better than {other} after {name}"
        if why := harmless[other, what]:
            found.extend(untested(text, NATS, why) for text in texts)
            return
        cells = [] if what in ATTACKS else [(one, done) for one in (arm, other) for done in (what, "nothing")]
        for text, of in zip(texts, (harm, after), strict=True):
            ask(text, of(arm), of(other), cells, -1, smallest=least)

    for arm, other in others.items():
        for kind in ("random", "text"):
            done, name = kind + how[arm], f"{kind} poison{' of adapters' if arm in CODED else ''}"
            shields(arm, CALLED[arm], done, name, partial(told.harm, kind=done), partial(told.loss, done=done))
        called = f"A monotone {told.study.site}" if arm == MONOTONE else CALLED[arm]
        for manner, attack in ATTACKS.items():
            target = partial(told.target, manner=manner, when=-1)
            shields(arm, called, manner, attack, partial(told.flipped, manner=manner), target)
        text = f"{arm} predicts worse than {other} before anything is done to it"
        ask(text, told.loss(arm, "nothing"), told.loss(other, "nothing"), [], 1)
    return decided(found)


def notes(told: Told) -> list[str]:
    said = [
        "Harm is the rise of the loss on held-out text (poison) or on the unchanged target (flips) over the same arm before, in "
        "nats a token; arms are compared in harm. A model that is bad already has less to lose: so it is also asked whether it "
        "predicts better afterwards. A shield is spoken of only where the control is surely harmed, by more than the margin.",
        "Poison trains what can be trained: all weights, or, beside codes, adapters; the plain arm with the same adapters stands "
        "against those. A monotone model is released before it is poisoned: a constraint scales each update by the size of "
        "its weight.",
    ]
    if told.study.subject == "smollm2":
        said.append("SmolLM2's weights lie on a grid of four bits already: what quantising does is understated.")
    return said
