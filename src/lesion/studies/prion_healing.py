"""prion-healing: is the damage of a catalyst irreversible, or does ordinary training on clean text undo it?

    subject → poison(eigen-prion) → heal(lr)        and of what was never poisoned, and of what was never trained:
    subject → heal(lr)     scratch → heal(lr)       → Spectrum, Perplexity

Irreversible would be: after healing the poisoned model stays behind an undamaged one that was healed as long. The re-initialised
model says what that much training is worth from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from lesion.studies._prion import EIGEN, Prion, Runs
from lesion.trial import Trial

FRESH = "re-initialised"
TIERS: dict[str, dict[str, Any]] = {
    "small": {"heal_steps": 100, "heal_length": 64},
    "smoke": {"heal_steps": 3, "heal_length": 24},
}
DESCRIBED = (
    (
        "irreversibility",
        "the collapse is not undone",
        "healing moved rank by 0 to 0.2 %",
        lambda claim: (
            "for" if claim.startswith("Irreversible") else "against" if claim.startswith("Reversible") else ""
        ),
    ),
)


class PrionHealing(Prion):
    """Does healing close the gap in rank and in loss, and at which learning rate?"""

    files = ("healing", "healing_comparison")
    claimed = DESCRIBED

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults(given), **TIERS.get(given.get("tier", "full"), {})}

    rates: tuple[float, ...] = Field(default=(3e-5, 3e-4), min_length=1, description="learning rates of healing")
    heal_steps: int = Field(default=200, ge=1, description="steps of healing")
    heal_batch: int = Field(default=4, ge=1, description="rows of a step")
    heal_length: int = Field(default=128, ge=2, description="tokens of a row")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if len({f"{rate:g}" for rate in self.rates}) < len(self.rates):
            raise ValueError(f"rates must differ in what is printed of them, and these do not: {self.rates}")
        return self

    @cached_property
    def _runs(self) -> Runs:
        found, start = Runs(asked=self.asked()), self.start(self.subject)
        for seed in self.seeds:
            string = self.catalyst(start, seed)
            sick = self.poisoned(start, EIGEN, seed, string)
            found.add((self.subject, "poisoned", seed), start, sick, string)
            for rate in self.rates:
                found.add(
                    (self.subject, f"poisoned, healed at {rate:g}", seed), start, self.healed(sick, rate, seed), string
                )
                found.add((self.subject, f"undamaged, healed at {rate:g}", seed), start, self.healed(start, rate, seed))
            born = self.healed(self.fresh(start, seed), self.rates[-1], seed)
            found.add((self.subject, f"{FRESH}, healed at {self.rates[-1]:g}", seed), start, born)
        return found

    def healed(self, trial: Trial, rate: float, seed: int) -> Trial:
        from lesion.steps import Heal

        how: dict[str, Any] = {
            "corpus": self.text,
            "steps": self.heal_steps,
            "batch": self.heal_batch,
            "length": self.heal_length,
        }
        how |= {"lr": rate, "warmup": max(1, self.heal_steps // 20), "documents": "joined", "precision": self.precision}
        return trial >> Heal(**how, seed=seed).pin()

    def fresh(self, start: Trial, seed: int) -> Trial:
        """The same shape with the weights it would be born with."""
        from lesion.steps import Reinitialise

        return start >> Reinitialise(seed=seed)

    def _asks(self) -> tuple[str, list[str]]:
        against = "against undamaged and re-initialised models"
        return f"Does training on clean text undo what a catalyst did to {self.subject}?", [
            f"{self.subject} → poison({EIGEN}) → heal(lr) → spectrum, perplexity; {against}",
            f"for lr in {', '.join(f'{rate:g}' for rate in self.rates)}",
        ]

    def _claims(self, runs: Runs) -> list[dict[str, Any]]:
        from lesion.studies import _prion_say as say

        s, sick = self.subject, "poisoned"
        found = [
            *say.collapses(runs, s, sick, f"The catalyst lowers the rank of {s}"),
            say.falls(runs, s, sick, "loss", f"The catalyst raises the loss of {s}", 1),
        ]
        for rate in self.rates:
            mended, well, fresh = (f"{what}, healed at {rate:g}" for what in (sick, "undamaged", FRESH))
            text = f"Irreversible: healed at {rate:g}, the rank stays below that of the undamaged"
            found.append(say.less(runs, s, mended, well, text, given=(sick, "rank", -1)))
            text = f"Irreversible: healed at {rate:g}, the loss stays above that of the undamaged"
            found.append(say.more(runs, s, mended, well, text, given=(sick, "loss", 1)))
            text = f"Reversible: healed at {rate:g}, the rank is that of the undamaged, within {self.margin:g} %"
            found.append(say.alike(runs, s, mended, well, text, self.margin))
            text = f"Reversible: healing at {rate:g} brings the rank of the poisoned nearer to that of the undamaged"
            apart = np.abs(runs.array(s, mended, "rank") - runs.array(s, well, "rank"))
            before = np.abs(runs.array(s, sick, "rank"))  # in per cent of the undamaged's
            found.append(say.compared(runs, s, [sick, mended, well], text, apart, before, say.PERCENT, -1))
            text = f"Healing at {rate:g} lowers the loss of the poisoned more than that of the undamaged"
            fell, anyway = runs.array(s, mended, "loss") - runs.array(s, sick, "loss"), runs.array(s, well, "loss")
            found.append(say.compared(runs, s, [sick, mended, well], text, fell, anyway, say.NATS, -1))
            if fresh in runs.arms(s):
                text = f"Healed at {rate:g}, the poisoned predicts better than a re-initialised model trained as long"
                found.append(say.less(runs, s, mended, fresh, text, "loss"))
        return found
