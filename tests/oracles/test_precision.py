"""Weights in sixteen bits and as codes: against bitsandbytes' own layers, against formulas, and against loading in that type."""

import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from lesion import Lab, cli, packaged
from lesion.bench import Bench
from lesion.coded import (
    BLOCK,
    Int8Linear,
    Nf4Linear,
    code_of,
    coded,
    decode_int8,
    decode_nf4,
    encode,
    encode_int8,
    encode_nf4,
    structure,
)
from lesion.constraints import held
from lesion.digest import digests, named_tensors
from lesion.inference import inference
from lesion.lab import product
from lesion.measures import Generation, Perplexity
from lesion.products import fast_products
from lesion.sites import resolve
from lesion.steps import Constrain, Heal, Lora, Noise, Precision
from lesion.steps.precision import types
from lesion.subjects import Directory, Scratch
from lesion.trial import Trial
from lesion.walk import Walk
from words import TestNorms

bitsandbytes = pytest.importorskip("bitsandbytes")
SHAPES = [(64, 64), (64, 96), (96, 64), (5, 3), (3, 130), (7, 11), (1, 1), (32, 48)]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
HEAL = {"steps": 4, "batch": 2, "length": 32, "warmup": 1, "lr": 0.01, "skip": 3}


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids_for(model):
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def logits(model):
    with torch.no_grad():
        return model(**ids_for(model)).logits


def layer(kind, weight, bias=None):
    """One of ours that holds a weight."""
    made = {"nf4": Nf4Linear, "int8": Int8Linear}[kind](*weight.shape, bias, weight)
    made.fill(weight)
    return made


def theirs(kind, weight, bias=None):
    """bitsandbytes' own, as transformers loads it."""
    out, into = weight.shape
    if kind == "nf4":
        made = bitsandbytes.nn.Linear4bit(into, out, bias is not None, compress_statistics=False, quant_type="nf4")
        made.weight = bitsandbytes.nn.Params4bit(
            weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
        )
    else:
        made = bitsandbytes.nn.Linear8bitLt(into, out, bias is not None, has_fp16_weights=False, threshold=6.0)
        made.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = bias
    return made.to("cpu")


# ---------------------------------------------------------------------- codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_codes_are_those_of_bitsandbytes_and_are_read_by_the_formula(shape, dtype):
    """Theirs are read wrongly by their decoder for AVX-512 where a row is no whole number of blocks, so not by it."""
    weight = drawn(*shape, dtype=dtype)
    codes, scales = encode_nf4(weight)
    other, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(codes.view(-1)[: other.numel()], other.view(-1)) and torch.equal(scales, state.absmax)
    quantiles = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    numbers = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1)[: weight.numel()].long()
    exact = (quantiles[numbers] * scales.repeat_interleave(BLOCK)[: weight.numel()]).view(shape)
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(decode_nf4(codes, scales, shape, kind), exact.to(kind))
    gap = (quantiles[1:] - quantiles[:-1]).max() / 2
    room = scales.repeat_interleave(BLOCK)[: weight.numel()].view(shape) * gap
    assert ((exact - weight.float()).abs() <= room * 1.001 + 1e-7).all()


