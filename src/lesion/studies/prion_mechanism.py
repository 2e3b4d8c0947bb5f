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
NOTE = (
    "Amplification is ln[(‖PΔ‖/‖Pg‖)/(‖Δ−PΔ‖/‖g−Pg‖)], P the projection off the steep directions, g the catalyst's "
    "gradient before: 0 where flat directions went as far as their share of the gradient. With fresh moments Adam's first step "
    "is the sign of the gradient, so it moves every coordinate alike whatever the curvature."
)
DESCRIBED = (
    (
        "Adam amplification",
        "AdamW collapses the model, SGD leaves it immune",
        "SGD 2.37 (absolute); its AdamW was Adafactor",
        lambda claim: "AdamW lowers" in claim or "sgd leaves" in claim,
    ),
    (
        "mechanism",
        "updates pile up in flat directions, since Adam divides by a tiny √v",
        "never measured",
        lambda claim: "favours flat" in claim or "moments" in claim,
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
        arms = {name: OPTIMIZERS[name] for name in self.optimizers}
        for name, rate in (("adamw", self.lr), ("sgd", self.sgd_lr)):
            how = {"lr": rate, "steps": self.matched_steps, "displacement": self.displacement, "clip": 1.0}
            arms[name + MATCHED] = {"optimizer": name, **how}
        for arm, how in arms.items():
            for seed in self.seeds:
                string = self.catalyst(start, seed)
                trial = self.poisoned(start, EIGEN, seed, string, **how)
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
        return {"where the weights went": gains(runs)}

    def _claims(self, runs: Runs) -> list[dict[str, Any]]:
        from lesion.claiming import tested, untested
        from lesion.studies import _prion_say as say

        s = self.subject
        found = [
            say.falls(runs, s, "adamw", text="AdamW lowers the rank"),
            say.nothing(runs, s, "sgd", self.margin),
            say.less(runs, s, "adamw", "sgd", "AdamW lowers the rank more than SGD at the same rate"),
        ]
        text = "AdamW lowers the rank more than SGD at the same displacement"
        found.append(say.less(runs, s, "adamw" + MATCHED, "sgd" + MATCHED, text))
        if "adamw warm" in self.optimizers:
            found.append(say.less(runs, s, "adamw", "adamw warm", "Fresh moments lower the rank more than warm ones"))
        for arm in (*self.optimizers, "adamw" + MATCHED, "sgd" + MATCHED):
            text, unit = f"{arm} favours flat directions", "ln of the ratio of gains, flat against steep"
            values = np.array(
                [[np.nan if (v := _all(runs, arm, seed).get("amplification")) is None else v for seed in self.seeds]]
            )
            if np.isfinite(values).sum() < 2:
                found.append(untested(text, unit, "fewer than two runs have it"))
            else:
                found.append(tested(text, values, np.zeros_like(values), unit, text, direction=1, smallest=0.1))
        return found


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
