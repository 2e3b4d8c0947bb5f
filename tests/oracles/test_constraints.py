"""Constraints on whole models: what is trained stays within them, and what is certified is so, against plain computations."""

import math

import pytest
import torch

from lesion import packaged
from lesion.bench import Bench
from lesion.constraints import free, held, materialise, signed
from lesion.ffn import ffns, oriented
from lesion.fit import Stopped
from lesion.lab import Lab
from lesion.measures import Monotonicity, Order, Perplexity
from lesion.measures.monotonicity import computed
from lesion.measures.order import tau
from lesion.steps import Choose, Constrain, Heal, MatchLoss, Noise
from lesion.subjects import Scratch
from lesion.trial import Reading, Trial

HOW = {"steps": 6, "batch": 2, "length": 32, "warmup": 1, "lr": 0.01, "skip": 3}
CAUSAL = [name for name in packaged.TINY if name != "tiny-t5"]
LOSS = Perplexity(documents=2, tokens=80, window=64, stride=32).pin()


def ids_for(model):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@pytest.mark.parametrize("family", packaged.TINY)
@pytest.mark.parametrize("init", ["none", "abs", "signature", "sign-frozen"])
@pytest.mark.parametrize("activation", ["keep", "monotone"])
def test_what_is_certified_is_the_network_itself(family, init, activation):
    """The float64 copy computes what the model computes, and its Jacobian is that of finite differences."""
    specimen = Scratch(architecture=family).load()
    if init != "none":
        Constrain(init=init, activation=activation).apply(specimen)
    for ffn in ffns(specimen.model, towers=True):
        f, jacobian, stream = computed(ffn)
        x = torch.randn(2, len(stream), generator=torch.Generator().manual_seed(3))
        module = ffn(x).detach()
        assert torch.allclose(module.double(), f(x.double()), atol=1e-5)
        wide, step = x.double(), 1e-6
        for i in (0, 5):
            shift = step * torch.eye(len(stream), dtype=torch.float64)[i]
            slope = (f(wide + shift) - f(wide - shift)) / (2 * step)
            assert torch.allclose(jacobian(wide)[..., i], slope, atol=1e-5)


@pytest.mark.parametrize("family", packaged.TINY)
def test_an_ffn_is_what_the_layer_runs(family):
    model = Scratch(architecture=family).load().model
    for ffn in ffns(model, towers=True):
        if type(ffn.owner).__name__.endswith("DecoderLayer"):
            continue  # OPT has no module of its own for it
        seen = {}
        hook = ffn.owner.register_forward_hook(lambda m, given, out, seen=seen: seen.update(x=given[0], y=out))
        more = {"pixel_values": None} if hasattr(model.config, "vision_config") else {}
        model(**ids_for(model), **{k: v for k, v in more.items() if v is not None})
        hook.remove()
        if seen:  # a vision tower sees no text
            assert torch.allclose(ffn(seen["x"]), seen["y"], atol=1e-6)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("form", ["softplus", "exponential", "projected"])
def test_training_never_leaves_the_constraint_and_moves_within_it(family, form):
    specimen = Scratch(architecture=family).load()
    Constrain(init="signature", form=form).apply(specimen)
    before = {name: module.weight.detach().clone() for name, module, _ in held(specimen.model)}
    facts = Heal(**HOW).pin().apply(specimen)
    assert facts["moved"] > 0.35  # a vision tower learns nothing from text
    for name, module, how in held(specimen.model):
        pattern = how.pattern()
        assert (module.weight * pattern >= 0).all()
        assert not torch.equal(module.weight, before[name])
    rows = Monotonicity(documents=2, tokens=24, pairs=8, points=1).pin()
    said = rows.summarise(rows.read(specimen, rows.items(specimen)))
    weights = sum(module.weight.numel() for _, module, _ in held(specimen.model))
    towers = {ffn.tower for ffn in ffns(specimen.model)}
    assert said["wrong"] == 0 and (len(towers) > 1 or said["checked"] == weights)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-qwen2", "tiny-t5"])