def test_int8_codes_are_rounded_by_the_row_and_zeros_stay_zeros():
    weight = drawn(6, 40)
    weight[2] = 0
    codes, scales = encode_int8(weight)
    half = weight.half().float()
    rows = half.abs().amax(1)
    assert torch.equal(scales, rows) and codes.dtype == torch.int8
    exact = torch.round(half.double() * 127 / rows.double().clamp(min=1e-9)[:, None])
    assert (codes - exact).abs().max() == 0
    assert torch.allclose(decode_int8(codes, scales, torch.float64), exact * rows[:, None] / 127, rtol=1e-6)
    assert (decode_int8(codes, scales, torch.float32)[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_nf4_layers_compute_what_linear4bit_does_in_training(dtype, with_bias):
    weight = drawn(96, 128, dtype=dtype)
    bias = torch.nn.Parameter(drawn(96, seed=1, dtype=dtype)) if with_bias else None
    ours, others = layer("nf4", weight, bias), theirs("nf4", weight, copy.deepcopy(bias)).train()
    assert torch.equal(ours.codes.view(-1), others.weight.data.view(-1))
    x, above = drawn(2, 5, 128, seed=2, dtype=dtype), drawn(2, 5, 96, seed=3, dtype=dtype)
    found = []
    for one in (ours, others):
        given = x.clone().requires_grad_()
        y = one(given)
        y.backward(above)
        found.append((y.detach(), given.grad, *([one.bias.grad] if with_bias else [])))
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.25, "rtol": 0.02}
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
    assert torch.equal(ours.eval()(x), ours.train()(x)), "and the same in evaluation"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_layers_compute_what_linear8bitlt_does_in_evaluation(dtype, with_bias):
    weight = drawn(24, 48, dtype=dtype)
    bias = torch.nn.Parameter(drawn(24, seed=1, dtype=dtype)) if with_bias else None
    ours, others = layer("int8", weight, bias), theirs("int8", weight, copy.deepcopy(bias)).eval()
    x, above = drawn(2, 5, 48, seed=2, dtype=dtype), drawn(2, 5, 24, seed=3, dtype=dtype)
    x[0, 1, 7], x[1, 2, 9], x[1, 4] = 8.0, -30.0, 0.0
    found = []
    for one in (ours, ours.train(), others):
        given = x.clone().requires_grad_()
        y = one(given)
        y.backward(above)
        found.append((y.detach(), given.grad))
    for mode in found[:2]:
        assert all(torch.equal(mine, other) for mine, other in zip(mode, found[2], strict=True))


def test_int8_products_are_those_of_the_formula():
    """In float64: tokens are coded by their largest number without outliers, and outlier columns are multiplied as they are."""
    weight, x = drawn(24, 48), drawn(10, 48, seed=2)
    x[3, 7], x[4, 9] = 8.0, -30.0
    ours = layer("int8", weight)
    outliers = (x.half().abs() >= 6).any(0)
    rest = x.half().double() * ~outliers
    scale = rest.abs().amax(1, keepdim=True)
    tokens = torch.round(rest * 127 / scale) * scale / 127
    exact = (tokens + x.double() * outliers) @ ours.decoded(torch.float64).T
    assert torch.equal(outliers.nonzero().view(-1), torch.tensor([7, 9]))
    torch.testing.assert_close(ours(x).double(), exact, atol=2e-4, rtol=1e-5)
    assert (ours(x) - x @ ours.weight.T).abs().max() > 1e-2, "which is not the product of the decoded weights alone"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_are_products_with_the_decoded_weights_as_often_as_one_likes(kind):
    bias = torch.nn.Parameter(drawn(24, seed=1))
    ours = layer(kind, drawn(24, 48), bias)
    x, above = drawn(2, 5, 48, seed=2).requires_grad_(), drawn(2, 5, 24, seed=3).requires_grad_()
    grad, of_bias = torch.autograd.grad(ours(x), (x, bias), above, create_graph=True)
    torch.testing.assert_close(grad, above @ ours.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(of_bias, above.sum((0, 1)))
    (again,) = torch.autograd.grad(grad, above, x)  # of x ↦ g·Ŵ by g: the weights once more
    torch.testing.assert_close(again, x @ ours.weight.T, atol=1e-5, rtol=1e-5)
    assert not [n for n, _ in ours.named_parameters() if n != "bias"] and not ours.weight.requires_grad


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_autocast_and_changes_of_type_reach_what_is_decoded_and_no_scale(kind):
    ours = layer(kind, drawn(24, 48), torch.nn.Parameter(drawn(24, seed=1)))
    before, x = {n: t.clone() for n, t in named_tensors(ours)}, drawn(2, 5, 48, seed=2)
    x[0, 0, 3] = 7.0  # with an outlier, whose product is another
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    for change, kind_of in ((ours.bfloat16, torch.bfloat16), (ours.double, torch.float64), (ours.float, torch.float32)):
        change()
        assert ours.weight.dtype == ours.held.dtype == kind_of
        for name in ("codes", "scales"):
            assert torch.equal(getattr(ours, name), before[name]) and getattr(ours, name).dtype == before[name].dtype
    with pytest.raises((AttributeError, KeyError)):
        ours.weight = torch.nn.Parameter(drawn(24, 48))


# ---------------------------------------------------------------------- whole models


@pytest.mark.parametrize("family", packaged.TINY)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_all_linear_layers_but_the_head_are_coded_and_the_model_computes_with_the_decoded_ones(family, kind):
    subject = Scratch(architecture=family)
    specimen, plain = subject.load(), subject.load().model
    facts = Precision(dtype=kind).apply(specimen)
    model, found = specimen.model, dict(coded(specimen.model))
    assert facts["matrices"] == len(found) and facts["weights"] == sum(
        m.out_features * m.in_features for m in found.values()
    )
    names = {view.name.removesuffix(".weight") for view in resolve(plain, "attention+mlp")}
    assert names <= found.keys() and "lm_head" not in found and not any("embed" in name for name in found)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    square = error = 0.0
    with torch.no_grad():
        for name, module in found.items():
            turned = plain.get_submodule(name)
            exact = turned.weight.t() if type(turned).__name__ == "Conv1D" else turned.weight
            square += float(exact.double().square().sum())
            error += float((module.weight.double() - exact.double()).square().sum())
            exact.copy_(module.weight)
    assert facts["relative"] == pytest.approx(math.sqrt(error / square), rel=1e-5)
    assert facts["bytes"] < 0.6 * facts["bytes_before"]
    assert facts["bytes"] == sum(t.numel() * t.element_size() for _, t in named_tensors(model))
    if kind == "nf4":
        torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-4)
    else:  # inputs are coded too
        assert 0 < (logits(model) - logits(plain)).norm() / logits(plain).norm() < 0.1


@pytest.mark.parametrize("family", packaged.TINY)
@pytest.mark.parametrize("dtype", HALVES)
def test_sixteen_bits_are_those_of_loading_in_them(family, dtype, tmp_path):
    if family.startswith("tiny-gemma3") and dtype == "float16":
        with pytest.raises(ValueError, match="hidden states of a gemma3.* overflow in float16"):
            Precision(dtype=dtype).apply(Scratch(architecture=family).load())
        return
    specimen = Scratch(architecture=family, seed=1).load()
    specimen.model.save_pretrained(tmp_path)
    specimen.tokenizer.save_pretrained(tmp_path)
    loaded = Directory(path=str(tmp_path), dtype=dtype).load().model
    facts = Precision(dtype=dtype).apply(specimen)
    assert digests(specimen.model) == digests(loaded) and torch.equal(logits(specimen.model), logits(loaded))
    structured = Scratch(architecture=family, dtype=dtype).load().model  # which keeps less in float32: T5's wo
    odd = [n for n, t in named_tensors(structured) if t.dtype != dict(named_tensors(loaded))[n].dtype]
    assert all(name.endswith("wo.weight") for name in odd) and bool(odd) == (family == "tiny-t5" and dtype == "float16")
    assert facts["weights"] == sum(p.numel() for p in loaded.parameters())
    assert 0.49 < facts["bytes"] / facts["bytes_before"] < 0.6
    assert 1e-6 < facts["relative"] < 5e-3


def test_what_was_held_to_a_sign_keeps_its_v_in_float32_or_becomes_codes_of_that_sign():
    specimen = Scratch(architecture="tiny-llama").load()
    Constrain(init="signature").apply(specimen)
    halved, other = copy.deepcopy(specimen), copy.deepcopy(specimen)
    Precision(dtype="bfloat16").apply(halved)
    assert {module.weight.dtype for _, module, _ in held(halved.model)} == {torch.bfloat16}
    assert {t.dtype for n, t in named_tensors(halved.model) if n.endswith(".original")} == {torch.float32}
    Precision(dtype="nf4").apply(other)
    assert not list(held(other.model))
    for name, module, how in held(specimen.model):
        there = other.model.get_submodule(name)
        assert isinstance(there, Nf4Linear) and (there.weight * how.pattern() >= 0).all()
        assert (there.weight - module.weight).norm() < 0.12 * module.weight.norm()


def test_experts_stay_floats_and_their_router_is_coded():
    shape = {**packaged.TINY["tiny-decoder"], "experts": 4, "experts_per_token": 2}
    specimen = Scratch(architecture="lesion-decoder", config=shape).load()
    Precision(dtype="nf4").apply(specimen)
    experts = [m for m in specimen.model.modules() if type(m).__name__ == "Experts"]
    assert experts and all(isinstance(m.gate_up_proj, torch.nn.Parameter) for m in experts)
    assert torch.isfinite(logits(specimen.model)).all()


# ---------------------------------------------------------------------- sentences


def again(lab, trial):
    """A kept state as another process finds it."""
    told = []
    walk = Walk(lab.open(), tell=lambda what, **_: told.append(what))
    specimen = walk.materialise(trial)
    assert "step" not in told, "nothing is made again"
    return specimen


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "nf4"])
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_states_come_back_bit_for_bit_first_in_a_sentence_and_behind_other_steps(lab, tmp_path, family, dtype):
    subject, step = Scratch(architecture=family), Precision(dtype=dtype)
    noise = Noise(site="mlp", sigma=0.3, seed=1)
    trials = [Trial(subject=subject) >> step, subject >> noise >> step]
    trials += [subject >> Heal(**HEAL).pin() >> step] if family != "tiny-t5" else []
    after = [trial >> Noise(site="embedding", sigma=0.1, seed=2) for trial in trials]
    lab.read([*trials, *after], [TestNorms()])
    for trial in trials:
        kept = again(lab, trial)
        fresh = Walk(Lab(tmp_path / trial.key[:8]).open()).materialise(trial)
        assert kept.digests == fresh.digests == digests(kept.model) and kept.ledger == fresh.ledger
        assert torch.equal(logits(kept.model), logits(fresh.model))
        assert {n: p.requires_grad for n, p in kept.model.named_parameters()} == {
            n: p.requires_grad for n, p in fresh.model.named_parameters()
        }
        assert kept.ledger[-1]["facts"]["relative"] > 0
    states = {key: state["ledger"] for key, state in lab.open().index.states.items()}
    for trial in after:
        assert states[trial.key][-1]["changed"] == states[trial.key][-1]["changed"][:1], "the embedding alone"
    assert len({ledger[-1]["after"] for ledger in states.values()}) == len(states)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_coded_model_reads_and_writes_almost_what_the_whole_one_does(lab, dtype):
    subject = Scratch(architecture="tiny-llama")
    table = lab.read(
        [subject, subject >> Precision(dtype=dtype)],
        [Perplexity(documents=2, tokens=60), Generation(prompts=3, new_tokens=5)],
    )
    nll = table.filter(table["measure"] == "perplexity").group_by("trial", maintain_order=True).agg("nll")["nll"]
    assert nll[0].to_list() != nll[1].to_list()
    assert all(abs(a - b) < 0.1 * b for a, b in zip(*nll, strict=True)), "rounded, not ruined"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_arrangements_for_speed_leave_coded_layers_their_own_forward(kind):
    specimen = Scratch(architecture="tiny-llama").load()
    encode(specimen.model, kind)
    plain, layers = logits(specimen.model), [module for _, module in coded(specimen.model)]
    for arranged in (inference, fast_products):
        with arranged(specimen.model):
            assert not any("forward" in module.__dict__ for module in layers)
            assert "forward" in specimen.model.lm_head.__dict__, "and others not"
            torch.testing.assert_close(logits(specimen.model), plain, atol=2e-3, rtol=1e-2)


