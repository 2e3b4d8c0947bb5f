"""modern-tasks: is a model better taught or better asked?

    subject                                → Task(shots=0), Task(shots=n)          prompting
    subject → lora → finetune(task)        → Task(shots=0)                         adapters
    subject → finetune(task)               → Task(shots=0)                         every weight

for task × seed of the training. All ways answer the same questions, so they are compared question by question. Described are
GPT-2 with adapters on SST-2 and GSM8K, T5-small with adapters on SAMSum, and prompting for all three: presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.study import Answer, Study
from lesion.trial import Measure, Reading, Trial

if TYPE_CHECKING:
    from lesion.store import Store
    from lesion.task import AnyTask

Way = Literal["zero-shot", "few-shot", "LoRA", "full"]
ZERO, FEW, LORA, FULL = "zero-shot", "few-shot", "LoRA", "full"
WAYS: tuple[Way, ...] = ("zero-shot", "few-shot", "LoRA", "full")
DESCRIBED: dict[str, Any] = {"rank": 16, "alpha": 32.0, "steps": 2000, "source": "hub", "batch": 32}
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "gpt2": DESCRIBED | {"subject": "openai-community/gpt2", "tasks": ("sst2", "gsm8k")},
    "t5-small": DESCRIBED | {"subject": "google-t5/t5-small", "tasks": ("summarise",), "shots": (1,), "length": 512},
}
TIERS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"subject": "smollm2", "tasks": ("sst2", "summarise", "gsm8k"), "source": "packaged", "repeats": 1}
    | {"sample": (0, 60, 80), "shots": (8, 1, 3), "steps": 100, "batch": 4, "precision": "bfloat16"}
    | {"ways": (ZERO, FEW, LORA), "rank": 16, "alpha": 32.0},
    "smoke": {"subject": "tiny-llama", "tasks": ("arithmetic",), "source": "packaged", "sample": (6,), "steps": 3}
    | {"batch": 2, "length": 160, "shots": (1,), "repeats": 2, "warmup": 1, "new_tokens": 8, "precision": "float32"},
}


class ModernTasks(Study):
    """Prompting, adapters and full fine-tuning on the same questions."""

    preset: Literal["none", "gpt2", "t5-small"] = Field(
        default="none", description="the described models and trainings"
    )
    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="as the preset says, SmolLM2 on two cores in under an hour, or seconds"
    )
    subject: str = Field(default="smollm2", description="model that is asked and taught")
    tasks: tuple[str, ...] = Field(
        default=("sst2", "summarise", "gsm8k"), min_length=1, description="tasks by name, or .jsonl files"
    )
    source: Literal["packaged", "hub"] = Field(default="packaged", description="where their examples come from")
    ways: tuple[Way, ...] = Field(default=WAYS, min_length=2, description="zero-shot, few-shot, LoRA, full")
    sample: tuple[int, ...] = Field(
        default=(0,), min_length=1, description="questions: one number for all tasks, or one for each; 0: all"
    )
    shots: tuple[int, ...] = Field(
        default=(4,),
        min_length=1,
        description="examples of a few-shot prompt: one number for all tasks, or one for each",
    )
    chat: Literal["plain", "template", "auto"] = Field(default="plain", description="how questions are put")
    new_tokens: int = Field(default=0, ge=0, description="of a reply at most; 0: as the task says")
    examples: int = Field(default=0, ge=0, description="examples that are taught; 0: all")
    steps: int = Field(default=400, ge=1, description="optimizer steps of a training")
    batch: int = Field(default=8, ge=1, description="rows of a step")
    split: int = Field(default=1, ge=1, description="parts that a step's rows are computed in, to save memory")
    length: int = Field(default=384, ge=16, description="tokens of a row")
    warmup: int = Field(default=20, ge=0, description="steps over which the learning rate rises")
    rank: int = Field(default=16, ge=1, description="of adapters")
    alpha: float = Field(default=32.0, gt=0, description="α of adapters")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of their input")
    site: str = Field(default="attention+mlp", description="matrices that have adapters")
    lr_lora: float = Field(default=2e-4, gt=0, description="largest learning rate of adapters")
    lr_full: float = Field(default=2e-5, gt=0, description="largest learning rate of all weights")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of training")
    repeats: int = Field(default=1, ge=1, description="trainings: seed, seed + 1, …")
    seed: int = Field(default=42, ge=0, description="first seed")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**PRESETS.get(given.get("preset", "none"), {}), **TIERS.get(given.get("tier", "full"), {})}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for name, least in (("sample", 0), ("shots", 1)):
            numbers = getattr(self, name)
            if len(numbers) not in (1, len(self.tasks)) or min(numbers) < least:
                raise ValueError(f"{name} is one number of {least} or more, or one for each task; got {numbers}")
        if len(set(self.tasks)) < len(self.tasks) or len(set(self.ways)) < len(self.ways):
            raise ValueError("a task or a way stands there twice")
        return self

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.repeats)

    @cached_property
    def known(self) -> dict[str, AnyTask]:
        """Tasks by name, pinned."""
        from lesion.task import FromHub, parse

        found: dict[str, AnyTask] = {}
        for name in self.tasks:
            task = parse(name)
            found[name] = (task.model_copy(update={"source": self.source}) if isinstance(task, FromHub) else task).pin()
        if len({task.key for task in found.values()}) < len(found):
            raise ValueError(f"two of these are one task: {', '.join(found)}")
        return found

    def trial(self, task: AnyTask, way: str, seed: int) -> Trial:
        """The model that answers."""
        from lesion.steps import Finetune, Lora
        from lesion.subjects import precise

        start = Trial(subject=precise(self.subject)).pin()
        if way in (ZERO, FEW):
            return start
        names = ("examples", "steps", "batch", "split", "length", "warmup", "precision", "chat")
        how: dict[str, Any] = {name: getattr(self, name) for name in names} | {"task": task, "seed": seed}
        if way == FULL:
            return start >> Finetune(**how, lr=self.lr_full)
        lora = Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, site=self.site, seed=seed)
        return start >> lora >> Finetune(**how, lr=self.lr_lora)

    def asked(self, name: str, way: str) -> Measure:
        from lesion.measures import Task

        place = self.tasks.index(name)
        shots, sample = (numbers[place if len(numbers) > 1 else 0] for numbers in (self.shots, self.sample))
        how: dict[str, Any] = {"sample": sample, "shots": shots if way == FEW else 0}
        return Task(task=self.known[name], **how, chat=self.chat, new_tokens=self.new_tokens, seed=self.seed)

    @cached_property
    def cells(self) -> dict[tuple[str, str, int], Reading]:
        """(task, way, seed) → reading. What is not trained is read once, under the first seed."""
        found: dict[tuple[str, str, int], Reading] = {}
        for name, task in self.known.items():
            for way in self.ways:
                for seed in self.seeds if way in (LORA, FULL) else self.seeds[:1]:
                    found[name, way, seed] = Reading(trial=self.trial(task, way, seed), measure=self.asked(name, way))
        return found

    def readings(self) -> list[Reading]:
        return list({r.key: r for r in self.cells.values()}.values())

    def check(self, store: Store) -> None:
        """Looks at the outline: are the adapters' matrices there?"""
        from lesion.sites import matrices
        from lesion.subjects import parse

        if LORA in self.ways:
            matrices(parse(self.subject).outline(), self.site)

    def answer(self, store: Store) -> Answer:
        from lesion.studies import _tasks as say

        told = say.Told(self, self.rows(store), store.index.states)
        return Answer(
            question=f"Is {self.subject} better taught or better asked?",
            sentences=[
                f"{self.subject} → [] | lora → finetune | finetune → task",
                f"for task in {', '.join(self.tasks)}; way in {', '.join(self.ways)}",
                f"for seed in {', '.join(map(str, self.seeds))}",
            ],
            summary=say.summary(told),
            curves=say.curves(told, store),
            generations=say.generations(told),
            claims=say.claims(told),
            extra=say.errors(told),
            notes=[*say.notes(told), *self.said_of_missing(store)],
            missing=self.missing(store),
            files=say.files(told),
            words=("training of", "step"),
        )
