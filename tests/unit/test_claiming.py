"""Claims of a study: equivalences and comparisons, corrected together."""

import numpy as np
import pytest

from lesion import claiming
from lesion.claiming import decided, the_same, untested

RNG = np.random.default_rng(7)


def _pair(effect, spread=0.1, seeds=3, items=16):
    before = RNG.normal(size=(seeds, items))
    return before + effect + spread * RNG.normal(size=(seeds, items)), before


def _verdicts(*rows):
    return dict(decided(rows).select("claim", "verdict").rows())


def test_an_equivalence_is_supported_within_and_contradicted_beyond_its_margin():
    found = _verdicts(the_same("near", *_pair(0.0), "nats", 0.5), the_same("far", *_pair(2.0), "nats", 0.5))
    assert found == {"near": "supported", "far": "contradicted"}


def test_both_verdicts_of_an_equivalence_are_held_to_the_correction():
    """What one claim alone may say, it may not say as one of forty."""
    beyond, within = (
        the_same("beyond", *_pair(0.62, 0.5), "nats", 0.5),
        the_same("within", *_pair(0.4, 0.5), "nats", 0.5),
    )
    for row in (beyond, within):
        row["p"] = 0.01
    beyond["verdict"], within["verdict"] = "contradicted", "supported"
    assert _verdicts(beyond) == {"beyond": "contradicted"} and _verdicts(within) == {"within": "supported"}
    others = [claiming.tested(f"nothing {i}", *_pair(0.0, 1.0), "nats", f"nothing {i}") for i in range(40)]
    found = _verdicts(beyond, within, *others)
    assert found["beyond"] == found["within"] == "inconclusive"


@pytest.mark.parametrize("sign", [-1, 1])
def test_false_contradictions_at_the_margin_stay_rare_over_a_family(sign):
    """Nine claims whose truth lies exactly at the margin: without a correction some were contradicted in 39 % of studies."""
    false = 0
    for _ in range(200):
        rows = [the_same(str(i), *_pair(sign * 0.5, 0.3, 1), "nats", 0.5) for i in range(9)]
        false += "contradicted" in _verdicts(*rows).values()
    assert false / 200 < 0.1  # .05 is the level


def test_the_p_that_is_shown_is_that_of_what_was_found():
    assert the_same("near", *_pair(0.0), "nats", 0.5)["p"] < 0.02
    assert the_same("far", *_pair(2.0), "nats", 0.5)["p"] < 0.02


def test_seeds_are_those_that_can_be_paired():
    after, before = _pair(0.0)
    after[1:] = np.nan
    assert the_same("one seed", after, before, "nats", 0.5)["seeds"] == 1


def test_what_was_not_tested_is_not_counted():
    rows = [untested("nothing there", "nats", "no rows"), the_same("near", *_pair(0.0), "nats", 0.5)]
    found = decided(rows)
    assert found["p_holm"].to_list()[0] is None and found["verdict"].to_list() == ["not tested", "supported"]


@pytest.mark.parametrize(("high", "said"), [(0.03, True), (0.07, False)])
def test_an_interval_within_what_is_called_none_is_told_where_power_is_too_low_for_a_verdict(high, said):
    row = {"claim": "shields", "effect": 0.01, "low": -0.01, "high": high, "unit": "nats", "p": 0.4, "power": 0.2}
    [found] = decided([{**row, "note": "draws differ", "direction": -1, "smallest": 0.05}]).to_dicts()
    assert found["verdict"] == "inconclusive" and found["note"].startswith("draws differ")
    assert ("within ±0.05" in found["note"]) == said