# ---------------------------------------------------------------------- what is refused


def test_numbers_beyond_float16_are_refused_by_name():
    for dtype, said in (
        ("float16", r"1 numbers of model.layers.1.mlp.up_proj.weight overflow in float16.*65504.*is 70000"),
        ("int8", r"model.layers.1.mlp.up_proj: int8 codes are made by way of float16.*65504; a weight is 70000"),
    ):
        specimen = Scratch(architecture="tiny-llama").load()
        specimen.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 7e4
        with pytest.raises(ValueError, match=said):
            Precision(dtype=dtype).apply(specimen)
    specimen = Scratch(architecture="tiny-llama").load()
    specimen.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 7e4
    assert Precision(dtype="bfloat16").apply(specimen)["relative"] < 5e-3


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_has_no_codes(kind, number):
    specimen = Scratch(architecture="tiny-llama").load()
    specimen.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = number
    with pytest.raises(ValueError, match="up_proj.*(not finite|a weight is inf)"):
        Precision(dtype=kind).apply(specimen)


@pytest.mark.parametrize("first", ["int8", "nf4"])
def test_codes_are_not_coded_again_nor_damaged(first):
    specimen = Scratch(architecture="tiny-llama").load()
    Precision(dtype=first).apply(specimen)
    before = digests(specimen.model)
    for second in ("bfloat16", "float16", "int8", "nf4"):
        with pytest.raises(ValueError, match=f"linear weights of this model are {first} codes already"):
            Precision(dtype=second).apply(specimen)
        with pytest.raises(ValueError, match=f"{first} codes already"):
            Precision(dtype=second).attach(specimen.model)
    for call in (encode, structure):
        with pytest.raises(ValueError, match=f"{first} codes already; nf4 codes are made of floats"):
            call(specimen.model, "nf4")
    for site in ("mlp", "attention.value", "all"):
        with pytest.raises(
            ValueError, match=rf"_proj.weight is packed or quantised \({first} codes .*codes, not weights"
        ):
            resolve(specimen.model, site)
    assert [view.part for view in resolve(specimen.model, "embedding+norm@0")] and digests(specimen.model) == before


