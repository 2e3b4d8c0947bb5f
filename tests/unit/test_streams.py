"""Streams: the same numbers whatever is drawn when, where and by whom; good numbers; nothing shared between places."""

import math
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from lesion import streams
from lesion.streams import BLOCK, PAIRS, Memory, drawing, forget, normals, uniform01, uniforms

LONG = BLOCK + 37 * PAIRS + 3
WHOLE: dict[str, np.ndarray] = {}

GOLDEN_UNIFORM = [0.1804308295249939, 0.8932649493217468, 0.4088438153266907]
GOLDEN_SECOND_BLOCK = [0.8157796859741211, 0.15766793489456177]
GOLDEN_ITEM = [0.5828747964934101, 0.03868529617949912]
GOLDEN_NORMAL = [-0.6271303, -0.9265364, -0.2444527]


def draw(law, n, seed=1, place="a", kind="k", start=0):
    out = np.full(n, np.nan, np.float32)
    (normals if law == "normal" else uniforms)(seed, place, kind, start, out)
    return out


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch):
    monkeypatch.setattr(streams, "_memory", Memory(3 * 4 * BLOCK))


def test_the_numbers_are_these_for_ever():
    """A change here changes every noise there ever was: raise the version of the steps."""
    assert draw("uniform", 3, 1, "w", "k").tolist() == GOLDEN_UNIFORM
    assert draw("uniform", 2, 1, "w", "k", BLOCK + 5).tolist() == GOLDEN_SECOND_BLOCK
    assert uniform01(1, "item", "sampling", 2).tolist() == GOLDEN_ITEM
    np.testing.assert_allclose(draw("normal", 3, 1, "w", "k"), GOLDEN_NORMAL, rtol=1e-5)


@pytest.mark.parametrize("law", ["normal", "uniform"])
@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, LONG - 1), count=st.integers(0, 3000))
@example(start=BLOCK - 1, count=2)
@example(start=BLOCK - 7, count=30 * PAIRS)
@example(start=0, count=LONG)
def test_any_stretch_is_a_stretch_of_the_whole(law, start, count):
    whole = WHOLE.setdefault(law, draw(law, LONG))
    count = min(count, LONG - start)
    assert np.array_equal(draw(law, count, start=start), whole[start : start + count])
    with drawing(law, 1, "k") as draws:
        assert np.array_equal(draws.read("a", start, count), whole[start : start + count])


def test_normals_are_box_muller_of_the_uniforms():
    u = draw("uniform", BLOCK + 8 * PAIRS).astype(np.float64).reshape(-1, 2, PAIRS)
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, 0])), 2 * np.pi * u[:, 1]
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    np.testing.assert_allclose(draw("normal", BLOCK + 8 * PAIRS), exact, atol=3e-6)


