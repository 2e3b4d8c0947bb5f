"""The walk: every state once, undone bit-exactly, and nothing that fails takes its neighbours along."""

import json
import math

import pytest

from lesion import Lab, steps
from lesion.subjects import Scratch
from lesion.trial import Reading, Trial
from words import CALLS, TestBreaks, TestFails, TestLies, TestMeddles, TestNorms, TestQuotes, TestShift, TestTrains

A = Scratch(architecture="tiny-gpt-neox")


@pytest.fixture(autouse=True)
def _fresh():
    CALLS.clear()


def totals(lab, trials, measure=None):
    table = lab.read(trials, [measure or TestNorms()])
    return {name: math.fsum(part["norm"]) for (name,), part in table.group_by("trial", maintain_order=True)}


def test_a_shared_prefix_is_walked_once(lab):
    base = A >> TestShift(by=1)
    lab.read([A, base, base >> TestShift(by=2), base >> TestShift(by=3)], [TestNorms()])
    assert [c for c in CALLS if c.startswith("shift")] == ["shift 1", "shift 2", "shift 3"]


def test_a_state_reads_the_same_whatever_was_visited_before_it(lab, tmp_path):
    trials = [
        A >> steps.Noise(site="attention.value", sigma=s, seed=1) >> TestShift(by=b) for s in (0.1, 0.5) for b in (1, 2)
    ]
    together = totals(lab, [A, *trials])
    for number, trial in enumerate(trials):
        assert totals(Lab(tmp_path / f"alone{number}"), [trial]) == {str(trial): together[str(trial)]}


def test_asking_again_costs_nothing_and_asking_for_more_costs_only_that(lab):
    totals(lab, [A])
    done = len(CALLS)
    first = totals(lab, [A])
    assert len(CALLS) == done
    assert totals(lab, [A, A >> TestShift()])[str(Trial(subject=A))] == first[str(Trial(subject=A))]
    assert [c for c in CALLS[done:] if c.startswith("shift")] == ["shift 1"]


def test_a_step_that_raises_midway_is_undone_recorded_and_left_behind(lab):
    after = A >> TestShift(by=4)
    store = lab.take([Reading(trial=t, measure=TestNorms()) for t in (A, A >> TestBreaks() >> TestShift(), after)])
    assert len(store.index.seals) == 2
    (failure,) = store.index.failures.values()
    assert failure["of"] == (A >> TestBreaks()).key
    assert failure["error"] == "RuntimeError: halfway" and "in apply" in failure["trace"]
    assert totals(lab, [after]) == totals(Lab(lab.path.parent / "other"), [after])


@pytest.mark.parametrize("culprit", [A >> TestLies(), A >> TestShift() >> TestLies()])
def test_a_step_that_changes_more_than_it_says_is_caught_and_the_rest_is_read_on_a_fresh_model(lab, culprit):
    others = [A >> TestShift(by=b) for b in (1, 2, 3)]
    store = lab.take([Reading(trial=t, measure=TestNorms()) for t in (culprit, *others)])
    assert any("must not be" in f["error"] for f in store.index.failures.values())
    assert totals(lab, others) == totals(Lab(lab.path.parent / "other"), others)


def test_a_measure_that_changes_the_model_is_caught(lab):
    readings = [Reading(trial=A, measure=m) for m in (TestMeddles(), TestNorms())]
    store = lab.take([*readings, Reading(trial=A >> TestShift(), measure=TestNorms())])
    assert any("changed that must not be" in f["error"] for f in store.index.failures.values())
    assert totals(lab, [A, A >> TestShift()]) == totals(Lab(lab.path.parent / "other"), [A, A >> TestShift()])


def test_a_measure_that_raises_is_a_recorded_failure_and_is_tried_again(lab):
    readings = [Reading(trial=A, measure=TestFails()), Reading(trial=A, measure=TestNorms())]
    store = lab.take(readings)
    assert readings[1].key in store.index.seals and readings[0].key not in store.index.seals
    assert "no second chunk" in store.index.failures[readings[0].key]["error"]
    assert len(store.index.begun[readings[0].key][0]) == 3, "the first chunk is not lost"
    with pytest.raises(RuntimeError, match="1 of 1 readings failed: RuntimeError: no second chunk"):
        lab.read([A], [TestFails()])


