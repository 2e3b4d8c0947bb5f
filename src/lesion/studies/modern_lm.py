"""modern-lm: a decoder from random weights: how well does it predict, what does it write, and does it beat counting?

    scratch → pretrain → Perplexity, Attention, Continuation, and Ngrams on the same tokens

for seed. The yardstick is an interpolated n-gram model counted on the text that was trained on: bits a byte are compared
document by document. A model that does not beat it has learned less than which three tokens follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.optimizers import OptimizerName
from lesion.studies._decoders import shape, trained
from lesion.study import Answer, Study
from lesion.trial import Reading, Trial, describe

if TYPE_CHECKING:
    from lesion.store import Store

WIKITEXT: dict[str, Any] = {"corpus": "wikitext-2", "held_out": "wikitext-2-validation", "precision": "bfloat16"}
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # the largest that is described for one RTX 3060: 12 GB, many hours
    "rtx3060": WIKITEXT
    | {"size": "250m", "vocabulary": 32_000, "length": 1024, "steps": 30_000, "batch": 32, "split": 16}
    | {"lr": 3e-4, "warmup": 1000, "recompute": True, "sinks": 1},
    "card-12gb": {"corpus": "wikitext-103", "held_out": "wikitext-2-validation", "precision": "bfloat16"}
    | {"size": "350m", "vocabulary": 32_000, "length": 1024, "steps": 60_000, "batch": 64, "split": 32}
    | {"lr": 3e-4, "warmup": 1000, "recompute": True},
    "card-24gb": {"corpus": "wikitext-103", "held_out": "wikitext-2-validation", "precision": "bfloat16"}
    | {"size": "1b", "vocabulary": 32_000, "length": 1024, "steps": 60_000, "batch": 128, "split": 64}
    | {"lr": 2e-4, "warmup": 2000, "recompute": True},
}
TIERS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"size": "small", "vocabulary": 2048, "corpus": "novels", "held_out": "austen", "length": 128}
    | {"steps": 600, "batch": 16, "split": 1, "lr": 4e-3, "warmup": 50, "precision": "bfloat16", "recompute": False}
    | {"sinks": 0},
    "smoke": {"size": "smoke", "vocabulary": 512, "corpus": "novels", "held_out": "austen", "length": 32}
    | {"steps": 10, "batch": 4, "split": 1, "lr": 1e-2, "warmup": 2, "documents": 3, "samples": 2, "new_tokens": 8}
    | {"precision": "float32", "recompute": False, "sinks": 0},
}


class ModernLm(Study):
    """How good does a decoder become from random weights, and does it beat counting?"""

    preset: Literal["none", "rtx3060", "card-12gb", "card-24gb"] = Field(
        default="none", description="other defaults: the described run, or the largest that fits on such a card"
    )
    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="as the preset says, a few minutes on two cores, or seconds"
    )
    subject: str = Field(
        default="", description="a model that is there already, such as tiny, instead of one that is trained here"
    )
    size: str = Field(default="6m", description="1m, 6m, 30m, 125m, 250m, 350m, 1b, tiny, small or smoke")
    vocabulary: int = Field(default=4096, ge=260, description="ids of the tokenizer, learned from the corpus")
    sinks: int = Field(default=0, ge=0, description="learned sink tokens, with a window of the training length")
    experts: int = Field(default=0, ge=0, description="experts in the place of each mlp, two a token; 0: a dense mlp")
    corpus: str = Field(default="novels", description="what is trained on: a packaged corpus, a file, or a hub's")
    held_out: str = Field(default="austen", description="what is read: a corpus that is not trained on")
    documents: int = Field(default=0, ge=0, description="first so many documents of it; 0: all")
    length: int = Field(default=256, ge=8, description="tokens of a training row, and of the perplexity window")
    steps: int = Field(default=2000, ge=1, description="optimizer steps")
    batch: int = Field(default=16, ge=1, description="rows of a step")
    split: int = Field(default=1, ge=1, description="parts that a step's rows are computed in, to save memory")
    recompute: bool = Field(default=False, description="compute activations twice, to save memory")
    optimizer: OptimizerName = Field(default="adamw", description="adamw, adam, adafactor, sgd, sgd-momentum, signsgd")
    lr: float = Field(default=2e-3, gt=0, description="largest learning rate")
    warmup: int = Field(default=100, ge=0, description="steps over which it rises")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of training")
    samples: int = Field(default=16, ge=1, description="held-out texts that are continued")
    new_tokens: int = Field(default=64, ge=1, description="length of a continuation")
    repeats: int = Field(default=1, ge=1, description="trainings: seed, seed + 1, …")
    seed: int = Field(default=0, ge=0, description="first seed")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**PRESETS.get(given.get("preset", "none"), {}), **TIERS.get(given.get("tier", "full"), {})}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        shape(self.size)
        if self.subject and self.repeats > 1:
            raise ValueError("a model that is there already is not trained again: repeats must be 1")
        return self

    @cached_property
    def _trials(self) -> dict[int, Trial]:
        if self.subject:
            from lesion.subjects import parse

            return {self.seed: Trial(subject=parse(self.subject)).pin()}
        config: dict[str, Any] = {"vocab_size": self.vocabulary, "max_position_embeddings": 4 * self.length}
        if self.sinks:
            config |= {"sinks": "tokens", "sink_tokens": self.sinks, "window": self.length - self.sinks}
        if self.experts:
            config |= {"experts": self.experts}
        names = ("corpus", "length", "steps", "batch", "split", "lr", "warmup", "precision", "recompute", "optimizer")
        training = {name: getattr(self, name) for name in names}
        seeds = range(self.seed, self.seed + self.repeats)
        return {s: trained(self.size, config, {**training, "documents": "joined", "floor": 0.02}, s) for s in seeds}

    @cached_property
    def _cells(self) -> dict[int, dict[str, Reading]]:
        from lesion.measures import Attention, Continuation, Ngrams, Perplexity

        text: dict[str, Any] = {"corpus": self.held_out, "documents": self.documents}
        context = max(8, self.length // 4)
        measures = {
            "model": Perplexity(**text, window=self.length, stride=self.length // 2),
            "trigram": Ngrams(**text, order=3, counted=self.corpus),
            "5-gram": Ngrams(**text, order=5, counted=self.corpus),
            "attention": Attention(corpus=self.held_out, documents=4, tokens=min(self.length, 128)),
        }
        pinned = {name: measure.pin() for name, measure in measures.items()}
        cells = {}
        for seed, trial in self._trials.items():
            how: dict[str, Any] = {"stretches": self.samples, "new_tokens": self.new_tokens, "seed": seed}
            samples = Continuation(corpus=self.held_out, length=context, times=(1,), **how).pin()
            cells[seed] = {
                name: Reading(trial=trial, measure=measure) for name, measure in {**pinned, "samples": samples}.items()
            }
        return cells

    def readings(self) -> list[Reading]:
        return list({r.key: r for cell in self._cells.values() for r in cell.values()}.values())

    def check(self, store: Store) -> None:
        from lesion.texts import apart

        apart(self.corpus, self.held_out)  # n-grams are counted on it, whoever trained the model

    def answer(self, store: Store) -> Answer:
        from lesion.studies import _lm as say

        rows = self.rows(store)
        cells = {
            seed: {name: rows[r.key] for name, r in cell.items() if r.key in rows} for seed, cell in self._cells.items()
        }
        ledgers = {
            seed: store.index.states[trial.key]["ledger"]
            for seed, trial in self._trials.items()
            if trial.key in store.index.states
        }
        notes = [
            "The model and both n-gram models score the same tokens of the same documents; bits a byte are what they cost. "
            "The n-gram models are interpolated Kneser-Ney (Chen & Goodman 1998), counted on "
            f"{self.corpus}.",
        ]
        what = self.subject or f"a decoder of size {self.size} trained on {self.corpus}"
        return Answer(
            question=f"How well does {what} predict and write {self.held_out}, and does it beat counting?",
            sentences=[self._sentence(), f"for seed in {', '.join(map(str, self._trials))}"],
            summary=say.summary(cells),
            curves=say.curves(ledgers),
            generations=say.generations(cells),
            claims=say.claims(cells),
            drawings=say.drawings(cells),
            notes=[*notes, *self.said_of_missing(store)],
            missing=self.missing(store),
            files=say.files(cells),
            words=("model", "step"),
        )

    def _sentence(self) -> str:
        trial = self._trials[self.seed]
        said = [describe(step.model_copy(update={"sha256": None})) for step in trial.steps]
        name = self.subject or f"scratch ({self.size}, vocabulary {self.vocabulary})"
        return " → ".join([name, *said, "perplexity, ngrams, attention, continuation"])
