"""Catalysts and poison: slopes against differences, searches that climb, arms that read what they say, gains against projections."""

import json
import math

import numpy as np
import pytest
import torch

from lesion import measures
from lesion.catalysts import Ground, ascended, search
from lesion.curvature import Curvature, chosen, twice_differentiable
from lesion.flips import allowed, table
from lesion.lanczos import flat_share, top
from lesion.measures.gain import spread
from lesion.packing import Listed
from lesion.stats import generator
from lesion.steepness import as_batch
from lesion.steps.poison import Poison
from lesion.store import Store
from lesion.strings import windows_of
from lesion.subjects import Scratch
from lesion.trial import Reading, Trial

SITE = {"site": "mlp.out", "documents": 2, "tokens": 16, "directions": 3, "tolerance": 1e-2}
SEARCH = {**SITE, "length": 10, "iterations": 4, "width": 4, "topk": 8, "controls": 2}
RUN = {"steps": 4, "length": 10, "lr": 1e-3, "seed": 3}


def subject(**config):
    return Scratch(architecture="tiny-gpt-neox", config=config)


def ground(here, steep=3):
    """A float64 model inside of `twice_differentiable`, with steep directions of a text."""
    parameters = chosen(here, "mlp.out")
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    with Curvature(here, parameters, as_batch(here, ids)) as c:
        pairs = top(c.times, torch.ones(c.size, dtype=torch.float64), steep, tolerance=1e-6)
    for p in parameters.values():
        p.requires_grad_(True)
    return Ground(here, list(parameters.values()), pairs.vectors)


@pytest.fixture
def double():
    here = subject().load().model.double()
    with twice_differentiable(here):
        yield here


@pytest.mark.parametrize("objective", ["aligned", "loss"])
def test_slopes_are_differences(double, objective):
    """Of a table row: along a random change of what one position reads; of a target: from the loss as a sum over targets."""
    here, tokens = ground(double), list(range(40, 48))
    by_row, by_target = here.slopes(objective, tokens)
    module = double.get_input_embeddings()
    direction = torch.randn(by_row.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(by, position):
        def nudge(module, given, out):
            out = out.clone()
            out[0, position] += by * direction
            return out

        hook = module.register_forward_hook(nudge)
        try:
            return here.value(objective, tokens)
        finally:
            hook.remove()

    for position in (0, 3, 6):
        slope = (value(1e-5, position) - value(-1e-5, position)) / 2e-5
        assert float(by_row[position] @ direction) == pytest.approx(slope, rel=1e-5, abs=1e-10)
    assert not by_row[7].any() and not by_target[0].any(), "the last is never read, the first never a target"
    if objective == "loss":
        logits = double(input_ids=torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        torch.testing.assert_close(by_target[1:], -logits.detach() / 7, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["aligned", "loss"])
def test_a_search_climbs_by_the_true_objective(double, objective):
    here, may = ground(double), torch.zeros(table(double).shape[0], dtype=torch.bool)
    may[32:120] = True

    def draw(iteration, positions, choices):
        stream = generator("test", iteration)
        return stream.integers(positions, size=6), stream.integers(choices, size=6)

    start = list(range(40, 50))
    found = search(here, start, may, objective, iterations=8, width=6, topk=10, draw=draw)
    assert found.course == sorted(found.course) and found.course[-1] > here.value(objective, start)
    assert here.value(objective, found.tokens) == pytest.approx(found.course[-1], rel=1e-12)
    assert may[found.tokens].all() and found.gradients == 8 and found.scored <= 1 + 8 * 6


def test_the_described_ascent_ends_at_the_nearest_allowed_tokens(double):
    here, may = ground(double), torch.ones(table(double).shape[0], dtype=torch.bool)
    start = list(range(40, 50))
    still = ascended(here, start, may, 0)
    assert still.tokens == start, "what has not moved is nearest to itself"
    moved = ascended(here, start, may, 60)
    assert moved.course[-1] > moved.course[0], "the loss of the soft string rises"
    may[start] = False
    assert not set(ascended(here, start, may, 0).tokens) & set(start)


def test_flat_share_is_that_of_the_gradient_by_hand(double):
    here, tokens = ground(double), list(range(60, 70))
    logits = double(input_ids=torch.tensor([tokens[:-1]])).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]))
    g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, here.parameters)])
    steep = here.steep.T @ (here.steep @ g)
    assert here.share(tokens) == pytest.approx(float((g - steep).square().sum() / g.square().sum()), rel=1e-10)
    assert here.loss(tokens) == pytest.approx(loss.item(), rel=1e-12)