def test_monotone_activations_and_signs_leave_no_violation_and_each_alone_may(family):
    measure = Monotonicity(documents=2, tokens=40, pairs=32, needed=False).pin()

    def said(**options):
        specimen = Scratch(architecture=family).load()
        if options:
            Constrain(**options).apply(specimen)
        return measure.summarise(measure.read(specimen, measure.items(specimen)))

    for init in ("abs", "clamp", "signature"):
        found = said(init=init, activation="monotone")
        assert all(found[f"{n}_{k}"] == 0 for n in ("pairs", "coordinates", "jacobian") for k in ("reached", "random"))
    free_of = said()
    assert free_of["checked"] == 0 and free_of["pairs_reached"] == 1 and 0.4 < free_of["jacobian_random"] < 0.6
    frozen = said(init="sign-frozen", activation="monotone")  # held, but to no structure: nothing is promised of it
    assert frozen["constrained"] == 0 and frozen["pairs_reached"] == 1


def test_one_wrong_weight_is_found_and_no_checked_weight_is_a_failure():
    specimen = Scratch(architecture="tiny-llama").load()
    measure = Monotonicity(documents=1, tokens=16, pairs=4, points=1).pin()
    with pytest.raises(ValueError, match="no weight of any feed-forward network is constrained"):
        measure.read(specimen, measure.items(specimen))
    Constrain(init="clamp", form="projected").apply(specimen)
    with torch.no_grad():
        free(ffns(specimen.model)[1].out)[3, 4] = -0.25
    rows = measure.read(specimen, measure.items(specimen))
    assert [row["wrong"] for row in rows] == [0, 1] and rows[1]["least"] == -0.25
    with torch.no_grad():
        free(ffns(specimen.model)[0].into)[0, 0] = math.nan
    assert measure.read(specimen, measure.items(specimen))[0]["wrong"] == 1


def test_sign_frozen_changes_nothing_and_keeps_every_sign_through_training():
    specimen = Scratch(architecture="tiny-gpt2").load()
    before = {name: p.detach().clone() for name, p in specimen.model.named_parameters()}
    facts = Constrain(init="sign-frozen", form="projected").apply(specimen)
    assert facts["retained"] == 1 and facts["relative"] == 0
    Heal(**HOW).pin().apply(specimen)
    for name, module, _ in held(specimen.model):
        was, now = before[f"{name}.weight"], module.weight
        assert (now * was >= 0).all() and not torch.equal(now, was)


def test_clamp_keeps_half_and_signature_more_and_abs_is_four_times_as_far():
    found = {
        init: Constrain(init=init).apply(Scratch(architecture="tiny-gpt-neox").load())
        for init in ("abs", "clamp", "signature")
    }
    assert found["clamp"]["relative"] ** 2 == pytest.approx(0.5, abs=0.02)
    assert found["abs"]["relative"] ** 2 == pytest.approx(2.0, abs=0.08)
    assert found["signature"]["retained"] > found["clamp"]["retained"] + 0.05
    assert found["signature"]["retained"] == pytest.approx(1 - found["signature"]["relative"] ** 2, abs=1e-3)


def test_bfloat16_v_moves_because_its_master_is_float32_and_what_rounds_away_stops_the_run():
    specimen = Scratch(architecture="tiny-llama", dtype="bfloat16").load()
    Constrain().apply(specimen)
    start = {name: free(module).detach().clone() for name, module, _ in held(specimen.model)}
    Heal(**{**HOW, "lr": 5e-5}).pin().apply(specimen)
    moved = torch.cat([(free(m) != start[n]).float().flatten() for n, m, _ in held(specimen.model)]).mean()
    assert moved > 0.99  # every V, by updates that bfloat16 would have swallowed: its numbers are 0.0156 apart there
    swallowed = torch.cat(
        [(free(m).bfloat16() != start[n].bfloat16()).float().flatten() for n, m, _ in held(specimen.model)]
    )
    assert swallowed.mean() < 0.2
    plain = Scratch(architecture="tiny-llama", dtype="bfloat16").load()
    with pytest.raises(
        Stopped, match=r"of the weights have moved after 6 steps, and at least 0\.001 were to: .*held in bfloat16"
    ):
        Heal(**{**HOW, "lr": 1e-9}).pin().apply(plain)


