"""Direct preference optimisation (Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward
model"): a model is trained on pairs of replies to prefer the better one, and held to where it began.

The reference is the state that the step begins with. Its log-probabilities of all replies are computed once, before the first
step, and kept beside the checkpoints, so no second model is held.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from lesion import asking, preferring
from lesion.digest import combined, digests, named_tensors
from lesion.fit import Documents, Training, fit
from lesion.products import fast_products
from lesion.responses import Examples
from lesion.task import AnyTask, Part, sampled
from lesion.tasks.preferences import Preferences
from lesion.trial import Specimen, Step

HELD_OUT = 32  # pairs whose loss is read meanwhile


NEVER = [math.nan, math.nan]  # the reference of a pair that is not trained on: were it read, the loss would say so


class Dpo(Training, Step):
    """Trains on preferences."""

    keeps: ClassVar[bool] = True

    task: AnyTask = Field(default=Preferences(), description="pairs of replies, the better one first")
    examples: int = Field(default=0, ge=0, description="of its training set, drawn at random; 0: all")
    chat: asking.Chat = Field(default="auto", description=f"how prompts are put; {asking.TOLD}")
    beta: float = Field(default=0.1, gt=0, description="β: how dear it is to leave the reference")
    smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="ε: share of pairs that are the other way round")
    average: bool = Field(default=False, description="log-probabilities a token instead of sums")
    cut: int = Field(default=0, ge=0, description="first so many tokens of a reply; 0: all")
    steps: int = Field(default=60, ge=1, description="optimizer steps")
    batch: int = Field(default=8, ge=1, description="pairs of a step")
    length: int = Field(default=512, ge=2, description="tokens of prompt and reply; a longer pair is left out")
    documents: Documents = Field(default="apart", description="a row is one reply")
    lr: float = Field(default=5e-6, gt=0, description="largest learning rate")
    warmup: int = Field(default=6, ge=0, description="steps over which the learning rate rises from 0")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.documents != "apart":
            raise ValueError("a row is one reply: documents='apart'")
        return self

    def touches(self, specimen: Specimen) -> list[str]:
        return [name for name, p in specimen.model.named_parameters() if p.requires_grad]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("preferences are learned by causal models, and this one is encoder-decoder")
        with specimen.workplace() as place:
            train, left = self._pairs(specimen, "train", self.examples)
            held = self._pairs(specimen, "test", HELD_OUT)[0] if self.eval_every else []
            order = self._rows(train, [NEVER] * len(train))
            asked = sorted(
                {order.row(i) for i in range(self.steps * self.batch)}
            )  # of many pairs few may be trained on
            kept = self._reference(specimen, [*(train[i] for i in asked), *held], place)
            known = dict(zip(asked, kept, strict=False))
            data = self._rows(train, [known.get(i, NEVER) for i in range(len(train))])
            apart = self._rows(held, kept[len(asked) :])
            how = preferring.Preference(self.beta, self.smoothing, self.average)
            more: dict[str, Any] = {"held_out": apart if held else None, "tell": specimen.tell, "objective": how}
            facts = fit(specimen.model, data, self, folder=place, **more)
        return {"task": self.task.name, "examples": len(train), "left_out": left, **facts}

    def _rows(self, pairs: list[preferring.Replies], reference: list[list[float]]) -> Examples:
        given = [(*pair, *both) for pair, both in zip(pairs, reference, strict=True)]
        return Examples(given, preferring.collate, self.length, self.seed)

    def _pairs(self, specimen: Specimen, part: Part, count: int) -> tuple[list[preferring.Replies], int]:
        """Pairs that fit into a row, and how many do not. Raises ValueError where none does."""
        chosen = sampled(self.task.examples(part), count, self.seed)
        found = preferring.replies(specimen, self.task, chosen, self.chat, self.cut)
        fitting = [p for p in found if len(p[0]) + max(len(p[1]), len(p[2])) <= self.length and preferring.differ(p)]
        if not fitting:
            raise ValueError(f"no pair of {self.task.name!r} to {part} with fits into {self.length} tokens")
        return fitting, len(found) - len(fitting)

    def _reference(self, specimen: Specimen, pairs: list[preferring.Replies], folder: Path) -> list[list[float]]:
        """ln p of both replies of each pair under the model as it is now; from the file where that speaks of the same."""
        weights = combined(digests(specimen.model, [name for name, _ in specimen.model.named_parameters()]))
        key = hashlib.sha256(f"{weights} {self.average} {self.precision} {pairs!r}".encode()).hexdigest()
        path = folder / "reference.json"
        with suppress(ValueError, OSError):  # one that was cut off by a crash, or that is not there, is computed again
            there = json.loads(path.read_text())
            if there.get("key") == key:
                known: list[list[float]] = there["reference"]
                return known
        # Held as `fit` will hold it, by the products that train: else a model would not begin at its reference. In bfloat16 other
        # products gave margins of half a nat to a model that was its own reference.
        with _float32(specimen.model), fast_products(specimen.model):
            found = log_probabilities_of(specimen.model, pairs, self.average, self.precision == "bfloat16", self.batch)
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")  # each of several processes has the same, and puts it there whole
        aside.write_text(json.dumps({"key": key, "reference": found}))
        aside.replace(path)
        return found


@contextmanager
def _float32(model: Any) -> Iterator[None]:
    """Holds the weights in float32 within a block; every sixteen-bit number is one of float32, so they come back as they were."""
    types = {name: t.dtype for name, t in named_tensors(model)}
    model.float()
    try:
        yield
    finally:
        for name, tensor in named_tensors(model):
            tensor.data = tensor.data.to(types[name])


def log_probabilities_of(
    model: Any, pairs: list[preferring.Replies], average: bool, autocast: bool, batch: int
) -> list[list[float]]:
    """[ln p(better), ln p(worse)] of each pair. Pairs of similar length are read together."""
    found: dict[int, list[float]] = {}
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - max(len(pairs[i][1]), len(pairs[i][2])))
    was, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            ids, targets, _, at = preferring.rows([pairs[i] for i in some])
            a, b, c = (x.flatten(0, 1).to(device) for x in (ids, targets, at))
            values = preferring.log_probabilities(model, a, b, c, average).view(-1, 2)
            found.update(zip(some, values.tolist(), strict=True))
    model.train(was)
    return [found[i] for i in range(len(pairs))]