def test_the_measure_has_a_row_for_the_string_and_its_controls(lab):
    measure = measures.Catalyst(**SEARCH).pin()
    rows = {row["item"]: row for row in lab.read([subject()], [measure]).to_dicts()}
    assert list(rows) == ["catalyst", "random/0", "random/1", "text/0", "text/1"]
    best = rows["catalyst"]
    assert (
        best["flat_share"] == pytest.approx(best["course"][-1], rel=1e-4) and best["flat_share"] >= best["start_share"]
    )
    assert len(best["string_ids"]) == 10 and 0 <= best["changed"] <= 4 and best["directions"] == 3
    assert all(0 <= row["flat_share"] <= 1 and row["loss"] > 0 for row in rows.values())
    again = lab.read([subject()], [measures.Catalyst(**SEARCH, draw=1).pin()]).to_dicts()
    assert (
        again[1]["string_ids"] != rows["random/0"]["string_ids"]
        and again[3]["string_ids"] != rows["text/0"]["string_ids"]
    )
    with pytest.raises(ValueError, match="a catalyst of 900 tokens is longer than the context of 256"):
        measure.model_copy(update={"length": 900}).read(subject().load(), ["catalyst"])


def strings(lab, **options):
    return Reading(trial=Trial(subject=subject()), measure=measures.Catalyst(**SEARCH, **options).pin())


def poisoned(lab, arm, **options):
    """The state, its ledger entry and its parent's."""
    more = {"catalyst": strings(lab)} if arm == "catalyst" else {}
    trial = (subject() >> Poison(arm=arm, **{**RUN, **more, **options})).pin()
    lab.read([trial], [measures.Perplexity(documents=1, tokens=16, window=16, stride=8)])
    return trial, Store(lab.path).index.states[trial.key]["ledger"][-1]


ARMS = ["catalyst", "random-repeated", "random-fresh", "text-repeated", "text-fresh", "shuffled", "gaussian"]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_reads_what_it_says(lab, arm):
    specimen = subject().load()
    specimen.recall = lambda reading: [{"item": "catalyst", "outcome": "measured", "string_ids": list(range(40, 50))}]
    step = Poison(arm=arm, **RUN, warm=2, **({"catalyst": strings(lab)} if arm == "catalyst" else {})).pin()
    rows = step._rows(specimen)
    assert [len(row) for row in rows] == [10] * 6
    dose, may = rows[2:], allowed(specimen.tokenizer, len(table(specimen.model)))
    same = len({tuple(row) for row in dose}) == 1
    assert same == (arm in ("catalyst", "random-repeated", "text-repeated", "gaussian"))
    if arm.startswith("random"):
        assert may[torch.tensor(dose)].all()
    if arm == "catalyst":
        assert dose[0] == list(range(40, 50))
    texts = windows_of(specimen, "novels", 10, 4, "poison", 3)
    if arm == "text-fresh":
        assert dose == texts
    if arm == "shuffled":
        assert dose != texts and [sorted(row) for row in dose] == [sorted(text) for text in texts]
    assert rows[:2] == windows_of(specimen, "novels", 10, 2, "warming text", 3)
    assert step._rows(specimen) == rows


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_moves_the_model_through_the_one_loop(lab, arm):
    _, entry = poisoned(lab, arm)
    facts = entry["facts"]
    assert facts["arm"] == arm and facts["steps"] == 4 and facts["moved"] > 0.5 and facts["ended"] is None
    assert 0 < facts["displacement"] < 1 and len(facts["tokens"]) == 10 and entry["changed"]


def test_one_plain_step_is_the_gradient_by_hand(lab):
    trial, entry = poisoned(lab, "random-repeated", steps=1, optimizer="sgd", lr=0.5)
    here = subject().load().model
    tokens = torch.tensor([entry["facts"]["tokens"]])
    logits = here(input_ids=tokens[:, :-1]).logits[0]
    torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
    from lesion.walk import Walk

    after = dict(Walk(Store(lab.path)).materialise(trial).model.named_parameters())
    for name, p in here.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(after[name], p.detach() - 0.5 * p.grad, rtol=1e-4, atol=1e-6)


