"""prion-mechanism: is it Adam? The same catalyst under several optimizers, and where each of them moves a model.

    subject → poison(eigen-prion, optimizer) → Spectrum, Perplexity, Gain, Spectrum of the change

at the same learning rate, as described; and at the same displacement, since a rate means another distance for each optimizer.
`gain` asks the mechanism itself: did flat directions go farther than their share of the gradient?
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from lesion.studies._prion import EIGEN, Prion, Runs

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adam": {"optimizer": "adam"},
    "adamw warm": {"optimizer": "adamw", "warm": 20},
    "adafactor": {"optimizer": "adafactor"},
    "signsgd": {"optimizer": "signsgd"},
    "sgd": {"optimizer": "sgd"},
    "sgd-momentum": {"optimizer": "sgd-momentum"},
}
MATCHED = " matched"  # at equal displacement
RANDOM = "adamw, random string"  # the null of what adamw does with a string that was sought
FINER, APART = (
    5,
    0.05,
)  # its rate is so much smaller, so that no step goes far beyond; what is farther apart is not equal
NOTE = (
    "Amplification is ln[(‖PΔ‖/‖Pg‖)/(‖Δ−PΔ‖/‖g−Pg‖)], P the projection off the steep directions, g the catalyst's gradient "
    "before: 0 where flat directions went as far as their share of the gradient. The catalyst was chosen for a flat one, and "
    "what is chosen falls back, so adamw is compared with itself on random strings too. With fresh moments Adam's first step is "
    "the sign of the gradient, so it moves every coordinate alike whatever the curvature."
)
DESCRIBED = (
    (
        "Adam amplification",
        "AdamW collapses the model, SGD leaves it immune",
        "SGD 2.37 (absolute); its AdamW was Adafactor",
        lambda claim: "for" if claim.startswith(("AdamW lowers", "sgd leaves")) else "",
    ),
    (
        "mechanism",
        "updates pile up in flat directions, since Adam divides by a tiny √v",
        "never measured",
        lambda claim: (
            "for"
            if claim.startswith(("AdamW favours", "adamw favours", "Fresh moments"))
            else "against"
            if claim.startswith(("sgd favours", "sgd matched favours"))
            else ""
        ),
    ),
)


class PrionMechanism(Prion):
    """Does Adam lower the rank where SGD does not, at equal rates and equal displacement, and does it favour flat directions?"""

    files = ("mechanism", "mechanism_comparison")
    called = ("optimizer", "run")
    claimed = DESCRIBED
    noted = (NOTE,)

    optimizers: tuple[str, ...] = Field(
        default=tuple(name for name in OPTIMIZERS if name != "adam"),  # which is adamw, where nothing decays
        min_length=2,
        description=", ".join(OPTIMIZERS),
    )
    displacement: float = Field(
        default=0.02, gt=0, description="relative displacement at which matched arms stop (adamw matched, sgd matched)"
    )
    matched_steps: int = Field(default=400, ge=1, description="most steps of a matched arm")
    sgd_lr: float = Field(
        default=0.1, gt=0, description="learning rate of sgd at matched displacement; clipped to norm 1"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if odd := [name for name in self.optimizers if name not in OPTIMIZERS]:
            raise ValueError(f"no optimizer {odd[0]!r} here; there are: {', '.join(OPTIMIZERS)}")
        if not {"adamw", "sgd"} <= set(self.optimizers):
            raise ValueError("the question is about adamw and sgd, and one of them is not among the optimizers")
        return self

    @cached_property
    def _runs(self) -> Runs:
        from lesion.measures import Gain

        found, start = Runs(asked=self.asked()), self.start(self.subject)
        change = self.asked(start)["change"]
        found.curved[self.subject] = self.steep(start)
        arms = {name: OPTIMIZERS[name] for name in self.optimizers}
        for name, rate in (("adamw", self.lr / FINER), ("sgd", self.sgd_lr)):
            how = {"lr": rate, "steps": self.matched_steps, "displacement": self.displacement, "clip": 1.0}
            arms[name + MATCHED] = {"optimizer": name, **how}
        for seed in self.seeds:
            strings = {arm: self.catalyst(start, seed) for arm in arms}
            strings[RANDOM] = self.catalyst(start, seed, iterations=0)  # what a search would begin with
            for arm, string in strings.items():
                trial = self.poisoned(start, EIGEN, seed, string, **arms.get(arm, OPTIMIZERS["adamw"]))
                gain = Gain(reference=start, catalyst=string, **self.curvature()).pin()
                found.add((self.subject, arm, seed), start, trial, string, gain=gain, change=change)
        return found

    def _asks(self) -> tuple[str, list[str]]:
        again = f"adamw and sgd once more at displacement {self.displacement:g}"
        return f"Is it Adam that lets a catalyst lower the rank of {self.subject}?", [
            f"{self.subject} → poison({EIGEN}, optimizer) → spectrum, perplexity, gain",
            f"for optimizer in {', '.join(self.optimizers)}; {again}",
        ]

    def _tables(self, runs: Runs) -> dict[str, pl.DataFrame]:
        from lesion.studies._prion_strings import steepest

        return {"where the weights went": gains(runs), "steep directions": steepest(runs)}

    def _claims(self, runs: Runs) -> list[dict[str, Any]]:
        from lesion.claiming import untested
        from lesion.studies import _prion_say as say

        s, unit = self.subject, "ln of the ratio of gains, flat against steep"
        found = [
            *say.collapses(runs, s, "adamw", "AdamW lowers the rank"),
            say.nothing(runs, s, "sgd", self.margin),
            say.less(
                runs,
                s,
                "adamw",
                "sgd",
                "AdamW lowers the rank more than SGD at the same rate",
                given=("adamw", "rank", -1),
            ),
        ]
        one, other = "adamw" + MATCHED, "sgd" + MATCHED
        text = "AdamW lowers the rank more than SGD at the same displacement"
        if (why := self._unequal(runs)) is not None:
            found.append(untested(text, say.PERCENT, why))
        else:
            found.append(say.less(runs, s, one, other, text, given=(one, "rank", -1)))
        if "adamw warm" in self.optimizers:
            text = "Fresh moments lower the rank more than warm ones"
            found.append(say.less(runs, s, "adamw", "adamw warm", text, given=("adamw", "rank", -1)))
        for arm in (*self.optimizers, one, other):
            values = self._amplified(runs, arm)
            text = f"{arm} favours flat directions"
            found.append(say.compared(runs, s, [arm], text, values, np.zeros_like(values), unit, 1))
        text = "adamw favours flat directions more with the catalyst than with a random string"
        one_string, another = (self._amplified(runs, arm) for arm in ("adamw", RANDOM))
        found.append(say.compared(runs, s, ["adamw", RANDOM], text, one_string, another, unit, 1))
        for a, b, where in (("adamw", "sgd", "the same rate"), (one, other, "the same displacement")):
            text = f"AdamW favours flat directions more than SGD at {where}"
            if a == one and why is not None:
                found.append(untested(text, unit, why))
                continue
            found.append(
                say.compared(runs, s, [a, b], text, self._amplified(runs, a), self._amplified(runs, b), unit, 1)
            )
        return found

    def _amplified(self, runs: Runs, arm: str) -> Any:
        values = [_all(runs, arm, seed).get("amplification") for seed in self.seeds]
        return np.array([[np.nan if value is None else value for value in values]], float)

    def _unequal(self, runs: Runs) -> str | None:
        """Why the matched arms are not at the same displacement; None where all their runs are."""
        for seed in self.seeds:
            found = [runs.run((self.subject, name + MATCHED, seed)) for name in ("adamw", "sgd")]
            if lost := [row["arm"] for row in found if row["ended"] != "displacement"]:
                return f"{lost[0]} did not come as far as {self.displacement:g} in {self.matched_steps} steps (seed {seed})"
            a, b = (row["displacement"] for row in found)
            if abs(a / b - 1) > APART:
                return f"the displacements of seed {seed} are {a:.3g} and {b:.3g}, farther apart than {APART:.0%}"
        return None


def _all(runs: Runs, arm: str, seed: int) -> dict[str, Any]:
    [subject] = runs.subjects
    return dict(runs.extra((subject, arm, seed), "gain").get("all", {}))


def gains(runs: Runs) -> pl.DataFrame:
    """Means over runs: how far, how flat the way and the gradient were, and the rank of the change."""
    from lesion.studies._prion_say import _mean

    rows = []
    [subject] = runs.subjects
    for arm in runs.arms(subject):
        seeds = runs.seeds(subject, arm)
        found = [_all(runs, arm, seed) for seed in seeds]
        row: dict[str, Any] = {"optimizer": arm}
        for name, label in (
            ("displacement", "‖ΔW‖"),
            ("flat_moved", "flat share of ΔW"),
            ("flat_pulled", "flat share of g"),
            ("amplification", "amplification"),
        ):
            row[label] = _mean([one.get(name) for one in found])
        changes = [r["effective_rank"] for seed in seeds for r in runs.extra((subject, arm, seed), "change").values()]
        row["effective rank of ΔW, mean over matrices"] = _mean(changes)
        row["runs"] = len(seeds)
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)
