"""Interpolated Kneser-Ney n-gram models over token ids (Kneser & Ney 1995; modified as in Chen & Goodman 1998, section 4):
what a small trained transformer must beat before it may be said to have learned anything.

With c the count of a gram and h′ the history h less its oldest token,

    p(w | h) = (c(h w) − D(c(h w))) / Σᵥ c(h v)  +  γ(h) p(w | h′),        γ(h) = Σᵥ D(c(h v)) / Σᵥ c(h v)

and p(w | h) = p(w | h′) where h was never followed by anything. Below the unigrams lies 1 / V: nothing has probability zero.

Counts. A gram of the highest order counts as often as it occurs; a shorter one by how many different tokens stand before
it. A start mark, which is history only and never predicted, stands before each document: what begins with it has nothing
before it and counts as often as it occurs. One mark is enough, since it says where the document begins, as a transformer's
positions do; it and all behind it are a full history, however short.

Discounts. Each order has three, for counts of 1, 2 and 3 or more, from how many of its grams have a count of 1, 2, 3, 4:

    Y = n₁ / (n₁ + 2 n₂)      D₁ = 1 − 2 Y n₂ / n₁      D₂ = 2 − 3 Y n₃ / n₂      D₃ = 3 − 4 Y n₄ / n₃

Where one of the four is zero, or a discount would not be positive, the order has the one discount Y for all counts (Ney,
Essen & Kneser 1994); where n₁ or n₂ is zero, ½. Unigrams of a vocabulary made for its own corpus, in which no token is
rare, come to that. `NGram.discounts` says what each order got: three equal ones are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Order:
    """All grams of one order. A gram's id is its place in `codes`; −1 stands for a gram that was never seen.

    Each array has one entry more than there are grams or histories, which is what index −1 reads: a code that none has, no
    share, and everything passed on to the shorter history.
    """

    codes: Ids  # sorted: id of the history, which is a gram of the order below, × (V + 1) + last token
    share: Floats  # of each gram: (c − D(c)) / Σ c
    spare: Floats  # of each history: γ

    def find(self, codes: Ids) -> Ids:
        place = np.searchsorted(self.codes, codes)
        return np.where(self.codes[place] == codes, place, -1)


class NGram:
    """A model of `order` n ≥ 1 over ids 0 … `vocabulary` − 1, from documents with the id `end` put behind each.

    `discounts` holds (D₁, D₂, D₃) of orders 1 … n. Time and memory grow with n × tokens.

    Raises ValueError where there is no document, `order` or `vocabulary` is below 1, or an id lies outside the vocabulary.
    """

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocabulary: int, end: int) -> None:
        if order < 1 or vocabulary < 1:
            raise ValueError(f"order and vocabulary must be 1 or more, not {order} and {vocabulary}")
        if not 0 <= end < vocabulary:
            raise ValueError(f"end must be an id of the vocabulary, 0 to {vocabulary - 1}, not {end}")
        if not len(documents):
            raise ValueError("expected at least one document to count n-grams in, there is none")
        self.order, self.vocabulary, self.end = order, vocabulary, end
        self._start = vocabulary  # the mark's id: the first outside the vocabulary
        self._base = vocabulary + 1
        marked = [np.concatenate(([self._start], self._checked(document), [end])) for document in documents]
        place = np.concatenate([np.arange(len(row)) for row in marked])  # of a token in its document
        stream = np.concatenate(marked)
        codes, counts = _counted(stream, place, order, self._base)
        self.discounts = tuple(discounts(c) for c in counts)
        histories = (1, *map(len, codes))  # the unigrams' only history is the empty one
        self._orders = [
            _weighed(*counted, self._base)
            for counted in zip(codes, counts, self.discounts, histories[:-1], strict=True)
        ]

    def nll(self, document: Sequence[int], skip_first: bool = True) -> Floats:
        """−ln p, in nats, of each token of a document [T] but its first, before which there is nothing: [max(T − 1, 0)].

        With `skip_first=False` the first is told from the start mark: [T]. The end is scored where the document holds it.
        Raises ValueError for an id outside the vocabulary.
        """
        stream = np.concatenate(([self._start], self._checked(document)))
        history = np.zeros(len(stream), np.int64)  # ids of the grams before each token, one order longer each time
        p = np.full(len(stream), 1 / self.vocabulary)
        for order in self._orders:
            gram = order.find(history * self._base + stream)  # behind history −1 the code is negative: never seen
            p = order.share[gram] + order.spare[history] * p
            history = np.concatenate(([-1], gram[:-1]))
        return -np.log(p[2 if skip_first else 1 :])

    def _checked(self, document: Sequence[int]) -> Ids:
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"expected a document as a row of whole numbers, not {ids.dtype} of shape {ids.shape}")
        outside = (ids < 0) | (ids >= self.vocabulary)
        if outside.any():
            raise ValueError(f"the vocabulary has ids 0 to {self.vocabulary - 1}, the document has {ids[outside][0]}")
        return ids.astype(np.int64)


def discounts(counts: Ids) -> tuple[float, float, float]:
    """(D₁, D₂, D₃) from the counts of one order's grams, as told above."""
    n1, n2, n3, n4 = map(int, np.bincount(np.minimum(counts, 5), minlength=5)[1:5])
    y = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    if n1 and n2 and n3 and n4:
        three = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if min(three) > 0:  # else a history could keep nothing for tokens it never saw
            return three
    return y, y, y


def _counted(stream: Ids, place: Ids, order: int, base: int) -> tuple[list[Ids], list[Ids]]:
    """The codes of the grams of each order and their counts."""
    codes: list[Ids] = []
    counts: list[Ids] = []
    shorter = np.zeros_like(stream)  # the id of the gram that ends at each token: at first the empty one
    for k in range(1, order + 1):
        ends = np.flatnonzero(place >= k - 1)  # no gram reaches over the start of its document
        found, first, inverse, times = np.unique(
            shorter[ends - 1] * base + stream[ends], return_index=True, return_inverse=True, return_counts=True
        )
        if k == 1:
            times[-1] = 0  # the start mark, the largest id, is never predicted
        else:
            without_first = shorter[ends[first]]
            before = np.bincount(without_first, minlength=len(counts[-1]))
            counts[-1] = np.where(before > 0, before, counts[-1])  # nothing stands before what begins a document
        codes.append(found)
        counts.append(times)
        shorter = np.full_like(stream, -1)
        shorter[ends] = inverse
    return codes, counts


def _weighed(codes: Ids, counts: Ids, three: tuple[float, float, float], histories: int, base: int) -> _Order:
    history = codes // base
    taken = np.array((0.0, *three))[np.minimum(counts, 3)]
    total = np.bincount(history, counts, histories)
    spare = np.divide(np.bincount(history, taken, histories), total, out=np.ones(histories), where=total > 0)
    share = (counts - taken) / total[history]
    none = np.iinfo(np.int64).max
    return _Order(np.append(codes, none), np.append(share, 0.0), np.append(spare, 1.0))
