"""Curvature: the steepest directions of the loss, how flat the rest is, and the density of eigenvalues.

    top/i      eigenpair i of largest |λ|: Rayleigh quotient, residual ‖H v − λ v‖ (computed, not estimated)
    random/i   a random direction: its Rayleigh quotient and ‖H v‖ / |λ₁|, what "flat" has to be compared with
    null/i     a vector near the null space of the site, by a Chebyshev filter
    density/i  nodes and weights of a quadrature of the density of eigenvalues, from one random probe

(Ghorbani, Krishnan & Xiao 2019, "An investigation into neural net optimization via Hessian eigenvalue density".)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lesion.steepness import GIB, OfCurvature
from lesion.trial import Row, Specimen

if TYPE_CHECKING:
    import torch

FLAT = 1e-3  # share of |λ₁| below which an eigenvalue is counted as near zero


class Curvature(OfCurvature):
    """Eigenpairs of largest magnitude, random directions, near-null vectors and the density."""

    random: int = Field(default=4, ge=1, description="random directions to compare with")
    null: int = Field(default=0, ge=0, description="vectors near the null space; choose a small site")
    degree: int = Field(default=80, ge=4, description="of the filter that finds them: products for each")
    probes: int = Field(default=2, ge=0, description="random probes of the density; 0: none")
    steps: int = Field(default=30, ge=2, description="Lanczos steps of a probe")

    def items(self, specimen: Specimen) -> list[str]:
        return self._names()

    def _names(self) -> list[str]:
        counts = {"top": self.directions, "random": self.random, "null": self.null, "density": self.probes}
        return [f"{kind}/{i:02d}" for kind, count in counts.items() for i in range(count)]

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """All at once: every row is relative to the largest eigenvalue."""
        yield list(items)

    def size(self) -> tuple[int, int]:
        products = (
            self.products_expected()
            + self.directions
            + self.random
            + self.null * self.degree
            + self.probes * self.steps
        )
        return len(self._names()), 4 * products * self.documents * self.tokens

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion.lanczos import Unfound

        began = time.perf_counter()
        try:
            rows, shared = self._rows(specimen)
        except Unfound as nothing:
            rows, shared = (
                [{"item": item, "outcome": nothing.outcome} for item in items],
                {"largest": None, "size": None},
            )
        spent = (time.perf_counter() - began) / len(rows)
        return [{**_row(row["item"]), **row, **shared, "duration": spent} for row in rows]

    def _rows(self, specimen: Specimen) -> tuple[list[Row], Row]:
        import torch

        from lesion.lanczos import density, near_null
        from lesion.stats import generator
        from lesion.steepness import random_direction

        pairs, rows = self.steep(specimen), list[Row]()
        with self.operated(specimen) as operator:
            largest, like = float(pairs.values[0].abs()), operator.parameters[0]
            for i, vector in enumerate(pairs.vectors):
                rows.append({"item": f"top/{i:02d}", **_looked_at(operator, vector, largest)})
            for i in range(self.random):
                v = random_direction(operator.size, "random direction", self.seed, i).to(like)
                rows.append({"item": f"random/{i:02d}", **_looked_at(operator, v / v.norm(), largest)})
            if self.null:
                block = torch.stack(
                    [random_direction(operator.size, "null", self.seed, i).to(like) for i in range(self.null)]
                )
                _, vectors, _ = near_null(operator.times, block / block.norm(dim=1, keepdim=True), largest, self.degree)
                for i, vector in enumerate(vectors):
                    rows.append({"item": f"null/{i:02d}", **_looked_at(operator, vector, largest)})
            if self.probes:
                stream = torch.Generator().manual_seed(int(generator("density", self.seed).integers(2**62)))
                found = density(
                    operator.times, operator.size, self.probes, self.steps, stream, like, self.memory * GIB or None
                )
                for i, (near, trace) in enumerate(
                    zip(found.share(-FLAT * largest, FLAT * largest), found.trace(operator.size), strict=True)
                ):
                    quadrature = {"nodes": found.nodes[i].tolist(), "weights": found.weights[i].tolist()}
                    rows.append({**_row(f"density/{i:02d}"), "near_zero": near, "trace": trace, **quadrature})
        return rows, {"largest": largest, "size": operator.size}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        def mean(kind: str, field: str) -> float | None:
            values = [row[field] for row in rows if row["item"].startswith(f"{kind}/") and row[field] is not None]
            return math.fsum(values) / len(values) if values else None

        top = [row for row in rows if row["item"].startswith("top/")]
        return {
            "largest": top[0]["value"],
            "least of the top": top[-1]["value"],
            "worst residual": max((row["residual"] for row in top if row["residual"] is not None), default=None),
            "length, random": mean("random", "length"),
            "length, null": mean("null", "length"),
            "near_zero": mean("density", "near_zero"),
            "trace": mean("density", "trace"),
            "size": top[0]["size"],
            "not_measured": sum(row["outcome"] != "measured" for row in rows),
        }


def _row(item: str) -> Row:
    names = ("value", "residual", "length", "near_zero", "trace", "nodes", "weights")
    return {"item": item, "outcome": "measured", **dict.fromkeys(names)}


def _looked_at(operator: Any, v: torch.Tensor, largest: float) -> Row:
    """Rayleigh quotient, and ‖H v − λ v‖ and ‖H v‖ as shares of |λ₁|, of a unit vector."""
    from lesion.lanczos import Unfound

    moved = operator.times(v)
    value = float(v @ moved)
    if not math.isfinite(value):
        raise Unfound("not finite", "a product with the operator is not finite")
    return {
        "value": value,
        "residual": float((moved - value * v).norm()) / largest,
        "length": float(moved.norm()) / largest,
    }
