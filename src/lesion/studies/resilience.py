"""resilience: which choices of architecture and training make a model harder to break?

    scratch (MHA | GQA | MoE | sinks) → pretrain            → noise(σ) → Perplexity
    scratch (GQA) → pretrain → constrain → heal → release    the same: monotone
    scratch (GQA) → pretrain → heal | sft | sft → dpo        the same: trained on, instructed, preferring

for arm × σ × seed. Arms differ in one thing: those of architecture from the plain one in that, those of training in what came
after. Noise is relative to each weight. What it did to the loss is compared within each arm, against the same arm undamaged, as a
share of what that has to lose; and between arms at matched damage, where the one that an arm differs from has lost half.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.studies._decoders import shape, trained
from lesion.study import Answer, Study
from lesion.trial import Reading, Trial

if TYPE_CHECKING:
    from lesion.store import Store
    from lesion.sweep import Sweep

PLAIN = "GQA"
ARMS = (PLAIN, "MHA", "MoE", "sink tokens", "sink logits", "monotone", "more text", "SFT", "more SFT", "DPO")
TIERS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"size": "small", "vocabulary": 1024, "steps": 300, "batch": 16, "length": 128, "lr": 4e-3, "later": 80}
    | {"precision": "bfloat16", "repeats": 5},
    "smoke": {"size": "smoke", "vocabulary": 512, "steps": 10, "batch": 4, "length": 48, "lr": 1e-2, "later": 3}
    | {"documents": 3, "precision": "float32", "repeats": 2, "doses": (0.5, 1.0, 3.0), "warmup": 2}
    | {"arms": (PLAIN, "MHA", "MoE", "more text", "monotone")},
}
# what an arm of training is compared with; the others are compared with the plain one
AGAINST = {"SFT": "more text", "more SFT": "SFT", "DPO": "more SFT", "monotone": "more text"}


class Resilience(Study):
    """The same lesions on models that differ in one thing."""

    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="hours on a card, half an hour on two cores, or seconds"
    )
    arms: tuple[str, ...] = Field(default=ARMS, min_length=2, description=", ".join(ARMS))
    size: str = Field(default="30m", description="of the decoders: 1m, 6m, 30m, 125m, 350m, 1b, tiny, small or smoke")
    vocabulary: int = Field(default=4096, ge=260, description="ids of the tokenizer, learned from the corpus")
    corpus: str = Field(default="novels", description="what is trained on")
    held_out: str = Field(default="austen", description="what is read")
    documents: int = Field(default=24, ge=2, description="its first so many documents")
    length: int = Field(default=256, ge=8, description="tokens of a training row, and of the perplexity window")
    steps: int = Field(default=2000, ge=1, description="steps of pretraining")
    later: int = Field(default=400, ge=1, description="steps of whatever comes after it")
    batch: int = Field(default=16, ge=1, description="rows of a step")
    lr: float = Field(
        default=2e-3,
        gt=0,
        description="learning rate of pretraining; what comes after has a tenth, and after that a hundredth",
    )
    warmup: int = Field(default=30, ge=0, description="steps over which it rises")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of training")
    experts: int = Field(default=4, ge=2, description="experts of MoE, two a token")
    site: str = Field(default="attention+mlp", description="what is damaged")
    doses: tuple[float, ...] = Field(
        default=(0.35, 0.6, 1.0, 1.5, 2.0, 3.0), min_length=3, description="σ of multiplicative noise"
    )
    margin: float = Field(
        default=0.02, gt=0, description="share of what there is to lose: a smaller difference is called none"
    )
    repeats: int = Field(default=3, ge=1, description="trainings and draws of noise: seed, seed + 1, …")
    seed: int = Field(default=0, ge=0, description="first seed")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return TIERS.get(given.get("tier", "full"), {})

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        shape(self.size)
        if odd := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"no arm {odd[0]!r}; there are: {', '.join(ARMS)}")
        if PLAIN not in self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(
                f"arms differ from each other, and {PLAIN!r} is one of them: the others are compared with it"
            )
        if not self.margin < 1:
            raise ValueError(f"a margin is a share of what there is to lose, below 1, not {self.margin:g}")
        if alone := [arm for arm in self.arms if AGAINST.get(arm, PLAIN) not in self.arms]:
            raise ValueError(f"{alone[0]!r} is compared with {AGAINST[alone[0]]!r}, which must be among the arms too")
        if list(self.doses) != sorted(set(self.doses)) or self.doses[0] <= 0:
            raise ValueError(f"doses rise, and the first is above 0; got {self.doses}")
        return self

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.repeats)

    @cached_property
    def _tasks(self) -> dict[str, Any]:
        from lesion.tasks import Instructions, Preferences

        return {"sft": Instructions().pin(), "dpo": Preferences().pin()}

    @cached_property
    def whole(self) -> dict[tuple[str, int], Trial]:
        """(arm, seed) → the undamaged model."""
        return {(arm, seed): self._arm(arm, seed) for arm, seed in itertools.product(self.arms, self.seeds)}

    def _arm(self, arm: str, seed: int) -> Trial:
        from lesion.steps import Constrain, Dpo, Heal, Release, Sft

        of = shape(self.size)
        config: dict[str, Any] = {"vocab_size": self.vocabulary, "max_position_embeddings": max(512, 4 * self.length)}
        kinds: dict[str, dict[str, Any]] = {
            "MHA": {"num_key_value_heads": of["num_attention_heads"]},
            "MoE": {"experts": self.experts, "intermediate_size": of["intermediate_size"] // 2},  # two of them a token
            "sink tokens": {"sinks": "tokens", "sink_tokens": 1, "window": self.length - 1},
            "sink logits": {"sinks": "logit"},
        }
        names = ("corpus", "length", "steps", "batch", "lr", "warmup", "precision")
        training: dict[str, Any] = {name: getattr(self, name) for name in names} | {
            "documents": "joined",
            "floor": 0.02,
        }
        born = trained(self.size, config | kinds.get(arm, {}), training, seed)
        how: dict[str, Any] = {"steps": self.later, "batch": self.batch, "lr": self.lr / 10, "seed": seed}
        how |= {"warmup": min(self.warmup, self.later), "precision": self.precision}
        text: dict[str, Any] = {**how, "corpus": self.corpus, "length": self.length, "documents": "joined", "skip": 0}
        replies: dict[str, Any] = {**how, "length": max(384, self.length), "batch": max(1, self.batch // 2)}
        if arm == "monotone":
            return (born >> Constrain(init="signature") >> Heal(**text) >> Release()).pin()
        if arm == "more text":
            return (born >> Heal(**text)).pin()
        if arm in ("SFT", "more SFT", "DPO"):
            taught = born >> Sft(**replies, task=self._tasks["sft"])
            more: dict[str, Any] = {**replies, "lr": self.lr / 100, "batch": max(1, self.batch // 4)}
            if arm == "more SFT":
                return (taught >> Sft(**{**more, "seed": seed + 1000}, task=self._tasks["sft"])).pin()
            return (taught >> Dpo(**more, cut=128, task=self._tasks["dpo"]) if arm == "DPO" else taught).pin()
        return born

    @cached_property
    def cells(self) -> dict[tuple[str, float, int], dict[str, Reading]]:
        """(arm, σ, seed) → its readings; σ = 0 is the undamaged arm."""
        from lesion.measures import Perplexity
        from lesion.steps import Noise

        # One window a document, and one id fewer than a row of training: so a decoder with sink tokens, whose window rolls,
        # reads in the way the others do.
        tokens = self.length - 1
        text: dict[str, Any] = {"corpus": self.held_out, "documents": self.documents, "tokens": tokens}
        read = Perplexity(**text, window=tokens, stride=tokens // 2).pin()
        found: dict[tuple[str, float, int], dict[str, Reading]] = {}
        for (arm, seed), trial in self.whole.items():
            for dose in (0.0, *self.doses):
                hurt = trial >> Noise(site=self.site, sigma=dose, seed=seed) if dose else trial
                found[arm, dose, seed] = {"perplexity": Reading(trial=hurt, measure=read)}
        return found

    def readings(self) -> list[Reading]:
        return list({r.key: r for cell in self.cells.values() for r in cell.values()}.values())

    def check(self, store: Store) -> None:
        """Is what is read not trained on, and is there, in the outline of each arm's decoder, what is to be damaged?"""
        from lesion.sites import resolve
        from lesion.texts import apart

        apart(self.corpus, self.held_out)
        for subject in {trial.subject.key: trial.subject for trial in self.whole.values()}.values():
            resolve(subject.outline(), self.site)

    def answer(self, store: Store) -> Answer:
        from lesion.studies import _resilience as say

        rows = self.rows(store)
        sweep = self.sweep(rows)
        return Answer(
            question=f"Which choices make a decoder of size {self.size} harder to break?",
            sentences=[
                f"scratch ({self.size}) → pretrain → [constrain → heal → release | heal | sft → dpo] → noise → perplexity",
                f"for arm in {', '.join(self.arms)}",
                f"for σ in {', '.join(f'{dose:g}' for dose in self.doses)}; seed in {', '.join(map(str, self.seeds))}",
            ],
            summary=say.summary(self, sweep),
            curves=sweep.curves(say.OUTCOMES),
            generations=say.nothing(),
            claims=say.claims(self, sweep),
            heat=say.heat(sweep),
            extra=say.tables(self, sweep, store),
            notes=[*say.notes(self), *self.said_of_missing(store)],
            missing=self.missing(store),
            words=("arm", "σ"),
        )

    def sweep(self, rows: Mapping[str, Mapping[str, Any]]) -> Sweep:
        from lesion.sweep import Sweep

        found = {
            cell: {name: rows.get(reading.key, {}) for name, reading in readings.items()}
            for cell, readings in self.cells.items()
        }
        return Sweep(self.arms, [0.0, *self.doses], self.seeds, found)
