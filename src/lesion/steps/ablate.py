"""Ablation: a share of a site is set to zero, in weights, attention heads, neurons or whole layers.

Heads after Michel, Levy & Neubig (2019); layers as in Fan, Grave & Joulin (2020) and Men et al. (2024); weights by
magnitude after Han et al. (2015). Nothing is rescaled by 1/(1 - share), as dropout would: what is gone is gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from lesion.blocks import (
    Block,
    Weights,
    by_view,
    cut,
    facts,
    magnitudes,
    names,
    nth_magnitude,
    rewrite,
    total,
)
from lesion.sites import View, parse, resolve
from lesion.streams import BLOCK, Floats, drawing, uniforms
from lesion.threads import each
from lesion.trial import Specimen, Step

WRITERS = ("attention.output", "cross.output", "mlp.out")  # what a layer adds to the residual stream comes from these
ROLES = {"head": ("attention", "cross"), "neuron": ("mlp",)}

Order = Literal["random", "largest", "smallest"]
Scores = npt.NDArray[np.floating[Any]]
Sums = tuple[float, float, float, float]  # units, Σw², ΣΔw², weights that were zeroed


def keep(w: Weights, mask: npt.NDArray[np.bool_]) -> int:
    """w ← w·1[mask] in place, as bits: what stays is untouched, what goes is +0, NaN included. Returns how many went."""
    bits = w.view(np.int32 if w.dtype == np.float32 else np.int64)
    np.bitwise_and(bits, np.negative(mask.view(np.int8)), out=bits)
    return len(mask) - int(np.count_nonzero(mask))


def keep_at_random(w: Weights, u: Floats, share: float) -> int:
    """w ← w·1[u ≥ share], u uniform in [0, 1). Returns how many went."""
    return keep(w, u >= np.float32(share))


def remove_by_size(blocks: Sequence[Block], count: int, order: Order) -> tuple[float, ...]:
    """Zeroes the `count` largest or smallest |w| of one view; equal ones in the order of memory, so that a larger count
    only adds. Returns (Σw², ΣΔw², count), the sums as `rewrite` does. Memory does not grow with the view: nothing is
    sorted."""
    if not count:
        return *total([rewrite(block.tensor, lambda w: None) for block in blocks]), 0
    size, largest = sum(block.tensor.numel() for block in blocks), order == "largest"
    bound, smaller, equal = nth_magnitude(blocks, size - count if largest else count - 1)
    ties = count - (size - smaller - equal if largest else smaller)  # how many of those equal to the bound go as well

    def act(w: Weights) -> None:
        nonlocal ties
        found = magnitudes(w)
        mask = found <= bound if largest else found >= bound
        same = np.flatnonzero(found == bound)[:ties]
        mask[same] = False
        ties -= len(same)
        keep(w, mask)

    return *total([rewrite(block.tensor, act) for block in blocks]), count


def share_of(share: float, n: int) -> int:
    """share x n, rounded half up, with the share taken as the decimal it is written as: 0.29 of 50 is 14.5, so 15."""
    return math.floor(Fraction(repr(share)) * n + Fraction(1, 2))


def first_of(scores: Scores, count: int, order: Order) -> list[int]:
    """Indices of the `count` lowest scores ("largest": highest), in rising order. Equal scores go by index, so that a
    larger count only adds."""
    ranked = np.argsort(-scores if order == "largest" else scores, kind="stable")
    return sorted(ranked[:count].tolist())


def energies(tensor: torch.Tensor, axis: int) -> npt.NDArray[np.float64]:
    """Σ w² of every slice along an axis, in float64."""
    slices = tensor.movedim(axis, 0)
    few = max(1, BLOCK // slices[0].numel())
    return torch.cat([part.double().reshape(len(part), -1).square().sum(1) for part in slices.split(few)]).cpu().numpy()


class Ablate(Step):
    """Sets a share of a site to zero.

    weight   Each weight on its own. At random: w·1[u > share], u uniform, so the share is met on average. By size: exactly
             share x n of each tensor, by |w|; equal ones by position. Biases stay.
    head     As many heads in every layer: their rows of query, key and value (weights and biases) and their columns of
             output, as far as the site names these. Zero columns of output alone remove a head exactly. Where queries are
             grouped, the heads are the query heads, and a key-value head goes with the last query head that reads it; a
             site of keys and values alone has key-value heads.
    neuron   As many neurons in every mlp: their rows of in and gate, biases included, and their columns of out.
    layer    Layers lose what the site names of attention.output, cross.output and mlp.out, weights and biases. With the
             site "attention+mlp", a block that adds to its input (pre-norm) becomes the identity.

    Of n units, share x n go, rounded half up; small shares of few heads are therefore none. The order is random, or by
    norm of what a unit would lose. Masks are nested: a larger share with the same seed, or in the same order, ablates all
    that a smaller one does, and more.
    """

    site: str = Field(description="what is ablated: mlp, attention, attention.value, attention+mlp, mlp.in@3-5, …")
    share: float = Field(ge=0, le=1, description="dose: share of the units that are set to zero, from 0 to 1")
    unit: Literal["weight", "head", "neuron", "layer"] = Field(default="weight", description="what goes as a whole")
    order: Order = Field(
        default="random", description="which go first: any, or those with the largest or smallest norm"
    )
    seed: int = Field(default=0, ge=0, description="of the random order; doses of one seed are nested")

    @model_validator(mode="after")
    def _seed_is_used(self) -> Self:
        if self.order != "random" and self.seed != 0:
            raise ValueError(f"seed={self.seed} has a meaning for order='random' only, not for {self.order!r}")
        return self

    def touches(self, specimen: Specimen) -> list[str]:
        return names(self._views(specimen))

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        views = self._views(specimen)
        if self.unit != "weight":
            return self._units(views)
        blocks = cut(specimen.model, views)
        weight, change, zeroed = total(self._at_random(blocks) if self.order == "random" else self._by_size(blocks))
        return facts(views, weight, change, zeroed=int(zeroed))

    def _views(self, specimen: Specimen) -> list[View]:
        """What may change."""
        if self.unit == "weight":
            return resolve(specimen.model, self.site)
        if any(term.heads for term in parse(self.site)):
            raise ValueError(f"unit={self.unit!r} chooses by share, so the site must not name heads; got {self.site!r}")
        found = resolve(specimen.model, self.site, biases=True)
        if self.unit == "layer":
            if views := [view for view in found if view.part.removesuffix(".bias") in WRITERS]:
                return views
            raise ValueError(f"unit='layer' zeroes {', '.join(WRITERS)}, of which the site {self.site!r} has none")
        if others := {view.part for view in found if view.part.partition(".")[0] not in ROLES[self.unit]}:
            allowed = " or ".join(ROLES[self.unit])
            raise ValueError(
                f"unit={self.unit!r} needs a site within {allowed}; {self.site!r} has {', '.join(sorted(others))}"
            )
        chosen = [view for view in found if view.units is not None]  # the bias of an output belongs to no unit
        if not chosen:
            raise ValueError(f"unit={self.unit!r}: what the site {self.site!r} has here is not divided into such units")
        return chosen

    def _at_random(self, blocks: Sequence[Block]) -> list[tuple[float, ...]]:
        with drawing("uniform", self.seed, "ablate.weight") as draws:

            def work(block: Block) -> tuple[float, ...]:
                u, gone = block.beside(draws), 0

                def act(w: Weights) -> None:
                    nonlocal gone
                    gone = keep_at_random(w, u, self.share)

                return *rewrite(block.tensor, act), gone

            return each(work, blocks)

    def _by_size(self, blocks: Sequence[Block]) -> list[tuple[float, ...]]:
        def work(group: list[Block]) -> tuple[float, ...]:
            count = share_of(self.share, sum(block.tensor.numel() for block in group))
            return remove_by_size(group, count, self.order)

        return each(work, by_view(blocks))

    def _units(self, views: Sequence[View]) -> dict[str, Any]:
        """Zeroes whole units, group by group: the heads or neurons of one layer, or the layers of one tower."""
        groups: dict[str, list[View]] = {}
        for view in views:
            groups.setdefault(self._group(view), []).append(view)
        act = self._layers if self.unit == "layer" else self._slices
        done = [act(place, group) for place, group in groups.items()]
        units, weight, change, zeroed = total(sums for _, sums in done)
        which = {place: gone for place, (gone, _) in zip(groups, done, strict=True)}
        more = {} if self.unit == "neuron" else {"which": which}  # neurons are too many to be listed
        silenced = sum(map(len, which.values()))
        return facts(views, weight, change, zeroed=int(zeroed), units=int(units), silenced=silenced, **more)

    def _group(self, view: View) -> str:
        role = view.part.partition(".")[0]
        return view.tower if self.unit == "layer" else f"{view.tower}/{role}@{view.layer}"

    def _choose(self, place: str, labels: Sequence[int], energy: npt.NDArray[np.float64]) -> list[int]:
        """Indices of the units that go. A unit's random number belongs to its label, whoever competes with it."""
        scores: Scores = energy
        if self.order == "random":
            drawn = np.empty(max(labels) + 1, np.float32)
            uniforms(self.seed, place, f"ablate.{self.unit}", 0, drawn)
            scores = drawn[list(labels)]
        return first_of(scores, share_of(self.share, len(labels)), self.order)

    def _slices(self, place: str, views: Sequence[View]) -> tuple[list[int], Sums]:
        """Heads or neurons of one layer."""
        counts = [view.tensor.shape[_axis(view)] for view in views]
        size = max(counts)
        if any(size % count or (self.unit == "neuron" and size != count) for count in counts):
            raise ValueError(f"{place} has {self.unit}s that cannot be matched: {sorted(set(counts))}")
        parts = [energies(view.tensor, _axis(view)) for view in views]
        gone = self._choose(place, range(size), np.sum([part for part in parts if len(part) == size], axis=0))
        chosen = np.isin(np.arange(size), gone)
        weight = change = zeroed = 0.0
        for view, energy in zip(views, parts, strict=True):
            here = chosen.reshape(len(energy), -1).all(1)  # a slice that several units share goes with the last of them
            view.tensor.index_fill_(_axis(view), torch.from_numpy(here).nonzero().squeeze(1).to(view.tensor.device), 0)
            weight, change = weight + energy.sum(), change + energy[here].sum()
            zeroed += here.sum() * view.tensor.numel() / len(energy)
        return gone, (size, weight, change, zeroed)

    def _layers(self, place: str, views: Sequence[View]) -> tuple[list[int], Sums]:
        """Layers of one tower."""
        inside = [(view.layer, view.tensor) for view in views if view.layer is not None]
        layers = sorted({layer for layer, _ in inside})
        energy = np.zeros(len(layers))
        for layer, tensor in inside:
            energy[layers.index(layer)] += energies(tensor, 0).sum()
        chosen = self._choose(place, layers, energy)
        gone = [layers[i] for i in chosen]
        zeroed = sum(tensor.zero_().numel() for layer, tensor in inside if layer in gone)
        return gone, (len(layers), energy.sum(), energy[chosen].sum(), zeroed)


def _axis(view: View) -> int:
    assert view.units is not None, "parts without units are not in `_views`"
    return view.units
