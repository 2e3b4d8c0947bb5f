"""Uniform quantisation of weights in place: every weight moves to the nearest of N evenly spaced levels.

The weights stay floats, so what is studied is the loss of precision alone, not a format of storage. Ranges are the usual
ones (Gholami et al. 2021, section III): minimum to maximum, symmetric about zero, or clipped at a percentile of |w|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from lesion.blocks import (
    Block,
    Weights,
    by_view,
    cut,
    facts,
    load,
    magnitude,
    names,
    nth_magnitude,
    rewrite,
    total,
)
from lesion.sites import View, resolve
from lesion.streams import BLOCK
from lesion.threads import each
from lesion.trial import Specimen, Step

Scheme = Literal["minmax", "symmetric", "percentile"]
Ends = Weights  # numbers of which each range of weights has one
MOST_LEVELS = 2**20  # beyond, the steps of a float32 are no longer much finer than those of the grid


def grid(low: Ends, high: Ends, levels: int, reach: Ends | None = None) -> tuple[Ends, Ends]:
    """First level and step of N levels, from the smallest and largest weight: arrays, one entry for each range.

    Without `reach` the levels run from low to high: Δ = (high - low)/(N - 1). With it from -reach to reach:
    Δ = 2·reach/(N - 1), the first at -Δ·(N - 1)/2, so that an odd N has an exact zero. Δ is 0 where all weights are
    equal or nothing is within reach.
    """
    if reach is None:
        return low, (high - low) / (levels - 1)
    delta = np.where(low == high, reach.dtype.type(0), 2 * reach / (levels - 1))
    return -(delta * ((levels - 1) / 2)), delta


def snap(w: Weights, first: Ends, delta: Ends, levels: int, *, clip: bool = True) -> None:
    """Moves w onto a grid, in place. Halves round to even; where Δ is 0, w is on its grid already and stays.

        w ← first + Δ·clamp(round((w - first)/Δ), 0, N - 1)

    first, Δ: broadcast against w, and of its type. clip=False saves the clamp where no weight lies beyond the grid.
    """
    constant = delta == 0
    was = w.copy() if constant.any() else w
    delta = np.where(constant, delta.dtype.type(1), delta)
    w -= first
    w /= delta
    np.rint(w, out=w)
    if clip:
        np.clip(w, 0, levels - 1, out=w)
    w *= delta
    w += first
    if was is not w:
        np.copyto(w, was, where=constant)


def geometric(first: float, last: float, n: int) -> tuple[int, ...]:
    """n whole numbers from first to last in equal ratios, rounded half up: geometric(1024, 4, 9) is 1024, 512, …, 4."""
    return _sweep(first, last, n, lambda t: first ** (1 - t) * last**t)


def linear(first: float, last: float, n: int) -> tuple[int, ...]:
    """n whole numbers from first to last in equal steps, rounded half up: linear(16, 4, 4) is 16, 12, 8, 4."""
    return _sweep(first, last, n, lambda t: first * (1 - t) + last * t)


def _sweep(first: float, last: float, n: int, at: Callable[[float], float]) -> tuple[int, ...]:
    if n < 2 or not (math.isfinite(first) and math.isfinite(last) and min(first, last) >= 1):
        raise ValueError(
            f"a sweep has at least 2 doses and runs between numbers of at least 1, not {n} from {first} to {last}"
        )
    found = tuple(math.floor(at(i / (n - 1)) + 0.5 + 1e-9) for i in range(n))  # 1e-9: a half may come out just below
    if len(set(found)) < n:
        raise ValueError(f"from {first} to {last} there are no {n} different whole numbers at equal distances: {found}")
    return found


class Quantise(Step):
    """Uniform quantisation of the weights of a site, biases left alone.

    `percentile` clips: levels run from -t to t, where t is the smallest number that at least so many percent of |w| do not
    exceed, and what lies beyond moves to ±t. A tensor (or channel) whose weights are all equal has no range and is left
    as it is; `constant` in the ledger counts these.
    """

    site: str = Field(description="what is quantised: mlp, attention.value, embedding, mlp.in@3-5, …")
    levels: int = Field(ge=2, le=MOST_LEVELS, description="dose: number of levels (fewer is more damage)")
    scheme: Scheme = Field(
        default="minmax", description="where the levels lie: from smallest to largest weight, or about 0"
    )
    percentile: float = Field(
        default=99.9, gt=0, le=100, description="percent of |w| within reach, for scheme=percentile"
    )
    channel: Literal["tensor", "output"] = Field(
        default="tensor", description="what has a range of its own: a tensor, or each output channel (embedding: token)"
    )

    @model_validator(mode="after")
    def _percentile_is_used(self) -> Self:
        if self.scheme != "percentile" and self.percentile != type(self).model_fields["percentile"].default:
            raise ValueError(
                f"percentile={self.percentile} has a meaning for scheme='percentile' only, not {self.scheme!r}"
            )
        return self

    def touches(self, specimen: Specimen) -> list[str]:
        return names(resolve(specimen.model, self.site))

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        views = resolve(specimen.model, self.site)
        if self.channel == "output":
            done = each(self._by_channel, [rows for view in views for rows in _rows(view)])
            weight, change, constant = total(done)
            return facts(views, weight, change, constant=int(constant))
        blocks = cut(specimen.model, views)
        ends = [torch.aminmax(view.tensor) for view in views]  # here, where torch may use threads of its own
        grids = each(self._grid, list(zip(ends, by_view(blocks), strict=True)))

        def work(block: Block) -> tuple[float, float]:
            return rewrite(block.tensor, lambda w: snap(w, *grids[block.view], self.levels, clip=self._clips))

        weight, change = total(each(work, blocks))
        return facts(views, weight, change, constant=sum(int(delta[0] == 0) for _, delta in grids))

    def _grid(self, view: tuple[tuple[torch.Tensor, torch.Tensor], list[Block]]) -> tuple[Ends, Ends]:
        """The grid of one view, from its smallest and largest weight and its blocks."""
        ends, blocks = view
        low, high = (load(end.reshape(1)) for end in ends)
        reach = None
        if self.scheme == "symmetric":
            reach = np.maximum(-low, high)
        if self.scheme == "percentile":
            rank = self._rank(sum(block.tensor.numel() for block in blocks))
            reach = np.array([magnitude(nth_magnitude(blocks, rank)[0], blocks[0].tensor.dtype)], low.dtype)
        return grid(low, high, self.levels, reach)

    def _by_channel(self, rows: torch.Tensor) -> tuple[float, float, int]:
        """Quantises [channels, …] in place."""
        constant = 0

        def act(w: Weights) -> None:
            nonlocal constant
            w = w.reshape(len(rows), -1)
            low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
            reach = None
            if self.scheme == "symmetric":
                reach = np.maximum(-low, high)
            if self.scheme == "percentile":
                rank = self._rank(w.shape[1])
                reach = np.partition(np.abs(w), rank, axis=1)[:, rank : rank + 1]
            first, delta = grid(low, high, self.levels, reach)
            constant = int((delta == 0).sum())
            snap(w, first, delta, self.levels, clip=self._clips)

        return *rewrite(rows, act), constant

    @property
    def _clips(self) -> bool:
        return self.scheme == "percentile"

    def _rank(self, size: int) -> int:
        """Of the percentile among `size` sorted magnitudes, from 0."""
        return max(0, math.ceil(Fraction(repr(self.percentile)) * size / 100) - 1)  # 99.9 as it is written


def _rows(view: View) -> Iterator[torch.Tensor]:
    """A view as groups of whole channels, [channels, …]."""

    def groups(tensor: torch.Tensor, axes: int) -> Iterator[torch.Tensor]:
        if axes > 1:
            for inner in tensor:
                yield from groups(inner, axes - 1)
        else:
            yield from tensor.split(max(1, BLOCK // tensor[0].numel()))

    yield from groups(view.tensor.movedim(view.outputs, tuple(range(len(view.outputs)))), len(view.outputs))
