"""modern-align: from a base model to one that answers, prefers and is checked, read after every step.

    subject → sft → dpo → finetune(arithmetic) → verifier
            → Task (responses, sums), Preference, Perplexity after each, and Verification at the end

for seed. The verifier is trained on solutions that the solver itself wrote to problems that neither was trained on, and chooses
among those that it wrote to others. Beside `dpo` stands a control that went on with `sft` for as many steps at dpo's rate: what
more training alone does to the margins.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lesion.study import Answer, Study, refuse_encoders
from lesion.trial import Measure, Reading, Trial

if TYPE_CHECKING:
    from lesion.store import Store

BASE, SFT, DPO, CONTROL, SOLVER, VERIFIER = "base", "sft", "dpo", "more sft", "solver", "verifier"
STAGES = (BASE, SFT, DPO, CONTROL, SOLVER)
TIERS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"subject": "smollm2", "source": "packaged", "held_out": "austen", "precision": "bfloat16", "repeats": 1}
    | {"sft_steps": 60, "dpo_steps": 60, "solver_steps": 60, "verifier_steps": 160, "batch": 4, "length": 384}
    | {"cut": 160, "responses": 60, "new_tokens": 96, "problems": 80, "solved": 100},
    "smoke": {"subject": "tiny-llama", "source": "packaged", "held_out": "austen", "precision": "float32"}
    | {"sft_steps": 2, "dpo_steps": 2, "solver_steps": 200, "solver_lr": 5e-3, "verifier_steps": 4, "batch": 4}
    | {"length": 256, "cut": 24, "responses": 3, "new_tokens": 8, "terms": 2, "largest": 6, "sums": 20, "problems": 12}
    | {"solved": 10, "solutions": 4, "documents": 2, "warmup": 1},
}


class ModernAlign(Study):
    """Supervised fine-tuning, preferences and a verifier, one after the other."""

    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="as written, SmolLM2 on two cores in half an hour, or seconds"
    )
    subject: str = Field(default="HuggingFaceTB/SmolLM2-135M", description="base model")
    source: Literal["packaged", "hub"] = Field(default="packaged", description="of instructions and preferences")
    held_out: str = Field(default="austen", description="text whose perplexity is read after every step")
    documents: int = Field(default=24, ge=2, description="its first so many documents")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of training")
    batch: int = Field(default=8, ge=1, description="rows, or pairs, of a step")
    split: int = Field(default=1, ge=1, description="parts that a step's rows are computed in, to save memory")
    length: int = Field(default=512, ge=16, description="tokens of a row")
    warmup: int = Field(default=6, ge=0, description="steps over which learning rates rise")
    sft_steps: int = Field(default=300, ge=1, description="steps on instructions")
    sft_lr: float = Field(default=2e-5, gt=0, description="their learning rate")
    dpo_steps: int = Field(default=100, ge=1, description="steps on preferences")
    dpo_lr: float = Field(default=5e-6, gt=0, description="their learning rate")
    beta: float = Field(default=0.1, gt=0, description="β of dpo")
    smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="label smoothing of dpo")
    average: bool = Field(default=False, description="length-normalised dpo")
    cut: int = Field(default=0, ge=0, description="first so many tokens of a preferred or rejected reply; 0: all")
    longest: int = Field(
        default=1024, ge=2, description="tokens of a held-out pair's prompt and reply; longer ones are not read"
    )
    solver_steps: int = Field(default=200, ge=1, description="steps on sums")
    solver_lr: float = Field(default=5e-5, gt=0, description="their learning rate")
    terms: int = Field(default=3, ge=2, description="numbers of a sum")
    largest: int = Field(default=30, ge=2, description="of the numbers")
    sums: int = Field(default=2000, ge=1, description="sums to train on")
    verifier_steps: int = Field(default=300, ge=1, description="steps of the verifier")
    verifier_lr: float = Field(default=5e-5, gt=0, description="their learning rate")
    trunk: Literal["decoder", "encoder"] = Field(default="decoder", description="what the verifier reads with")
    problems: int = Field(default=300, ge=2, description="sums whose solutions the verifier is trained on")
    solved: int = Field(default=200, ge=2, description="sums that are tested with")
    solutions: int = Field(default=8, ge=2, description="solutions of each")
    temperature: float = Field(default=0.8, gt=0, description="at which they are drawn")
    responses: int = Field(default=0, ge=0, description="held-out instructions; 0: all")
    new_tokens: int = Field(default=128, ge=1, description="of a response at most")
    repeats: int = Field(default=1, ge=1, description="chains: seed, seed + 1, …")
    seed: int = Field(default=42, ge=0, description="first seed")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return TIERS.get(given.get("tier", "full"), {})

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.repeats)

    @cached_property
    def _tasks(self) -> dict[str, Any]:
        from lesion.tasks import Arithmetic, Instructions, Preferences

        sums: dict[str, Any] = {"terms": self.terms, "largest": self.largest, "test": self.solved}
        return {
            "instructions": Instructions(source=self.source).pin(),
            "preferences": Preferences(source=self.source).pin(),
            "sums": Arithmetic(**sums, train=self.sums, half=1).pin(),
            "checked": Arithmetic(**sums, train=self.problems, half=2).pin(),  # sums that the solver was not trained on
        }

    @cached_property
    def chains(self) -> dict[int, dict[str, Trial]]:
        """Seed → stage → the model there."""
        return {seed: self._chain(seed) for seed in self.seeds}

    def _chain(self, seed: int) -> dict[str, Trial]:
        from lesion.steps import Dpo, Finetune, Sft, Verifier
        from lesion.subjects import precise

        tasks = self._tasks
        names = ("batch", "split", "length", "warmup", "precision")
        how: dict[str, Any] = {name: getattr(self, name) for name in names} | {"seed": seed}
        base = Trial(subject=precise(self.subject)).pin()
        taught = base >> Sft(**how, task=tasks["instructions"], steps=self.sft_steps, lr=self.sft_lr)
        dpo: dict[str, Any] = {"beta": self.beta, "smoothing": self.smoothing, "average": self.average, "cut": self.cut}
        preferring = taught >> Dpo(**how, **dpo, task=tasks["preferences"], steps=self.dpo_steps, lr=self.dpo_lr)
        more = {**how, "seed": seed + 1000}  # the same examples in another order
        control = taught >> Sft(**more, task=tasks["instructions"], steps=self.dpo_steps, lr=self.dpo_lr)
        solver = preferring >> Finetune(**how, task=tasks["sums"], steps=self.solver_steps, lr=self.solver_lr)
        samples = Reading(trial=solver, measure=self.drawn("train", self.problems, seed))
        checks: dict[str, Any] = {"steps": self.verifier_steps, "lr": self.verifier_lr, "trunk": self.trunk}
        verifier = solver >> Verifier(**how, **checks, samples=samples)
        return {BASE: base, SFT: taught, DPO: preferring, CONTROL: control, SOLVER: solver, VERIFIER: verifier}

    def drawn(self, part: str, problems: int, seed: int) -> Measure:
        """Solutions that are drawn."""
        from lesion.measures import Task

        how: dict[str, Any] = {"part": part, "sample": problems, "repeats": self.solutions, "seed": seed}
        task = self._tasks["checked" if part == "train" else "sums"]
        return Task(task=task, **how, temperature=self.temperature, batch=64)

    @cached_property
    def cells(self) -> dict[tuple[str, int], dict[str, Reading]]:
        """(stage, seed) → its readings. The base is read once."""
        from lesion.measures import Perplexity, Preference, Task, Verification

        tasks = self._tasks
        text: dict[str, Any] = {"corpus": self.held_out, "documents": self.documents, "tokens": 256}
        respond = Task(
            task=tasks["instructions"], sample=self.responses, chat="auto", new_tokens=self.new_tokens, seed=self.seed
        )
        asked: dict[str, Measure] = {
            "responses": respond,
            "sums": Task(task=tasks["sums"], sample=self.solved, seed=self.seed),
            "text": Perplexity(**text, window=256, stride=128).pin(),
        }
        found: dict[tuple[str, int], dict[str, Reading]] = {}
        for seed, chain in self.chains.items():
            prefer: dict[str, Any] = {"task": tasks["preferences"], "cut": self.cut, "length": self.longest}
            for stage in STAGES:
                if stage == BASE and seed != self.seeds[0]:
                    continue
                reference = None if stage == BASE else chain[BASE] if stage == SFT else chain[SFT]
                measures = {**asked, "preferences": Preference(**prefer, reference=reference)}
                if stage == SOLVER:
                    measures = {
                        "sums": asked["sums"],
                        "text": asked["text"],
                        "drawn": self.drawn("test", self.solved, seed),
                    }
                found[stage, seed] = {n: Reading(trial=chain[stage], measure=m) for n, m in measures.items()}
            solutions = found[SOLVER, seed]["drawn"]
            check = Reading(trial=chain[VERIFIER], measure=Verification(of=solutions))
            samples = Reading(trial=chain[SOLVER], measure=self.drawn("train", self.problems, seed))
            found[VERIFIER, seed] = {"verification": check, "taught with": samples}
        return found

    def readings(self) -> list[Reading]:
        return list({r.key: r for cell in self.cells.values() for r in cell.values()}.values())

    def check(self, store: Store) -> None:
        from lesion.subjects import precise

        refuse_encoders(precise(self.subject).outline(), self.subject)

    def answer(self, store: Store) -> Answer:
        from lesion.studies import _align as say

        told = say.Told(self, self.rows(store), store.index.states)
        return Answer(
            question=f"What does each step of alignment do to {self.subject}?",
            sentences=[
                f"{self.subject} → sft → dpo → finetune(sums) → verifier → responses, preferences, sums, perplexity",
                f"for seed in {', '.join(map(str, self.seeds))}",
            ],
            summary=say.summary(told),
            curves=say.curves(told),
            generations=say.generations(told),
            claims=say.claims(told),
            drawings=say.drawings(told),
            extra=say.tables(told),
            notes=[*say.NOTES, *self.said_of_missing(store)],
            missing=self.missing(store),
            words=("training", "step"),
        )