def test_annealing_begins_at_the_teacher_and_ends_within_the_constraint(tmp_path):
    subject = Trial(subject=Scratch())
    annealed = subject >> Constrain() >> Heal(**HOW, teacher=subject, anneal=1.0)
    lab = Lab(tmp_path)
    lab.read([annealed], [Monotonicity(documents=1, tokens=16, pairs=4, points=1)])
    states = lab.open().index.states
    (of_last,) = [s["ledger"] for s in states.values() if len(s["ledger"]) == 3]
    plain = Scratch().load()
    first = Heal(**HOW).pin().apply(plain)["curve"][0]["loss"]
    assert of_last[-1]["facts"]["curve"][0]["loss"] == pytest.approx(first, abs=1e-5)
    reading = next(iter(lab.open().index.seals.values()))
    assert reading.summary["wrong"] == 0 and reading.summary["checked"] > 0


def test_a_model_has_nothing_to_learn_from_itself():
    specimen = Scratch().load()
    specimen.bring = lambda trial: Scratch().load()
    facts = Heal(**HOW, teacher=Trial(subject=Scratch()), distil=1.0).pin().apply(specimen)
    assert facts["curve"][0]["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distil": 0.5}, "a teacher is needed"),
        ({"teacher": Trial(subject=Scratch())}, "a teacher is needed"),
    ],
)
def test_teachers_without_a_use_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Heal(**options)


def test_nothing_to_anneal_is_refused():
    specimen = Scratch().load()
    specimen.bring = lambda trial: Scratch().load()
    with pytest.raises(ValueError, match="this model has none: constrain it first"):
        Heal(**HOW, teacher=Trial(subject=Scratch()), anneal=0.5).pin().apply(specimen)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_an_exported_model_is_plain_and_says_the_same(family):
    specimen = Scratch(architecture=family).load()
    Constrain(init="signature").apply(specimen)
    with torch.no_grad():
        before = specimen.model(**ids_for(specimen.model)).logits
        materialise(specimen.model)
        after = specimen.model(**ids_for(specimen.model)).logits
    assert torch.equal(before, after)
    assert not [n for n, _ in specimen.model.named_parameters() if "parametrizations" in n]


def test_a_changed_activation_has_no_plain_form():
    specimen = Scratch().load()
    Constrain(activation="monotone").apply(specimen)
    with pytest.raises(ValueError, match="no monotone activation"):
        materialise(specimen.model)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-decoder"])
@pytest.mark.parametrize("activation", ["keep", "monotone"])
def test_a_constrained_model_arranged_for_inference_says_what_it_says(family, activation):
    from lesion.inference import inference

    specimen = Scratch(architecture=family).load()
    Constrain(init="signature", activation=activation).apply(specimen)
    with torch.no_grad():
        before = specimen.model(input_ids=torch.arange(40)[None]).logits
    with inference(specimen.model):
        inside = specimen.model(input_ids=torch.arange(40)[None]).logits
    assert torch.allclose(before, inside, atol=1e-5)
    assert all(signed(module) is not None for _, module, _ in held(specimen.model))


