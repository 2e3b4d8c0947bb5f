"""prion-placebo: is a catalyst along flat directions special, or does any garbage collapse a model?

    subject → poison(eigen-prion | loss-ascent | random tokens | real text | shuffled text | Gaussian inputs)
            → Spectrum, Perplexity                                     for seed, arms paired by seed

Described: the catalyst collapses rank, Gaussian noise and random text do nothing. The published run's random text was the
evaluation's own sentences, and its treatment and its controls had different optimizers; here all arms share everything but what
is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import polars as pl
from pydantic import Field, model_validator

from lesion.studies._prion import ASCENT, EIGEN, Prion, Runs

POISONS = "random-repeated", "random-fresh", "text-repeated", "text-fresh", "shuffled", "gaussian"
SMALL: dict[str, Any] = {
    "second": "smollm2",
    "second_runs": 10,
    "second_arms": (EIGEN, "random-repeated", "text-fresh"),
}
SMALL |= {"second_site": "attention@28-29+mlp@28-29", "second_steps": 30, "second_iterations": 10}
DESCRIBED = (
    (
        "specificity",
        "the catalyst collapses rank, Gaussian noise and random text do not (about 0 %)",
        "treatment 6.14, Gaussian 3.07, text 1.50 (absolute; treatment against Gaussian p .22)",
        lambda claim: "for" if claim.startswith(f"{EIGEN} lowers") or "as it was" in claim else "",
    ),
    (
        "alignment",
        "a catalyst aligned with null directions of the Hessian",
        "62 to 64 of 64 tokens were the random ones it began with",
        lambda claim: "for" if claim.startswith("Catalysts of") else "",
    ),
)


class PrionPlacebo(Prion):
    """Does a catalyst aligned with flat directions lower the rank more than random tokens, text and noise?"""

    files = ("placebo", "placebo_comparison")
    claimed = DESCRIBED

    arms: tuple[str, ...] = Field(
        default=(EIGEN, ASCENT, *POISONS), min_length=2, description=f"{EIGEN}, {ASCENT}, {', '.join(POISONS)}"
    )
    second: str = Field(default="", description="a further model, with fewer runs")
    second_runs: int = Field(default=3, ge=1, description="its runs")
    second_arms: tuple[str, ...] = Field(default=(EIGEN, "random-repeated"), description="its arms")
    second_site: str = Field(default="attention+mlp", description="matrices whose curvature is asked about there")
    second_steps: int = Field(default=100, ge=1, description="steps of poison there")
    second_iterations: int = Field(default=60, ge=0, description="of the search for a string there")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults(given), **(SMALL if given.get("tier") == "small" else {})}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        known = (EIGEN, ASCENT, *POISONS)
        if odd := [arm for arm in (*self.arms, *self.second_arms) if arm not in known]:
            raise ValueError(f"no arm {odd[0]!r}; there are: {', '.join(known)}")
        if EIGEN not in self.arms:
            raise ValueError(f"the question is about {EIGEN!r}, which is not among the arms")
        return self

    @cached_property
    def _runs(self) -> Runs:
        found = Runs(asked=self.asked())
        self._add(found, self.subject, self.arms, self.seeds, {}, {})
        if self.second:
            seeds = self.seeds[: self.second_runs]
            curved: dict[str, Any] = {"site": self.second_site, "iterations": self.second_iterations}
            curved["documents"] = max(1, self.curved // 2)
            self._add(found, self.second, self.second_arms, seeds, curved, {"steps": self.second_steps})
        return found

    def _add(
        self, found: Runs, subject: str, arms: Any, seeds: Any, curved: dict[str, Any], poison: dict[str, Any]
    ) -> None:
        start = self.start(subject)
        searched = {name: value for name, value in curved.items() if name != "iterations"}
        found.curved[subject] = self.steep(start, **searched)
        for arm in arms:
            for seed in seeds:
                objective = {EIGEN: self.objective, ASCENT: "loss"}.get(arm)
                string = self.catalyst(start, seed, objective, **curved) if objective else None
                trial = self.poisoned(start, arm, seed, string, **poison)
                found.add((subject, arm, seed), start, trial, string)

    def _asks(self) -> tuple[str, list[str]]:
        sentence = f"{self.subject} → poison(arm, {self.steps} steps of {self.length} tokens) → spectrum, perplexity"
        return f"Does {EIGEN} lower the rank of {self.subject} more than any garbage does?", [
            sentence,
            f"for arm in {', '.join(self.arms)}",
        ]

    def _tables(self, runs: Runs) -> dict[str, pl.DataFrame]:
        from lesion.studies import _prion_strings as strings

        return {"how flat the strings are": strings.alignment(runs), "steep directions": strings.steepest(runs)}

    def _claims(self, runs: Runs) -> list[dict[str, Any]]:
        from lesion.studies import _prion_say as say
        from lesion.studies import _prion_strings as strings

        found = []
        for subject in runs.subjects:
            here = runs.arms(subject)
            found += say.collapses(runs, subject, EIGEN)
            for arm in here:
                if arm != EIGEN:
                    text = f"{EIGEN} lowers the rank of {subject} more than {arm}"
                    found.append(say.less(runs, subject, EIGEN, arm, text, given=(EIGEN, "rank", -1)))
            for arm in here:
                if arm in ("gaussian", "text-fresh", "text-repeated"):
                    found.append(say.nothing(runs, subject, arm, self.margin))
            found += strings.flatter(runs, subject)
        return found
