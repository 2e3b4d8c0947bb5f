"""immunity: does a model that was made monotone, healed or quantised resist poison and attacks better?

    subject                                       plain
    subject → heal                                trained on: as long as the next two, the control of both
    subject → constrain → heal                    monotone
    subject → noise → heal                        healed
    subject → precision(int8)                     quantised; poison then trains adapters beside the codes

    arm → [release | lora] → poison(random | text) → Perplexity, against the same arm before
    arm                                           → Hotflip (iterative; as many trials without gradients; random flips)

A constraint scales every update by the size of its weight, which alone would shield; so a monotone model is released before
it is poisoned, and "held" poison of the constrained one stands beside. For arm × seed. Every arm is compared with itself
before, and the arms in what they lost by that, document by document.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.study import Answer, Study, refuse_encoders
from lesion.trial import Measure, Reading, Trial

if TYPE_CHECKING:
    from lesion.store import Store

PLAIN, TRAINED, MONOTONE = "plain", "trained on", "monotone"
ARMS = (PLAIN, TRAINED, MONOTONE, "healed", "int8", "nf4")
CODED = ("int8", "nf4")
AGAINST = {
    MONOTONE: TRAINED,
    "healed": TRAINED,
}  # which was trained for as long; the others are compared with the plain one
POISONS = {"random": "random-repeated", "text": "text-repeated"}
TIERS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"subject": "tiny", "corpus": "novels", "held_out": "austen", "documents": 24, "tokens": 128}
    | {"steps": 240, "batch": 8, "length": 96, "lr": 4e-4, "poison_steps": 60, "poison_lr": 3e-4, "attacked": 24}
    | {"flips": 4, "candidates": 16, "repeats": 5, "precision": "bfloat16"},
    "smoke": {"subject": "tiny-llama", "corpus": "novels", "held_out": "austen", "documents": 3, "tokens": 32}
    | {"steps": 3, "batch": 2, "length": 24, "lr": 1e-2, "poison_steps": 3, "poison_length": 12, "poison_lr": 1e-2}
    | {"attacked": 3, "prompt": 12, "target": 6, "flips": 2, "candidates": 4, "repeats": 2, "precision": "float32"},
}


class Immunity(Study):
    """Poison and attacks on monotone, healed and quantised models."""

    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="Pythia on a card, tiny on two cores in half an hour, or seconds"
    )
    subject: str = Field(default="EleutherAI/pythia-410m", description="model that is made immune, or not")
    arms: tuple[str, ...] = Field(default=ARMS, min_length=2, description=", ".join(ARMS))
    site: str = Field(default="mlp", description="what is made monotone")
    sigma: float = Field(default=0.2, gt=0, description="noise that is healed")
    corpus: str = Field(default="novels", description="what heals")
    held_out: str = Field(default="austen", description="what is read and attacked")
    documents: int = Field(default=32, ge=2, description="its first so many documents")
    tokens: int = Field(default=256, ge=16, description="first so many tokens of each")
    steps: int = Field(default=300, ge=1, description="steps of every healing")
    batch: int = Field(default=8, ge=1, description="rows of a step")
    length: int = Field(default=256, ge=8, description="tokens of a row")
    lr: float = Field(default=1e-4, gt=0, description="learning rate of healing")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of training")
    poison_steps: int = Field(default=100, ge=1, description="steps of poison: the dose")
    poison_length: int = Field(default=64, ge=2, description="tokens of its string")
    poison_lr: float = Field(
        default=1e-4, gt=0, description="its learning rate; the same for all weights and for adapters"
    )
    rank: int = Field(default=8, ge=1, description="of the adapters beside codes, and of those of the adapted control")
    attacked: int = Field(default=32, ge=2, description="documents that are attacked")
    prompt: int = Field(default=48, ge=2, description="tokens of each that may be flipped")
    target: int = Field(default=24, ge=1, description="tokens after them that are scored")
    flips: int = Field(default=8, ge=1, description="tokens that are flipped at most")
    candidates: int = Field(default=32, ge=1, description="flips that are tried for each")
    margin: float = Field(default=0.05, gt=0, description="nats a token: a smaller difference is called none")
    repeats: int = Field(default=3, ge=1, description="seeds of everything: seed, seed + 1, …")
    seed: int = Field(default=0, ge=0, description="first seed")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return TIERS.get(given.get("tier", "full"), {})

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if odd := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"no arm {odd[0]!r}; there are: {', '.join(ARMS)}")
        if PLAIN not in self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(
                f"arms differ from each other, and {PLAIN!r} is one of them: it is what others are compared with"
            )
        if alone := [arm for arm in self.arms if AGAINST.get(arm, PLAIN) not in self.arms]:
            raise ValueError(f"{alone[0]!r} is compared with {AGAINST[alone[0]]!r}, which must be among the arms too")
        return self

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.repeats)

    def arm(self, name: str, seed: int) -> Trial:
        """An arm before anything is done to it."""
        from lesion.steps import Constrain, Heal, Noise, Precision
        from lesion.subjects import precise

        start = Trial(subject=precise(self.subject)).pin()
        how: dict[str, Any] = {"corpus": self.corpus, "steps": self.steps, "batch": self.batch, "length": self.length}
        how |= {"lr": self.lr, "warmup": max(1, self.steps // 10), "precision": self.precision, "seed": seed}
        heal = Heal(**how, documents="joined").pin()
        match name:
            case "trained on":
                return start >> heal
            case "monotone":
                return start >> Constrain(site=self.site, init="signature") >> heal
            case "healed":
                return start >> Noise(site="all", sigma=self.sigma, seed=seed) >> heal
            case "int8" | "nf4":
                return start >> Precision(dtype=name)
        return start

    @cached_property
    def cells(self) -> dict[tuple[str, str, int], dict[str, Reading]]:
        """(arm, what is done to it, seed) → its readings: "nothing", "random" and "text" poison, of an arm of codes and of its
        control, the plain one with the same adapters, "random beside" and "text beside"."""
        from lesion.measures import Hotflip
        from lesion.steps import Lora, Poison, Release

        found: dict[tuple[str, str, int], dict[str, Reading]] = {}
        how: dict[str, Any] = {"documents": self.attacked, "prompt": self.prompt, "target": self.target}
        how |= {"flips": self.flips, "candidates": self.candidates, "corpus": self.held_out}
        dose: dict[str, Any] = {"steps": self.poison_steps, "length": self.poison_length, "lr": self.poison_lr}
        for name, seed in itertools.product(self.arms, self.seeds):
            trial = self.arm(name, seed)
            found[name, "nothing", seed] = {"loss": Reading(trial=trial, measure=self._loss)}
            for manner in ("iterative", "query", "random"):
                attack = Hotflip(manner=manner, seed=seed, **how).pin()
                found[name, "nothing", seed][manner] = Reading(trial=trial, measure=attack)
            adapted = Lora(rank=self.rank, seed=seed)
            for kind, arm in POISONS.items():
                poison = Poison(arm=arm, **dose, seed=seed, text=self.corpus, precision=self.precision).pin()
                if name == MONOTONE:
                    found[name, f"{kind} held", seed] = {"loss": Reading(trial=trial >> poison, measure=self._loss)}
                if name not in CODED:
                    free = trial >> Release() if name == MONOTONE else trial
                    found[name, kind, seed] = {"loss": Reading(trial=free >> poison, measure=self._loss)}
                if name in CODED or name == PLAIN:
                    there = Reading(trial=trial >> adapted >> poison, measure=self._loss)
                    found[name, f"{kind} beside", seed] = {"loss": there}
        return found

    @cached_property
    def _loss(self) -> Measure:
        from lesion.measures import Perplexity

        t = self.tokens
        return Perplexity(corpus=self.held_out, documents=self.documents, tokens=t, window=t, stride=t // 2).pin()

    def readings(self) -> list[Reading]:
        return list({r.key: r for cell in self.cells.values() for r in cell.values()}.values())

    def check(self, store: Store) -> None:
        """Looks at the outline: is it a causal model with what is to be made monotone, and a context for what it reads?"""
        from lesion.likelihood import context_of
        from lesion.steps import Constrain
        from lesion.subjects import precise
        from lesion.texts import apart

        apart(self.corpus, self.held_out)
        model = precise(self.subject).outline()
        refuse_encoders(model, self.subject)
        longest = max(self.prompt + self.target, self.poison_length, self.length)
        if (context := context_of(model.config.get_text_config())) and longest > context:
            raise ValueError(
                f"a prompt of {self.prompt} tokens with a target of {self.target}, a poison of {self.poison_length} or a row of "
                f"{self.length} is longer than the context of {self.subject}, {context}"
            )
        if MONOTONE in self.arms:
            Constrain(site=self.site).attach(model)

    def answer(self, store: Store) -> Answer:
        import polars as pl

        from lesion.report.page import CURVES, GENERATIONS
        from lesion.studies import _immunity as say

        told = say.Told(self, self.rows(store), store.index.states)
        return Answer(
            question=f"Do monotone, healed and quantised {self.subject} resist poison and attacks better?",
            sentences=[
                f"{self.subject} → [] | heal | constrain → heal | noise → heal | precision → [lora] → poison → perplexity",
                "the same arms → hotflip, random flips",
                f"for arm in {', '.join(self.arms)}; seed in {', '.join(map(str, self.seeds))}",
            ],
            summary=say.summary(told),
            curves=pl.DataFrame(schema=CURVES),
            generations=pl.DataFrame(schema=GENERATIONS),
            claims=say.claims(told),
            notes=[*say.notes(told), *self.said_of_missing(store)],
            missing=self.missing(store),
            words=("arm", "seed"),
        )
