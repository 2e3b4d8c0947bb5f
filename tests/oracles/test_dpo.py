"""Direct preference optimisation: its loss against the formula and trl's, both sides of its gradient, its reference, and resuming."""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from lesion import Lab, preferring
from lesion.loss import IGNORE
from lesion.measures import Preference
from lesion.steps import Dpo, Lora
from lesion.steps.dpo import log_probabilities_of
from lesion.subjects import Scratch
from lesion.trial import Trial, Unfinished
from words import TestPairs

HOW = {"task": TestPairs(), "steps": 6, "batch": 2, "length": 64, "lr": 1e-2, "warmup": 1}
PAIRS = [([5, 6, 7], [8, 9, 257], [10, 257]), ([11], [12, 257], [13, 14, 15, 257]), ([16, 17], [18, 257], [19, 257])]
FAMILIES = ["tiny-llama", "tiny-gpt2", "tiny-gemma3-text", "tiny-opt", "tiny-decoder"]


def load(family="tiny-llama", seed=0):
    return Scratch(architecture=family, seed=seed).load()


def naive(model, prompt, reply):
    """Σ ln p(reply | prompt) in float64, one token after the other."""
    total = 0.0
    for i, token in enumerate(reply):
        logits = model(input_ids=torch.tensor([[*prompt, *reply[:i]]])).logits[0, -1].double()
        total = total + logits.log_softmax(-1)[token]
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("average", [False, True])
def test_log_probabilities_are_those_of_each_reply_alone(family, average):
    model = load(family).model.double()
    with torch.no_grad():
        found = log_probabilities_of(model, PAIRS, average, False, 2)
        for (prompt, *both), values in zip(PAIRS, found, strict=True):
            for reply, value in zip(both, values, strict=True):
                assert value == pytest.approx(
                    float(naive(model, prompt, reply)) / (len(reply) if average else 1), rel=1e-5
                )


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.0), (0.3, 0.2)])
def test_the_loss_is_the_formula_and_both_sides_have_a_gradient(beta, smoothing):
    model, other = load(seed=1).model.double(), load(seed=2).model.double()
    reference = log_probabilities_of(other, PAIRS, False, False, 3)
    batch = preferring.collate([(*pair, *r) for pair, r in zip(PAIRS, reference, strict=True)])
    loss = preferring.Preference(beta, smoothing, False).total(model, *batch)
    by_hand = 0.0
    for (prompt, better, worse), (rb, rw) in zip(PAIRS, reference, strict=True):
        z = beta * ((naive(model, prompt, better) - rb) - (naive(model, prompt, worse) - rw))
        by_hand = by_hand - (1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-6)
    p = model.model.layers[0].mlp.up_proj.weight
    ours, theirs = (torch.autograd.grad(x, p)[0] for x in (loss, by_hand))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-8)
    # each side alone: with the gradient of the other one cut it is another gradient, and none is zero
    sides = []
    for side in (0, 1):
        ids, targets, _, at, _ = batch
        found = preferring.log_probabilities(model, ids[:, side], targets[:, side], at[:, side], False)
        sides.append(torch.autograd.grad(found.sum(), p)[0])
    assert all(float(side.norm()) > 1e-3 for side in sides) and not torch.allclose(*sides)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-opt"])
def test_at_the_reference_the_loss_is_ln_2(family, kind):
    """Also where the model has dropout, which the reference was read without, and where it is held in sixteen bits."""
    specimen = load(family)
    specimen.model.to(kind)
    facts = Dpo(**HOW).pin().apply(specimen)
    assert facts["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert facts["loss"] < math.log(2) and facts["examples"] == 5
    assert {p.dtype for p in specimen.model.parameters()} == {kind}


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2"])
def test_in_bfloat16_the_reference_is_read_by_the_products_that_train(family):
    """One pair at a time, so that nothing else differs: with the kernels of inference this was ln 2 to two digits."""
    facts = Dpo(**{**HOW, "batch": 1}, beta=1.0, precision="bfloat16").pin().apply(load(family))
    assert facts["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-9)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-decoder"])
