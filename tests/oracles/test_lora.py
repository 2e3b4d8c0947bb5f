"""Low-rank adapters: against peft's own wrapping, float64, and what must not move while they are trained."""

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lesion import Lab, cli, packaged
from lesion.adapters import adapted, begin, parts, unwrap, wrap
from lesion.coded import coded, encode
from lesion.digest import digests, named_tensors
from lesion.ffn import ffns, is_turned, oriented
from lesion.fit import Training, fit
from lesion.inference import inference
from lesion.lab import product
from lesion.measures import Perplexity
from lesion.packing import pack
from lesion.products import fast_products
from lesion.sites import matrices, resolve
from lesion.steps import Constrain, Heal, Lora, Merge, Noise, Precision
from lesion.steps.heal import lift
from lesion.subjects import Scratch
from lesion.trial import Trial
from lesion.walk import Walk
from words import TestNorms

pytest.importorskip("bitsandbytes")
FAMILIES = ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-t5", "tiny-decoder"]
HOW = Training(steps=12, batch=4, length=24, warmup=2, save_every=4, lr=1e-2, precision="float32", seed=3)
HEAL = Heal(steps=6, batch=2, length=32, warmup=1, lr=0.02, skip=3, save_every=2).pin()


def load(family, **fields):
    return Scratch(architecture=family, **fields).load()


def ids_for(model):
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def logits(model):
    with torch.no_grad():
        return model(**ids_for(model)).logits