def test_a_matched_control_has_the_loss_it_was_to_have(lab):
    good = Trial(subject=Scratch()) >> Heal(**HOW)
    bad = Trial(subject=Scratch())
    to = Reading(trial=bad, measure=LOSS)
    matched = good >> MatchLoss(to=to, step=Noise(site="all", sigma=0.2, seed=1), within=0.02)
    table = lab.read([bad, good, matched], [LOSS])
    assert len(table) == 6
    store = lab.open()
    facts = store.index.states[matched.pin().key]["ledger"][-1]["facts"]
    assert abs(facts["nll"] - facts["target"]) <= 0.02 and facts["dose"] > 0
    here, there = (store.index.seals[Reading(trial=t.pin(), measure=LOSS).key].summary["nll"] for t in (matched, bad))
    assert abs(here - there) <= 0.02
    with pytest.raises(ValueError, match="only a better model can be matched to a worse one"):
        backwards = MatchLoss(to=Reading(trial=good, measure=LOSS), step=Noise(site="all", sigma=0.2)).pin()
        bench = Bench(Scratch().load())
        bench.specimen.recall = lambda reading: list(store.rows([reading.pin().key]))
        bench.apply(backwards)


def test_the_best_candidate_is_chosen_and_is_that_candidate(lab):
    start = Trial(subject=Scratch()) >> Constrain(init="clamp")
    tried = [start >> Heal(**{**HOW, "lr": rate}) for rate in (1e-6, 1e-2)]
    chosen = Trial(subject=Scratch()) >> Choose(candidates=tuple(Reading(trial=t, measure=LOSS) for t in tried))
    lab.read([chosen], [LOSS, Monotonicity(documents=1, tokens=16, pairs=4, points=1)])
    states = lab.open().index.states
    ledger = states[chosen.pin().key]["ledger"]
    assert ledger[-1]["facts"]["chosen"] == 1
    assert ledger[-1]["after"] == states[tried[1].pin().key]["ledger"][-1]["after"]


@pytest.mark.parametrize("diverges", [True, False])
def test_a_candidate_that_diverged_is_passed_over_and_one_that_failed_otherwise_is_no_choice(
    lab, monkeypatch, diverges
):
    from lesion.fit import Stopped

    tried = [Trial(subject=Scratch()) >> Heal(**{**HOW, "lr": rate}) for rate in (1e-3, 1e-2)]
    chosen = Trial(subject=Scratch()) >> Choose(candidates=tuple(Reading(trial=t, measure=LOSS) for t in tried))
    heal = Heal.apply

    def apply(self, specimen):
        if self.lr == 1e-2:
            raise Stopped("loss inf at step 3") if diverges else torch.OutOfMemoryError("no room")
        return heal(self, specimen)

    monkeypatch.setattr(Heal, "apply", apply)
    store = lab.take([Reading(trial=chosen, measure=LOSS).pin()])
    state = store.index.states.get(chosen.pin().key)
    if diverges:
        assert state["ledger"][-1]["facts"]["values"][1] is None and state["ledger"][-1]["facts"]["chosen"] == 0
    else:
        assert state is None and "no room" in store.index.failures[chosen.pin().key]["error"]


def test_candidates_that_differ_in_kind_are_refused():
    one, other = Trial(subject=Scratch()), Trial(subject=Scratch()) >> Constrain()
    with pytest.raises(ValueError, match="the same kinds of steps"):
        Choose(candidates=tuple(Reading(trial=t, measure=LOSS) for t in (one, other)))


def test_tau_is_scipys_and_a_planted_order_is_seen():
    from scipy.stats import kendalltau

    drawn = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)).numpy()
    assert all(
        t == pytest.approx(kendalltau(range(5), row).statistic) for t, row in zip(tau(drawn), drawn, strict=True)
    )
    specimen = Scratch().load()
    rows = Order(directions=20).read(specimen, Order().items(specimen))
    assert {row["item"].split("/")[0] for row in rows} and all(
        -1 <= row["tau"] <= 1 and 0 < row["p"] <= 1 for row in rows
    )


def test_weights_of_a_network_are_read_in_one_orientation():
    llama, gpt2 = (ffns(Scratch(architecture=f).load().model)[0] for f in ("tiny-llama", "tiny-gpt2"))
    assert oriented(llama.into).shape == (96, 64) and oriented(gpt2.into).shape == (256, 64)
    assert oriented(gpt2.out).shape == (64, 256)
