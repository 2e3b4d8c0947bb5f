"""Rows to train on that are whole examples: prompts with their responses, of which only the responses are scored.

    row of a causal model     prompt response <end> | prompt response <end> | …      as many as fit, kept apart
    row of an encoder-decoder source → response <end>                                one

A response without its prompt teaches something else, so no example is cut: one that is longer than a row is left out, and how
many are is a fact of the step. Examples share a row as `lesion.packing` keeps documents apart, so nothing is padded but what is
left of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lesion.likelihood import padded
from lesion.loss import IGNORE
from lesion.packing import Packed, digest_of, order_of_rows

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt and of its response, the end token included


def pack_pairs(pairs: Sequence[Pair], length: int, seed: int) -> Packed:
    """Rows of `length` tokens, filled best-fit from the longest example on (Johnson 1973). Raises ValueError where an example is
    longer than a row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of each row, ascending, and its number
    for i in sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1])):
        size = len(pairs[i][0]) + len(pairs[i][1])
        if size > length:
            raise ValueError(f"example {i} has {size} tokens, and a row has {length}")
        at = bisect.bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (left - size, row))
    stream = np.zeros(len(rows) * length + 1, np.int32)  # a row's targets reach one token beyond it
    number, scored = np.full(len(stream), -1, np.int32), np.zeros(len(stream), bool)
    for row, inside in enumerate(rows):
        start = row * length
        for i in inside:
            (prompt, response), middle = pairs[i], start + len(pairs[i][0])
            end = middle + len(response)
            stream[start:middle], stream[middle:end] = prompt, response
            number[start:end], scored[middle:end] = i, True
            start = end
        stream[start : (row + 1) * length] = stream[start - 1]
        number[start : (row + 1) * length] = -2 - row
    return Packed(stream, number, length, "apart", seed, (), scored)


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows that are one example each, in a random order of each epoch; `collate` makes a batch of some."""

    examples: Sequence[Any]  # of plain numbers
    collate: Callable[[Sequence[Any]], tuple[Any, ...]]
    length: int
    seed: int

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, first: int, count: int) -> tuple[Any, ...]:
        return self.collate([self.examples[self.row(i)] for i in range(first, first + count)])

    def row(self, i: int) -> int:
        epoch, place = divmod(i, len(self))
        return int(order_of_rows(self.seed, epoch, len(self))[place])

    def digest(self) -> str:
        return digest_of(self.length, self.seed, repr(self.examples))


def translations(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """A batch of an encoder-decoder: sources [B, S], targets [B, T], which of the sources there is [B, S]."""
    sources = padded([list(source) for source, _ in pairs])
    seen = torch.arange(sources.shape[1]) < torch.tensor([[len(source)] for source, _ in pairs])
    targets = torch.full((len(pairs), max(len(t) for _, t in pairs)), IGNORE)
    for row, (_, target) in enumerate(pairs):
        targets[row, : len(target)] = torch.tensor(target)
    return sources, targets, seen.long(), None
