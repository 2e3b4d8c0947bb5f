"""A sweep of made-up rows, whose answers are known."""

import math

import numpy as np
import polars as pl
import pytest

from lesion.outcomes import Outcome, of_displacement, of_generation, of_perplexity
from lesion.studies import _degrade as say
from lesion.sweep import Sweep

DOSES, SEEDS, ITEMS = [0.0, 0.1, 0.2, 0.4, 0.8], [1, 2], 12
RIGHT, CONFIDENCE = of_generation()
NLL = of_perplexity()[0]
KL, SAME, _ = of_displacement()


def sweep(rows_of, sites=("attention.value", "mlp"), strength=float, doses=DOSES):
    cells = {(site, dose, seed): rows_of(site, dose, seed) for site in sites for dose in doses for seed in SEEDS}
    return Sweep(list(sites), list(doses), SEEDS, cells, strength)


def made(site, dose, seed):
    """The mlp is hit twice as hard; answers fail one after the other; losses of predictions are steeper for the mlp."""
    hard = dose * (2 if site == "mlp" else 1)
    noise = lambda i: 0.01 * math.sin(i + seed)  # noqa: E731
    return {
        "perplexity": {f"d{i}": {"nll": 10.0 * (2 + hard + noise(i)), "tokens": 10} for i in range(ITEMS)},
        "generation": {
            f"p{i}": {"correct": i / ITEMS >= hard, "group": "math", "stop": "end", "logprob": -hard}
            for i in range(ITEMS)
        },
        "displacement": {
            "weights": {"relative": dose},
            **{
                f"d{i}": {
                    "kl": 10 * hard**2 * (1 + noise(i)),
                    "same_top": 10
                    * (1 - (1 - math.exp(-((hard / 0.5) ** (4 if site == "mlp" else 1.5)))))
                    * (1 - noise(i) / 9),
                    "tokens": 10,
                    "change": [1.0, hard],
                    "norm": [1.0, 1.0],
                }
                for i in range(ITEMS)
            },
        },
    }


def test_points_are_means_and_relative_ones_are_paired():
    s = sweep(made)
    assert s.point(RIGHT, "mlp", 0.4)["value"] == pytest.approx(2 / ITEMS)  # 0.8 of twelve go
    found = s.point(NLL, "mlp", 0.4)
    assert found["value"] == pytest.approx(math.exp(0.8)), "the noise of items is in both arms"
    assert found["low"] == pytest.approx(found["high"]) and (found["items"], found["seeds"]) == (ITEMS, 2)
    assert s.point(NLL, "mlp", 0.0)["value"] == 1
    assert s.point(KL, "attention.value", 0.2)["value"] == pytest.approx(0.04, rel=0.01)


def test_effects_are_signed_and_corrected_over_the_whole_table():
    table = sweep(made).effects([RIGHT, NLL])
    assert len(table) == 2 * 2 * 4
    row = table.row(
        by_predicate=(pl.col("outcome") == "accuracy") & (pl.col("site") == "mlp") & (pl.col("dose") == 0.4), named=True
    )
    assert row["value"] == pytest.approx(-10 / 12) and row["high"] < 0 and row["d"] < 0
    assert all(row["p_holm"] >= row["p"] for row in table.iter_rows(named=True))


def test_missing_values_are_missing():
    def torn(site, dose, seed):
        found = made(site, dose, seed)
        if dose == 0.8:
            found["perplexity"] = {name: {**row, "nll": None} for name, row in found["perplexity"].items()}
        if (dose, seed) == (0.4, 2):
            del found["generation"]
        return found

    s = sweep(torn)
    assert s.point(NLL, "mlp", 0.8) == {"value": None, "low": None, "high": None, "items": None, "seeds": None}
    assert s.effect(NLL, "mlp", 0.8) is None
    assert s.point(RIGHT, "mlp", 0.4)["value"] == pytest.approx(2 / ITEMS) and s.point(RIGHT, "mlp", 0.4)["seeds"] == 1
    assert len(s.effects([NLL])) == 2 * 3
    assert s.threshold(NLL, "mlp") is None, "no document has a value at every dose"


