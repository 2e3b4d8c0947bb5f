"""Speech graphs: a text as the walk of its words, each a node, each step from one word to the next an edge.

Mota et al. (2012), "Speech graphs provide a quantitative measure of thought disorder in psychosis", PLoS ONE 7(4), and
Mota et al. (2014), "Graph analysis of dream reports is especially informative about psychosis", Scientific Reports 4:
how connected the walk is, against the same words in random order, and in windows of equal length because length decides
most of it.

A walk makes two things simple. Its graph is of one piece, so its largest connected component is all of it. And what
is strongly connected is one stretch of the walk: whatever lies between two sayings of a word can be reached from either,
so the components part exactly where no word that was said is said again, and counting them takes no search.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lesion.stats import generator

Walks = NDArray[np.int64]  # [walks, words]: numbers of nodes, in the order of the words

COMPARED = ("lsc", "repeated_edges")


def graph(words: Sequence[str], *, shuffles: int = 100, seed: int) -> dict[str, float | int | None]:
    """Attributes of the directed multigraph of consecutive words; an edge for each step, so n words have n − 1 edges.

        nodes             N = different words
        edges             E = n − 1
        repeated_edges    edges beyond the first between an ordered pair (u, v):  E − |{(u, v)}|
        parallel_edges    edges beyond the first between an unordered pair {u, v}:  E − |{{u, v}}|
        self_loops        edges from a word to itself ("very very")
        lcc               nodes of the largest weakly connected component: N, as every walk is of one piece
        lsc               nodes of the largest strongly connected component
        degree            mean over nodes of edges in and out:  2E / N
        density           E / (N (N − 1)); it exceeds 1 where edges repeat enough, and is None for a single node

    and for x in lsc and repeated_edges (lcc is N in any order), over `shuffles` random orders of the same words:

        x_null            mean of x over the shuffles
        x_z               (x − x_null) / s, with s their standard deviation (÷ shuffles − 1); None where s = 0

    The shuffles come from a stream of their own, by seed and words. A text without words has counts of 0 and no
    ratios. Raises ValueError for fewer than two shuffles.
    """
    if shuffles < 2:
        raise ValueError(f"a spread needs at least 2 shuffles, not {shuffles}")
    walk, nodes, edges = _walk(words), len(set(words)), max(len(words) - 1, 0)
    walks = np.repeat(walk, shuffles + 1, axis=0)
    generator("speech graph", seed, list(words)).permuted(walks[1:], axis=1, out=walks[1:])
    measured = {"lsc": _strong(walks, nodes), "repeated_edges": edges - _different_edges(walks, nodes)}
    source, target = walk[0, :-1], walk[0, 1:]
    undirected = np.stack([np.minimum(source, target), np.maximum(source, target)])
    found: dict[str, float | int | None] = {
        "nodes": nodes,
        "edges": edges,
        "repeated_edges": int(measured["repeated_edges"][0]),
        "parallel_edges": edges - np.unique(undirected, axis=1).shape[1],
        "self_loops": int((source == target).sum()),
        "lcc": nodes,
        "lsc": int(measured["lsc"][0]),
        "degree": 2 * edges / nodes if nodes else None,
        "density": edges / (nodes * (nodes - 1)) if nodes > 1 else None,
    }
    for name in COMPARED:
        here, null = measured[name][0], measured[name][1:]
        spread = null.std(ddof=1)
        found[f"{name}_null"] = float(null.mean()) if nodes else None
        found[f"{name}_z"] = float((here - null.mean()) / spread) if spread else None
    return found


def windows(words: Sequence[str], *, size: int = 30, step: int = 1) -> dict[str, float | int | None]:
    """The means of lcc, lsc and repeated_edges over windows of `size` words, each `step` words after the one before,
    so that texts of different length compare; `windows` is their number. Without a whole window the means are None.

    Raises ValueError for a window or a step of less than one word.
    """
    if size < 1 or step < 1:
        raise ValueError(f"windows and steps hold at least 1 word, got size={size}, step={step}")
    if len(words) < size:
        return {"windows": 0, "lcc": None, "lsc": None, "repeated_edges": None}
    walks = np.lib.stride_tricks.sliding_window_view(_walk(words)[0], size)[::step]
    nodes = len(set(words))
    return {
        "windows": len(walks),
        "lcc": float(_first_sayings(walks, nodes).sum(1).mean()),
        "lsc": float(_strong(walks, nodes).mean()),
        "repeated_edges": float((size - 1 - _different_edges(walks, nodes)).mean()),
    }


def _walk(words: Sequence[str]) -> Walks:
    """[1, words]: words by number, in the order of their first saying."""
    numbers: dict[str, int] = {}
    return np.array([[numbers.setdefault(word, len(numbers)) for word in words]], dtype=np.int64)


def _first_sayings(walks: Walks, nodes: int) -> NDArray[np.bool_]:
    """[walks, words]: whether the word there was not said before in its walk."""
    rows, places = np.arange(len(walks))[:, None], np.arange(walks.shape[1])
    first = np.empty((len(walks), nodes), dtype=np.int64)
    first[rows, walks[:, ::-1]] = places[::-1]  # of several values for one node the last is kept
    return first[rows, walks] == places


def _strong(walks: Walks, nodes: int) -> NDArray[np.int64]:
    """[walks]: nodes of the largest strongly connected component.

    With last(u) the place where u is said last, a component ends at place i where max over j ≤ i of last(walk[j]) = i;
    its nodes are the first sayings since the component before it ended.
    """
    if not walks.size:
        return np.zeros(len(walks), dtype=np.int64)
    rows, places = np.arange(len(walks))[:, None], np.arange(walks.shape[1])
    last = np.empty((len(walks), nodes), dtype=np.int64)
    last[rows, walks] = places
    ends = np.maximum.accumulate(last[rows, walks], axis=1) == places
    so_far = np.cumsum(_first_sayings(walks, nodes), axis=1)  # different words up to here
    at_ends = np.maximum.accumulate(np.where(ends, so_far, 0), axis=1)
    before = np.concatenate([np.zeros((len(walks), 1), dtype=np.int64), at_ends[:, :-1]], axis=1)
    return np.where(ends, so_far - before, 0).max(axis=1)


def _different_edges(walks: Walks, nodes: int) -> NDArray[np.int64]:
    """[walks]: different ordered pairs of consecutive words."""
    pairs = np.sort(walks[:, :-1] * nodes + walks[:, 1:], axis=1)
    if not pairs.shape[1]:
        return np.zeros(len(walks), dtype=np.int64)
    return 1 + (pairs[:, 1:] != pairs[:, :-1]).sum(axis=1)