def test_activations_are_computed_twice_where_that_is_asked_for(family, monkeypatch):
    """Without dropout a model is not in training, and transformers would keep what its layers compute."""
    passes, weights = [], []
    for recompute in (False, True):
        specimen = load(family)
        layer = next(m for m in specimen.model.modules() if isinstance(m, GradientCheckpointingLayer))
        inner = next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm) or "RMSNorm" in type(m).__name__)
        seen: list[bool] = []
        inner.register_forward_pre_hook(lambda m, _, seen=seen: seen.append(torch.is_grad_enabled()))
        Dpo(**{**HOW, "eval_every": 2}, recompute=recompute).pin().apply(specimen)
        passes.append(sum(seen))
        weights.append([p.detach().clone() for p in specimen.model.parameters()])
        assert not specimen.model.is_activation_checkpointing and layer.training == specimen.model.training
    assert passes == [6, 12] and all(map(torch.equal, *weights))


def test_a_layer_with_dropout_of_its_own_is_not_computed_twice():
    with pytest.raises(ValueError, match="OPTDecoderLayer drops out by itself, and here nothing may: recompute=False"):
        Dpo(**HOW, recompute=True).pin().apply(load("tiny-opt"))


def test_only_pairs_that_are_trained_on_are_read_before(monkeypatch):
    read = []

    def counting(model, pairs, *more):
        read.append(len(pairs))
        return log_probabilities_of(model, pairs, *more)

    monkeypatch.setattr("lesion.steps.dpo.log_probabilities_of", counting)
    facts = Dpo(**{**HOW, "steps": 3, "batch": 1, "eval_every": 1}).pin().apply(load())
    assert (
        read == [3 + 3] and facts["examples"] == 5 and math.isfinite(facts["loss"]) and math.isfinite(facts["held_out"])
    )


def test_the_loss_is_that_of_trl():
    trl = pytest.importorskip("trl")
    model, other = load(seed=1).model, load(seed=2).model
    reference = log_probabilities_of(other, PAIRS, False, False, 3)
    batch = preferring.collate([(*pair, *r) for pair, r in zip(PAIRS, reference, strict=True)])
    ids, targets = (torch.cat((x[:, 0], x[:, 1])) for x in batch[:2])
    scored = targets != IGNORE
    last = torch.where(scored, torch.arange(ids.shape[1]), 0).max(1).values + 1
    ids = torch.cat((ids, torch.zeros_like(ids[:, :1])), 1)  # theirs shifts by itself, so the last target is an input
    mask, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row in range(len(ids)):
        ids[row, int(last[row])] = targets[row, int(last[row]) - 1]
        mask[row, : int(last[row]) + 1] = 1
        completion[row, 1:] = scored[row]
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    inputs |= {f"ref_{name}_logps": batch[4][:, i].float() for i, name in enumerate(("chosen", "rejected"))}

    def wrapped(input_ids, attention_mask, labels, **_):
        """A model as theirs is patched: log-probabilities of the targets, and what they log."""
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
        kept = labels[:, 1:]
        each = logits.log_softmax(-1).gather(2, kept.clamp(min=0)[..., None])[..., 0] * (kept != IGNORE)
        return SimpleNamespace(log_probs=each, entropy=each * 0, mean_logits=each * 0, is_top1=each > 0)

    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=0.3,
        use_weighting=False,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    theirs = trl.DPOTrainer._compute_loss(trainer, wrapped, inputs, False)
    ours = preferring.Preference(0.3, 0.0, False).total(model, *batch) / len(PAIRS)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    p = model.model.layers[0].mlp.up_proj.weight
    mine, other_one = (torch.autograd.grad(x, p)[0] for x in (ours, theirs))
    assert torch.allclose(mine, other_one, atol=1e-6, rtol=1e-4)


