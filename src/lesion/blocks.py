"""Weights in blocks: a step walks over many parameters in place, with several threads and in constant memory.

A block is a stretch of one parameter's memory, at most BLOCK elements long. Its position there is what random streams are
read by: element i of a parameter gets value i of the parameter's stream, whichever view asks for it, so that noise on
"attention.value" is that part of the noise on "attention", in fused and transposed layouts too.

Within a block, kernels run on pieces so small that torch keeps them on the calling thread. Threads therefore share the
work by blocks alone, which no result depends on, and never wait for each other inside a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import nn

from lesion.sites import View
from lesion.streams import BLOCK, Draws

PIECE = 2**15  # elements: the largest kernel that torch does not split among threads; four pieces fit into an L2 cache
DIGIT = 16  # bits of a magnitude that one pass of `nth_magnitude` settles

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of a parameter's memory. `tensor` is flat wherever the view has no gaps there."""

    view: int  # number of the view it belongs to
    name: str  # of the parameter
    start: int  # position of its first element in the parameter's memory
    tensor: torch.Tensor

    def numbers(self, draws: Draws) -> torch.Tensor:
        """The draws of these elements, on the CPU, in the shape of `tensor`."""
        drawn = torch.from_numpy(draws.read(self.name, self.start, _span(self.tensor)))
        return drawn.as_strided(self.tensor.shape, self.tensor.stride())


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
    step, row = tensor.stride(0), _span(tensor[0])
    if row > BLOCK:
        for i, inner in enumerate(tensor):
            yield from _cut(inner, start + i * step)
        return
    rows = 1 + (BLOCK - row) // step
    for i in range(0, len(tensor), rows):
        yield start + i * step, tensor[i : i + rows]


def _span(tensor: torch.Tensor) -> int:
    """Length of the stretch of memory from the first element to the last."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def each(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[work(item) for item in items], by as many threads as torch may use. A thread takes the next item when it is done
    with one; the results come in the order of the items."""
    count = min(torch.get_num_threads(), len(items))
    results: dict[int, Result] = {}
    turns = iter(range(len(items)))  # one iterator for all: the interpreter hands out each turn once

    def take_turns() -> None:
        with torch.no_grad():
            for turn in turns:
                results[turn] = work(items[turn])

    if count < 2:
        take_turns()
    else:
        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(take_turns) for _ in range(count)]:
                future.result()
    return [results[turn] for turn in range(len(items))]


def rewrite(
    tensor: torch.Tensor, act: Callable[..., Sequence[float]], *others: torch.Tensor, flat: bool = True
) -> tuple[float, ...]:
    """Runs act(w, …) on the pieces of a block and of `others` beside it; w is changed in place. Returns act's sums.

    Half precision is computed in float32 and rounded once, at the end. With flat=False the block is one piece and keeps
    its shape.
    """
    work = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    work = work.contiguous()
    parts: Iterable[tuple[torch.Tensor, ...]] = [(work, *others)]
    if flat:
        size = PIECE if work.device.type == "cpu" else max(1, work.numel())
        beside = [other.to(work.device, work.dtype) for other in others]
        parts = zip(*(whole.reshape(-1).split(size) for whole in (work, *beside)), strict=True)
    sums = total(act(*part) for part in parts)
    if work is not tensor:
        tensor.copy_(work)
    return sums


def pieces(blocks: Sequence[Block]) -> Iterator[torch.Tensor]:
    """The pieces of some blocks, for reading: float32 or float64, flat, in the order of memory."""
    for block in blocks:
        for piece in block.tensor.reshape(-1).split(PIECE):
            yield piece if piece.dtype == torch.float64 else piece.float()


def total(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Sums of columns."""
    return tuple(math.fsum(column) for column in zip(*rows, strict=True))


def square(tensor: torch.Tensor) -> float:
    """Σ x², of a piece."""
    norm = float(torch.linalg.vector_norm(tensor))
    return norm * norm


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
    wide = dtype == torch.float64
    return float(
        torch.tensor(bits, dtype=torch.int64 if wide else torch.int32).view(torch.float64 if wide else torch.float32)
    )


def nth_magnitude(blocks: Sequence[Block], n: int) -> tuple[int, int, int]:
    """The n-th smallest |w| (from 0) of one view as `magnitudes` gives it, how many are smaller, and how many equal it.

    A radix selection: each pass counts one digit of those that agree with the digits found so far, so the memory is a
    histogram whatever the size of the tensor.
    """
    wide = blocks[0].tensor.dtype == torch.float64
    found, smaller, equal = 0, 0, 0
    for shift in range((64 if wide else 32) - DIGIT, -1, -DIGIT):
        counts = torch.zeros(2**DIGIT, dtype=torch.int64)
        for piece in pieces(blocks):
            bits = magnitudes(piece)
            digits = bits[bits >> (shift + DIGIT - 1) >> 1 == found]  # in two: a shift by all the bits is undefined
            here = torch.bincount((digits >> shift) & (2**DIGIT - 1)).cpu()
            counts[: len(here)] += here
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, n - smaller, right=True))
        equal = int(counts[digit])
        smaller += int(upto[digit]) - equal
        found = found << DIGIT | digit
    return found, smaller, equal
