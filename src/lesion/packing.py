"""Packing: documents one after the other, an end token behind each, cut into rows of one length, nothing padded or lost.

Row i of the training order is a pure function of (seed, i): the rows of each epoch in a random order of their own (numpy's
Philox keyed by sha256). With `documents="apart"` a token sees and counts only its own document: positions begin anew and
attention ends at the boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lesion.loss import IGNORE
from lesion.stats import generator

Ids = npt.NDArray[np.int64]
Documents = Literal["apart", "joined"]


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of `length` inputs and their targets over one stream of tokens."""

    stream: Ids  # all documents, each with its end token
    number: Ids  # of the document a token belongs to
    length: int
    documents: Documents
    seed: int

    def __len__(self) -> int:
        """Rows of an epoch; what is left over is shorter than a row and comes in no epoch."""
        return (len(self.stream) - 1) // self.length

    def row(self, i: int) -> int:
        """Which row the i-th of the training order is."""
        epoch, place = divmod(i, len(self))
        return int(_order(self.seed, epoch, len(self))[place])

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Inputs, targets, mask (None where causal order is all) and positions of rows first … first + count − 1."""
        starts = [self.row(i) * self.length for i in range(first, first + count)]
        index = np.array(starts)[:, None] + np.arange(self.length)
        ids, targets = torch.from_numpy(self.stream[index]), torch.from_numpy(self.stream[index + 1])
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


def pack(documents: Sequence[Sequence[int]], end: int, length: int, seed: int, kept: Documents = "apart") -> Packed:
    """Raises ValueError where all documents together make no row."""
    stream = [token for document in documents for token in (*document, end)]
    number = np.repeat(np.arange(len(documents)), [len(document) + 1 for document in documents])
    if len(stream) <= length:
        raise ValueError(f"{len(stream)} tokens of text make no row of {length}, which needs one more than that")
    return Packed(np.array(stream, np.int64), number.astype(np.int64), length, kept, seed)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, rows: int) -> Ids:
    return generator("order of rows", seed, epoch).permutation(rows)
