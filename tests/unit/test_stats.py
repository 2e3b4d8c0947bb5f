"""Statistics against closed forms, simulations and each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from lesion.stats import Estimate, holm, ratio, trend, verdict


def test_the_value_is_a_ratio_of_sums_and_weighted():
    total, weight = np.array([[2.0, 6.0], [4.0, 0.0]]), np.array([[1.0, 3.0], [2.0, 0.0]])
    assert ratio(total, weight).value == 2.0
    assert ratio([1.0, 100.0], [1.0, 0.0]).value == 1.0, "a missing cell has no say, whatever stands there"


def test_the_interval_is_repeatable_and_independent_of_other_calls():
    x = np.random.default_rng(0).normal(size=(3, 20))
    first = ratio(x, np.ones_like(x))
    ratio(x + 1, np.ones_like(x), purpose="other")
    assert ratio(x, np.ones_like(x)) == first
    assert ratio(x, np.ones_like(x), purpose="other") != first


def test_equivariance():
    x = np.random.default_rng(1).exponential(size=(2, 30))
    one = np.ones_like(x)
    a, b = ratio(x, one), ratio(3 * x + 2 * one, one)
    assert (b.value, b.low, b.high) == pytest.approx((3 * a.value + 2, 3 * a.low + 2, 3 * a.high + 2))


def test_pairing_makes_an_effect_without_noise_exact():
    base = np.random.default_rng(2).normal(10, 5, size=(1, 25))
    effect = (base + 0.5) - base
    found = ratio(effect, np.ones_like(effect))
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "make",
    [lambda g, n: g.normal(size=n), lambda g, n: g.exponential(size=n) - 1, lambda g, n: g.integers(0, 2, n) - 0.5],
)
def test_intervals_over_items_cover_the_truth(make):
    inside, runs = 0, 300
    for run in range(runs):
        x = make(np.random.default_rng([7, run]), 40)
        found = ratio(x, np.ones_like(x))
        inside += found.low <= 0 <= found.high
    assert 0.90 <= inside / runs <= 0.98


def test_seeds_widen_the_interval():
    g = np.random.default_rng(3)
    x = g.normal(size=(6, 1)) + 0.1 * g.normal(size=(6, 40))
    both, items = ratio(x, np.ones_like(x)), ratio(x.mean(0), np.ones(40))
    assert both.high - both.low > 5 * (items.high - items.low)


def test_items_without_a_value_do_not_count():
    g = np.random.default_rng(5)
    x, holes = g.normal(size=(2, 12)), np.zeros((2, 5))
    full, holed = ratio(x, np.ones_like(x)), ratio(np.hstack([x, holes]), np.hstack([np.ones_like(x), holes]))
    assert holed == full and holed.items == 12


def test_too_little_to_say_is_said():
    assert ratio([3.0], [2.0]) == Estimate(1.5, None, None, 1, 1)


@pytest.mark.parametrize(
    ("total", "weight", "said"),
    [
        ([1.0], [0.0], "weights are zero"),
        ([np.nan, 1], [1, 1], "finite"),
        ([1, 1], [1, -1], "not negative"),
        ([1, 1], [1], r"\(1, 2\)"),
    ],
)
def test_degenerate_input_is_refused_by_name(total, weight, said):
    with pytest.raises(ValueError, match=said):
        ratio(total, weight)


# Families, trends, verdicts


def holm_by_hand(p):
    """Reject from the smallest on; the corrected p is the level at which each would just be rejected."""
    order, out, worst = sorted(range(len(p)), key=lambda i: p[i]), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, p[i] * (len(p) - rank)))
        out[i] = worst
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8), st.randoms(use_true_random=False))
def test_holm(p, random):
    found = holm(p)
    assert found == pytest.approx(holm_by_hand(p))
    assert all(b >= a for a, b in zip(p, found, strict=True)) and all(v <= 1 for v in found)
    order = random.sample(range(len(p)), len(p))
    assert holm([p[i] for i in order]) == pytest.approx([found[i] for i in order])


def test_holm_does_not_count_what_was_not_tested():
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]
    assert holm([None]) == [None]
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, float("nan")])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 6), st.integers(2, 9))
def test_a_trend_is_pages(seed, doses, items):
    y = np.random.default_rng(seed).integers(0, 5, (doses, items)).astype(float)
    found, back = trend(y), trend(y[::-1])
    rise, fall = (scipy_stats.page_trend_test(v.T).pvalue for v in (y, -y))
    assert found.p == pytest.approx(min(1, 2 * min(rise, fall)))
    assert back.z == pytest.approx(-found.z) and back.p == pytest.approx(found.p)
    assert trend(np.exp(y)).z == pytest.approx(found.z), "ranks alone count"


def test_a_trend_has_a_sign_and_leaves_out_holes():
    y = -np.arange(5.0)[:, None] + 0.1 * np.random.default_rng(1).normal(size=(5, 10))
    y[2, 3] = np.nan
    found = trend(y)
    assert found.z < -5 and found.p < 1e-6 and found.items == 9
    z = (scipy_stats.page_trend_test(np.delete(y, 3, 1).T).statistic - 9 * 5 * 36 / 4) / np.sqrt(9 * 25 * 6 * 24 / 144)
    assert found.z == pytest.approx(z)


@pytest.mark.parametrize("y", [np.zeros(3), np.zeros((2, 5)), np.zeros((4, 1)), np.full((4, 3), np.nan)])
def test_a_trend_of_too_little_is_refused(y):
    with pytest.raises(ValueError, match="trend"):
        trend(y)


@pytest.mark.parametrize(
    ("low", "high", "p", "how", "said"),
    [
        (0.1, 0.5, 0.01, {}, "supported"),
        (0.1, 0.5, 0.01, {"direction": -1}, "contradicted"),
        (-0.5, -0.1, 0.01, {"direction": -1}, "supported"),
        (-0.5, -0.1, 0.01, {}, "contradicted"),
        (0.1, 0.5, 0.05, {}, "inconclusive"),
        (-0.1, 0.5, 0.01, {}, "inconclusive"),
        (0.0, 0.5, 0.01, {}, "inconclusive"),
        (-0.1, 0.1, 0.9, {}, "inconclusive"),
        (-0.1, 0.1, 0.9, {"smallest": 0.2}, "contradicted"),
        (0.05, 0.1, 0.001, {"smallest": 0.2}, "contradicted"),
        (-0.1, 0.1, None, {"smallest": 0.2}, "contradicted"),
        (-0.1, 0.1, 0.9, {"smallest": 0.2, "power": 0.5}, "inconclusive"),
        (-0.1, 0.3, 0.9, {"smallest": 0.2, "power": 0.9}, "inconclusive"),
        (0.1, 0.5, None, {}, "inconclusive"),
        (None, None, 0.001, {}, "inconclusive"),
    ],
)
def test_verdicts(low, high, p, how, said):
    assert verdict(low, high, p, **how) == said


def test_verdicts_take_a_direction():
    with pytest.raises(ValueError, match="direction"):
        verdict(0, 1, 0.5, direction=0)
    with pytest.raises(ValueError, match="smallest"):
        verdict(0, 1, 0.5, smallest=-1)
