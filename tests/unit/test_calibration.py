"""The calibration table: whole, repeatable, and able to catch a procedure that lies."""

import numpy as np
import polars as pl
import pytest

from lesion import calibration
from lesion.calibration import CASES, calibrate


@pytest.fixture(scope="module")
def table():
    return calibrate(30, seed=1)


def test_every_procedure_meets_every_case(table):
    found = set(table["procedure"])
    assert {"compare permutation", "compare wilcoxon", "compare t", "compare mcnemar", "equivalent", "trend"} <= found
    assert {"interval of the mean", "interval of the ED50", "interval of the threshold, d"} <= found
    assert set(CASES) <= set(table["case"]) and set(table["n"]) == {6, 12, 40} and set(table["seeds"]) == {1, 3}
    assert any(name.startswith("holm") for name in found)
    assert table.select("procedure", "case", "n", "seeds").is_unique().all()


def test_a_row_has_one_share_inside_its_interval(table):
    share = table.select(pl.coalesce("rejected", "covered")).to_series()
    assert (table["rejected"].is_null() != table["covered"].is_null()).all()
    assert ((table["low"] <= share + 1e-12) & (share <= table["high"] + 1e-12)).all()
    assert (table["simulations"] <= 30).all() and not table.select(
        pl.any_horizontal(pl.all().exclude("rejected", "covered").is_null())
    ).to_series().any()


def test_procedures_are_calibrated(table):
    """One row in fifty may miss by chance: a 95 % interval of thirty simulations lets little else through."""
    missed = table.filter(~pl.col("ok"))
    assert len(missed) <= len(table) * 0.04, missed


def test_it_repeats_and_its_seed_counts():
    def means(seed):
        return [line.rejected for part in (calibration._trends, calibration._families) for line in part(20, seed)]

    assert means(0) == means(0) != means(1)


@pytest.mark.parametrize("case", CASES)
def test_a_case_has_the_mean_it_is_said_to(case):
    for shift in (0.0, 0.4) if case != "skewed differences" else (0.0,):
        x = CASES[case](np.random.default_rng(0), (4000, 2, 5), shift)
        assert np.nanmean(x) == pytest.approx(shift, abs=0.03)
        assert case != "0/1" or set(np.unique(x)) <= {-1, 0, 1}
        assert not np.isnan(x).all(1).any(), "every item has a seed left"


def test_a_test_that_lies_is_caught(monkeypatch):
    """Halved p values and an interval at half its width must not pass."""
    honest, wide = calibration.p_values, calibration.interval
    monkeypatch.setattr(calibration, "p_values", lambda each, test: honest(each, test) / 2)
    monkeypatch.setattr(
        calibration,
        "interval",
        lambda x, binary: tuple(0.5 * b for b in wide(x - x.mean((1, 2), keepdims=True), binary)),
    )
    monkeypatch.setattr(calibration, "CASES", {"normal": CASES["normal"]})
    lines = [line for line in calibration._comparisons(500, 0) if line.n == 40 and line.seeds == 1]
    by_name = {line.procedure: line for line in lines}
    assert not by_name["compare permutation"].ok and not by_name["compare t"].ok
    assert not by_name["interval of the mean"].ok and by_name["interval of the mean"].covered == 1


def test_too_few_simulations_are_refused():
    with pytest.raises(ValueError, match="10 or more"):
        calibrate(5)
