"""A loss-matched control: damage of a known kind, of just the dose at which the model is as bad as another one.

Whether a model is robust cannot be told from whether it is already bad: the loss of a worse model has less room to rise. So
what is claimed of an intervention is compared with a model of the same clean loss that got there without it. The dose is
found by doubling and bisection on the same reading that the other model has, and stands in the ledger.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from lesion.digest import named_tensors
from lesion.trial import Measure, Reading, Specimen, Step

DOUBLINGS = 12
HALVINGS = 24


class MatchLoss(Step):
    """Applies a step of some dose until this model's `nll` is that of a quoted reading."""

    keeps: ClassVar[bool] = True

    to: Reading = Field(description="the other model's loss: a reading whose summary has the value")
    step: Step = Field(description="the damage, such as a noise; its dose is where the search begins")
    dose: str = Field(default="sigma", description="the field of the step that is its dose")
    value: str = Field(default="nll", description="what is matched in the summary")
    within: float = Field(
        default=0.005, gt=0, description="largest difference, in the unit of the value (nats a token)"
    )

    def touches(self, specimen: Specimen) -> list[str]:
        return self.step.touches(specimen)

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        assert specimen.recall is not None, "the walk recalls what is quoted"
        if self.dose not in type(self.step).model_fields:
            raise ValueError(
                f"{self.step.name} has no field {self.dose!r}; it has {', '.join(type(self.step).model_fields)}"
            )
        target = self.to.measure.summarise(specimen.recall(self.to)).get(self.value)
        if target is None:
            raise ValueError(f"{self.to.measure.name} of {self.to.trial} has no {self.value!r} to be matched")
        tensors = dict(named_tensors(specimen.model))
        before = {name: tensors[name].detach().clone() for name in self.touches(specimen)}
        tried: dict[float, float] = {}

        def loss(dose: float) -> float:
            for name, tensor in before.items():
                tensors[name].data.copy_(tensor)
            if dose:
                self.step.model_copy(update={self.dose: dose}).apply(specimen)
            found = read(self.to.measure, specimen).get(self.value)
            tried[dose] = float("inf") if found is None else float(found)  # damage beyond all measure
            if specimen.tell is not None:
                specimen.tell("train", step=len(tried), steps=HALVINGS, loss=tried[dose], lr=dose)
            return tried[dose]

        healthy = loss(0.0)
        if healthy > target + self.within:
            raise ValueError(
                f"{specimen.trial} has {self.value} {healthy:.4f} without any damage, which is more than the {target:.4f} that "
                "was to be reached: only a better model can be matched to a worse one"
            )
        dose = search(loss, float(getattr(self.step, self.dose)), healthy, target, self.within)
        facts = {"dose": dose, self.value: loss(dose), "target": target, "undamaged": healthy, "readings": len(tried)}
        return {**facts, "of": self.step.to_json()}


def read(measure: Measure, specimen: Specimen) -> dict[str, Any]:
    """The summary of a measure on what lies on the bench."""
    items = measure.items(specimen)
    return measure.summarise([row for chunk in measure.chunks(items) for row in measure.read(specimen, chunk)])


def search(loss: Any, dose: float, healthy: float, target: float, within: float) -> float:
    """A dose with |loss(dose) − target| ≤ within, for a loss that rises from `healthy` at 0. ValueError where none is found."""
    if abs(healthy - target) <= within:
        return 0.0
    low, high = 0.0, dose
    if high <= 0:
        raise ValueError(f"the search begins at a dose above 0, not at {dose}")
    for _ in range(DOUBLINGS):
        if loss(high) >= target - within:
            break
        low, high = high, 2 * high
    else:
        raise ValueError(f"doses up to {high / 2:g} do not reach the loss {target:.4f}")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = loss(middle)
        if abs(found - target) <= within:
            return middle
        low, high = (middle, high) if found < target else (low, middle)
    raise ValueError(
        f"no dose between {low:g} and {high:g} has a loss within {within:g} of {target:.4f}: it jumps there"
    )
