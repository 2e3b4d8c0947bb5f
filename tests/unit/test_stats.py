"""Statistics against closed forms, simulations and each other."""

import numpy as np
import pytest

from lesion.stats import Estimate, ratio


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
        found = ratio(x, np.ones_like(x), purpose=str(run))
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