def test_warming_moves_no_weight_and_changes_what_adam_does_first(lab):
    cold, _ = poisoned(lab, "random-repeated", steps=1)
    warm, entry = poisoned(lab, "random-repeated", steps=1, warm=3)
    from lesion.walk import Walk

    start, a, b = (
        np.concatenate([p.detach().numpy().ravel() for p in Walk(Store(lab.path)).materialise(t).model.parameters()])
        for t in (Trial(subject=subject()), cold, warm)
    )
    touched = np.abs(a - start) > 0
    signs = [np.isclose(np.abs(x - start)[touched], 1e-3, rtol=0.02).mean() for x in (a, b)]
    assert signs[0] > 0.95, "cold Adam's first step is the sign, but where the gradient is as small as its epsilon"
    assert signs[1] < 0.3 and entry["facts"]["steps"] == 1
    folder = Store(lab.path).state_folder(warm.key)
    rates = [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rates == [0, 0, 0, 1e-3]


def test_the_schedule_is_that_of_the_dose_alone():
    step = Poison(arm="random-fresh", warm=20, steps=20, schedule="cosine", floor=0.0, lr=1.0)
    running = step.model_copy(update={"steps": 40})
    assert (
        [running.rate(i) for i in (0, 19)] == [0, 0] and running.rate(20) == 1 and running.rate(39) == pytest.approx(0)
    )


def test_stopping_at_a_displacement_or_at_a_rise(lab):
    _, entry = poisoned(lab, "random-fresh", steps=60, lr=3e-3, displacement=0.05)
    facts = entry["facts"]
    assert facts["ended"] == "displacement" and 0.05 <= facts["displacement"] < 0.08 and facts["steps"] < 60
    _, entry = poisoned(lab, "random-fresh", steps=60, lr=3e-2, rise=0.05)
    assert entry["facts"]["ended"] == "rise" and entry["facts"]["steps"] < 60
    _, entry = poisoned(lab, "random-fresh", steps=2, displacement=5.0)
    assert entry["facts"]["ended"] is None, "what was never reached is said"


def test_a_run_that_diverges_is_an_outcome(lab):
    trial, entry = poisoned(lab, "random-fresh", steps=60, lr=1e18, optimizer="sgd")
    assert entry["facts"]["ended"] == "diverged" and entry["facts"]["steps"] < 60
    rows = lab.read([trial], [measures.Perplexity(documents=1, tokens=16, window=16, stride=8)]).to_dicts()
    assert len(rows) == 1, "it is read like any other"


def test_an_interrupted_poison_ends_with_the_same_bits(tmp_path):
    from lesion import fit
    from lesion.trial import Unfinished

    def run(folder, stop=None):
        specimen = subject().load()
        specimen.place = folder
        step = Poison(arm="random-fresh", **{**RUN, "steps": 6}, warm=2, displacement=9.0).pin()
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            if stop:
                patch.setattr(fit, "asked", lambda: seen.append(1) or len(seen) == stop)
                with pytest.raises(Unfinished):
                    step.apply(specimen)
                return None
            facts = step.apply(specimen)
        return facts, [p.detach().clone() for p in specimen.model.parameters()]

    facts, whole = run(tmp_path / "a")
    run(tmp_path / "b", stop=3)
    again, parts = run(tmp_path / "b")
    assert again == facts and all(map(torch.equal, whole, parts))


def test_gaussian_inputs_reach_the_model_in_training_only():
    from lesion.steps.poison import _Gaussian

    here = subject().load().model
    ids = torch.arange(40, 50)[None]
    plain = here(input_ids=ids).logits
    with _Gaussian(Poison(arm="gaussian", seed=3, warm=2), here) as seen:
        assert torch.equal(here(input_ids=ids).logits, plain)
        here.train()
        seen(here, 1)
        assert torch.equal(here.get_input_embeddings()(ids), here.get_input_embeddings().weight[ids]), (
            "it is warmed on text"
        )
        seen(here, 2)
        drawn = here.get_input_embeddings()(ids)
        assert not torch.equal(drawn, here.get_input_embeddings().weight[ids])
        size = float(here.get_input_embeddings().weight.detach().square().mean().sqrt())
        assert float(drawn.square().mean().sqrt()) == pytest.approx(size, rel=0.2)
        assert torch.equal(drawn, here.get_input_embeddings()(ids)), "the same in every step"
    here.eval()
    assert torch.equal(here(input_ids=ids).logits, plain)


def test_what_makes_no_sense_is_refused(lab):
    with pytest.raises(ValueError, match="arm='catalyst' and a reading by catalyst go together"):
        Poison(arm="catalyst")
    with pytest.raises(ValueError, match="go together"):
        Poison(arm="gaussian", catalyst=strings(lab))
    wrong = Reading(trial=Trial(subject=subject()), measure=measures.Order())
    with pytest.raises(ValueError, match="a reading by catalyst, not by 'order'"):
        Poison(arm="catalyst", catalyst=wrong)
    with pytest.raises(ValueError, match="split=1"):
        Poison(arm="gaussian", batch=2, split=2)
    with pytest.raises(ValueError, match="documents='joined'"):
        Poison(arm="gaussian", documents="apart")
    with pytest.raises(ValueError, match="longer than the context of 256"):
        Poison(arm="gaussian", length=900).apply(subject().load())
    with pytest.raises(ValueError, match="has 10 tokens, and a row of this poison has 12"):
        specimen = subject().load()
        specimen.recall = lambda reading: [
            {"item": "catalyst", "outcome": "measured", "string_ids": list(range(40, 50))}
        ]
        Poison(arm="catalyst", catalyst=strings(lab), length=12).apply(specimen)
    with pytest.raises(ValueError, match="encoder-decoder"):
        Poison(arm="gaussian").apply(Scratch(architecture="tiny-t5").load())
    with pytest.raises(ValueError, match="Input should be"):
        Poison(arm="pile")


def test_gain_is_what_projections_say():
    n, stream = 200, torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=stream, dtype=torch.float64))
    steep, values = turn[:, :4].T.contiguous(), torch.tensor([4.0, -3.0, 2.0, 1.0], dtype=torch.float64)
    g = torch.randn(n, generator=stream, dtype=torch.float64)
    *directions, whole = spread(values, steep, g, -0.1 * g)
    assert whole["amplification"] == pytest.approx(0, abs=1e-9), "one step of SGD favours nothing"
    assert all(row["gain"] == pytest.approx(0.1) for row in directions)
    assert [row["value"] for row in directions] == [4, -3, 2, 1]
    part = steep.T @ (steep @ g)
    *_, whole = spread(values, steep, g, -(part + 3 * (g - part)))
    assert whole["amplification"] == pytest.approx(math.log(3))
    assert whole["flat_pulled"] == pytest.approx(flat_share(g, steep))
    *_, still = spread(values, steep, g, torch.zeros(n, dtype=torch.float64))
    assert still["amplification"] is None and still["displacement"] == 0
    *_, sick = spread(values, steep, g, torch.full((n,), math.nan, dtype=torch.float64))
    assert sick["outcome"] == "not finite" and sick["displacement"] is None


