"""A verifier (Cobbe et al. 2021, "Training verifiers to solve math word problems"): a model is trained to tell right solutions
from wrong ones, on solutions that were *sampled from a model* and are labelled by their final answers. So it sees in training
what it will be asked about, wrong chains of thought among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from lesion import verifying
from lesion.digest import named_tensors
from lesion.fit import Documents, Training, fit
from lesion.responses import Examples
from lesion.trial import Reading, Specimen, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Verifier(Training, Step):
    """Trains a verdict on sampled solutions."""

    keeps: ClassVar[bool] = True

    samples: Reading = Field(description="solutions: a reading by task, of examples to train on, with several replies")
    trunk: verifying.Trunk = Field(
        default="decoder", description="decoder: a head on this model; encoder: a small one of its own"
    )
    steps: int = Field(default=200, ge=1, description="optimizer steps")
    batch: int = Field(default=16, ge=1, description="solutions of a step")
    length: int = Field(default=256, ge=2, description="tokens of a problem and its solution; longer ones are left out")
    documents: Documents = Field(default="apart", description="a row is one solution")
    lr: float = Field(default=1e-4, gt=0, description="largest learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.samples.measure.name != "task":
            raise ValueError(f"solutions are read by task, not by {self.samples.measure.name!r}")
        asked: Any = self.samples.measure
        if asked.part != "train":
            raise ValueError("a verifier is trained on solutions of examples to train on: part='train'")
        if asked.task.metric != "correct":
            raise ValueError(
                f"a verifier learns what is right, and {asked.task.name!r} is graded by {asked.task.metric!r}"
            )
        if self.documents != "apart":
            raise ValueError("a row is one solution: documents='apart'")
        return self

    def attach(self, model: PreTrainedModel) -> None:
        verifying.attach(model, self.trunk, self.length, self.seed)

    def touches(self, specimen: Specimen) -> list[str]:
        if self.trunk == "encoder":
            return []
        return [name for name, _ in named_tensors(specimen.model)]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("a verifier reads with a causal model, and this one is encoder-decoder")
        assert specimen.recall is not None, "the walk recalls what is quoted"
        judged = verifying.solutions(specimen, self.samples, specimen.recall(self.samples))
        found = [(text, right) for _, text, right in judged if len(text) <= self.length]
        good = sum(right for _, right in found)
        if not good or good == len(found):
            raise ValueError(
                f"of {len(found)} sampled solutions {good} are right: a verifier needs right and wrong ones"
            )
        self.attach(specimen.model)
        data = Examples(found, verifying.collate, self.length, self.seed)
        with specimen.workplace() as place:
            how: dict[str, Any] = {"tell": specimen.tell, "objective": verifying.Correctness()}
            facts = fit(specimen.model, data, self, folder=place, **how)
        return {"solutions": len(found), "right": good, "left_out": len(judged) - len(found), **facts}
