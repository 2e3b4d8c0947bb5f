"""Dose and response against curves that are known, scipy's own fit, and what must not change them."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize

from lesion.doses import fit, hill, match, threshold
from lesion.stats import cohens_d, compare

DOSES = np.array([0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])


def curve(ed50=0.18, slope=4.0, top=1.0, bottom=0.2, noise=0.0, seeds=1, items=8, seed=0, doses=DOSES):
    g = np.random.default_rng(seed)
    mean = bottom + (top - bottom) * hill(doses, ed50, slope)
    return mean[:, None, None] + noise * g.normal(size=(len(doses), seeds, items)) + np.zeros((1, seeds, items))


def test_the_curve_has_its_half_at_the_ed50():
    assert hill(np.array([0.0, 0.18]), 0.18, 3.0) == pytest.approx([1, 0.5])
    assert hill(np.array([1e3]), 1e-3, 80.0) == 0, "an endless power is no error"


@settings(max_examples=20, deadline=None)
@given(st.floats(0.08, 0.35), st.floats(1.5, 12), st.floats(-3, 3), st.sampled_from([-2.0, -0.5, 0.7, 4.0]))
def test_a_curve_without_noise_is_found_again(ed50, slope, top, change):
    found = fit(DOSES, curve(ed50, slope, top, top + change), draws=20)
    assert found.ed50 == pytest.approx(ed50, rel=1e-3)
    assert (found.top, found.bottom) == pytest.approx((top, top + change), abs=0.02 * abs(change))
    assert found(DOSES) == pytest.approx(curve(ed50, slope, top, top + change)[:, 0, 0], abs=1e-3 * abs(change))
    assert found.slope > 0


def test_least_squares_are_those_of_scipy():
    y = curve(noise=0.15, items=12, seeds=3)
    found = fit(DOSES, y)
    means = y.mean((1, 2))
    best, _ = optimize.curve_fit(
        lambda x, top, bottom, ed50, slope: bottom + (top - bottom) / (1 + (x / ed50) ** slope),
        DOSES, means, [1, 0.2, 0.18, 4], bounds=([-9, -9, 0.01, 0.5], [9, 9, 2, 32]),
    )  # fmt: skip
    assert (found.top, found.bottom, found.ed50, found.slope) == pytest.approx(best, rel=1e-3)
    assert found.low < found.ed50 < found.high and found.reason is None


@example(126, 2.0, 3.0, -1.0)  # whose lower bound lies below the doses
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(0.1, 10), st.floats(-5, 5))
def test_units_do_not_matter(seed, unit, scale, shift):
    y = curve(noise=0.1, seed=seed)
    one, other = fit(DOSES, y, draws=100), fit(DOSES * unit, y * scale + shift, draws=100)
    assert other.ed50 == pytest.approx(one.ed50 * unit, rel=1e-3)
    assert other.slope == pytest.approx(one.slope, rel=1e-2)
    for bound, scaled in ((one.low, other.low), (one.high, other.high)):  # one beyond the doses is so in any unit
        assert scaled is bound is None or scaled == pytest.approx(bound * unit, rel=2e-3)


def test_a_rise_is_a_fall_turned_over():
    y = curve(noise=0.1)
    down, up = fit(DOSES, y), fit(DOSES, -y)
    assert up.ed50 == pytest.approx(down.ed50, rel=1e-4) and up.bottom > up.top


def test_more_items_narrow_the_interval_and_seeds_that_disagree_widen_it():
    few, many = fit(DOSES, curve(noise=0.1, items=8)), fit(DOSES, curve(noise=0.1, items=80))
    assert many.high - many.low < 0.6 * (few.high - few.low)
    apart = np.stack([curve(ed50, noise=0.02, items=40, seed=i)[:, 0] for i, ed50 in enumerate((0.13, 0.18, 0.25))], 1)
    alike = np.stack([curve(0.18, noise=0.02, items=40, seed=i)[:, 0] for i in range(3)], 1)
    near, far = fit(DOSES, alike), fit(DOSES, apart)
    assert (far.low is None or far.high is None) or far.high - far.low > 5 * (near.high - near.low)


def test_what_does_not_fall_is_refused():
    flat = np.random.default_rng(0).normal(size=(8, 1, 10))
    with pytest.raises(ValueError, match="neither falls nor rises with dose"):
        fit(DOSES, flat)


def test_what_lies_beyond_the_doses_is_not_made_up():
    found = fit(DOSES, curve(ed50=0.9, slope=3.0, bottom=0.0))
    assert found.ed50 is None and found.low is None and found.top is None
    assert found.reason == "the half effect lies beyond the largest dose tested"
    open_ended = fit(DOSES, curve(noise=0.15, items=12, seeds=2))
    assert open_ended.ed50 is not None and open_ended.high is None and "upper end" in open_ended.reason
    with pytest.raises(ValueError, match="no curve to read"):
        found(0.1)


def test_holes_are_left_out():
    y = curve(noise=0.1, seeds=2, items=9)
    holed = y.copy()
    holed[3, 0, 4] = np.nan
    assert fit(DOSES, holed).ed50 == pytest.approx(fit(DOSES, y).ed50, rel=0.03)
    holed[3, 1, 4] = np.nan
    left = fit(DOSES, holed)
    assert left == fit(DOSES, np.delete(y, 4, 2)) and left.items == 8


@pytest.mark.parametrize(
    ("doses", "y", "said"),
    [
        (DOSES, np.zeros((7, 1, 4)), r"\(8,\) and \(7, 1, 4\)"),
        (DOSES[::-1], np.zeros((8, 1, 4)), "rise from 0"),
        (DOSES - 0.1, np.zeros((8, 1, 4)), "rise from 0"),
        (DOSES[:3], np.zeros((3, 1, 4)), "4 or more doses"),
        (DOSES, np.zeros((8, 1, 1)), "2 items"),
        (DOSES, np.full((8, 1, 4), np.inf), "infinite"),
    ],
)
def test_what_is_no_curve_is_refused_by_name(doses, y, said):
    with pytest.raises(ValueError, match=said):
        fit(doses, y)


# Thresholds


def test_a_raw_threshold_is_linear_between_neighbours():
    change = -np.array([0.0, 0.1, 0.2, 0.6, 1.0])[:, None, None] + np.zeros((1, 1, 6))
    found = threshold([0, 1, 2, 4, 8], change, -0.4, "raw")
    assert (found.dose, found.low, found.high) == pytest.approx((3, 3, 3))
    assert threshold([1, 2, 4, 8], change[1:], -0.05, "raw").dose == pytest.approx(0.5), "dose 0 changes nothing"
    assert threshold([0, 1, 2, 4, 8], change, -1.0, "raw").dose == 8


def test_a_threshold_in_d_is_where_d_arrives():
    change = curve(noise=0.3, items=20, bottom=0.0, seed=3) - 1
    found = threshold(DOSES, change, -0.8)
    d = np.array([cohens_d(change[k]).d for k in range(8)])
    after = int((d <= -0.8).argmax())
    expected = np.interp(0.8, -d[after - 1 : after + 1], DOSES[after - 1 : after + 1])
    assert found.dose == pytest.approx(expected)
    assert found.low < found.dose < found.high and found.unit == "d"


@pytest.mark.parametrize("unit", ["d", "raw"])
def test_a_threshold_that_lies_on_a_dose_has_the_interval_of_that_dose(unit):
    """Where the bound itself arrives at a tested dose: d and mean are those of `cohens_d` and `compare`."""
    change = curve(noise=0.3, items=20, bottom=0.0, seed=4) - 1
    effect = compare(change[4], np.zeros_like(change[4]))
    low, high = (effect.d_low, effect.d_high) if unit == "d" else (effect.low, effect.high)
    assert threshold(DOSES, change, low, unit).low == pytest.approx(DOSES[4], abs=0.02)
    assert threshold(DOSES, change, high, unit).high == pytest.approx(DOSES[4], abs=0.02)


def test_thresholds_are_signed():
    change = curve(noise=0.2, items=20, bottom=0.0) - 1
    down, up = threshold(DOSES, change, -0.8), threshold(DOSES, -change, 0.8)
    assert (up.dose, up.low, up.high) == pytest.approx((down.dose, down.low, down.high))
    never = threshold(DOSES, change, 0.8)
    assert never.dose is None and never.high is None and never.reason == "never reached at the doses tested"


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_threshold_in_d_knows_no_units(seed, unit, scale):
    change = curve(noise=0.3, items=15, bottom=0.0, seed=seed) - 1
    one, other = threshold(DOSES, change, -0.8), threshold(DOSES * unit, change * scale, -0.8)
    assert (other.dose / unit, other.low / unit) == pytest.approx((one.dose, one.low), rel=1e-5)
    assert (other.high is None) == (one.high is None)


def test_an_interval_that_does_not_end_is_said_to():
    change = np.random.default_rng(5).normal(-0.9, 1, (3, 1, 6)) * np.array([0, 0.5, 1.0])[:, None, None]
    found = threshold([0, 1, 2], change, -0.5)
    assert found.high is None and "beyond" in found.reason


def test_items_that_all_change_alike_reach_any_d_at_once():
    change = np.zeros((4, 1, 8))
    change[2:] = -1
    found = threshold([0, 1, 2, 3], change, -0.8)
    assert (found.dose, found.low, found.high) == (2, 2, 2)


@pytest.mark.parametrize(
    ("at", "unit", "said"), [(0, "d", "other than 0"), (np.nan, "d", "other"), (1, "g", "no unit 'g'")]
)
def test_a_threshold_of_nothing_is_refused(at, unit, said):
    with pytest.raises(ValueError, match=said):
        threshold(DOSES, np.zeros((8, 1, 4)), at, unit)


# Matched doses


def test_matched_doses_do_the_same_damage():
    attention, mlp = np.array([0, 0.2, 0.4, 0.8, 1.4]), np.array([0, 0.1, 0.2, 0.3, 0.5])
    found = match({"attention": (attention, 10 * np.exp(2 * attention)), "mlp": (mlp, 10 * np.exp(7 * mlp))}, 30)
    assert found == pytest.approx({"attention": np.log(3) / 2, "mlp": np.log(3) / 7})


def test_a_dose_tested_is_its_own_match_and_zero_damage_is_left_out():
    doses, damage = [0, 1, 2, 3], [0, 0.1, 0.5, 0.7]
    for dose, at in zip(doses[1:], damage[1:], strict=True):
        assert match({"a": (doses, damage)}, at)["a"] == pytest.approx(dose)
    assert match({"a": (doses, damage)}, 0.05)["a"] is None and match({"a": (doses, damage)}, 0.8)["a"] is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 3), min_size=2, max_size=7), st.floats(0.02, 0.98))
def test_the_match_lies_between_its_neighbours(steps, share):
    damage = np.exp(np.cumsum(steps))
    at = float(np.exp(np.log(damage[0]) + share * np.log(damage[-1] / damage[0])))
    found = match({"a": (np.arange(len(damage)), damage)}, at)["a"]
    assert np.floor(found) <= np.searchsorted(damage, at) <= np.ceil(found) + 1e-9 or damage[
        round(found)
    ] == pytest.approx(at)


def test_the_first_of_several_is_taken():
    assert match({"a": ([0, 1, 2, 3], [1, 4, 2, 8])}, 3)["a"] < 1


@pytest.mark.parametrize(
    ("doses", "damage", "at", "said"),
    [([0, 1], [1, 2], 0, "positive number"), ([0, 1], [1, 2, 3], 2, "a: doses are"), ([1, 0], [1, 2], 2, "a: 2 or more rising"),
     ([0, 1, 2], [1, 0, 2], 2, "positive damage"), ([0, 1], [0, 2], 2, "2 or more rising")],
)  # fmt: skip
def test_what_cannot_be_matched_is_refused_by_name(doses, damage, at, said):
    with pytest.raises(ValueError, match=said):
        match({"a": (doses, damage)}, at)