def test_gain_of_one_small_sgd_step_is_nil_and_of_adam_is_not(lab):
    healthy = Trial(subject=subject())
    found = {}
    for optimizer, lr in (("sgd", 1e-2), ("adamw", 1e-4)):
        trial, _ = poisoned(lab, "catalyst", steps=1, optimizer=optimizer, lr=lr)
        measure = measures.Gain(reference=healthy, catalyst=strings(lab), **SITE).pin()
        rows = lab.read([trial], [measure]).to_dicts()
        found[optimizer] = rows[-1]
        assert rows[-1]["item"] == "all" and len(rows) == 4
    assert found["sgd"]["amplification"] == pytest.approx(0, abs=2e-2)
    assert found["sgd"]["flat_moved"] == pytest.approx(found["sgd"]["flat_pulled"], abs=1e-3)
    assert abs(found["adamw"]["amplification"]) > 0.1


def test_rows_in_their_order_and_again():
    listed = Listed(np.arange(12, dtype=np.int32).reshape(3, 4))
    ids, targets, mask, at = listed.batch(2, 2)
    assert ids.tolist() == [[8, 9, 10], [0, 1, 2]] and targets.tolist() == [[9, 10, 11], [1, 2, 3]]
    assert mask is None and at.tolist() == [[0, 1, 2]] * 2 and listed.length == 3 and len(listed) == 3
