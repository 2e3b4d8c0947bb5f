"""Speech graphs: every attribute against a graph library and naive definitions, the null, and what cannot be said."""

import math
from itertools import pairwise

import networkx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lesion.speech import graph, windows

WORDS = st.lists(st.sampled_from([f"w{i}" for i in range(12)]), max_size=40)
LONGER = [f"w{(i * i + 3 * i // 4) % 61}" for i in range(200)]


def built(words):
    """The graph as a person would build it."""
    found = networkx.MultiDiGraph()
    found.add_nodes_from(words)
    found.add_edges_from(pairwise(words))
    return found


def largest(components):
    return max(map(len, components), default=0)


@given(WORDS)
@example([])
@example(["a"])
@example(["a", "a"])
@example(["a", "b", "a", "c", "d", "e", "c"])  # two components, the second said before the last word
@example(["a", "b", "c"])
def test_attributes_are_those_of_networkx(words):
    theirs, ours = built(words), graph(words, shuffles=2, seed=0)
    simple = networkx.DiGraph(theirs)
    undirected = networkx.Graph(theirs)
    assert ours["nodes"] == theirs.number_of_nodes()
    assert ours["edges"] == theirs.number_of_edges()
    assert ours["repeated_edges"] == theirs.number_of_edges() - simple.number_of_edges()
    assert ours["parallel_edges"] == theirs.number_of_edges() - undirected.number_of_edges()
    assert ours["self_loops"] == networkx.number_of_selfloops(theirs)
    assert ours["lcc"] == largest(networkx.weakly_connected_components(theirs))
    assert ours["lsc"] == largest(networkx.strongly_connected_components(theirs))
    if words:
        assert ours["degree"] == pytest.approx(sum(d for _, d in theirs.degree()) / len(theirs))
    if len(theirs) > 1:
        assert ours["density"] == pytest.approx(networkx.density(theirs))


def test_a_long_text_has_the_components_of_networkx():
    assert graph(LONGER, shuffles=2, seed=0)["lsc"] == largest(networkx.strongly_connected_components(built(LONGER)))
    unique = [f"u{i}" for i in range(100)]
    words = [*unique[:40], *unique[10:30], *unique[40:], *unique[60:95]]  # 0-9 | 10-39 | 40-59 | 60-99
    assert graph(words, shuffles=2, seed=0)["lsc"] == 40
    assert largest(networkx.strongly_connected_components(built(words))) == 40


@given(WORDS, st.integers(1, 12), st.integers(1, 5))
def test_windows_are_the_graphs_of_their_stretches(words, size, step):
    parts = [words[i : i + size] for i in range(0, len(words) - size + 1, step)]
    found = windows(words, size=size, step=step)
    assert found["windows"] == len(parts)
    for name in ("lcc", "lsc", "repeated_edges"):
        each = [graph(part, shuffles=2, seed=0)[name] for part in parts]
        assert found[name] == (pytest.approx(sum(each) / len(each)) if parts else None)


def test_the_null_is_what_shuffling_gives():
    """Mean and spread against a plain loop over networkx, with another stream: equal within the error of both."""
    words, stream = LONGER[:60], np.random.default_rng(7)
    lsc, repeated = [], []
    for _ in range(300):
        shuffled = list(stream.permutation(words))
        lsc.append(largest(networkx.strongly_connected_components(built(shuffled))))
        repeated.append(59 - len(set(pairwise(shuffled))))
    found = graph(words, shuffles=3000, seed=1)
    for name, drawn in {"lsc": lsc, "repeated_edges": repeated}.items():
        error = np.std(drawn, ddof=1) / math.sqrt(300)
        assert found[f"{name}_null"] == pytest.approx(np.mean(drawn), abs=5 * error)
        z = (found[name] - np.mean(drawn)) / np.std(drawn, ddof=1)
        assert found[f"{name}_z"] == pytest.approx(z, rel=0.2, abs=0.3)


def test_a_text_that_goes_round_repeats_more_edges_than_its_shuffles_and_a_list_less():
    assert graph(list("abcdefgh") * 4, seed=0)["repeated_edges_z"] > 5
    apart = [f"{i}" for i in range(10)]
    assert graph(apart + apart, seed=0)["lsc"] == 10
    in_pairs = [word for word in apart for _ in range(2)]  # every word twice in a row: nothing ever comes back
    assert graph(in_pairs, seed=0)["lsc"] == 1
    assert graph(in_pairs, seed=0)["lsc_z"] < -3


def test_the_shuffles_are_of_seed_and_words():
    one = graph(LONGER, seed=3)
    assert one == graph(LONGER, seed=3)
    assert one["lsc_null"] != graph(LONGER, seed=4)["lsc_null"]
    assert {k: v for k, v in one.items() if "_null" not in k and "_z" not in k} == {
        k: v for k, v in graph(LONGER, seed=4).items() if "_null" not in k and "_z" not in k
    }


def test_what_cannot_be_said_is_none_and_numbers_are_plain():
    empty = graph([], seed=0)
    assert {k for k, v in empty.items() if v is None} == {
        "degree", "density", "lsc_null", "lsc_z", "repeated_edges_null", "repeated_edges_z",
    }  # fmt: skip
    assert {v for v in empty.values() if v is not None} == {0}
    same = graph(["a"] * 9, seed=0)
    assert (same["lsc_z"], same["repeated_edges_z"], same["density"]) == (None, None, None)
    assert (same["lsc"], same["self_loops"], same["repeated_edges"]) == (1, 8, 7)
    for words in ([], ["a"], ["a", "b", "a"], LONGER):
        for value in (graph(words, seed=0) | windows(words)).values():
            assert value is None or type(value) in (int, float)
            assert value is None or math.isfinite(value)


@pytest.mark.parametrize(
    "call", [lambda: graph(["a"], shuffles=1, seed=0), lambda: windows(["a"], size=0), lambda: windows(["a"], step=0)]
)
def test_refusals(call):
    with pytest.raises(ValueError, match="at least"):
        call()
