"""Independent groups against scipy, dense definitions, examples worked by hand, and simulated studies without any effect."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from lesion.groups import (
    anova,
    describe,
    pairwise,
    permutation,
    slope,
    slope_t,
    welch,
    welch_t,
)
from lesion.outliers import both, keep_iqr, keep_zscore
from lesion.stats import holm

SIZES = np.log10([70e6, 160e6, 410e6, 1e9])


def three(seed=0):
    g = np.random.default_rng(seed)
    return {"prion": g.normal(1, 2, 9), "gaussian": g.normal(0, 1, 7), "text": g.normal(0, 0.5, 12)}


def line(seed=0, runs=5, rise=0.5):
    g = np.random.default_rng(seed)
    x = np.repeat(SIZES, runs)
    return x, rise * x + g.normal(size=len(x))


# One group


def test_a_description_is_numpys_and_scipys():
    x = three()["prion"]
    found = describe(x)
    assert (found.n, found.mean, found.sd) == (9, pytest.approx(x.mean()), pytest.approx(x.std(ddof=1)))
    assert (found.sem, found.median) == (pytest.approx(scipy_stats.sem(x)), np.median(x))
    assert (found.min, found.max) == (x.min(), x.max())
    assert (found.low, found.high) == pytest.approx(scipy_stats.t.interval(0.95, 8, x.mean(), scipy_stats.sem(x)))


def test_runs_that_are_all_the_same_have_no_interval():
    found = describe([0.1] * 5)
    assert (found.sd, found.sem, found.low, found.high) == (0, 0, None, None)


# All groups together


def test_anova_by_hand():
    found = anova({"a": [1, 2, 3], "b": [2, 3, 4], "c": [6, 7, 8]})  # between 42 with 2 df, within 6 with 6
    assert (found.f, found.df_between, found.df_within, found.runs) == (pytest.approx(21), 2, 6, 9)
    assert (found.eta2, found.omega2) == pytest.approx((42 / 48, 40 / 49))


@pytest.mark.parametrize("seed", range(4))
def test_both_anovas_are_scipys(seed):
    found = anova(three(seed))
    fisher = scipy_stats.f_oneway(*three(seed).values())
    robust = scipy_stats.f_oneway(*three(seed).values(), equal_var=False)
    assert (found.f, found.p) == pytest.approx((fisher.statistic, fisher.pvalue))
    assert (found.welch_f, found.welch_p) == pytest.approx((robust.statistic, robust.pvalue))


def test_of_two_groups_welchs_anova_is_welchs_test():
    a, b = list(three().values())[:2]
    found, pair = anova({"a": a, "b": b}), welch(a, b)
    assert (found.welch_f, found.welch_df, found.welch_p) == pytest.approx((pair.t**2, pair.df, pair.p))


def test_an_omega_squared_may_be_negative_and_what_has_no_spread_says_nothing():
    assert anova({"a": [1, 2, 3], "b": [1, 2, 3]}).omega2 == pytest.approx(-1 / 5)
    one = anova({"a": [1, 1, 1], "b": [1, 2, 3]})
    assert one.p is not None and one.welch_p is None
    none = anova({"a": [1, 1, 1], "b": [2, 2, 2]})
    assert none.f is None and none.p is None and none.eta2 == 1
    assert anova({"a": [0.1] * 3, "b": [0.1] * 4}).eta2 is None


# Two groups


def test_a_contrast_by_hand():
    found = welch([1, 2, 3], [3, 4, 5], names=("adam", "sgd"))
    assert (found.first, found.second, found.n_first, found.n_second, found.value) == ("adam", "sgd", 3, 3, -2)
    assert (found.t, found.df) == pytest.approx((-(6**0.5), 4))
    assert found.g == pytest.approx(-2 * (2 / np.pi) ** 0.5), "J(4) = Γ(2) / (√2 Γ(3/2)) = √(2/π)"
    assert (found.p_permutation, found.splits) == (4 / 20, 20), (
        "either 3 may go with 1 and 2, and each split has a mirror"
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_contrast_is_scipys(seed):
    a, b = list(three(seed).values())[:2]
    found, expected = welch(a, b), scipy_stats.ttest_ind(a, b, equal_var=False)
    bounds = expected.confidence_interval(0.95)
    assert (found.t, found.df, found.p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))


@pytest.mark.parametrize(("n", "m"), [(3, 4), (5, 5), (12, 11)])
def test_the_permutation_is_scipys_of_welchs_t(n, m):
    g = np.random.default_rng(n)
    a, b = g.normal(0.7, 1, n), g.normal(0, 2, m)
    expected = scipy_stats.permutation_test(
        (a, b), lambda a, b, axis: np.abs(scipy_stats.ttest_ind(a, b, equal_var=False, axis=axis).statistic),
        vectorized=True, alternative="greater", n_resamples=4000, rng=1,
    ).pvalue  # fmt: skip
    p, splits = permutation(a, b)
    exact = n + m <= 10
    assert p == pytest.approx(expected, abs=1e-9 if exact else 0.03)
    assert (splits <= 252) == exact and (splits == 10_001) != exact
    assert permutation(a, b) == (p, splits)


def test_a_permutation_is_never_zero_and_knows_ties():
    assert permutation(np.arange(12.0), np.arange(12.0) + 99)[0] == 1 / 10_001
    assert permutation(np.zeros(3), np.ones(3))[0] == 2 / 20
    assert permutation(np.full(3, 0.1), np.full(4, 0.1))[0] == 1


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.8])
def test_the_interval_of_g_inverts_noncentral_t(shift):
    g = np.random.default_rng(3)
    a, b = g.normal(shift, 1, 6), g.normal(0, 2, 9)
    found = welch(a, b)
    unit = ((a.var(ddof=1) + b.var(ddof=1)) / 2) ** 0.5
    to_t = unit / (a.var(ddof=1) / 6 + b.var(ddof=1) / 9) ** 0.5
    tails = [
        scipy_stats.nct.cdf(found.t, found.df, bound * to_t) for bound in (found.low / unit, found.g_low, found.g_high)
    ]
    assert tails[1:] == pytest.approx([0.975, 0.025], abs=1e-5)
    assert abs(found.g) < abs(found.value / unit)


def test_an_endless_t_has_an_interval_at_once():
    near = np.array([1, 1 + 1e-6, 1 + 2e-6])
    found, edge = welch(near, near + 1), welch(near * 1000, near * 1000 + 1)  # |t| of a million, and of about 1,200
    assert found.g_low < found.g < found.g_high < 0
    assert found.g_low / found.g == pytest.approx(edge.g_low / edge.g, rel=1e-3)
    some = welch(near * 1300, near * 1300 + 1)  # just below 1000, where scipy searches
    assert abs(some.t) < 1000 < abs(edge.t) and some.g_high / some.g == pytest.approx(edge.g_high / edge.g, rel=0.01)


def test_groups_without_spread_leave_the_permutation():
    found = welch([2, 2, 2, 2], [1, 1, 1], names=("int8", "nf4"))
    assert (found.value, found.p_permutation, found.note) == (1, 1 / 35, "no spread in 'int8' and 'nf4'")
    assert found.p is None and found.low is None and found.t is None and found.g is None
    one = welch([2, 2, 2, 2], [1, 2, 3])
    assert one.df == pytest.approx(2) and one.p is not None and one.note == "no spread in 'a'"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 6), st.integers(3, 6), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_turning_scaling_and_shifting_a_contrast(seed, n, m, scale, shift):
    g = np.random.default_rng(seed)
    a, b = g.normal(size=n), g.normal(0.5, 2, m)
    one, back, moved = welch(a, b), welch(b, a), welch(a * scale + shift * scale, b * scale + shift * scale)
    assert (back.value, back.low, back.high, back.t) == pytest.approx((-one.value, -one.high, -one.low, -one.t))
    assert (back.g, back.g_low, back.g_high) == pytest.approx((-one.g, -one.g_high, -one.g_low), rel=1e-4, abs=1e-6)
    assert (back.p, back.p_permutation) == pytest.approx((one.p, one.p_permutation))
    assert (moved.value, moved.low) == pytest.approx((one.value * scale, one.low * scale), rel=1e-6)
    assert (moved.p, moved.p_permutation, moved.g) == pytest.approx((one.p, one.p_permutation, one.g), rel=1e-6)
    assert one.low < one.value < one.high and one.g_low < one.g < one.g_high
    assert (one.p < 0.05) == (one.low > 0 or one.high < 0) == (one.g_low > 0 or one.g_high < 0)


def test_all_pairs_are_named_in_order_and_corrected_together():
    found = pairwise(three())
    assert [(c.first, c.second) for c in found] == [("prion", "gaussian"), ("prion", "text"), ("gaussian", "text")]
    assert [c.p_holm for c in found] == holm([c.p for c in found])
    assert found[1].p == welch(three()["prion"], three()["text"]).p
    still = pairwise({"a": [1, 1, 1], "b": [2, 2, 2], "c": [1, 2, 4]})
    assert still[0].p_holm is None and still[1].p_holm == min(1, 2 * min(c.p for c in still[1:]))


# A slope


def test_a_slope_by_hand():
    found = slope(np.repeat([0, 1, 2], 3), [0, 1, 2, 1, 2, 3, 2, 3, 4])
    assert (found.slope, found.intercept, found.r2, found.theil_sen) == pytest.approx((1, 1, 0.5, 1))
    assert (found.distinct, found.runs) == (3, 9)
    error = (4 / (1 - 1 / 9 - 1 / 6) ** 2 / 36) ** 0.5
    assert found.high - 1 == pytest.approx(1 - found.low) == pytest.approx(scipy_stats.t.ppf(0.975, 7) * error)
    assert found.p_fit == pytest.approx(1) and found.p_means is None, "the means lie on the line"
    assert found.note.startswith("only 3 distinct x")


@pytest.mark.parametrize("seed", range(4))
def test_a_slope_is_scipys_with_a_dense_sandwich(seed):
    x, y = line(seed)
    found, expected, tau = slope(x, y), scipy_stats.linregress(x, y), scipy_stats.kendalltau(x, y)
    assert (found.slope, found.intercept, found.r2) == pytest.approx(
        (expected.slope, expected.intercept, expected.rvalue**2)
    )
    assert (found.tau, found.tau_p) == (tau.statistic, tau.pvalue)
    design = np.stack([np.ones_like(x), x], 1)
    inverse = np.linalg.inv(design.T @ design)
    hat = design @ inverse @ design.T
    rest = (y - hat @ y) / (1 - np.diag(hat))
    error = (inverse @ design.T @ np.diag(rest**2) @ design @ inverse)[1, 1] ** 0.5
    assert found.high - found.slope == pytest.approx(scipy_stats.t.ppf(0.975, 18) * error)
    assert found.p == pytest.approx(2 * scipy_stats.t.sf(abs(found.slope / error), 18))


@pytest.mark.parametrize("seed", range(4))
def test_means_off_the_line_are_the_error_of_p_means(seed):
    x, y = line(seed)
    means = y.reshape(4, 5).mean(1)
    found, of_means = slope(x, y), scipy_stats.linregress(SIZES, means)
    assert found.p_means == pytest.approx(of_means.pvalue), "as many runs at each x"
    off = 5 * ((means - of_means.intercept - of_means.slope * SIZES) ** 2).sum() / 2
    pure = y.reshape(4, 5).var(1, ddof=1).mean()
    assert found.p_fit == pytest.approx(scipy_stats.f.sf(off / pure, 2, 16))


def test_sizes_that_lie_each_elsewhere_are_no_slope():
    x, y = line(1, 10, 0)
    y += np.repeat([0, 9, -2, 8], 10)
    found = slope(x, y)
    assert found.p < 0.02 and found.p_means > 0.4 and found.p_fit < 1e-9 and "off the line" in found.note


def test_a_line_without_noise_has_no_error_and_one_outlier_no_say_in_the_median():
    x, y = line(0, 3)
    exact = slope(x, 2 * x + 1)
    assert (exact.slope, exact.intercept, exact.theil_sen, exact.r2) == pytest.approx((2, 1, 2, 1))
    assert exact.p is None and exact.low is None and exact.p_means is None and exact.note.startswith("all runs lie")
    flat = slope(x, np.full_like(y, 0.1))
    assert flat.slope == 0 and flat.p is None and flat.tau is None and flat.r2 is None and "the same" in flat.note
    y = 2 * x + 0.01 * y
    y[-1] += 50
    assert slope(x, y).slope > 10 and slope(x, y).theil_sen == pytest.approx(2, abs=0.1)
    ties = np.repeat([0.0, 1.0], [11, 1])
    assert slope(x, ties).theil_sen == 0, "no warning where nearly all y tie"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-2, 1e2), st.floats(-50, 50))
def test_turning_scaling_and_shifting_a_slope(seed, scale, shift):
    x, y = line(seed, 3)
    one, moved, mirror, other = slope(x, y), slope(x, scale * (y + shift)), slope(x, -y), slope(scale * (x + shift), y)
    ends = np.array([one.slope, one.low, one.high, one.theil_sen, one.theil_low])
    for found, by in ((moved, scale), (other, 1 / scale)):
        got = (found.slope, found.low, found.high, found.theil_sen, found.theil_low)
        assert got == pytest.approx(tuple(ends * by), rel=1e-6, abs=1e-6 * by)
        assert (found.p, found.p_means, found.r2) == pytest.approx((one.p, one.p_means, one.r2), rel=1e-5, abs=1e-9)
    assert (mirror.slope, mirror.low, mirror.tau) == pytest.approx((-one.slope, -one.high, -one.tau))


# Outliers


def test_fences_by_hand():
    x = [1, 2, 3, 4, 5, 6, 7, 11.5, 12]  # quartiles 3 and 7, fences −3 and 13
    assert keep_iqr(x).all()
    assert keep_iqr([*x[:-1], 13]).all() and not keep_iqr([*x[:-1], 13.001])[-1], "a fence is inside"
    assert keep_iqr(x, 1.0).tolist() == [True] * 7 + [False] * 2
    assert keep_iqr([0, 0, 0, 0, 0, 1, -1]).tolist() == [True] * 5 + [False] * 2, "no width, no room"


def test_ten_runs_cannot_exceed_three_deviations():
    assert keep_zscore([0] * 9 + [1e9]).all(), "9 / √10 = 2.85"
    assert keep_zscore([0] * 10 + [1e9]).tolist() == [True] * 10 + [False], "10 / √11 = 3.02"
    assert keep_zscore([0] * 4 + [1], 1.7).tolist() == [True] * 4 + [False], "4 / √5 = 1.79"
    for constant in ([0.1] * 11, [1e9 / 3] * 4):
        assert keep_iqr(constant, 0.01).all() and keep_zscore(constant, 0.01).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-9, 40), min_size=3, max_size=15), st.floats(1e-3, 1e3), st.floats(-100, 100), st.booleans()
)
def test_a_filter_minds_neither_scale_nor_shift(values, scale, shift, turned):
    x = np.array(values, float)
    moved = (-scale if turned else scale) * (x + shift)
    np.testing.assert_array_equal(keep_iqr(moved), keep_iqr(x))
    np.testing.assert_array_equal(keep_zscore(moved, 1.5), keep_zscore(x, 1.5))


def test_an_analysis_is_made_twice():
    groups = {"adam": [1, 2, 3, 2, 30], "sgd": [0, 1, 2, 1]}
    found = both(groups, "iqr", anova)
    assert (found.kept, found.dropped) == ({"adam": 4, "sgd": 4}, {"adam": 1, "sgd": 0})
    assert found.outliers == {"adam": (4,), "sgd": ()} and (found.limit, found.note) == (1.5, None)
    assert found.unfiltered == anova(groups) and found.filtered == anova({"adam": [1, 2, 3, 2], "sgd": groups["sgd"]})
    other = both(groups, "iqr", anova, by={"adam": [99, 1, 2, 1, 2], "sgd": [1, 2, 3, 4]})
    assert other.outliers["adam"] == (0,) and other.filtered == anova({"adam": [2, 3, 2, 30], "sgd": groups["sgd"]})


def test_what_a_filter_cannot_do_is_said():
    groups = {"adam": [1.0, 2, 3, 2, 30], "sgd": [0.0, 1, 2, 1]}
    stuck = both(groups, "zscore", pairwise)
    assert stuck.unfiltered == stuck.filtered and "no |z| exceeds 3" in stuck.note and "'adam', 'sgd'" in stuck.note
    short = both(groups, "zscore", pairwise, limit=0.1)
    assert short.filtered is None and len(short.unfiltered) == 1 and "leaves 'adam' 0" in short.note


# Studies in which nothing happens


@pytest.mark.parametrize(("n", "m", "spread"), [(5, 5, 1), (10, 10, 3), (5, 10, 3)])
def test_welch_rejects_and_misses_one_in_twenty(n, m, spread):
    g = np.random.default_rng(n + m)
    value, error, df = welch_t(g.normal(size=(8000, n)), g.normal(0, spread, (8000, m)))
    p = 2 * scipy_stats.t.sf(np.abs(value) / error, df)
    assert 0.035 < (p < 0.05).mean() < 0.06


@pytest.mark.parametrize(("runs", "most"), [(3, 0.075), (10, 0.06)])
def test_a_slope_keeps_its_level_where_spreads_differ(runs, most):
    g, x = np.random.default_rng(runs), np.repeat(SIZES, runs)
    for spreads in ([1, 1, 1, 1], [1, 1.5, 2, 3], [1, 1, 1, 4]):
        y = g.normal(size=(8000, len(x))) * np.repeat(spreads, runs)
        b, error = slope_t(x, y)
        p = 2 * scipy_stats.t.sf(np.abs(b) / error, len(x) - 2)
        assert 0.03 < (p < 0.05).mean() < most
    assert p[0] == pytest.approx(slope(x, y[0]).p)


def test_a_family_of_pairs_finds_something_in_one_of_twenty():
    x = np.random.default_rng(4).normal(size=(3000, 4, 8))
    found = [welch_t(x[:, a], x[:, b]) for a, b in combinations(range(4), 2)]
    p = np.stack([2 * scipy_stats.t.sf(np.abs(value) / error, df) for value, error, df in found], 1)
    share = np.mean([min(holm(family)) < 0.05 for family in p.tolist()])
    assert 0.03 < share < 0.06, "a little less than .05, for pairs share groups"
    assert [c.p for c in pairwise(dict(zip("abcd", x[0], strict=True)))] == pytest.approx(p[0])


def test_permutations_reject_one_in_twenty():
    x = np.random.default_rng(5).lognormal(size=(1500, 10))
    share = np.mean([permutation(one[:5], one[5:])[0] <= 0.05 for one in x])
    assert 0.03 < share < 0.065


# Refusals

FEW, HOLED = [1.0, 2.0], [1.0, np.nan, 2.0, np.inf]
X = np.repeat([1.0, 2.0, 3.0], 3)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: describe(FEW), "three runs or more; the group has 2"),
        (lambda: describe(1.0), r"one number a run \[runs\], not \(\)"),
        (lambda: welch([1, 2, 3], FEW, names=("adam", "sgd")), "three runs or more; group 'sgd' has 2"),
        (lambda: anova({"a": [1, 2, 3], "b": []}), "group 'b' has 0"),
        (lambda: pairwise({"a": [1, 2, 3], "b": HOLED}), "group 'b' has 2 of 4 values that are not finite"),
        (lambda: anova({"a": [1, 2, 3]}), r"groups: expected 2 or more, not \['a'\]"),
        (lambda: slope(X, X[:8]), "9 x and 8 y"),
        (lambda: slope(X[:6], X[:6]), r"three distinct x or more; here are \[1.0, 2.0\]"),
        (lambda: slope(X[:8], X[:8]), "three runs or more; x = 3 has 2"),
        (lambda: slope(X, [np.nan, *X[1:]]), "y has 1 of 9 values"),
        (lambda: keep_iqr(HOLED), "not finite"),
        (lambda: keep_zscore(FEW), "the group has 2"),
        (lambda: keep_iqr(X, 0), "positive number, not 0"),
        (lambda: keep_zscore(X, np.inf), "positive number, not inf"),
        (lambda: both({"a": X}, "mad", len), "no filter 'mad'; there are iqr, zscore"),
        (lambda: both({}, "iqr", len), "groups: expected 1 or more"),
        (lambda: both({"a": X}, "iqr", len, by={"a": X[1:]}), "{'a': 9} and {'a': 8}"),
        (lambda: both({"a": X}, "iqr", len, by={"b": X}), "{'a': 9} and {'b': 9}"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_by_name(act, said):
    with pytest.raises(ValueError, match=said):
        act()