def test_thresholds_and_halves_of_levels_are_levels():
    def quantised(site, levels, seed):
        return made(site, 1 / levels if levels else 0.0, seed)

    s = sweep(quantised, strength=lambda levels: 1 / levels, doses=[0.0, 64.0, 16.0, 8.0, 4.0, 2.0])
    table = s.thresholds([RIGHT])
    for row in table.iter_rows(named=True):
        assert row["at d"] == -0.8 and 2 <= row["dose"] <= 16
    attention, mlp = (table.filter(pl.col("site") == site)["dose"][0] for site in s.sites)
    assert mlp > attention, "half the noise: twice the levels"


def test_matched_damage_is_where_divergence_is_equal():
    s = sweep(made)
    low, high = s.range_of(KL)
    assert low == pytest.approx(0.04, rel=0.02) and high == pytest.approx(0.64, rel=0.02)
    found = s.at_damage(KL, 0.16)
    assert found["attention.value"] == pytest.approx(0.4, rel=0.02) and found["mlp"] == pytest.approx(0.2, rel=0.02)
    np.testing.assert_allclose(
        s.at(RIGHT, "mlp", 0.3), (s.array(RIGHT, "mlp", 0.2)[0] + s.array(RIGHT, "mlp", 0.4)[0]) / 2
    )
    at = say.matched(s, [RIGHT, KL])
    assert at.table["divergence"].n_unique() == 3 and at.strengths["attention.value"] > at.strengths["mlp"]
    heat = s.heat([RIGHT, KL], at.strengths, at.note)
    assert set(heat["row"]) == set(s.sites) and (heat.filter(heat["column"] == "accuracy")["value"] < 0).all()


def test_claims_say_what_the_rows_say():
    s = sweep(made)
    outcomes = [RIGHT, CONFIDENCE, NLL, KL, SAME]
    table = say.claims(s, outcomes, "mult-gauss", say.matched(s, outcomes))
    said = dict(zip(table["claim"], table["verdict"], strict=True))
    assert said["The strongest damage to mlp (0.8) lowers the accuracy of answers"] == "supported"
    assert said["attention.value fails gradually, mlp abruptly"] == "supported"
    equal = next(v for k, v in said.items() if k.startswith("At equal divergence"))
    assert equal in ("contradicted", "inconclusive"), "at equal divergence these two do the same"
    turned = sweep(lambda site, dose, seed: made({"mlp": "attention.value"}.get(site, "mlp"), dose, seed))
    table = say.claims(turned, outcomes, "mult-gauss", None)
    assert (
        dict(zip(table["claim"], table["verdict"], strict=True))["attention.value fails gradually, mlp abruptly"]
        == "contradicted"
    )
    assert not [c for c in table["claim"] if "levels" in c]


def test_nothing_is_claimed_of_doses_that_do_not_reach_it():
    s = sweep(made, doses=[0.0, 0.01, 0.02])
    table = say.claims(s, [SAME, NLL], "mult-gauss", None)
    row = table.row(by_predicate=pl.col("claim").str.contains("gradually"), named=True)
    assert row["verdict"] == "not tested" and "half of its predictions" in row["note"] and row["effect"] is None


def test_harmless_quantisation_is_shown_by_equivalence_and_not_by_a_missing_effect():
    def levels(harm):
        return lambda site, dose, seed: {
            "generation": {
                f"p{i}": {
                    "correct": (i + seed) % 2 == 0 and not (0 < dose <= 16 and i < harm),
                    "group": "g",
                    "stop": "end",
                    "logprob": 0.0,
                }
                for i in range(60)
            }
        }

    for harm, want in ((0, "supported"), (40, "contradicted")):
        s = sweep(levels(harm), sites=("mlp",), strength=lambda x: 1 / x, doses=[0.0, 256.0, 16.0, 4.0])
        table = say.claims(s, of_generation(), "uni-quant", None)
        row = table.row(by_predicate=pl.col("claim").str.contains("16 levels"), named=True)
        assert row["verdict"] == want, row


def test_an_outcome_knows_its_worse_side():
    assert [
        Outcome("n", "u", better, "g", "m", lambda row: None).worse for better in ("higher", "lower", "neither")
    ] == [-1, 1, 0]