def test_with_adapters_the_reference_is_the_model_with_them_and_nothing_else_moves():
    specimen = load()
    Lora(rank=2).apply(specimen)
    frozen = {n: p.detach().clone() for n, p in specimen.model.named_parameters() if not p.requires_grad}
    facts = Dpo(**HOW).pin().apply(specimen)
    assert (
        facts["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and facts["loss"] < facts["curve"][0]["loss"]
    )
    assert all(torch.equal(p, frozen[n]) for n, p in specimen.model.named_parameters() if n in frozen)


def test_margins_grow_where_it_was_trained_and_the_divergence_with_them(lab):
    start = Trial(subject=Scratch())
    trained = start >> Dpo(**{**HOW, "steps": 40}, beta=0.1)
    measure = Preference(task=TestPairs(), part="train", reference=start)
    rows = lab.read([start, trained], [measure])
    first, after = (
        rows.filter(rows["trial"] == str(t.pin())) if "trial" in rows.columns else None for t in (start, trained)
    )
    if first is None:
        first, after = rows[:5], rows[5:]
    assert first["margin"].to_list() == [0.0] * 5 and first["kl"].to_list() == [0.0] * 5
    assert after["correct"].all() and (after["kl"] > 0).all() and (after["margin"] > 0.5).all()


def test_the_measure_is_the_formula():
    one, other = load(seed=1), load(seed=2)
    one.bring = lambda _: other
    measure = Preference(task=TestPairs(), part="train", chat="plain", reference=Trial(subject=Scratch(seed=2)))
    row = measure.read(one, ["pair/0"])[0]
    tokens = [one.tokenizer(t)["input_ids"] for t in ("Say 0:", " I say 0", " no")]
    better, worse = ([*reply, 257] for reply in tokens[1:])
    with torch.no_grad():
        for model, suffix in ((one.model, ""), (other.model, "_before")):
            for name, reply in (("better", better), ("worse", worse)):
                assert row[name + suffix] == pytest.approx(float(naive(model, tokens[0], reply)), rel=1e-5)
        total, count = 0.0, 0
        for reply in (better, worse):
            ids = torch.tensor([[*tokens[0], *reply]])
            p, q = (
                m.model(input_ids=ids).logits[0, len(tokens[0]) - 1 : -1].double().log_softmax(-1) for m in (one, other)
            )
            total += float((p.exp() * (p - q)).sum())
            count += len(reply)
    assert row["kl"] == pytest.approx(total / count, rel=1e-4)
    assert row["margin"] == pytest.approx(row["better"] - row["better_before"] - row["worse"] + row["worse_before"])


def test_the_reference_is_computed_once_and_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    plain, killed = load(), load()
    plain.place, killed.place = tmp_path / "plain", tmp_path / "killed"
    how = Dpo(**{**HOW, "save_every": 2}).pin()
    how.apply(plain)

    def tell(what, step=0, **_):
        if step == 4:
            raise Unfinished("now")

    killed.tell = tell
    with pytest.raises(Unfinished):
        how.apply(killed)
    there = (tmp_path / "killed" / "reference.json").read_bytes()
    again = load()
    again.place = tmp_path / "killed"
    monkeypatch.setattr("lesion.steps.dpo.log_probabilities_of", lambda *_: pytest.fail("computed again"))
    how.apply(again)
    assert (tmp_path / "killed" / "reference.json").read_bytes() == there
    assert len(json.loads(there)["reference"]) == 5
    for (n, a), (_, b) in zip(plain.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), n


def test_pairs_that_are_the_same_after_the_cut_are_none():
    specimen = load()
    rows = Preference(task=TestPairs(), part="train", cut=1, length=64).read(specimen, ["pair/0", "pair/1"])
    assert {row["outcome"] for row in rows} <= {"read", "the same after the cut"}
    assert preferring.differ(([1], [2], [3])) and not preferring.differ(([1], [2], [2]))


def test_wrong_pairs_are_refused():
    from words import TestSums

    with pytest.raises(ValueError, match="is no pair of replies with the better one first"):
        Dpo(**{**HOW, "task": TestSums()}).apply(load())
    with pytest.raises(ValueError, match="no pair of 'test-pairs' to train with fits into 4 tokens"):
        Dpo(**{**HOW, "length": 4}).apply(load())
    with pytest.raises(ValueError, match="encoder-decoder"):
        Dpo(**HOW).apply(load("tiny-t5"))
    with pytest.raises(ValueError, match="documents='apart'"):
        Dpo(**HOW, documents="joined")


def test_a_split_step_is_the_same_step():
    whole, parts = load(), load()
    a = Dpo(**{**HOW, "steps": 2, "batch": 4}).apply(whole)
    b = Dpo(**{**HOW, "steps": 2, "batch": 4}, split=2).apply(parts)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_a_lab_keeps_what_was_preferred(lab):
    assert isinstance(lab, Lab)
    trial = Trial(subject=Scratch()) >> Dpo(**HOW, eval_every=3)
    lab.read([trial], [Preference(task=TestPairs())])
    assert lab.read([trial], [Preference(task=TestPairs())]).height == 3
