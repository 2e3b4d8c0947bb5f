"""Weights in blocks: a step walks over many parameters in place and in constant memory.

A block is a stretch of one parameter's memory, at most BLOCK elements long. Its position there is what random streams are
read by: element i of a parameter gets value i of the parameter's stream, whichever view asks for it, so that noise on
"attention.value" is that part of the noise on "attention", in fused and transposed layouts too. A block with its draws
fits into the caches of a processor, so a step may go over it several times for the price of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lesion.sites import View
from lesion.streams import BLOCK, Draws, Span

AHEAD = 64  # blocks whose draws are made before the first of them is used: threads that draw are not those that compute
ROW = 2**13  # elements that are summed by one thread, so that a sum does not depend on the number of threads
DIGIT = 16  # bits of a magnitude that one pass of `nth_magnitude` settles


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of a parameter's memory. `tensor` is flat wherever the view has no gaps there."""

    view: int  # number of the view it belongs to
    name: str  # of the parameter
    start: int  # position of its first element in the parameter's memory
    tensor: torch.Tensor

    @property
    def span(self) -> Span:
        return self.name, self.start, _length(self.tensor)


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


def with_draws(blocks: Sequence[Block], draws: Draws) -> Iterator[tuple[Block, torch.Tensor]]:
    """Every block with its draws: float32 on the CPU, in the shape of the block."""
    for first in range(0, len(blocks), AHEAD):
        batch = blocks[first : first + AHEAD]
        for block, drawn in zip(batch, draws.fetch([block.span for block in batch]), strict=True):
            yield block, torch.from_numpy(drawn).as_strided(block.tensor.shape, block.tensor.stride())


def rewrite(tensor: torch.Tensor, act: Callable[..., tuple[float, ...]], *beside: torch.Tensor) -> tuple[float, ...]:
    """Returns act(w, …) of a block and of what lies beside it; act changes w in place.

    w is contiguous, in float32 or float64; half precision is rounded once, at the end.
    """
    work = tensor if tensor.dtype == torch.float64 else tensor.float()
    work = work.contiguous()
    result = act(work, *(other.to(work.device, work.dtype).contiguous() for other in beside))
    if work is not tensor:
        tensor.copy_(work)
    return result


def pieces(blocks: Iterable[Block]) -> Iterator[torch.Tensor]:
    """Blocks for reading: float32 or float64, flat, in the order of memory."""
    for block in blocks:
        piece = block.tensor.reshape(-1)
        yield piece if piece.dtype == torch.float64 else piece.float()


def total(rows: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """Sums of columns."""
    return tuple(math.fsum(column) for column in zip(*rows, strict=True))


def square(tensor: torch.Tensor) -> float:
    """Σ x² of a contiguous tensor: of rows in its own precision, over rows in float64."""
    flat = tensor.view(-1)
    cutoff = len(flat) // ROW * ROW
    norms = torch.linalg.vector_norm(flat[:cutoff].view(-1, ROW), dim=1).tolist() if cutoff else []
    if cutoff < len(flat):
        norms.append(float(torch.linalg.vector_norm(flat[cutoff:])))
    return math.fsum(norm * norm for norm in norms)


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


def magnitudes(piece: torch.Tensor) -> torch.Tensor:
    """|w| as whole numbers in the same order: the bits of a float without its sign. NaN comes last."""
    return piece.abs().view(torch.int32 if piece.dtype == torch.float32 else torch.int64)


def magnitude(bits: int, dtype: torch.dtype) -> float:
    """The number that `magnitudes` has turned into these bits, for weights of this type."""
    whole, real = (torch.int64, torch.float64) if dtype == torch.float64 else (torch.int32, torch.float32)
    return float(torch.tensor(bits, dtype=whole).view(real))


def nth_magnitude(blocks: Sequence[Block], n: int) -> tuple[int, int, int]:
    """The n-th smallest |w| (from 0) of one view as `magnitudes` gives it, how many are smaller, and how many equal it.

    A radix selection: each pass counts one digit of those that agree with the digits found so far, so the memory is a
    histogram whatever the size of the tensor.
    """
    bits = 64 if blocks[0].tensor.dtype == torch.float64 else 32
    found, smaller, equal = 0, 0, 0
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros(2**DIGIT, dtype=torch.int64)
        for piece in pieces(blocks):
            digits = magnitudes(piece)
            if shift < bits - DIGIT:
                digits = digits[digits >> (shift + DIGIT) == found]
            here = torch.bincount((digits >> shift) & (2**DIGIT - 1)).cpu()
            counts[: len(here)] += here
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, n - smaller, right=True))
        equal = int(counts[digit])
        smaller += int(upto[digit]) - equal
        found = found << DIGIT | digit
    return found, smaller, equal