def test_normals_are_normal_and_uniforms_uniform():
    z, u = draw("normal", LONG, seed=3), draw("uniform", LONG, seed=3)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    n = len(z)
    assert abs(z.mean(dtype=float)) < 4 / math.sqrt(n)
    assert abs((z.astype(float) ** 2).mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z.astype(float) ** 4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert np.isfinite(z).all() and np.abs(z).max() <= math.sqrt(48 * math.log(2)) + 1e-5
    assert u.min() >= 0 and u.max() < 1
    assert np.array_equal(u * 2**24, np.round(u * 2**24))


@pytest.mark.parametrize("lag", [1, 2, PAIRS, 2 * PAIRS, BLOCK])
def test_values_at_a_distance_are_unrelated(lag):
    for z in (draw("normal", LONG).astype(float), draw("uniform", LONG).astype(float)):
        for x in (z, z**2):
            assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 4.5 / math.sqrt(len(z) - lag)


def test_other_seeds_places_and_kinds_are_other_streams():
    keys = [
        (1, "a", "k"),
        (2, "a", "k"),
        (1, "b", "k"),
        (1, "a", "l"),
        (1, "a.k", ""),
        (1, "", "a.k"),
        (1, 'a","k', ""),
    ]
    drawn = [draw("normal", 20_000, *key).astype(float) for key in keys]
    related = np.abs(np.corrcoef(drawn) - np.eye(len(keys)))
    assert related.max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("slots", [0, 1, 2, 100])
def test_what_is_remembered_changes_nothing(monkeypatch, slots):
    monkeypatch.setattr(streams, "_memory", Memory(slots * 4 * BLOCK))
    plain = {place: draw("normal", LONG, 7, place) for place in "abc"}
    for _ in range(3):
        with drawing("normal", 7, "k") as draws:
            for place in "cab":
                assert np.array_equal(draws.read(place, 0, 10), plain[place][:10])  # first a part, then more of it
                assert np.array_equal(draws.read(place, 0, LONG), plain[place])
        with drawing("normal", 8, "k") as draws:
            assert np.array_equal(draws.read("a", 0, LONG), draw("normal", LONG, 8))


def test_a_second_walk_at_the_same_time_draws_afresh():
    with drawing("normal", 1, "k") as outer:
        held = outer.read("a", 0, BLOCK)
        was = held.copy()
        with drawing("normal", 2, "k") as inner:
            assert np.array_equal(inner.read("a", 0, BLOCK), draw("normal", BLOCK, 2))
        assert np.array_equal(held, was)
        assert outer.read("a", 0, BLOCK) is not held and np.shares_memory(outer.read("a", 0, BLOCK), held)


def test_a_failure_within_a_walk_leaves_the_memory_free():
    with pytest.raises(RuntimeError), drawing("normal", 1, "k"):
        raise RuntimeError
    with drawing("normal", 1, "k") as draws:
        assert np.shares_memory(draws.read("a", 0, 5), draws.read("a", 0, 5))


def test_threads_that_ask_for_the_same_get_the_same():
    want, wrong = draw("normal", LONG), []

    def work(draws, start):
        for step in range(0, LONG - 5000, 19_999):
            where = (start + step) % (LONG - 5000)
            if not np.array_equal(draws.read("a", where, 5000), want[where : where + 5000]):
                wrong.append(where)

    with drawing("normal", 1, "k") as draws:
        crew = [threading.Thread(target=work, args=(draws, 170_000 * i)) for i in range(8)]
        for one in crew:
            one.start()
        for one in crew:
            one.join()
    assert not wrong


def test_memory_has_a_limit_and_is_given_back():
    tracemalloc.start()
    try:
        with drawing("uniform", 1, "k") as draws:
            for i in range(6):  # the memory holds 3
                draws.read(f"place {i}", 0, BLOCK)
        held, most = tracemalloc.get_traced_memory()
        assert 3 * 4 * BLOCK <= held < 3.5 * 4 * BLOCK and most < 5 * 4 * BLOCK
        forget()
        assert tracemalloc.get_traced_memory()[0] < 4 * BLOCK
    finally:
        tracemalloc.stop()
    with drawing("uniform", 1, "k") as draws:
        assert np.array_equal(draws.read("place 0", 0, 9), draw("uniform", 9, 1, "place 0"))


def test_a_short_stream_needs_no_whole_block():
    with drawing("normal", 1, "k") as draws:
        draws.read("a", 0, 10)
    (block,) = streams._memory.index.values()
    assert len(block) == 2 * PAIRS


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**70), st.text(), st.text(), st.integers(0, 300), st.integers(0, 300))
def test_an_item_draws_by_position(seed, item, purpose, n, m):
    few, many = sorted((n, m))
    values = uniform01(seed, item, purpose, many)
    assert values.dtype == np.float64 and values.shape == (many,)
    assert np.array_equal(uniform01(seed, item, purpose, few), values[:few])
    assert ((values >= 0) & (values < 1)).all()
    if many > 3:
        for other in ((seed + 1, item, purpose), (seed, item + "x", purpose), (seed, item, purpose + "x")):
            assert not np.array_equal(uniform01(*other, many), values)


def test_items_are_uniform_and_unrelated():
    drawn = np.array([uniform01(5, f"iq/{i}", "sampling", 500) for i in range(200)])
    assert stats.kstest(drawn.reshape(-1), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(drawn) - np.eye(200)).max() < 5.5 / math.sqrt(500)


def test_no_global_stream_moves():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - that it is left alone is the point
    draw("normal", BLOCK), uniform01(1, "a", "b", 10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
