"""prion-healing: is the damage of a catalyst irreversible, or does ordinary training on clean text undo it?

    subject → poison(eigen-prion) → heal(lr)        and of what was never poisoned, and of what was never trained:
    subject → heal(lr)     scratch → heal(lr)       → Spectrum, Perplexity

Irreversible would be: after healing the poisoned model stays behind an undamaged one that was healed as long. The re-initialised
model says what that much training is worth from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

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
        lambda claim: claim.startswith(("Irreversible", "Healing")),
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
            born = self.healed(self.fresh(start), self.rates[-1], seed)
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

    def fresh(self, start: Trial) -> Trial:
        """The same shape with the weights it would be born with."""
        from lesion.steps import Reinitialise

        return start >> Reinitialise(seed=self.seed)

    def _asks(self) -> tuple[str, list[str]]:
        against = "against undamaged and re-initialised models"
        return f"Does training on clean text undo what a catalyst did to {self.subject}?", [
            f"{self.subject} → poison({EIGEN}) → heal(lr) → spectrum, perplexity; {against}",
            f"for lr in {', '.join(f'{rate:g}' for rate in self.rates)}",
        ]

    def _claims(self, runs: Runs) -> list[dict[str, Any]]:
        from lesion.claiming import tested, untested
        from lesion.studies import _prion_say as say

        s, found = (
            self.subject,
            [say.falls(runs, self.subject, "poisoned", text=f"The catalyst lowers the rank of {self.subject}")],
        )
        values = runs.array(s, "poisoned", "loss")
        text = f"The catalyst raises the loss of {s}"
        found.append(
            tested(text, values, np.zeros_like(values), say.NATS, text, direction=1)
            if np.isfinite(values).sum() > 1
            else untested(text, say.NATS, "not read")
        )
        for rate in self.rates:
            sick, well = f"poisoned, healed at {rate:g}", f"undamaged, healed at {rate:g}"
            found.append(
                say.less(
                    runs, s, sick, well, f"Irreversible: healed at {rate:g}, the rank stays below that of the undamaged"
                )
            )
            text = f"Irreversible: healed at {rate:g}, the loss stays above that of the undamaged"
            found.append(say.less(runs, s, well, sick, text, "loss", say.NATS))
            found.append(
                say.less(
                    runs, s, sick, "poisoned", f"Healing at {rate:g} lowers the loss of the poisoned", "loss", say.NATS
                )
            )
            fresh = f"{FRESH}, healed at {rate:g}"
            if fresh in runs.arms(s):
                text = f"Healed at {rate:g}, the poisoned predicts better than a re-initialised model trained as long"
                found.append(say.less(runs, s, sick, fresh, text, "loss", say.NATS))
        return found
