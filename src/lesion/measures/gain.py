"""Gain: along which directions of the loss a training has moved a model, and whether flat ones were favoured.

    Δ = W − W₀ over the chosen matrices, W₀ the model before, vᵢ its steep eigenvectors, P the projection off all of them
    direction/i   ⟨vᵢ, Δ⟩, ⟨vᵢ, g⟩ and their ratio |⟨vᵢ, Δ⟩ / ⟨vᵢ, g⟩|          g: gradient, before, of what was trained on
    all           amplification = ln[(‖PΔ‖ / ‖Pg‖) / (‖Δ − PΔ‖ / ‖g − Pg‖)]     positive: flat directions went farther than their
                                                                                share of the gradient; one step of SGD gives 0

That Adam divides by √v is said to amplify what is flat; but it divides each coordinate by its own, with fresh moments the first
step is sign(g), and with warm ones |Δw| ≤ η(1 − β₁)/√(1 − β₂). So it is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from lesion.steepness import OfCurvature
from lesion.trial import Reading, Row, Specimen, Trial

if TYPE_CHECKING:
    import torch

ALL = "displacement", "flat_moved", "flat_pulled", "amplification"


class Gain(OfCurvature):
    """A row for each steep direction, and one for all."""

    reference: Trial = Field(description="the model before")
    catalyst: Reading = Field(description="a reading by catalyst, of whose string g is the gradient")

    @field_validator("catalyst")
    @classmethod
    def _of_a_catalyst(cls, value: Reading) -> Reading:
        if value.measure.name != "catalyst":
            raise ValueError(f"the string is that of a reading by catalyst, not by {value.measure.name!r}")
        return value

    def _names(self) -> list[str]:
        return [*(f"direction/{i:02d}" for i in range(self.directions)), "all"]

    def items(self, specimen: Specimen) -> list[str]:
        return self._names()

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """All at once: the steep subspace is found once."""
        yield list(items)

    def size(self) -> tuple[int, int]:
        return len(self._names()), 4 * self.products_expected() * self.documents * self.tokens

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion.catalysts import Ground

        assert specimen.bring is not None and specimen.recall is not None
        from lesion.lanczos import Unfound

        began, before = time.perf_counter(), specimen.bring(self.reference)
        tokens = next(row["string_ids"] for row in specimen.recall(self.catalyst) if row["item"] == "catalyst")
        try:
            if tokens is None:
                raise Unfound("no string", "the quoted reading has found none")
            pairs = self.steep(before)
            with self.operated(before, graphs=False) as operator:
                gradient = Ground(before.model, operator.parameters, pairs.vectors).gradient(tokens)
                moved = _moved(operator.names, operator.parameters, specimen.model)
            rows = spread(pairs.values, pairs.vectors, gradient, moved)
        except Unfound as nothing:
            blank = dict.fromkeys(("value", "moved", "pulled", "gain", *ALL))
            rows = [{"item": item, "outcome": nothing.outcome, **blank} for item in items]
        spent = (time.perf_counter() - began) / len(rows)
        return [{**row, "duration": spent} for row in rows]

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {name: rows[-1][name] for name in ALL} | {
            "not_measured": sum(row["outcome"] != "measured" for row in rows)
        }


def _moved(names: Sequence[str], before: Sequence[torch.Tensor], model: Any) -> torch.Tensor:
    """Δ [N]. Raises ValueError where the model has no such matrices any more: they are codes, or adapters hang on them."""
    from lesion.curvature import flat

    here = dict(model.named_parameters())
    if lost := [
        name
        for name in names
        if name not in here or here[name].shape != dict(zip(names, before, strict=True))[name].shape
    ]:
        raise ValueError(f"{lost[0]} of the model before is no plain matrix now: merge adapters first")
    return flat([here[name].detach().float() - was.detach().float() for name, was in zip(names, before, strict=True)])


def spread(values: torch.Tensor, vectors: torch.Tensor, gradient: torch.Tensor, moved: torch.Tensor) -> list[Row]:
    """The rows, from eigenvalues [k], eigenvectors [k, N], g [N] and Δ [N]."""
    from lesion.lanczos import Unfound

    if not bool(gradient.isfinite().all()):
        raise Unfound("not finite", "the gradient of the string is not finite")
    rows: list[Row] = []
    moves, pulls = (vectors @ moved).double().tolist(), (vectors @ gradient).double().tolist()
    for i, (value, move, pull) in enumerate(zip(values.tolist(), moves, pulls, strict=True)):
        fine = math.isfinite(move)
        row: Row = {"item": f"direction/{i:02d}", "outcome": "measured" if fine else "not finite", "value": value}
        row |= {"moved": move if fine else None, "pulled": pull}
        rows.append({**row, "gain": abs(move / pull) if fine and pull else None} | dict.fromkeys(ALL))
    all_moved, all_pulled = (float(x.double().square().sum()) for x in (moved, gradient))
    steep_moved, steep_pulled = (math.fsum(x * x for x in some) for some in (moves, pulls))
    fine = math.isfinite(all_moved)
    row = {"item": "all", "outcome": "measured" if fine else "not finite"} | dict.fromkeys(
        ("value", "moved", "pulled", "gain")
    )
    row |= {"displacement": math.sqrt(all_moved) if fine else None}
    row |= {"flat_moved": 1 - steep_moved / all_moved if fine and all_moved else None}
    row |= {"flat_pulled": 1 - steep_pulled / all_pulled if all_pulled else None}
    parts = (all_moved - steep_moved, all_pulled - steep_pulled, steep_moved, steep_pulled)
    ready = fine and all(part > 0 for part in parts)
    flat_move, flat_pull, steep_move, steep_pull = parts
    row["amplification"] = 0.5 * math.log(flat_move / flat_pull * steep_pull / steep_move) if ready else None
    return [*rows, row]
