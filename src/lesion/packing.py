"""Packing: documents one after the other, an end token behind each, cut into rows of one length, nothing padded or lost.

Row i of the training order is a pure function of (seed, i): the rows of each epoch in a random order of their own (numpy's
Philox keyed by sha256). With `documents="apart"` a token sees and counts only its own document: positions begin anew and
attention ends at the boundary. Where a model has learned sink tokens, every row begins with them (`begin`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lesion.loss import IGNORE
from lesion.stats import generator

Ids = npt.NDArray[np.int32]  # half of what torch wants: a corpus may have hundreds of millions
Documents = Literal["apart", "joined"]


class Data(Protocol):
    """Rows to train on, in an order that is a pure function of their number."""

    @property
    def length(self) -> int:
        """Tokens of a row, at most."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def batch(self, first: int, count: int) -> tuple[Any, ...]:
        """Inputs, targets, mask, positions of rows first … first + count − 1, and whatever else an objective reads."""

    def digest(self) -> str:
        """sha256 of all rows and their order."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of `length` inputs and their targets over one stream of tokens."""

    stream: Ids  # all documents, each with its end token
    number: Ids  # of the document a token belongs to
    length: int
    documents: Documents
    seed: int
    begin: tuple[int, ...] = ()
    scored: npt.NDArray[np.bool_] | None = None  # which tokens are predicted; None: all

    def digest(self) -> str:
        scored = b"" if self.scored is None else self.scored.tobytes()
        return digest_of(
            self.length, self.documents, self.seed, self.begin, self.stream.tobytes(), self.number.tobytes(), scored
        )

    @property
    def own(self) -> int:
        """Tokens of the stream that a row reads."""
        return self.length - len(self.begin)

    def __len__(self) -> int:
        """Rows of an epoch; what is left over is shorter than a row and comes in no epoch."""
        return max(0, len(self.stream) - 1) // self.own

    def row(self, i: int) -> int:
        """Which row the i-th of the training order is."""
        epoch, place = divmod(i, len(self))
        return int(order_of_rows(self.seed, epoch, len(self))[place])

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Inputs, targets, mask (None where causal order is all) and positions of rows first … first + count − 1."""
        starts = [self.row(i) * self.own for i in range(first, first + count)]
        index = np.array(starts)[:, None] + np.arange(self.own)
        ids, targets = (torch.from_numpy(self.stream[i].astype(np.int64)) for i in (index, index + 1))
        if self.scored is not None:
            targets = targets.masked_fill(torch.from_numpy(~self.scored[index + 1]), IGNORE)
        if self.begin:
            start = torch.tensor(self.begin).expand(count, -1)
            ids, unscored = torch.cat((start, ids), 1), torch.full_like(start, IGNORE)
            unscored[:, -1] = torch.from_numpy(self.stream[index[:, 0]].astype(np.int64))
            targets = torch.cat((unscored, targets), 1)
        if self.documents == "joined":
            return ids, targets, None, torch.arange(self.length).expand(count, -1)
        of, following = torch.from_numpy(self.number[index]), torch.from_numpy(self.number[index + 1])
        targets = targets.masked_fill(following != of, IGNORE)  # nothing before it tells how a document begins
        begins = torch.ones_like(of, dtype=torch.bool)
        begins[:, 1:] = of[:, 1:] != of[:, :-1]
        place = torch.arange(self.length).expand(count, -1)
        at = place - torch.where(begins, place, 0).cummax(1).values
        mask = (of[:, None, :, None] == of[:, None, None, :]) & (place[:, None, :, None] >= place[:, None, None, :])
        return ids, targets, mask, at


@dataclass(frozen=True, eq=False)
class Listed:
    """Rows that are given, [rows, length + 1] of tokens, in their order; behind the last comes the first again."""

    stream: Ids
    seed: int = 0
    documents: Documents = "joined"
    begin: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.stream.shape[1] - 1

    def digest(self) -> str:
        return digest_of(self.stream.shape, self.documents, self.seed, self.begin, self.stream.tobytes())

    def __len__(self) -> int:
        return len(self.stream)

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """As of `Packed`."""
        rows = torch.from_numpy(self.stream[np.arange(first, first + count) % len(self.stream)].astype(np.int64))
        return rows[:, :-1], rows[:, 1:], None, torch.arange(self.length).expand(count, -1)


def pack(
    documents: Sequence[Sequence[int]],
    end: int,
    length: int,
    seed: int,
    kept: Documents = "apart",
    begin: tuple[int, ...] = (),
) -> Packed:
    """Raises ValueError where all documents together make no row, and where rows that begin with sinks keep documents apart:
    a document that a row begins within would have none."""
    if begin and kept == "apart":
        raise ValueError("rows that begin with sink tokens need documents='joined'")
    if length <= len(begin):
        raise ValueError(f"a row of {length} tokens has no room beside {len(begin)} sink tokens")
    documents = [document for document in documents if len(document)]  # an empty one would teach to end at once
    stream = np.concatenate([np.array((*document, end), np.int32) for document in documents] or [np.zeros(0, np.int32)])
    number = np.repeat(np.arange(len(documents), dtype=np.int32), [len(document) + 1 for document in documents])
    made = Packed(stream, number, length, kept, seed, begin)
    if not len(made):
        raise ValueError(f"{len(stream)} tokens of text make no row of {made.own}, which needs one more than that")
    return made


def digest_of(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else f"{part} ".encode())
    return found.hexdigest()


@lru_cache(maxsize=8)
def order_of_rows(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    return generator("order of rows", seed, epoch).permutation(rows)
