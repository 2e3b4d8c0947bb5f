"""prion-shield: do codes of eight or four bits protect a model from a catalyst, or is it the adapters that come with them?

    subject → [precision] → [lora] → poison(eigen-prion) → [precision] → Spectrum, Perplexity

What was described compares full training in sixteen bits with adapters on codes, so two things differ at once. Here they are
crossed: full and adapters in bfloat16, adapters on int8 and on nf4; and a fully poisoned model that is coded afterwards. All are
poisoned with the string that was found on the model itself, in float32.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

from pydantic import Field, model_validator

from lesion.studies._prion import EIGEN, Prion, Runs
from lesion.trial import Trial

ARMS: dict[str, tuple[tuple[str, ...], bool, str]] = {  # precisions before, adapters, precision after
    "float32 full": ((), False, ""),
    "bf16 full": (("bfloat16",), False, ""),
    "bf16 lora": (("bfloat16",), True, ""),
    "int8 lora": (("bfloat16", "int8"), True, ""),  # what is not coded is bfloat16 in all of these
    "nf4 lora": (("bfloat16", "nf4"), True, ""),
    "full, then int8": ((), False, "int8"),
    "full, then nf4": ((), False, "nf4"),
}
NOTE = (
    "Each arm is compared with its own model before (of coded ones the coded model), so what is said is what the poison did, and "
    "not what the precision did. Adapters have a learning rate of their own: a shield of adapters is one at these rates."
)
DESCRIBED = (
    (
        "quantisation shield",
        "fp16 collapses, 8 bits show minor damage, 4 bits none",
        "int8 0.46, 4 bits 3.52 (absolute; fp4, not nf4; adapters against full training)",
        lambda claim: (
            "for"
            if claim.startswith(("As described", "int8 shields", "nf4 shields"))
            else "against"
            if claim.startswith("Adapters shield")
            else ""
        ),
    ),
)


class PrionShield(Prion):
    """Do codes protect, at equal adapters; do adapters protect, at equal precision; does coding afterwards undo anything?"""

    files = ("shield", "shield_matrix")
    claimed = DESCRIBED
    noted = (NOTE,)

    arms: tuple[str, ...] = Field(default=tuple(ARMS), min_length=2, description=", ".join(ARMS))
    rank: int = Field(default=8, ge=1, description="of the adapters")
    alpha: float = Field(default=16.0, gt=0, description="of the adapters: they count alpha/rank times")
    lora_lr: float = Field(default=1e-3, gt=0, description="learning rate of adapters, which start at zero")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if odd := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"no arm {odd[0]!r}; there are: {', '.join(ARMS)}")
        return self

    @cached_property
    def _runs(self) -> Runs:
        from lesion.steps import Lora, Precision

        found, start = Runs(asked=self.asked()), self.start(self.subject)
        for arm in self.arms:
            first, adapters, then = ARMS[arm]
            before: Trial = start
            for dtype in first:
                before = before >> Precision(dtype=dtype)
            rate = {"lr": self.lora_lr} if adapters else {}
            coded = start >> Precision(dtype=then) if then else before
            for seed in self.seeds:
                string = self.catalyst(start, seed)
                held = (
                    before >> Lora(rank=self.rank, alpha=self.alpha, site=self.site, seed=seed) if adapters else before
                )
                trial = self.poisoned(held, EIGEN, seed, string, **rate)
                found.add((self.subject, arm, seed), coded, trial >> Precision(dtype=then) if then else trial, string)
        return found

    def _asks(self) -> tuple[str, list[str]]:
        sentence = f"[precision] → [lora({self.rank})] → poison({EIGEN}) → [precision] → spectrum, perplexity"
        return f"Do codes of eight or four bits protect {self.subject} from a catalyst?", [
            f"{self.subject} → {sentence}",
            f"for arm in {', '.join(self.arms)}",
        ]

    def _claims(self, runs: Runs) -> list[dict[str, Any]]:
        from lesion.studies import _prion_say as say

        s = self.subject
        found = [claim for arm in self.arms if arm.endswith("full") for claim in say.collapses(runs, s, arm)]
        pairs = (
            ("bf16 lora", "int8 lora", "int8 shields: adapters on it lower the rank less than on bfloat16"),
            ("bf16 lora", "nf4 lora", "nf4 shields: adapters on it lower the rank less than on bfloat16"),
            ("int8 lora", "nf4 lora", "nf4 shields more than int8"),
            ("bf16 full", "bf16 lora", "Adapters shield: full training lowers the rank more, both in bfloat16"),
            (
                "bf16 full",
                "nf4 lora",
                "As described: full training in 16 bits lowers the rank more than adapters on nf4",
            ),
            (
                "bf16 full",
                "int8 lora",
                "As described: full training in 16 bits lowers the rank more than adapters on int8",
            ),
            ("float32 full", "full, then int8", "Coding in int8 afterwards brings rank back"),
            ("float32 full", "full, then nf4", "Coding in nf4 afterwards brings rank back"),
        )
        for one, other, text in pairs:
            if {one, other} <= set(self.arms):
                found.append(say.less(runs, s, one, other, text, given=(one, "rank", -1)))
        for arm in self.arms:
            if arm.endswith("lora"):
                found.append(say.nothing(runs, s, arm, self.margin))
        if {"bf16 full", "bf16 lora"} <= set(self.arms):
            text = "Full training raises the loss more than adapters do, both in bfloat16"
            found.append(say.more(runs, s, "bf16 full", "bf16 lora", text, given=("bf16 full", "loss", 1)))
        return found
