"""Paired comparisons against scipy, dense definitions, and what must not change them."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from lesion.paired import differences, draw_means, interval, item_means, p_values, standard_error, stretch, with_seeds
from lesion.stats import cohens_d, compare, equivalent, power_paired


def arms(seed=0, seeds=1, items=9, shift=0.4):
    g = np.random.default_rng(seed)
    before = g.normal(size=(seeds, items))
    return before + shift + 0.5 * g.normal(size=(seeds, items)), before


rows = st.lists(st.integers(-4, 4), min_size=2, max_size=9).map(lambda v: np.array(v, float))


# The p of one difference an item


def by_hand(d):
    """Every sign pattern, one after the other."""
    reached = [abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-9 for signs in itertools.product([1, -1], repeat=len(d))]
    return np.mean(reached)


@settings(max_examples=40, deadline=None)
@given(rows)
def test_sign_flips_are_exact_with_ties_and_zeros(d):
    assert p_values(d[None], "permutation")[0] == pytest.approx(by_hand(d))


@settings(max_examples=40, deadline=None)
@given(rows)
def test_signed_ranks_are_exact_with_ties_and_zeros(d):
    ranked = np.sign(d) * scipy_stats.rankdata(np.abs(d))
    assert p_values(d[None], "wilcoxon")[0] == pytest.approx(by_hand(ranked))


@pytest.mark.parametrize("items", [6, 11, 25])
def test_untied_signed_ranks_are_scipys(items):
    d = np.random.default_rng(items).normal(0.3, 1, (3, items))
    expected = [scipy_stats.wilcoxon(row, mode="exact").pvalue for row in d]
    np.testing.assert_allclose(p_values(d, "wilcoxon"), expected, rtol=1e-12)


def test_drawn_flips_agree_with_scipys_permutation_test():
    after, before = arms(3, items=20, shift=0.15)
    expected = scipy_stats.permutation_test(
        (after[0], before[0]), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", n_resamples=20_000,
        vectorized=True, rng=1,
    ).pvalue  # fmt: skip
    found = compare(after, before, test="permutation").p
    assert 0 < found < 1 and found == pytest.approx(expected, abs=0.02)


def test_drawn_flips_are_never_zero_and_repeat():
    after, before = arms(items=30, shift=9)
    assert compare(after, before).p == compare(after, before).p == 1 / 10_001


def test_t_is_scipys():
    after, before = arms(1)
    assert compare(after, before, test="t").p == pytest.approx(scipy_stats.ttest_rel(after[0], before[0]).pvalue)


@pytest.mark.parametrize(("rose", "fell"), [(0, 0), (5, 0), (1, 7), (4, 4)])
def test_mcnemar_is_the_binomial_test_of_what_changed(rose, fell):
    after = np.r_[np.ones(rose), np.zeros(fell), [1, 0]]
    before = np.r_[np.zeros(rose), np.ones(fell), [1, 0]]
    found = compare(after, before)
    expected = scipy_stats.binomtest(rose, rose + fell).pvalue if rose + fell else 1.0
    assert found.test == "mcnemar" and found.p == pytest.approx(expected)


def test_auto_takes_the_test_that_applies():
    right = np.array([[1.0, 0, 1, 1], [0, 1, 1, 1]])
    assert compare(right[:1], 1 - right[:1]).test == "mcnemar"
    assert compare(right, 1 - right).test == "permutation", "two seeds"
    assert compare(right[:1] * 2, right[:1]).test == "permutation", "not 0/1"


# Seeds × items


def test_one_seed_has_the_standard_error_of_the_mean():
    x = np.random.default_rng(2).normal(size=(5, 1, 8))
    error, df = standard_error(x)
    np.testing.assert_allclose(error, scipy_stats.sem(x[:, 0], axis=1))
    assert (df == 7).all()


def test_seeds_and_items_have_the_mean_squares_of_a_two_way_layout():
    g = np.random.default_rng(4)
    x = (g.normal(size=(4, 1)) + g.normal(size=(1, 7)) + g.normal(size=(4, 7)))[None]
    grand, row, column = x[0].mean(), x[0].mean(1), x[0].mean(0)
    ms_seeds = 7 * ((row - grand) ** 2).sum() / 3
    ms_items = 4 * ((column - grand) ** 2).sum() / 6
    ms_rest = ((x[0] - row[:, None] - column + grand) ** 2).sum() / 18
    scaled = ms_seeds * 3 / scipy_stats.chi2.median(3)
    assert scaled > ms_rest
    error, df = standard_error(x)
    assert error[0] ** 2 == pytest.approx((ms_items + scaled - ms_rest) / 28)
    expected = (ms_items + scaled - ms_rest) ** 2 / (ms_items**2 / 6 + scaled**2 / 3 + ms_rest**2 / 18)
    assert df[0] == pytest.approx(expected)


def test_seeds_that_disagree_are_no_evidence():
    """Three seeds of which each moves all items by its own amount: no number of items makes that an effect."""
    g = np.random.default_rng(5)
    x = np.array([[0.2], [1.0], [0.6]]) + 0.05 * g.normal(size=(3, 60))
    found = compare(x, np.zeros_like(x))
    assert found.p_items < 0.001 and found.p > 0.05
    assert found.low < 0 < found.high
    assert compare(x[:1], np.zeros_like(x[:1])).p < 0.001, "with one seed nobody can know"


def test_p_is_that_of_items_where_seeds_agree():
    x = np.random.default_rng(6).normal(0.5, 1, (1, 15)).repeat(3, 0)
    found = compare(x, np.zeros_like(x))
    assert found.p == found.p_items == compare(x[:1], np.zeros_like(x[:1])).p
    assert with_seeds(np.array([0.2]), x[None])[0] == 0.2


def test_the_interval_is_the_percentile_interval_stretched():
    after, before = arms(7, items=10)
    x, _ = differences(after, before)
    found = compare(after, before, purpose="here")
    draws = draw_means(x[None], "here")[:, 0]
    z, t = scipy_stats.norm.ppf(0.975), scipy_stats.t.ppf(0.975, 9)
    wide = t / z * scipy_stats.sem(x[0]) / draws.std()
    assert stretch(x[None], draws[:, None], 0.95)[0] == pytest.approx(wide)
    low, high = found.value + wide * (np.quantile(draws, [0.025, 0.975]) - found.value)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.high - found.low == pytest.approx(2 * t * scipy_stats.sem(x[0]), rel=0.1), "near the t interval"


def test_missing_cells_take_the_same_way_as_whole_ones():
    g = np.random.default_rng(8)
    x = g.normal(size=(1, 3, 12))
    holed = np.concatenate([x, x])
    holed[1, 0, 4] = np.nan
    whole, mixed = draw_means(x, "p")[:, 0], draw_means(holed, "p")[:, 0]
    np.testing.assert_allclose(mixed, whole, rtol=1e-12)


def test_a_cell_counts_only_where_both_arms_have_it():
    after, before = arms(9, seeds=3, items=8)
    holed_after, holed_before = after.copy(), before.copy()
    holed_after[0, 2], holed_before[1, 2] = np.nan, np.nan
    x = after - before
    x[:2, 2] = np.nan
    found = compare(holed_after, holed_before)
    assert found.value == pytest.approx(np.nanmean(x, axis=0).mean())
    assert (found.seeds, found.items) == (3, 8)
    holed_after[2, 2] = np.nan
    left = compare(holed_after, holed_before)
    kept = np.delete(np.arange(8), 2)
    assert left == compare(after[:, kept], before[:, kept]), "an item without any pair is none"


# What must not change a comparison


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.integers(3, 14), st.floats(1e-3, 1e3))
def test_turning_and_scaling(seed, seeds, items, scale):
    after, before = arms(seed, seeds, items)
    one, back, big = compare(after, before), compare(before, after), compare(after * scale, before * scale)
    assert (back.value, back.p, back.power) == pytest.approx((-one.value, one.p, one.power))
    assert (back.low, back.high) == pytest.approx((-one.high, -one.low))
    assert (back.d_low, back.d_high) == pytest.approx((-one.d_high, -one.d_low), rel=1e-5)
    assert (big.p, big.d, big.power) == pytest.approx((one.p, one.d, one.power))
    assert (big.low, big.high) == pytest.approx((one.low * scale, one.high * scale))
    assert one.low < one.value < one.high and one.d_low < one.d < one.d_high


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_the_order_of_items_and_seeds_says_nothing(seed, random):
    after, before = arms(seed, 3, 8)
    items, seeds = random.sample(range(8), 8), random.sample(range(3), 3)
    place = np.ix_(seeds, items)
    one, other = compare(after, before), compare(after[place], before[place])
    assert (other.value, other.p, other.d_low) == pytest.approx((one.value, one.p, one.d_low))
    width = one.high - one.low
    assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=0.12 * width), "but for the draw"


# What is degenerate


def test_no_difference_is_an_effect_of_zero():
    same = np.random.default_rng(1).normal(size=(2, 9))
    for test in ("permutation", "wilcoxon", "t"):
        found = compare(same, same, test=test)
        assert (found.value, found.p, found.low, found.high) == (0, 1, 0, 0)
        assert found.d is None and found.power is None and found.note == "no item differs"


def test_a_difference_without_spread_says_what_is_known():
    base = np.random.default_rng(2).normal(10, 5, (1, 8))
    found = compare(base + 0.5, base)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.p == 2 / 2**8 and found.d is None and "the same" in found.note
    assert compare(base + 0.5, base, test="t").p is None
    few = compare(base[:, :3] + 0.5, base[:, :3])
    assert few.p == 0.25 and few.low is None and few.high is None, "three equal items could be chance"


def test_right_or_wrong_never_makes_an_interval_of_no_width():
    found = compare(np.zeros(8), np.ones(8))
    assert found.value == -1 == found.low and -1 < found.high < 0
    still = compare(np.ones(8), np.ones(8))
    assert still.low < 0 < still.high and still.p == 1


def test_right_or_wrong_has_the_interval_of_bonett_and_price_where_items_are_many():
    g = np.random.default_rng(3)
    before = (g.random(400) < 0.5).astype(float)
    after = np.where(g.random(400) < 0.3, 1 - before, before)
    rose, fell = ((after - before == v).sum() for v in (1, -1))
    p, q = (rose + 1) / 402, (fell + 1) / 402
    half = 1.96 * np.sqrt((p + q - (p - q) ** 2) / 402)
    found = compare(after, before)
    assert (found.low, found.high) == pytest.approx((p - q - half, p - q + half), abs=0.005)


@pytest.mark.parametrize(
    ("after", "before", "how", "said"),
    [
        ([1.0], [2.0], {}, "2 items .* here are 1"),
        ([1.0, np.nan], [np.nan, 2.0], {}, "here are 0"),
        ([1, 2, 3], [1, 2], {}, r"\(1, 3\) and \(1, 2\)"),
        ([1, np.inf], [1, 2], {}, "infinite"),
        ([1, 2], [1, 3], {"test": "sign"}, "no test 'sign'; there are auto"),
        ([1, 2], [1, 3], {"test": "mcnemar"}, "0 and 1 of one seed"),
        ([1, 2], [1, 3], {"smallest": 0}, "positive d"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(after, before, how, said):
    with pytest.raises(ValueError, match=said):
        compare(after, before, **how)


# Sizes, power, equivalence


@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.3, 3.0])
def test_the_interval_of_d_inverts_noncentral_t(shift):
    x = np.random.default_rng(11).normal(shift, 1, 14)
    found = cohens_d(x)
    assert found.d == pytest.approx(x.mean() / x.std(ddof=1))
    t = found.d * 14**0.5
    assert scipy_stats.nct.cdf(t, 13, found.low * 14**0.5) == pytest.approx(0.975, abs=1e-6)
    assert scipy_stats.nct.cdf(t, 13, found.high * 14**0.5) == pytest.approx(0.025, abs=1e-6)


def test_seeds_that_disagree_widen_the_interval_of_d():
    g = np.random.default_rng(12)
    agreed = g.normal(0.5, 1, (1, 12)).repeat(3, 0)
    shifted = agreed + np.array([[-0.8], [0.0], [0.8]])
    assert cohens_d(shifted).d == pytest.approx(cohens_d(agreed).d) == pytest.approx(cohens_d(agreed[0]).d)
    assert cohens_d(shifted).low < cohens_d(agreed).low


def test_d_of_too_little_is_refused():
    with pytest.raises(ValueError, match="2 or more items"):
        cohens_d([1.0])
    with pytest.raises(ValueError, match="2 or more items"):
        cohens_d([1.0, np.inf])


def test_power_is_what_simulated_studies_find():
    x = np.random.default_rng(13).normal(0.6, 1, (4000, 15))
    share = (scipy_stats.ttest_1samp(x, 0, axis=1).pvalue < 0.05).mean()
    assert power_paired(0.6, 15) == pytest.approx(share, abs=0.025)
    assert power_paired(0, 15, 0.1) == pytest.approx(0.1)
    assert power_paired(-0.6, 15) == pytest.approx(power_paired(0.6, 15))


def test_the_power_of_a_comparison_is_that_of_its_items():
    after, before = arms(14, items=15)
    found = compare(after, before, smallest=0.6)
    assert found.power == pytest.approx(power_paired(0.6, 15)) and found.smallest == 0.6


@pytest.mark.parametrize("n", [3, 12, 24, 80, 872, 5000])
def test_power_grows_to_one_however_clear_the_effect(n):
    """SciPy's tails are NaN far out, and were printed so."""
    found = [power_paired(d, n) for d in np.linspace(0, 40, 801)]
    assert all(0.05 <= p <= 1 + 1e-12 for p in found) and found[-1] > (0.9 if n == 3 else 0.999)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(found))