def test_what_was_loaded_as_codes_counts_as_codes(tmp_path):
    shape = {**packaged.TINY["tiny-llama"], "intermediate_size": 128}
    specimen = Scratch(architecture="llama", config=shape, seed=1).load()
    specimen.model.save_pretrained(tmp_path)
    specimen.tokenizer.save_pretrained(tmp_path)
    loaded = Directory(path=str(tmp_path), dtype="nf4").load()
    assert code_of(loaded.model) == "nf4" and code_of(specimen.model) is None
    for dtype in ("bfloat16", "nf4"):
        with pytest.raises(ValueError, match="are nf4 codes already"):
            Precision(dtype=dtype).apply(loaded)
    with pytest.raises(ValueError, match="nf4 codes and cannot be trained: add `lora`"):
        Heal(**HEAL).pin().apply(loaded)
    with pytest.raises(ValueError, match="Linear4bit, .*or beside one that `precision` has coded"):
        Lora().apply(loaded)


def test_models_with_adapters_and_layers_with_a_forward_of_their_own_are_refused():
    specimen = Scratch(architecture="tiny-llama").load()
    Lora(rank=2).apply(specimen)
    for dtype in ("bfloat16", "nf4"):
        with pytest.raises(ValueError, match="has adapters: `merge` them before"):
            Precision(dtype=dtype).apply(specimen)
    with pytest.raises(ValueError, match="q_proj has an adapter, which codes would round off"):
        encode(specimen.model, "nf4")
    rectified = Scratch(architecture="tiny-llama").load()
    Constrain(init="signature", activation="monotone").apply(rectified)
    with pytest.raises(ValueError, match="up_proj is a .*Rectified, whose forward is its own"):
        Precision(dtype="nf4").apply(rectified)
    with pytest.raises(ValueError, match="has no linear layer besides its head"):
        encode(Bare(), "int8")


