"""Training on replies: what `finetune` and `sft` share. Not a word of the grammar, a base of such words.

The loss is that of language modelling over the tokens of replies and their end tokens; prompts are read and not scored. Every
weight that wants to be trained is: behind `lora` the adapters, else all.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from lesion import asking
from lesion.fit import Documents, Training, fit
from lesion.packing import Data
from lesion.responses import Examples, pack_pairs, translations
from lesion.task import AnyTask, Part, sampled
from lesion.trial import Specimen, Step

HELD_OUT = 64  # examples whose loss is read meanwhile


class ResponseTraining(Training, Step):
    """Trains on examples of a task."""

    family: ClassVar[str] = "step"
    keeps: ClassVar[bool] = True

    task: AnyTask = Field(description="what is taught")
    examples: int = Field(default=0, ge=0, description="of its training set, drawn at random; 0: all")
    chat: asking.Chat = Field(default="plain", description=f"how they are put; {asking.TOLD}")
    batch: int = Field(default=8, ge=1, description="rows of an optimizer step")
    length: int = Field(default=256, ge=2, description="tokens of a row; a longer example is left out")
    documents: Documents = Field(default="apart", description="no example sees another one")
    lr: float = Field(default=2e-4, gt=0, description="largest learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices")

    @model_validator(mode="after")
    def _keeps_examples_apart(self) -> Self:
        if self.documents != "apart":
            raise ValueError("an example that saw others would learn from their replies: documents='apart'")
        return self

    def touches(self, specimen: Specimen) -> list[str]:
        return [name for name, p in specimen.model.named_parameters() if p.requires_grad]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        data, facts = self.data(specimen, "train", self.examples)
        held = self.data(specimen, "test", HELD_OUT)[0] if self.eval_every else None
        with specimen.workplace() as place:
            done = fit(specimen.model, data, self, folder=place, held_out=held, tell=specimen.tell)
        return {"task": self.task.name, **facts, **done}

    def data(self, specimen: Specimen, part: Part, count: int) -> tuple[Data, dict[str, Any]]:
        """Rows, and facts about them. Raises ValueError where no example fits into a row."""
        if getattr(specimen.model.config, "sinks", None) == "tokens":
            raise ValueError("a row of examples cannot begin with learned sink tokens: each example would need its own")
        found = asking.pairs(specimen, self.task, sampled(self.task.examples(part), count, self.seed), self.chat)
        both = specimen.model.config.is_encoder_decoder
        sizes = [max(len(a), len(b)) if both else len(a) + len(b) for a, b in found]
        fit_in = [pair for pair, size in zip(found, sizes, strict=True) if size <= self.length]
        if not fit_in:
            raise ValueError(
                f"no example of {self.task.name!r} fits into {self.length} tokens; the shortest has {min(sizes)}"
            )
        facts = {"examples": len(fit_in), "left_out": len(found) - len(fit_in)}
        if both:
            return Examples(fit_in, translations, self.length, self.seed), facts
        return pack_pairs(fit_in, self.length, self.seed), facts