def test_power_refuses_what_has_none():
    for n, alpha in ((1, 0.05), (5, 0), (5, 1)):
        with pytest.raises(ValueError, match="2 or more items"):
            power_paired(0.5, n, alpha)


def test_equivalence_is_two_one_sided_tests():
    after, before = arms(15, items=20, shift=0.05)
    d = (after - before)[0]
    found = equivalent(after, before, 0.4)
    low = scipy_stats.ttest_1samp(d, -0.4, alternative="greater").pvalue
    high = scipy_stats.ttest_1samp(d, 0.4, alternative="less").pvalue
    assert found.p == pytest.approx(max(low, high))
    expected = scipy_stats.t.interval(0.9, 19, d.mean(), scipy_stats.sem(d))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.verdict == "equivalent"
    assert equivalent(before, after, 0.4).p == pytest.approx(found.p)


@pytest.mark.parametrize("margin", [0.1, 0.3, 0.7])
def test_the_verdict_of_equivalence_is_that_of_its_interval(margin):
    for seed in range(12):
        found = equivalent(*arms(seed, 3, 10, shift=0.3), margin)
        assert (found.verdict == "equivalent") == (-margin < found.low and found.high < margin)
        assert (found.verdict == "different") == (found.low > margin or found.high < -margin)


def test_equality_of_few_items_is_no_equivalence():
    same = np.full(4, 3.0)
    few, many = equivalent(same, same, 0.5), equivalent(np.full(5, 3.0), np.full(5, 3.0), 0.5)
    assert few.p == 1 / 16 and few.verdict == "inconclusive" and few.low is None
    assert many.p == 1 / 32 and many.verdict == "equivalent" and many.low == 0
    assert equivalent(same + 0.5, same, 0.5).p == 1
    right = np.ones(12)
    assert equivalent(right, right, 0.1).verdict == "inconclusive", "twelve right answers leave room for a tenth"
    with pytest.raises(ValueError, match="margin"):
        equivalent(same, same, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_many_studies_at_once_are_each_their_own(seed):
    g = np.random.default_rng(seed)
    x = g.normal(size=(4, 2, 7))
    assume(np.isfinite(x).all())
    low, high = interval(x, False)
    for run in range(4):
        alone = interval(x[run : run + 1], False)
        assert (alone[0][0], alone[1][0]) == pytest.approx((low[run], high[run]))
        for test in ("permutation", "wilcoxon", "t"):
            assert p_values(item_means(x), test)[run] == pytest.approx(p_values(item_means(x[run : run + 1]), test)[0])


def test_a_seed_without_any_value_in_one_run_is_as_if_it_were_not_there():
    """A dose at which one seed gave nothing but NaN: what real studies hold, and simulated ones did not."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 3, 9))
    x[0, 1] = np.nan
    error, df = standard_error(x)
    less, fewer = standard_error(x[:1, [0, 2]])
    assert error[0] == pytest.approx(less[0]) and df[0] == pytest.approx(fewer[0])
    lone = x[:1].copy()
    lone[0, 2] = np.nan
    assert standard_error(lone)[0][0] == pytest.approx(lone[0, 0].std(ddof=1) / 3)
    from lesion.stats import cohens_d

    assert cohens_d(x[0]).d == pytest.approx(cohens_d(x[0][[0, 2]]).d)
    assert cohens_d(x[0]).low == pytest.approx(cohens_d(x[0][[0, 2]]).low)