def test_force_takes_again_and_the_new_take_counts(lab):
    first = lab.take([Reading(trial=A, measure=TestNorms())])
    done = len(CALLS)
    again = lab.take([Reading(trial=A, measure=TestNorms())], force=True)
    assert len(CALLS) == 2 * done
    (key,) = first.index.seals
    assert (first.index.seals[key].take, again.index.seals[key].take) == (0, 1)
    assert lab.open().index.seals[key].take == 1
    bare = [[{k: v for k, v in row.items() if k != "take"} for row in store.rows()] for store in (first, again)]
    assert bare[0] == bare[1]


def test_a_raised_version_invalidates_just_its_readings(lab, monkeypatch):
    readings = [Reading(trial=t, measure=TestNorms(power=p)) for t in (A, A >> TestShift()) for p in (1, 2)]
    before = {r.key for r in readings}
    lab.take(readings)
    monkeypatch.setattr(TestShift, "version", 2)
    fresh = [Reading(trial=t, measure=TestNorms(power=p)) for t in (A, A >> TestShift()) for p in (1, 2)]
    assert len({r.key for r in fresh} & before) == 2
    CALLS.clear()
    lab.take(fresh)
    assert [c for c in CALLS if c.startswith("shift")] == ["shift 1"]


def test_an_expensive_state_is_kept_and_its_children_start_from_it(lab, tmp_path):
    trained = A >> TestTrains(seed=1)
    one = totals(lab, [trained])
    folder = lab.open().state_folder(trained.key)
    assert sorted(p.name for p in folder.iterdir()) == ["ledger.json", "model.safetensors", "trial.json"]
    assert Trial.from_json(json.loads((folder / "trial.json").read_text())).key == trained.key
    later = trained >> TestShift(by=3) >> TestTrains(seed=2)
    two = totals(lab, [trained >> TestShift(), later])
    assert [c for c in CALLS if c.startswith("train")] == ["train 1", "train 2"]
    fresh = totals(Lab(tmp_path / "fresh"), [trained, trained >> TestShift(), later])
    assert fresh == {**one, **two}


def test_a_kept_state_that_was_tampered_with_is_refused_by_name(lab):
    trained = A >> TestTrains()
    totals(lab, [trained])
    file = lab.open().state_folder(trained.key) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match="not the one its ledger describes"):
        totals(lab, [trained >> TestShift()])
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(RuntimeError, match="cannot be read"):
        totals(lab, [trained >> TestShift()])


def test_a_quoted_reading_is_taken_first(lab):
    other = Reading(trial=A >> TestShift(by=2), measure=TestNorms())
    table = lab.read([A], [TestQuotes(other=other)])
    assert other.key in lab.open().index.seals
    assert table["norm"][0] < -1000, "the shifted tensor weighs more"
    assert set(table["norm"][1:]) == {0.0}


def test_an_address_that_does_not_exist_stops_the_run_before_it_starts(lab):
    readings = [Reading(trial=A >> steps.Noise(site=s, sigma=0.1), measure=TestNorms()) for s in ("mlp", "mpl")]
    with pytest.raises(ValueError, match=r"mpl.*there are.*embedding.*attention.*mlp"):
        lab.take(readings)
    assert not [c for c in CALLS if c.startswith("norms")]


def test_tied_weights_are_one_tensor_and_the_ledger_says_so(lab):
    tied = Scratch(architecture="tiny-llama")
    store = lab.take([Reading(trial=tied >> steps.Noise(site="embedding", sigma=0.1), measure=TestNorms())])
    (state,) = store.index.states.values()
    loaded, step = state["ledger"]
    assert loaded["tied"] == {"model.embed_tokens.weight": ["lm_head.weight"]}
    assert step["changed"] == ["model.embed_tokens.weight"]