def learned(model, seed=4):
    """B as if something had been learned."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in adapted(model):
            b = parts(module)[1]
            b.copy_(torch.randn(b.shape, generator=source) * 0.02)


def data(seed=0):
    rng = np.random.default_rng(5)
    return pack([np.cumsum(rng.integers(0, 3, rng.integers(5, 40))) % 60 + 1 for _ in range(60)], 0, HOW.length, seed)


class Killed(Exception):
    pass


def kill_at(at):
    def tell(what, step, **told):
        if step == at:
            raise Killed

    return tell


# ---------------------------------------------------------------------- what is computed


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning"
)  # of peft's, which asks transformers for it
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["float32", "nf4", "int8"])
def test_outputs_and_gradients_are_those_of_peft_on_the_same_a_and_b(family, kind):
    ours = load(family)
    if kind != "float32":
        encode(ours.model, kind)
    theirs = copy.deepcopy(ours.model)
    Lora(rank=4, alpha=6.0, seed=1).apply(ours)
    learned(ours.model)
    modules = dict(adapted(ours.model))
    turned = any(is_turned(module.base_layer) for module in modules.values())
    peft = importlib.import_module("peft")
    how = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=list(modules), fan_in_fan_out=turned)
    wrapped = peft.get_peft_model(theirs, how)
    here, there = dict(ours.model.named_parameters()), dict(theirs.named_parameters())
    assert here.keys() == there.keys(), "and tensors are called as peft calls them"
    with torch.no_grad():
        for name, p in there.items():
            p.copy_(here[name])
    found = []
    for model in (ours.model, wrapped):
        out = model(**ids_for(ours.model)).logits
        out.square().mean().backward()
        found.append(out.detach())
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)
    for name, p in here.items():
        assert p.requires_grad == there[name].requires_grad == ("lora_" in name), name
        assert (p.grad is None) == ("lora_" not in name)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, there[name].grad, atol=1e-6, rtol=1e-5)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in here.values())


@pytest.mark.parametrize("family", packaged.TINY)
def test_an_adapter_that_has_learned_nothing_changes_no_logit(family):
    specimen = load(family)
    before, random = logits(specimen.model), torch.random.get_rng_state()
    facts = Lora(rank=3).apply(specimen)
    assert torch.equal(logits(specimen.model), before)
    assert torch.equal(torch.random.get_rng_state(), random), "nobody else's random numbers are touched"
    trained = {n: p for n, p in specimen.model.named_parameters() if p.requires_grad}
    assert facts["trainable"] == sum(p.numel() for p in trained.values()) and facts["modules"] * 2 == len(trained)
    assert facts["share"] == facts["trainable"] / sum(p.numel() for p in specimen.model.parameters())
    assert type(specimen.model) is type(load(family).model) and not hasattr(specimen.model, "peft_config")


def test_a_depends_on_the_seed_and_the_matrix_alone_and_follows_kaimings_law():
    drawn = []
    for site, seed in (("attention+mlp", 1), ("mlp", 1), ("attention+mlp", 2)):
        specimen = load("tiny-llama")
        Lora(site=site, rank=8, seed=seed).apply(specimen)
        drawn.append({name: parts(module)[0].detach() for name, module in adapted(specimen.model)})
    first, fewer, other = drawn
    assert fewer.keys() < first.keys() and all(torch.equal(a, first[name]) for name, a in fewer.items())
    assert not any(torch.equal(a, other[name]) for name, a in first.items())
    assert len({a.flatten()[0].item() for a in first.values()}) == len(first)
    for a in first.values():
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound and a.abs().max() > 0.97 * bound
        assert abs(float(a.mean())) < 0.1 * bound and float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2"])
def test_arrangements_for_speed_compute_the_same_with_adapters(family):
    specimen = load(family)
    Lora(rank=4).apply(specimen)
    learned(specimen.model)
    plain = logits(specimen.model)
    for arranged in (inference, fast_products):
        with arranged(specimen.model):
            assert not any("forward" in module.__dict__ for _, module in adapted(specimen.model))
            torch.testing.assert_close(logits(specimen.model), plain, atol=1e-5, rtol=1e-4)


def test_adapters_are_float32_beside_whatever_is_there():
    specimen = load("tiny-llama", dtype="bfloat16")
    before = digests(specimen.model)
    Lora(rank=4).apply(specimen)
    assert {p.dtype for _, module in adapted(specimen.model) for p in parts(module)[:2]} == {torch.float32}
    assert logits(specimen.model).dtype == torch.bfloat16
    HEAL.apply(specimen)
    after = {n.replace(".base_layer", ""): d for n, d in digests(specimen.model).items() if "lora_" not in n}
    assert after == before, "the base has come back in its type, bit for bit"
    facts = Merge().apply(specimen)
    assert {p.dtype for p in specimen.model.parameters()} == {torch.bfloat16} and facts["relative"] > 0


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize("family", packaged.TINY)
def test_merged_is_unmerged_and_a_plain_model_again(family):
    specimen, plain = load(family), load(family)
    Lora(rank=4, alpha=6.0).apply(specimen)
    learned(specimen.model)
    before, wanted = logits(specimen.model), {}
    for name, module in adapted(specimen.model):
        a, b, scale = parts(module)
        assert scale == 1.5
        wanted[name] = (oriented(module.base_layer).double() + scale * b.double() @ a.double()).detach()
    facts = Merge().apply(specimen)
    torch.testing.assert_close(logits(specimen.model), before, atol=1e-5, rtol=1e-5)
    here, there = dict(named_tensors(specimen.model)), dict(named_tensors(plain.model))
    assert list(here) == list(there) and all(p.requires_grad for p in specimen.model.parameters())
    for name, exact in wanted.items():
        module = specimen.model.get_submodule(name)
        assert type(module) is type(plain.model.get_submodule(name))
        torch.testing.assert_close(oriented(module).double(), exact, atol=1e-6, rtol=1e-6)
    assert [n for n in here if not torch.equal(here[n], there[n])] == [
        n for n in here if n.removesuffix(".weight") in wanted
    ]
    bases = {name: oriented(plain.model.get_submodule(name)).detach().double() for name in wanted}
    square = sum(float(base.square().sum()) for base in bases.values())
    moved = sum(float((exact - bases[name]).square().sum()) for name, exact in wanted.items())
    assert facts["relative"] == pytest.approx((moved / square) ** 0.5, rel=1e-4)
    assert resolve(specimen.model, "all") and not list(adapted(specimen.model))


# ---------------------------------------------------------------------- sentences


def again(lab, trial):
    told = []
    specimen = Walk(lab.open(), tell=lambda what, **_: told.append(what)).materialise(trial)
    assert "step" not in told, "nothing is made again"
    return specimen


@pytest.mark.parametrize(
    ("family", "first"),
    [("tiny-llama", None), ("tiny-gpt2", "bfloat16"), ("tiny-gpt-neox", "nf4"), ("tiny-decoder", "int8")],
)
def test_states_come_back_bit_for_bit_through_training_and_merging(lab, tmp_path, family, first):
    """What is loaded from disk is what another lab holds in memory when it makes it."""
    start = Trial(subject=Scratch(architecture=family)) >> Noise(site="mlp", sigma=0.2, seed=3)
    start = start >> Precision(dtype=first) if first else start
    tuned = start >> Lora(rank=4, seed=1) >> HEAL
    trials = [start >> Lora(rank=4, seed=1), tuned]
    trials += [tuned >> Merge(), tuned >> Merge() >> HEAL] if first in (None, "bfloat16") else []
    lab.read([*trials, trials[-1] >> Noise(site="embedding", sigma=0.1)], [TestNorms()])
    other = Walk(Lab(tmp_path / "other").open())
    for trial in trials:
        kept, fresh = again(lab, trial), other.materialise(trial)
        assert kept.digests == fresh.digests == digests(kept.model) and kept.ledger == fresh.ledger
        assert torch.equal(logits(kept.model), logits(fresh.model))
        flags = [{n: p.requires_grad for n, p in s.model.named_parameters()} for s in (kept, fresh)]
        assert flags[0] == flags[1] and any(flags[0].values())
    healed = again(lab, tuned)
    assert all("lora_" in name for name in healed.ledger[-1]["changed"])
    assert healed.ledger[-1]["facts"]["trained"] == healed.ledger[-2]["facts"]["trainable"]
    if len(trials) > 2:
        last = again(lab, trials[-1])
        assert last.ledger[-1]["facts"]["trained"] == sum(p.numel() for p in last.model.parameters())


def test_an_encoder_decoder_keeps_its_adapters_too(lab, tmp_path):
    trial = Scratch(architecture="tiny-t5") >> Precision(dtype="nf4") >> Lora(site="attention+cross", rank=2)
    lab.read([trial], [TestNorms()])
    kept, fresh = again(lab, trial), Walk(Lab(tmp_path / "fresh").open()).materialise(trial)
    assert kept.digests == fresh.digests and len(list(adapted(kept.model))) == 24


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qlora_learns_and_no_code_moves(tmp_path, kind):
    specimen = load("tiny-llama")
    encode(specimen.model, kind)
    Lora(rank=8).apply(specimen)
    before = digests(specimen.model)
    how = HOW.model_copy(update={"steps": 20})
    facts = fit(specimen.model, data(), how, folder=tmp_path)
    rows = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(rows[-3:]) < sum(rows[:3]) - 0.6, "nats in three steps"
    after = digests(specimen.model)
    moved = {name for name in after if after[name] != before[name]}
    assert moved == {name for name in after if "lora_" in name} and len(list(coded(specimen.model))) == 14
    assert facts["trained"] == sum(p.numel() for p in specimen.model.parameters() if p.requires_grad)
    assert 0.9 < facts["moved"] <= 1 and not any(p.grad is not None for p in specimen.model.parameters())


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_killed_and_continued_it_is_as_if_it_had_not_been(tmp_path, kind):
    def fresh():
        specimen = load("tiny-llama")
        if kind != "float32":
            encode(specimen.model, kind)
        Lora(rank=4, dropout=0.2).apply(specimen)
        return specimen.model

    whole = fresh()
    facts = fit(whole, data(), HOW, folder=tmp_path / "whole")
    for at in (1, 5, 11):
        folder = tmp_path / f"torn-{at}"
        with pytest.raises(Killed):
            fit(fresh(), data(), HOW, folder=folder, tell=kill_at(at))
        torch.rand(7)  # whatever the process did before
        model = fresh()
        assert fit(model, data(), HOW, folder=folder) == facts
        assert digests(model) == digests(whole), f"killed at {at}"


def test_checkpoints_hold_what_is_trained_and_belong_to_one_base(tmp_path):
    from safetensors.torch import load_file

    def fresh(seed):
        specimen = load("tiny-llama", seed=seed)
        Lora(rank=4).apply(specimen)
        return specimen.model

    fit(fresh(0), data(), HOW, folder=tmp_path)
    saved = [load_file(path / "model.safetensors") for path in Path(tmp_path).glob("step-*")]
    assert saved and all("lora_" in name for weights in saved for name in weights)
    with pytest.raises(ValueError, match="holds another run"):
        fit(fresh(1), data(), HOW, folder=tmp_path)  # whose A and B are the same


def test_activations_computed_twice_and_autocast_work_with_adapters(tmp_path):
    found = []
    for more in ({}, {"recompute": True}, {"precision": "bfloat16"}):
        specimen = load("tiny-llama")
        encode(specimen.model, "nf4")
        Lora(rank=4).apply(specimen)
        facts = fit(specimen.model, data(), HOW.model_copy(update=more), folder=tmp_path / str(len(found)))
        found.append((digests(specimen.model), facts["loss"]))
    assert found[0][0] == found[1][0] and found[2][1] == pytest.approx(found[0][1], rel=0.02)


# ---------------------------------------------------------------------- addresses, and what is refused


def test_whole_matrices_by_their_sites_fused_ones_as_one():
    gpt2, neox, t5 = (load(name).model for name in ("tiny-gpt2", "tiny-gpt-neox", "tiny-t5"))
    assert matrices(gpt2, "attention@1") == ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]
    assert matrices(neox, "attention@0+mlp.in@0") == [
        "gpt_neox.layers.0.attention.query_key_value",
        "gpt_neox.layers.0.attention.dense",
        "gpt_neox.layers.0.mlp.dense_h_to_4h",
    ]
    assert len(matrices(t5, "cross")) == 8 and len(matrices(t5, "encoder/attention.value")) == 2
    joined = "attention.query@0+attention.key@0+attention.value@0"
    assert matrices(gpt2, joined) == ["transformer.h.0.attn.c_attn"]
    before = matrices(neox, "all")
    encode(neox, "nf4")
    Lora().apply(load("tiny-gpt-neox"))
    assert matrices(neox, "all") == before, "codes have addresses too"


@pytest.mark.parametrize(
    ("family", "site", "says"),
    [
        ("tiny-gpt2", "attention.value", r"a part of transformer.h.0.attn.c_attn, .* such as 'attention'"),
        ("tiny-gpt-neox", "mlp+attention.query", r"a part of gpt_neox.layers.0.attention.query_key_value"),
        ("tiny-llama", "embedding", r"model.embed_tokens is a Embedding, and an adapter stands beside a plain Linear"),
        ("tiny-llama", "all", r"has the head lm_head too"),
        ("tiny-llama", "attention+position", r"no site 'position'"),
        ("tiny-llama", "mlp+norm@0", r"input_layernorm is a LlamaRMSNorm"),
        ("tiny-mistral", "head", r"has the head lm_head too, whose weights are read without calling it"),
        ("tiny-llama", "head", r"has the head lm_head too"),
        ("tiny-llama", "mpl", r"no site 'mpl' in llama; there are: embedding, attention"),
        ("tiny-gemma3", "projector/projection", r"no module of its own"),
    ],
)
def test_what_can_have_no_adapter_is_refused_by_name(family, site, says):
    specimen = load(family)
    before = digests(specimen.model)
    with pytest.raises(ValueError, match=says):
        Lora(site=site).apply(specimen)
    assert digests(specimen.model) == before and all(p.requires_grad for p in specimen.model.parameters())


def test_wrong_orders_are_refused_by_name():
    specimen = load("tiny-llama")
    with pytest.raises(ValueError, match="no adapter to merge; `lora` adds some"):
        Merge().apply(specimen)
    Lora(site="attention").apply(specimen)
    with pytest.raises(ValueError, match="has adapters already, such as that of .*q_proj: `merge` them first"):
        Lora(site="mlp").apply(specimen)
    with pytest.raises(ValueError, match="has an adapter already"):
        wrap(specimen.model, ["model.layers.0.self_attn.q_proj"], 2, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"q_proj is wrapped in a Linear: merge or remove the adapter first"):
        Noise(site="attention", sigma=0.1).touches(specimen)
    Lora(site="mlp").apply(other := load("tiny-llama"))
    with pytest.raises(ValueError, match="merge the adapter first"):
        oriented(ffns(other.model)[0].into)
    held = load("tiny-llama")
    Constrain(site="mlp", init="abs").apply(held)
    Lora(site="attention").apply(held)
    with pytest.raises(ValueError, match="up_proj is held to a sign"):
        unwrap(held.model)
        Lora(site="mlp").apply(held)
    with pytest.raises(ValueError, match="the teacher has an adapter beside .*, which is no part of its matrix"):
        lift(held.model, other.model)
    with pytest.raises(ValueError, match="must not name heads"):
        Lora(site="attention:0")
    with pytest.raises(ValueError, match="greater than 0"):
        Lora(alpha=0.0)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_are_neither_trained_nor_merged_into(tmp_path, kind):
    specimen = load("tiny-llama", dtype="bfloat16")
    encode(specimen.model, kind)
    before = digests(specimen.model)
    with pytest.raises(ValueError, match=f"linear weights are {kind} codes and cannot be trained: add `lora`"):
        fit(specimen.model, data(), HOW, folder=tmp_path)
    assert digests(specimen.model) == before and not any(tmp_path.iterdir()), "before anything is done"
    Lora().apply(specimen)
    with pytest.raises(ValueError, match=f"{kind} codes, to which a merge would round off.*precision dtype=bfloat16"):
        Merge().apply(specimen)
    assert len(list(adapted(specimen.model))) == 14


def test_frozen_weights_are_never_trained_and_a_model_of_them_alone_is_refused(tmp_path):
    specimen = load("tiny-llama")
    specimen.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that can be trained"):
        fit(specimen.model, data(), HOW, folder=tmp_path / "none")
    specimen.model.model.layers[0].requires_grad_(True)
    before = digests(specimen.model)
    facts = fit(specimen.model, data(), HOW, folder=tmp_path / "some")
    after = digests(specimen.model)
    assert all((after[n] != before[n]) == (".layers.0." in n) for n in after)
    assert facts["trained"] == sum(p.numel() for p in specimen.model.model.layers[0].parameters())


def test_an_export_has_its_adapters_merged(lab, tmp_path):
    from transformers import AutoModelForCausalLM

    trial = Scratch(architecture="tiny-llama") >> Lora(rank=4) >> HEAL
    (reading,) = product([trial], [Perplexity(documents=1, tokens=40)])
    lab.take([reading])
    assert cli.run(["export", reading.trial.key, str(tmp_path / "out"), "--lab", str(lab.path)]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kept = again(lab, reading.trial)
    torch.testing.assert_close(logits(model.eval()), logits(kept.model), atol=1e-5, rtol=1e-5)
    Merge().apply(kept)
    assert digests(model) == digests(kept.model)


def test_what_peft_draws_is_not_what_is_used():
    specimen = load("tiny-llama")
    modules = wrap(specimen.model, ["model.layers.0.mlp.up_proj"], 4, 8.0, 0.0)
    begin(modules, 1)
    (module,) = modules.values()
    a, b, scale = parts(module)
    assert (a.shape, b.shape, scale) == ((4, 64), (96, 4), 2.0) and (b == 0).all()
    other = load("tiny-llama")
    torch.rand(5)
    begin(again := wrap(other.model, ["model.layers.0.mlp.up_proj"], 4, 8.0, 0.0), 1)
    assert torch.equal(parts(next(iter(again.values())))[0], a)