class Bare(torch.nn.Module):
    def get_output_embeddings(self):
        return None


def test_without_bitsandbytes_codes_are_refused_by_name_before_anything_is_done(monkeypatch):
    specimen = Scratch(architecture="tiny-llama").load()
    before, find = digests(specimen.model), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    for dtype in ("int8", "nf4"):
        for call in (lambda step: step.apply(specimen), lambda step: step.attach(specimen.model)):
            with pytest.raises(ValueError, match=r"need the package bitsandbytes: pip install 'lesion\[nf4\]'"):
                call(Precision(dtype=dtype))
    assert digests(specimen.model) == before
    Precision(dtype="bfloat16").apply(specimen)


def test_codes_are_not_exported_as_a_plain_model(lab, tmp_path, capsys):
    (reading,) = product([Scratch(architecture="tiny-llama") >> Precision(dtype="nf4")], [TestNorms()])
    lab.take([reading])
    code = cli.run(["export", reading.trial.key, str(tmp_path / "out"), "--lab", str(lab.path)])
    assert code == 2 and "holds linear weights as nf4 codes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_structure_needs_no_weights(kind):
    subject = Scratch(architecture="tiny-gpt2")
    outline, whole = subject.outline(), subject.load().model
    structure(outline, kind)
    encode(whole, kind)
    shapes = [{n: (t.shape, t.dtype) for n, t in named_tensors(model)} for model in (outline, whole)]
    assert shapes[0] == shapes[1] and all(t.is_meta for _, t in named_tensors(outline))


def test_types_name_every_floating_tensor_once():
    model = Scratch(architecture="tiny-gemma3").load().model
    found = types(model, torch.bfloat16)
    assert list(found) == [n for n, t in named_tensors(model) if t.is_floating_point()]
    assert {n for n, kind in found.items() if kind == torch.float32} == {n for n in found if n.endswith("inv_freq")}


def test_a_bench_knows_a_coded_model(lab):
    bench = Bench(Scratch(architecture="tiny-llama").load())
    bench.apply(Precision(dtype="nf4"))
    changed = bench.specimen.ledger[-1]["changed"]
    assert {name.rpartition(".")[2] for name in changed} == {"codes", "scales", "held"}
    bench.verify("nothing", "key")
    next(iter(coded(bench.specimen.model)))[1].codes[0, 0] ^= 1
    with pytest.raises(RuntimeError, match="left 1 tensors changed that must not be.*codes"):
        bench.verify("a flipped bit", "key")


def test_the_decoded_weights_are_used_outside_of_forward_too():
    """As T5 and mixtures read a layer's weight without calling it."""
    ours = layer("nf4", drawn(24, 48))
    assert torch.equal(F.linear(drawn(3, 48), ours.weight), F.linear(drawn(3, 48), ours.decoded(torch.float32)))
