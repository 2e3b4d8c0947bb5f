"""Poison: a model is trained on something that is no language, or on one string again and again, at a fixed dose.

    catalyst          the string of a quoted reading by `catalyst`, in every step
    random-repeated   one string of random tokens in every step          random-fresh   another one in each
    text-repeated     one window of real text in every step              text-fresh     another one in each
    shuffled          another window in each step, its tokens in random order
    gaussian          in place of embedded tokens normal vectors of the same size, one string of random tokens as targets

All arms share steps, rows, tokens and the one training loop, so they differ in what is read and in nothing else. What warms an
optimizer (`warm`) is clean text at a rate of zero: Adam's second moments are then those of ordinary training, where they would
begin at zero and make its first step the sign of the gradient. A run whose loss is no longer finite ends there and says so: that
is an outcome of poison, not a failure of the run.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from lesion.fit import Documents, Training, displacement, evaluate, fit
from lesion.packing import Listed
from lesion.stats import generator
from lesion.strings import random_strings, windows_of
from lesion.texts import corpus_digest
from lesion.trial import Reading, Specimen, Step

Arm = Literal["catalyst", "random-repeated", "random-fresh", "text-repeated", "text-fresh", "shuffled", "gaussian"]
CLEAN = 4  # windows of clean text whose loss says how far a poison has come


class Poison(Training, Step):
    """Trains every weight that wants to be trained on a poison."""

    keeps: ClassVar[bool] = True

    arm: Arm = Field(description="what is trained on")
    catalyst: Reading | None = Field(default=None, description="whose string (arm catalyst)")
    steps: int = Field(default=100, ge=1, description="optimizer steps: the dose")
    batch: int = Field(default=1, ge=1, description="rows of a step")
    length: int = Field(default=64, ge=2, description="tokens of a row")
    documents: Documents = Field(default="joined", description="a row is one string")
    lr: float = Field(default=1e-4, gt=0, description="learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="constant", description="of the learning rate")
    warmup: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices")
    clip: float = Field(default=0.0, ge=0, description="largest norm of the gradient; 0: any")
    warm: int = Field(
        default=0, ge=0, description="steps on clean text at a rate of 0 before, which warm the optimizer"
    )
    text: str = Field(default="novels", description="corpus of text, of what is shuffled, and of what warms")
    text_sha256: str | None = Field(default=None, description="digest of that corpus; filled in when pinned")
    displacement: float = Field(
        default=0.0, ge=0, description="stop once √(Σ(w − w₀)² / Σw₀²) over trained weights is so large; 0: never"
    )
    rise: float = Field(
        default=0.0, ge=0, description="stop once the loss on clean text has risen by so many nats a token; 0: never"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.arm == "catalyst") != (self.catalyst is not None):
            raise ValueError(
                f"arm='catalyst' and a reading by catalyst go together, not {self.arm!r} and {self.catalyst}"
            )
        if self.catalyst is not None and self.catalyst.measure.name != "catalyst":
            raise ValueError(f"the string is that of a reading by catalyst, not by {self.catalyst.measure.name!r}")
        if self.arm == "gaussian" and self.split > 1:
            raise ValueError("a step's normal vectors are drawn for all its rows together: split=1")
        if self.documents != "joined":
            raise ValueError("a row of poison is one string: documents='joined'")
        return self

    def pin(self) -> Self:
        return super().pin().with_digest(f"corpus {self.text!r}", corpus_digest(self.text), "text_sha256")

    def rate(self, step: int) -> float:
        """Zero while the optimizer is warmed, which `steps` of a run that is under way includes."""
        if step < self.warm:
            return 0.0
        dose = {name: getattr(self, name) for name in Training.model_fields} | {"steps": self.steps - self.warm}
        return Training(**dose).rate(step - self.warm)

    def touches(self, specimen: Specimen) -> list[str]:
        return [name for name, p in specimen.model.named_parameters() if p.requires_grad]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        from lesion.likelihood import context_of

        model = specimen.model
        if model.config.is_encoder_decoder:
            raise ValueError("poison is for causal models, and this one is encoder-decoder")
        context = context_of(model.config.get_text_config())
        if context and self.length > context:
            raise ValueError(f"a poison of {self.length} tokens is longer than the context of {context}")
        clean = windows_of(specimen, self.text, self.length, CLEAN, "clean text", self.seed)
        rows = np.array(self._rows(specimen), np.int32)
        watch = _Watch(self, model, Listed(np.array(clean, np.int32)))
        how = self.model_copy(update={"steps": self.warm + self.steps})
        seen = _Gaussian(self, model) if self.arm == "gaussian" else None
        with seen or nullcontext(), specimen.workplace() as place:
            facts = fit(model, Listed(rows), how, folder=place, tell=specimen.tell, ends=watch, before=seen)
        facts["steps"] = max(0, facts["steps"] - self.warm)
        row = rows[self.warm * self.batch].tolist()
        return {"arm": self.arm, "tokens": row, **facts}

    def _rows(self, specimen: Specimen) -> list[list[int]]:
        """All rows of the run, those that warm first."""
        warming = windows_of(specimen, self.text, self.length, self.warm * self.batch, "warming text", self.seed)
        count = self.steps * self.batch
        match self.arm:
            case "catalyst":
                return warming + [self._string(specimen)] * count
            case "random-repeated" | "gaussian":
                return warming + self._random(specimen, 1) * count
            case "random-fresh":
                return warming + self._random(specimen, count)
        texts = windows_of(
            specimen, self.text, self.length, 1 if self.arm == "text-repeated" else count, "poison", self.seed
        )
        if self.arm == "shuffled":
            orders = (generator("shuffled", self.seed, i).permutation(self.length) for i in range(count))
            texts = [[text[j] for j in order] for text, order in zip(texts, orders, strict=True)]
        return warming + (texts * count if self.arm == "text-repeated" else texts)

    def _random(self, specimen: Specimen, count: int) -> list[list[int]]:
        from lesion.flips import allowed, table

        may = allowed(specimen.tokenizer, len(table(specimen.model)))
        return random_strings(may, self.length, count, "random poison", self.seed)

    def _string(self, specimen: Specimen) -> list[int]:
        assert specimen.recall is not None and self.catalyst is not None, "the walk recalls what is quoted"
        row = next(row for row in specimen.recall(self.catalyst) if row["item"] == "catalyst")
        tokens: list[int] | None = row["string_ids"]
        if tokens is None:
            raise ValueError(f"the quoted reading has found no string: {row['outcome']}")
        if len(tokens) != self.length:
            raise ValueError(f"the catalyst has {len(tokens)} tokens, and a row of this poison has {self.length}")
        if max(tokens) >= (size := specimen.model.get_input_embeddings().weight.shape[0]):
            raise ValueError(
                f"the catalyst was found for another vocabulary: it has the id {max(tokens)}, here are {size}"
            )
        return tokens


class _Watch:
    """Ends a run that has come far enough, or whose loss is not finite."""

    def __init__(self, how: Poison, model: Any, clean: Listed):
        self.how, self.clean = how, clean
        wanted = model.named_parameters() if how.displacement else ()
        self.start = {name: p.detach().float().clone() for name, p in wanted if p.requires_grad}
        self.first = self.loss(model) if how.rise else 0.0

    def loss(self, model: Any) -> float:
        return evaluate(model, self.clean, self.how)

    def far(self, model: Any) -> bool:
        pairs = ((p, self.start[name]) for name, p in model.named_parameters() if name in self.start)
        return not (displacement(pairs) or 0.0) < self.how.displacement

    def __call__(self, model: Any, step: int, found: dict[str, Any]) -> str | None:
        if not (math.isfinite(found["loss"]) and math.isfinite(found["norm"])):
            return "diverged"
        if step < self.how.warm:
            return None
        if self.how.displacement and self.far(model):
            return "displacement"
        rise = self.loss(model) - self.first if self.how.rise else 0.0
        if not math.isfinite(rise):
            return "diverged"
        return "rise" if self.how.rise and rise >= self.how.rise else None


class _Gaussian:
    """While it trains on the dose, a model reads normal vectors in place of its embedded tokens, the same for each step, of the
    same root mean square as the rows of its table. A `with` block; called before each step with its number."""

    def __init__(self, how: Poison, model: Any):
        self.how, self.module, self.step = how, model.get_input_embeddings(), 0
        self.size = float(self.module.weight.detach().float().square().mean().sqrt())
        self.drawn: torch.Tensor | None = None

    def __enter__(self) -> _Gaussian:
        self.hook = self.module.register_forward_hook(self.instead)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def __call__(self, model: Any, step: int) -> None:
        self.step = step

    def instead(self, module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        if not module.training or self.step < self.how.warm:
            return out
        if self.drawn is None:
            stream = torch.Generator().manual_seed(int(generator("gaussian", self.how.seed).integers(2**62)))
            scale = float(getattr(module, "embed_scale", 1.0))
            self.drawn = torch.randn(out.shape, generator=stream) * self.size * scale
        return self.drawn.to(out)
