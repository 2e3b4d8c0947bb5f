"""Weights in blocks: a step walks over many parameters in place, with several threads and in constant memory.

A block is a stretch of one parameter's memory, at most BLOCK elements long. Its position there is what random streams are
read by: element i of a parameter gets value i of the parameter's stream, whichever view asks for it, so that noise on
"attention.value" is that part of the noise on "attention", in fused and transposed layouts too.

Blocks are changed by numpy on the CPU, wherever the model lies. So a model on a GPU takes the same damage, bit for bit;
and a numpy function, unlike one of torch, stays on the thread that called it, so threads never wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lesion.sites import View
from lesion.streams import BLOCK, Draws, Floats

Weights = npt.NDArray[np.float32] | npt.NDArray[np.float64]

SAMPLE = 2**15  # elements of a block by which its change is measured
SERIAL = 2**15  # elements up to which torch copies on the calling thread
DIGIT = 16  # bits of a magnitude that one pass of `nth_magnitude` settles


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of a parameter's memory. `tensor` is flat wherever the view has no gaps there."""

    view: int  # number of the view it belongs to
    name: str  # of the parameter
    start: int  # position of its first element in the parameter's memory
    tensor: torch.Tensor

    def beside(self, draws: Draws) -> Floats:
        """The draws of these elements, flat, in their order."""
        shape, steps = self.tensor.shape, self.tensor.stride()
        drawn = draws.read(self.name, self.start, _length(self.tensor))
        if len(drawn) == self.tensor.numel():
            return drawn
        return np.lib.stride_tricks.as_strided(drawn, shape, [4 * step for step in steps]).reshape(-1)


def cut(model: nn.Module, views: Sequence[View]) -> list[Block]:
    """All views as blocks, each view's in the order of memory."""
    blocks = []
    for number, view in enumerate(views):
        tensor = view.tensor
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
        start = int(tensor.storage_offset()) - int(model.get_parameter(view.name).storage_offset())
        blocks += [Block(number, view.name, where, part) for where, part in _cut(tensor, start)]
    return blocks


def by_view(blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks of each view."""
    return [list(group) for _, group in groupby(blocks, key=lambda block: block.view)]


def _cut(tensor: torch.Tensor, start: int) -> Iterator[tuple[int, torch.Tensor]]:
    if tensor.is_contiguous():
        flat, done = tensor.view(-1), 0
        while done < len(flat):
            here = flat[done : done + BLOCK - (start + done) % BLOCK]  # up to where the stream's next block begins
            yield start + done, here
            done += len(here)
        return
    step, row = tensor.stride(0), _length(tensor[0])
    if row > BLOCK:
        for i, inner in enumerate(tensor):
            yield from _cut(inner, start + i * step)
        return
    rows = 1 + (BLOCK - row) // step
    for i in range(0, len(tensor), rows):
        yield start + i * step, tensor[i : i + rows]


def _length(tensor: torch.Tensor) -> int:
    """From the first element to the last in memory, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def load(tensor: torch.Tensor) -> Weights:
    """A block as a flat array: the tensor's own memory where that is possible, else a copy in float32 or float64."""
    near = tensor.cpu()
    if near.is_contiguous() and near.dtype in (torch.float32, torch.float64):
        return near.view(-1).numpy()
    work = torch.empty(near.shape, dtype=torch.promote_types(near.dtype, torch.float32))
    _copy(work, near)
    return work.view(-1).numpy()


def rewrite(tensor: torch.Tensor, act: Callable[[Weights], None]) -> tuple[float, float]:
    """Lets `act` change a block in place. Half precision is computed in float32 and rounded once, at the end.

    Returns (Σw², ΣΔw²), w as it was, estimated from the first SAMPLE elements.
    """
    work = load(tensor)
    head = work[:SAMPLE].copy()
    act(work)
    if tensor.data_ptr() != work.ctypes.data:
        here = torch.from_numpy(work).view(tensor.shape)
        if tensor.device.type == "cpu":
            _copy(tensor, here)
        else:
            tensor.copy_(here)
    scale = len(work) / len(head)
    return scale * square(head), scale * square(head - work[:SAMPLE])


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """target.copy_(source) in pieces so small that torch does not call other threads."""
    if target.numel() <= SERIAL:
        target.copy_(source)
        return
    axis = max(range(target.dim()), key=lambda axis: target.shape[axis])
    for part, other in zip(target.chunk(2, axis), source.chunk(2, axis), strict=True):
        _copy(part, other)


def square(array: Weights) -> float:
    """Σ x², by a loop of numpy's own: a BLAS would call other threads."""
    return float(np.einsum("i,i->", array, array))


def total(rows: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """Sums of columns."""
    return tuple(math.fsum(column) for column in zip(*rows, strict=True))


def facts(views: Sequence[View], weight: float, change: float, **more: Any) -> dict[str, Any]:
    """What every step in place says of itself: how many parameters it addressed, how many numbers these views hold,
    and √(Σ‖Δw‖² / Σ‖w‖²), from the two sums; None where it has no value."""
    known = weight > 0 and math.isfinite(weight) and math.isfinite(change)
    return {
        "tensors": len({view.name for view in views}),
        "parameters": sum(view.tensor.numel() for view in views),
        "relative_change": math.sqrt(max(0.0, change) / weight) if known else None,
        **more,
    }


def names(views: Sequence[View]) -> list[str]:
    return list(dict.fromkeys(view.name for view in views))


def magnitudes(array: Weights) -> npt.NDArray[np.signedinteger[Any]]:
    """|w| as whole numbers in the same order: the bits of a float without its sign. NaN comes last."""
    return np.abs(array).view(np.int32 if array.dtype == np.float32 else np.int64)


def magnitude(bits: int, dtype: torch.dtype) -> float:
    """The number that `magnitudes` has turned into these bits, for weights of this type."""
    return float(np.int64(bits).view(np.float64) if dtype == torch.float64 else np.int32(bits).view(np.float32))


def nth_magnitude(blocks: Sequence[Block], n: int) -> tuple[int, int, int]:
    """The n-th smallest |w| (from 0) of one view as `magnitudes` gives it, how many are smaller, and how many equal it.

    A radix selection: each pass counts one digit of those that agree with the digits found so far, so the memory is a
    histogram whatever the size of the tensor.
    """
    bits = 64 if blocks[0].tensor.dtype == torch.float64 else 32
    found, smaller, equal = 0, 0, 0
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = np.zeros(2**DIGIT, np.int64)
        for block in blocks:
            digits = magnitudes(load(block.tensor))
            if shift < bits - DIGIT:
                digits = digits[digits >> (shift + DIGIT) == found]
            here = np.bincount((digits >> shift) & (2**DIGIT - 1))
            counts[: len(here)] += here
        upto = counts.cumsum()
        digit = int(np.searchsorted(upto, n - smaller, side="right"))
        equal = int(counts[digit])
        smaller += int(upto[digit]) - equal
        found = found << DIGIT | digit
    return found, smaller, equal
