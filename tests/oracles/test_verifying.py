"""Verifiers: their numbers against naive ones, a verifier that learns what is there to learn, and choosing among solutions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lesion import verifying
from lesion.measures import Task, Verification
from lesion.measures.verification import choices, majority
from lesion.steps import Verifier
from lesion.subjects import Scratch
from lesion.tasks.jsonl import plain
from lesion.trial import Reading, Trial
from words import TestPairs, TestSums

START = Trial(subject=Scratch())
DRAWN = Task(task=TestSums(), part="train", sample=8, repeats=6, temperature=1.0, new_tokens=4)
TESTED = Task(task=TestSums(), part="test", sample=4, repeats=4, temperature=1.0, new_tokens=4)
HOW = {"steps": 80, "batch": 16, "length": 32, "lr": 3e-3, "warmup": 2}


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=25))
def test_auroc_is_the_share_of_pairs_in_their_order(rows):
    scores, right = zip(*rows, strict=True)
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, ra in zip(scores, right, strict=True)
        for b, rb in zip(scores, right, strict=True)
        if ra and not rb
    ]
    found = verifying.auroc(scores, right)
    assert found is None if not pairs else found == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_error_is_zero_where_chances_are_shares():
    assert verifying.calibration_error([0.25] * 4, [True, False, False, False]) == pytest.approx(0)
    assert verifying.calibration_error([1.0, 1.0], [False, True]) == pytest.approx(0.5)
    assert verifying.calibration_error([0.05, 0.95], [False, True]) == pytest.approx(0.05)


def row(example, chance, correct, stated):
    return {"example": example, "chance": chance, "correct": correct, "stated": stated}


def test_ways_of_choosing():
    rows = [row("a", 0.1, False, "3"), row("a", 0.9, True, "4"), row("a", 0.2, False, "3"), row("a", None, False, None)]
    rows += [row("b", 0.5, True, "7"), row("b", 0.4, False, "8"), row("b", 0.3, False, "8"), row("b", 0.9, False, "8")]
    found = choices(rows)
    assert list(found) == [1, 2, 4]
    assert found[1]["best"] == found[4]["first"] == {"a": 0.0, "b": 1.0}
    assert found[2]["best"] == {"a": 1.0, "b": 1.0} and found[4]["best"] == {"a": 1.0, "b": 0.0}
    assert found[4]["majority"] == {"a": 0.0, "b": 0.0}
    assert found[4]["any"] == {"a": 0.25, "b": 0.25} and found[2]["any"] == {"a": 0.5, "b": 0.5}
    assert majority(rows[:2])["stated"] == "3", "of equally many the first"


def test_where_a_task_reads_no_number_words_are_voted_with(lab):
    drawn = Task(task=TestPairs(), method="generate", sample=2, repeats=6, temperature=1.0, new_tokens=1)
    samples = Reading(trial=START, measure=DRAWN).pin()
    trained = START >> Verifier(**{**HOW, "steps": 8}, samples=samples)
    rows = lab.read([trained], [Verification(of=Reading(trial=START, measure=drawn).pin())]).to_dicts()
    texts = {row["item"]: row["text"] for row in lab.read([START], [drawn]).to_dicts()}
    assert [row["stated"] for row in rows] == [plain(texts[row["item"]]) or None for row in rows]


@pytest.mark.parametrize("trunk", ["decoder", "encoder"])
def test_a_verifier_learns_what_can_be_seen(lab, trunk):
    """Whether a reply has an even number of letters is there to be learned, by heart if by nothing else."""
    samples = Reading(trial=START, measure=DRAWN).pin()
    trained = START >> Verifier(**{**HOW, "steps": 160}, samples=samples, trunk=trunk)
    check = Verification(of=Reading(trial=START, measure=TESTED).pin())
    rows = lab.read([trained], [check])
    assert rows["chance"].is_between(0, 1).all() and rows["chance"].n_unique() > 2
    store = lab.take([Reading(trial=trained, measure=check).pin()])
    facts = store.index.states[trained.pin().key]["ledger"][-1]["facts"]
    assert facts["loss"] < 0.5  # from 0.69
    assert 0 < facts["right"] < facts["solutions"]


def test_an_encoder_leaves_the_model_as_it_was(lab):
    samples = Reading(trial=START, measure=DRAWN).pin()
    specimen = Scratch().load()
    before = {n: p.detach().clone() for n, p in specimen.model.named_parameters()}
    specimen.recall = lambda reading: list(reading.measure.read(specimen, reading.measure.items(specimen)))
    facts = Verifier(**{**HOW, "steps": 3}, samples=samples, trunk="encoder").apply(specimen)
    assert facts["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the head begins at zero"
    assert all(torch.equal(p, before[n]) for n, p in specimen.model.named_parameters() if n in before)


def test_padding_is_not_seen():
    model = Scratch().load().model
    for trunk in ("decoder", "encoder"):
        verifying.attach(model, trunk, 16, 3)
        head = model.verifier.head if trunk == "encoder" else model.verifier
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            alone = verifying.verdicts(model, torch.tensor([[5, 6, 7]]), torch.tensor([2]))
            beside = verifying.verdicts(model, torch.tensor([[5, 6, 7, 9, 9], [1, 2, 3, 4, 5]]), torch.tensor([2, 4]))
        assert float(alone[0]) == pytest.approx(float(beside[0]), abs=1e-5)
        with pytest.raises(ValueError, match="has a verifier already"):
            verifying.attach(model, trunk, 16, 3)
        del model.verifier


def test_what_makes_no_sense_is_refused(lab):
    samples = Reading(trial=START, measure=TESTED)
    with pytest.raises(ValueError, match="part='train'"):
        Verifier(samples=samples)
    with pytest.raises(ValueError, match="of examples to test with; these are of the part 'train'"):
        Verification(of=Reading(trial=START, measure=DRAWN))
    with pytest.raises(ValueError, match="no verifier; the step `verifier` trains one"):
        verifying.verdicts(Scratch().load().model, torch.tensor([[1]]), torch.tensor([0]))
    specimen = Scratch().load()
    specimen.recall = lambda _: [
        {"item": "sum/0#0", "example": "sum/0", "text": "xx", "correct": True},
        {"item": "sum/1#0", "example": "sum/1", "text": "yy", "correct": True},
    ]
    with pytest.raises(ValueError, match="of 2 sampled solutions 2 are right: a verifier needs right and wrong ones"):
        Verifier(**HOW, samples=Reading(trial=START, measure=DRAWN)).apply(specimen)


def test_a_verifier_is_kept_and_read_again(lab):
    samples = Reading(trial=START, measure=DRAWN).pin()
    trained = START >> Verifier(**{**HOW, "steps": 5}, samples=samples)
    check = Verification(of=Reading(trial=START, measure=TESTED).pin())
    first = lab.read([trained], [check]).sort("item")["chance"].to_list()
    store = lab.take([Reading(trial=trained, measure=check).pin()])
    from lesion.walk import Walk

    again = Walk(store).materialise(trained.pin())
    again.recall = lambda reading: [r for r in store.rows([reading.key])]
    rows = {r["item"]: r["chance"] for r in check.read(again, check.items(again))}
    assert [rows[i] for i in sorted(rows)] == pytest.approx(first, abs=1e-6)
