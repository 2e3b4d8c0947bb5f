"""The steps in place, against float64 and the plain formula: noise, ablation, quantisation, and the walk over blocks."""

import itertools
import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lesion import blocks, packaged, streams
from lesion.sites import resolve
from lesion.steps.ablate import Ablate, energies, first_of, keep, keep_at_random, remove_by_size, share_of
from lesion.steps.noise import Noise, disturb, spread
from lesion.steps.quantise import Quantise, geometric, grid, linear, snap
from lesion.streams import BLOCK, Memory, normals, uniforms
from lesion.subjects import Scratch
from lesion.threads import each

FAMILIES = list(packaged.TINY)
_bench = {}


@pytest.fixture
def specimen(request):
    """A tiny model of a family, dtype float32 unless said, with biases and norms that are not all zero or one."""
    yield from _fresh(getattr(request, "param", "tiny-llama"))


def _fresh(family):
    if family not in _bench:
        found = Scratch(architecture=family).load()
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in found.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
        _bench[family] = found, {n: p.detach().clone() for n, p in found.model.named_parameters()}
    found, healthy = _bench[family]
    yield found
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            parameter.data = healthy[name].clone()


def weights(specimen):
    return {n: p.detach().clone() for n, p in specimen.model.named_parameters()}


def after(specimen, step):
    """The weights that a step makes of the specimen, which is left as it was."""
    was = weights(specimen)
    step.apply(specimen)
    found = weights(specimen)
    for name, parameter in specimen.model.named_parameters():
        parameter.data.copy_(was[name])
    return found


def mask_of(specimen, site, name):
    """Where in a parameter a site lies."""
    model, data = specimen.model, specimen.model.get_parameter(name).data
    was = data.clone()
    data.zero_()
    for view in resolve(model, site):
        if view.name == name:
            view.tensor.fill_(1)
    found = data.bool()
    data.copy_(was)
    return found


def drawn(law, seed, name, kind, shape):
    out = np.empty(math.prod(shape), np.float32)
    (normals if law == "normal" else uniforms)(seed, name, kind, 0, out)
    return torch.from_numpy(out).view(shape).double()


def blocks_of(*arrays):
    return [blocks.Block(0, "w", 0, torch.from_numpy(array)) for array in arrays]


# ---- noise


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sigma", [1e-6, 0.3, 5.0])
def test_noise_is_its_formula(dtype, sigma):
    rng = np.random.default_rng(0)
    w, z = rng.normal(size=4000).astype(dtype), rng.normal(size=4000).astype(np.float32)
    x, exact = z.astype(float), w.astype(float)
    wanted = {
        "multiplicative": exact * (1 + sigma * x),
        "additive": exact + sigma * 0.7 * x,
        "lognormal": exact * np.exp(sigma * x),
    }
    for law, want in wanted.items():
        got = w.copy()
        disturb(got, z, law, sigma, std=0.7)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(got, want, rtol=40 * eps, atol=4 * eps * np.abs(exact).max())


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.4])
def test_multiplicative_noise_grows_and_flips_as_theory_says(sigma):
    w = np.random.default_rng(1).normal(size=400_000).astype(np.float32)
    z = np.empty_like(w)
    normals(1, "w", "k", 0, z)
    got = w.copy()
    disturb(got, z, "multiplicative", sigma)
    growth = math.sqrt((got.astype(float) ** 2).mean() / (w.astype(float) ** 2).mean())
    assert growth == pytest.approx(math.sqrt(1 + sigma**2), rel=0.01)
    flips, p = (np.sign(got) != np.sign(w)).mean(), stats.norm.cdf(-1 / sigma)
    assert abs(flips - p) < 4.5 * math.sqrt(max(p, 1e-6) / len(w))
    logs = w.copy()
    disturb(logs, z, "lognormal", sigma)
    assert (np.sign(logs) == np.sign(w)).all()
    np.testing.assert_allclose(np.log(logs.astype(float) / w) / sigma, z, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50), min_size=1, max_size=6),
    st.floats(-1e3, 1e3),
)
def test_the_standard_deviation_of_parts_is_that_of_the_whole(parts, offset):
    arrays = [np.array(part, np.float32) + np.float32(offset) for part in parts]
    want = np.concatenate(arrays).astype(float).std()
    assert spread(arrays) == pytest.approx(want, rel=1e-4, abs=1e-4 * max(1, abs(offset)) * 1e-2)


@pytest.mark.parametrize("specimen", FAMILIES, indirect=True)
def test_noise_reads_its_stream_by_position_in_the_parameter(specimen):
    """In every layout: stacked, interleaved, transposed."""
    was = weights(specimen)
    found = after(specimen, Noise(site="all", sigma=0.25, seed=4))
    touched = {view.name for view in resolve(specimen.model, "all")}
    for name, w in was.items():
        want = w.double()
        if name in touched:
            want = want * (1 + 0.25 * drawn("normal", 4, name, "noise.multiplicative", w.shape))
        torch.testing.assert_close(found[name].double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("specimen", ["tiny-gpt2", "tiny-gpt-neox", "tiny-llama"], indirect=True)
@pytest.mark.parametrize(
    "part", ["attention.value", "attention.query@1", "attention.key:1", "attention.output:0,3", "mlp.out"]
)
def test_a_part_takes_its_part_of_the_damage_of_the_whole(specimen, part):
    if specimen.model.config.model_type == "llama" and ",3" in part:
        part = "attention.output:0,2"
    was = weights(specimen)
    for make in (lambda site: Noise(site=site, sigma=0.5, seed=2), lambda site: Ablate(site=site, share=0.3, seed=2)):
        whole, found = after(specimen, make("all")), after(specimen, make(part))
        for name in was:
            here = mask_of(specimen, part, name)
            assert torch.equal(found[name], torch.where(here, whole[name], was[name])), name


@pytest.mark.parametrize("specimen", ["tiny-gpt2", "tiny-gpt-neox", "tiny-llama"], indirect=True)
def test_additive_noise_is_in_units_of_each_views_spread(specimen):
    was = weights(specimen)
    found = after(specimen, Noise(site="attention", sigma=0.5, seed=3, law="additive"))
    for view in resolve(specimen.model, "attention"):
        w, shape = was[view.name], was[view.name].shape
        here = mask_of(specimen, f"{view.part}@{view.layer}", view.name)
        z = drawn("normal", 3, view.name, "noise.additive", shape)
        want = w.double() + 0.5 * w[here].double().std(correction=0) * z
        torch.testing.assert_close(found[view.name][here].double(), want[here], rtol=1e-5, atol=1e-7)


def test_doses_are_paired(specimen):
    was = weights(specimen)["model.layers.0.mlp.up_proj.weight"].double()
    directions = []
    for sigma in (0.1, 0.4, 1.6):
        now = after(specimen, Noise(site="mlp", sigma=sigma, seed=9))["model.layers.0.mlp.up_proj.weight"].double()
        directions.append((now - was) / (sigma * was))
    for one, other in itertools.pairwise(directions):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_laws_seeds_and_parameters_have_unrelated_noise(specimen):
    was, z = weights(specimen), []
    for seed, law in ((1, "multiplicative"), (2, "multiplicative"), (1, "lognormal")):
        now = after(specimen, Noise(site="mlp", sigma=0.1, law=law, seed=seed))
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            z.append((now[name] / was[name] - 1).flatten().double().numpy())
    assert np.abs(np.corrcoef(z) - np.eye(len(z))).max() < 5 / math.sqrt(len(z[0]))


def test_tied_weights_are_damaged_once_and_dose_zero_touches_nothing(specimen):
    was = weights(specimen)
    once, both = (after(specimen, Noise(site=site, sigma=0.3)) for site in ("embedding", "embedding+head"))
    assert all(torch.equal(once[name], both[name]) for name in was)
    specimen.model.get_parameter("model.embed_tokens.weight").data[0, :3] = torch.tensor([-0.0, math.nan, -math.inf])
    bits = {n: w.view(torch.int32) for n, w in weights(specimen).items()}
    for step in (
        *(Noise(site="all", sigma=0, law=law) for law in ("multiplicative", "additive", "lognormal")),
        Ablate(site="all", share=0),
        Ablate(site="all", share=0, order="smallest"),
    ):
        assert all(torch.equal(w.view(torch.int32), bits[name]) for name, w in after(specimen, step).items())


# ---- ablation


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=40), st.data())
def test_what_is_kept_keeps_its_bits_and_what_goes_is_zero(values, data):
    for dtype, whole in ((np.float32, np.int32), (np.float64, np.int64)):
        w = np.array(values, dtype)
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(w), max_size=len(w))))
        want = np.where(mask, w.view(whole), 0)
        assert keep(w, mask) == (~mask).sum()
        assert np.array_equal(w.view(whole), want)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-42, math.inf]), st.floats(-9, 9, width=16)),
        min_size=1,
        max_size=60,
    ),
    dtype=st.sampled_from([np.float32, np.float64]),
    order=st.sampled_from(["largest", "smallest"]),
    parts=st.integers(1, 4),
    data=st.data(),
)
def test_ablation_by_size_is_that_of_a_stable_sort(values, dtype, order, parts, data):
    w = np.array(values, dtype)
    count = data.draw(st.integers(0, len(w)))
    ranked = np.argsort(-np.abs(w) if order == "largest" else np.abs(w), kind="stable")
    want = w.copy()
    want[ranked[:count]] = 0
    pieces = [part.copy() for part in np.array_split(w, parts) if len(part)]
    with np.errstate(invalid="ignore"):
        *_, gone = remove_by_size(blocks_of(*pieces), count, order)
    assert gone == count
    assert np.array_equal(np.concatenate(pieces), want)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50),
    st.sampled_from([np.float32, np.float64]),
    st.data(),
)
def test_the_nth_magnitude_is_that_of_a_sort(values, dtype, data):
    w = np.array(values, dtype)
    n = data.draw(st.integers(0, len(w) - 1))
    found, smaller, equal = blocks.nth_magnitude(blocks_of(w), n)
    want = np.sort(np.abs(w))[n]
    assert blocks.magnitude(found, torch.from_numpy(w).dtype) == want
    assert (smaller, equal) == ((np.abs(w) < want).sum(), (np.abs(w) == want).sum())


def test_shares_are_taken_as_they_are_written_and_rounded_half_up():
    assert [share_of(s, 50) for s in (0.0, 0.29, 0.01, 0.5, 1.0)] == [0, 15, 1, 25, 50]
    assert share_of(0.15, 10) == 2 and share_of(1e-9, 10**6) == 0 and share_of(0.05, 9) == 0 and share_of(0.5, 9) == 5


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=300), st.sampled_from(["random", "largest", "smallest"]), st.data()
)
def test_choices_are_nested_and_best_first(scores, order, data):
    few, many = sorted(data.draw(st.tuples(*[st.integers(0, len(scores))] * 2)))
    some, more = first_of(np.array(scores, float), few, order), first_of(np.array(scores, float), many, order)
    assert set(some) <= set(more) and len(more) == many and more == sorted(more)
    sign = -1 if order == "largest" else 1
    assert more == sorted(sorted(range(len(scores)), key=lambda i: (sign * scores[i], i))[:many])


def test_the_share_itself_and_zero_are_on_the_right_side():
    u = np.array([0, 2**-24, 0.25 - 2**-24, 0.25, 1 - 2**-24], np.float32)
    for share, gone in ((0.0, 0), (1e-30, 1), (0.25, 3), (1.0, 5)):
        w = np.ones(5, np.float32)
        assert keep_at_random(w, u, share) == gone and not w[:gone].any() and w[gone:].all()


def test_random_ablation_follows_its_uniforms_and_is_nested(specimen):
    was, gone = weights(specimen), []
    for share in (0.05, 0.3, 0.31, 0.9, 1.0):
        found = after(specimen, Ablate(site="mlp", share=share, seed=6))
        for name in {view.name for view in resolve(specimen.model, "mlp")}:
            u = drawn("uniform", 6, name, "ablate.weight", was[name].shape).float()
            assert torch.equal(found[name], torch.where(u >= torch.tensor(share), was[name], 0))
        gone.append(torch.cat([(w == 0).flatten() for n, w in found.items() if "mlp" in n]))
        assert gone[-1].double().mean() == pytest.approx(share, abs=0.02)
    for less, more in itertools.pairwise(gone):
        assert (less <= more).all()
    assert gone[-1].all()


def with_inputs_zeroed(specimen, module, columns, tokens):
    """Logits when some inputs of a module are zero: what it means that a head or neuron is not there."""

    def hook(_, inputs):
        (x,) = inputs
        return (x.masked_fill(torch.isin(torch.arange(x.shape[-1]), torch.tensor(columns)), 0),)

    with specimen.model.get_submodule(module).register_forward_pre_hook(hook), torch.no_grad():
        return specimen.model(tokens).logits


def logits_after(specimen, step, tokens):
    was = weights(specimen)
    facts = step.apply(specimen)
    with torch.no_grad():
        found = specimen.model(tokens).logits
    for name, parameter in specimen.model.named_parameters():
        parameter.data.copy_(was[name])
    return facts, found


TOKENS = torch.arange(24).view(2, 12) * 7 % 250


@pytest.mark.parametrize(
    ("specimen", "module"),
    [
        ("tiny-llama", "model.layers.1.self_attn.o_proj"),
        ("tiny-gpt2", "transformer.h.1.attn.c_proj"),
        ("tiny-gpt-neox", "gpt_neox.layers.1.attention.dense"),
    ],
    indirect=["specimen"],
)
@pytest.mark.parametrize("site", ["attention@1", "attention.output@1"])
@pytest.mark.parametrize("order", ["random", "smallest"])
def test_an_ablated_head_is_exactly_not_there(specimen, module, site, order):
    facts, found = logits_after(specimen, Ablate(site=site, share=0.5, unit="head", order=order), TOKENS)
    (heads,) = facts["which"].values()
    assert len(heads) == 2 and facts["silenced"] == 2 and facts["units"] == 4
    columns = [16 * head + i for head in heads for i in range(16)]
    torch.testing.assert_close(found, with_inputs_zeroed(specimen, module, columns, TOKENS))


def test_a_shared_key_goes_with_its_last_query(specimen):
    """4 query heads read 2 key-value heads."""
    for share, seed in itertools.product((0.25, 0.5, 0.75, 1.0), range(6)):
        step = Ablate(site="attention@0", share=share, unit="head", seed=seed)
        was = weights(specimen)
        (heads,) = step.apply(specimen)["which"].values()
        found = weights(specimen)
        specimen.model.load_state_dict({**specimen.model.state_dict(), **was})
        own = {"q_proj": heads, "k_proj": [k for k in (0, 1) if {2 * k, 2 * k + 1} <= set(heads)]}
        own["v_proj"] = own["k_proj"]
        for part, gone in own.items():
            rows = found[f"model.layers.0.self_attn.{part}.weight"].view(-1, 16, 64)
            assert [i for i, row in enumerate(rows) if not row.any()] == gone


def test_keys_and_values_alone_have_their_own_heads(specimen):
    facts = Ablate(site="attention.value", share=0.5, unit="head").apply(specimen)
    assert facts["units"] == 4 and facts["silenced"] == 2  # 2 layers of 2 heads
    rows = weights(specimen)["model.layers.0.self_attn.v_proj.weight"].view(2, 16, 64)
    assert [i for i, row in enumerate(rows) if not row.any()] == facts["which"]["text/attention@0"]


@pytest.mark.parametrize(
    ("specimen", "module"),
    [
        ("tiny-llama", "model.layers.1.mlp.down_proj"),
        ("tiny-gpt2", "transformer.h.1.mlp.c_proj"),
        ("tiny-opt", "model.decoder.layers.1.fc2"),
    ],
    indirect=["specimen"],
)
@pytest.mark.parametrize("site", ["mlp@1", "mlp.out@1", "mlp.in@1"])
def test_an_ablated_neuron_is_exactly_not_there(specimen, module, site):
    parts = [v for v in resolve(specimen.model, "mlp@1", biases=True) if v.units is not None]
    facts, found = logits_after(specimen, Ablate(site=site, share=0.4, unit="neuron", seed=5), TOKENS)
    count = parts[0].tensor.shape[0]
    assert facts["silenced"] == share_of(0.4, count) and facts["units"] == count
    uniform = np.empty(count, np.float32)
    uniforms(5, "text/mlp@1", "ablate.neuron", 0, uniform)
    gone = np.argsort(uniform, kind="stable")[: facts["silenced"]].tolist()
    torch.testing.assert_close(found, with_inputs_zeroed(specimen, module, gone, TOKENS))


@pytest.mark.parametrize(
    "specimen", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-opt", "tiny-qwen2"], indirect=True
)
def test_an_ablated_layer_is_the_identity(specimen):
    step = Ablate(site="attention+mlp", share=0.5, unit="layer", seed=1)
    was = weights(specimen)
    facts = step.apply(specimen)
    with torch.no_grad():
        states = specimen.model(TOKENS, output_hidden_states=True).hidden_states
    (gone,) = facts["which"]["text"]
    if gone == 0:  # the state after the last layer is normed
        torch.testing.assert_close(states[1], states[0])
    specimen.model.load_state_dict({**specimen.model.state_dict(), **was})
    everything = Ablate(site="attention+mlp", share=1, unit="layer")
    everything.apply(specimen)
    assert set(step.touches(specimen)) == set(everything.touches(specimen))
    assert {n for n, w in weights(specimen).items() if not torch.equal(w, was[n])} == set(step.touches(specimen))
    with torch.no_grad():
        states = specimen.model(TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], states[0])


def test_units_fall_by_norm_and_larger_shares_only_add(specimen):
    views = [v for v in resolve(specimen.model, "mlp@0", biases=True) if v.units is not None]
    norms = sum(v.tensor.double().square().movedim(v.units, 0).flatten(1).sum(1) for v in views)
    before, gone = weights(specimen)["model.layers.0.mlp.down_proj.weight"], set()
    for order, share in itertools.product(("largest", "smallest"), (0.1, 0.35, 0.8)):
        now = after(specimen, Ablate(site="mlp@0", share=share, unit="neuron", order=order))[
            "model.layers.0.mlp.down_proj.weight"
        ]
        here = set(((now == 0).all(0) & (before != 0).any(0)).nonzero().flatten().tolist())
        ranked = norms.sort(descending=order == "largest", stable=True).indices
        assert here == set(ranked[: share_of(share, len(norms))].tolist())
        assert gone <= here or share == 0.1
        gone = here


def test_energies_are_sums_of_squares(specimen):
    for view in resolve(specimen.model, "attention+mlp+norm", biases=True):
        for axis in range(view.tensor.dim()):
            want = view.tensor.double().square().movedim(axis, 0).reshape(view.tensor.shape[axis], -1).sum(1)
            np.testing.assert_allclose(energies(view.tensor, axis), want, rtol=1e-12)


def test_a_layers_place_in_the_order_does_not_depend_on_its_competitors():
    model = Scratch(architecture="llama", config={**packaged.TINY["tiny-llama"], "num_hidden_layers": 12}).load()
    order = [
        set(Ablate(site="mlp", share=k / 12, unit="layer", seed=3).apply(model)["which"]["text"]) for k in range(1, 13)
    ]
    ranked = [next(iter(b - a)) for a, b in itertools.pairwise([set(), *order])]
    some = [
        next(iter(b - a))
        for a, b in itertools.pairwise(
            [
                set(),
                *(
                    set(Ablate(site="mlp@2-7", share=k / 6, unit="layer", seed=3).apply(model)["which"]["text"])
                    for k in range(1, 7)
                ),
            ]
        )
    ]
    assert some == [layer for layer in ranked if 2 <= layer <= 7]


# ---- quantisation


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=200),
    levels=st.one_of(st.integers(2, 20), st.sampled_from([255, 256, 1024, 65536])),
    reach=st.sampled_from([None, "max", "half"]),
)
def test_snapping_is_its_formula(values, levels, reach):
    w = np.array(values, np.float32)
    low, high = w.min(keepdims=True), w.max(keepdims=True)
    edge = {None: None, "max": np.maximum(-low, high), "half": np.maximum(-low, high) / 2}[reach]
    got = w.copy()
    snap(got, *grid(low, high, levels, edge), levels)
    if low == high or (edge is not None and edge == 0):
        assert np.array_equal(got, w)
        return
    exact = w.astype(float)
    first, last = (float(low[0]), float(high[0])) if edge is None else (-float(edge[0]), float(edge[0]))
    delta = (last - first) / (levels - 1)
    if delta < 1e-30:
        return
    steps = np.clip(np.round((exact - first) / delta), 0, levels - 1)
    want = first + delta * steps
    slack = 1e-6 * (abs(first) + abs(last))
    tie = np.abs(((exact - first) / delta) % 1 - 0.5) < 1e-5 * levels + 2e-2 * (slack / delta)
    assert (np.abs(got - want)[~tie] <= slack).all()
    assert (np.abs(got - want) <= delta + slack).all()
    assert len(np.unique(got)) <= levels
    within = (exact >= first) & (exact <= last)
    assert (np.abs(got - exact)[within] <= delta / 2 + slack).all()


def test_a_symmetric_grid_of_odd_size_has_an_exact_zero_and_of_even_size_none():
    w = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for levels in range(2, 40):
        got, amax = w.copy(), np.abs(w).max(keepdims=True)
        snap(got, *grid(w.min(keepdims=True), w.max(keepdims=True), levels, amax), levels)
        assert (0.0 in got) == (levels % 2 == 1)
        even = np.linspace(-amax[0], amax[0], levels)
        assert np.abs(np.unique(got)[:, None] - even).min(axis=1).max() < 1e-6 * amax[0]


@pytest.mark.parametrize("specimen", FAMILIES, indirect=True)
@pytest.mark.parametrize("channel", ["tensor", "output"])
@pytest.mark.parametrize("scheme", ["minmax", "symmetric", "percentile"])
def test_no_more_levels_than_asked_and_the_grid_is_where_it_should_be(specimen, channel, scheme):
    step = Quantise(
        site="all", levels=5, scheme=scheme, channel=channel, **({"percentile": 90} if scheme == "percentile" else {})
    )
    before = {(v.name, v.part, v.tensor.storage_offset()): v.tensor.clone() for v in resolve(specimen.model, "all")}
    assert step.apply(specimen)["constant"] == 0
    for view in resolve(specimen.model, "all"):
        lead = len(view.outputs)
        now, was = (
            t.movedim(view.outputs, tuple(range(lead))).reshape(math.prod(t.shape[i] for i in view.outputs), -1)
            for t in (view.tensor, before[view.name, view.part, view.tensor.storage_offset()])
        )
        if channel == "tensor":
            now, was = now.reshape(1, -1), was.reshape(1, -1)
        for row, old in zip(now, was, strict=True):
            size = old.abs()
            edge = size.max() if scheme == "symmetric" else size.sort().values[math.ceil(0.9 * len(old)) - 1]
            low, high = (old.min(), old.max()) if scheme == "minmax" else (-edge, edge)
            delta = (high - low).double() / 4
            want = low + delta * ((old.double() - low) / delta).round().clamp(0, 4)
            assert len(row.unique()) <= 5
            off = (row.double() - want).abs()
            tie = (((old.double() - low) / delta) % 1 - 0.5).abs() < 1e-4
            assert (off[~tie] < 1e-5 * delta).all() and (off[tie] < 1.001 * delta).all()


def test_constant_tensors_and_channels_are_left_and_counted(specimen):
    up, down = (specimen.model.get_parameter(f"model.layers.0.mlp.{n}_proj.weight").data for n in ("up", "down"))
    up.fill_(0.125)
    down[3] = -0.5
    for scheme in ("minmax", "symmetric", "percentile"):
        was = weights(specimen)
        facts = Quantise(site="mlp", levels=4, scheme=scheme).apply(specimen)
        assert facts["constant"] == 1 and torch.equal(up, was["model.layers.0.mlp.up_proj.weight"])
        specimen.model.load_state_dict({**specimen.model.state_dict(), **was})
        facts = Quantise(site="mlp", levels=4, scheme=scheme, channel="output").apply(specimen)
        assert facts["constant"] == len(up) + 1 and torch.equal(up, was["model.layers.0.mlp.up_proj.weight"])
        assert (down[3] == -0.5).all() and not torch.equal(down, was["model.layers.0.mlp.down_proj.weight"])
        specimen.model.load_state_dict({**specimen.model.state_dict(), **was})
    up.zero_()
    facts = Quantise(site="mlp.in@0", levels=3).apply(specimen)
    assert facts["relative_change"] is None and facts["constant"] == 1 and not up.any()


def test_sweeps_of_levels():
    assert geometric(1024, 4, 9) == (1024, 512, 256, 128, 64, 32, 16, 8, 4)
    assert geometric(4, 1024, 3) == (4, 64, 1024) and geometric(10, 1000, 4) == (10, 46, 215, 1000)
    assert linear(1, 28, 7) == (1, 6, 10, 15, 19, 24, 28)  # 5.5 comes out of the floats a hair too small
    assert linear(16, 4, 4) == (16, 12, 8, 4) and linear(2, 3, 2) == (2, 3) and linear(4, 7, 3) == (4, 6, 7)
    for bad in (
        lambda: geometric(4, 2, 9),
        lambda: linear(4, 4, 2),
        lambda: linear(4, 8, 1),
        lambda: geometric(0, 8, 3),
        lambda: linear(math.nan, 8, 3),
    ):
        with pytest.raises(ValueError, match=r"sweep|different"):
            bad()


# ---- blocks and threads

STEPS = [
    Noise(site="all", sigma=0.3, seed=1),
    Noise(site="all", sigma=0.3, law="additive", seed=1),
    Noise(site="all", sigma=0.3, law="lognormal", seed=1),
    Ablate(site="all", share=0.3, seed=1),
    Ablate(site="all", share=0.3, order="smallest"),
    Quantise(site="all", levels=6),
    Quantise(site="all", levels=7, scheme="percentile", percentile=97.5),
    Quantise(site="all", levels=7, channel="output"),
]


@pytest.mark.parametrize("specimen", ["tiny-gpt2", "tiny-gpt-neox", "tiny-gemma3", "tiny-llama"], indirect=True)
@pytest.mark.parametrize("size", [100, 1000, 4097])
@pytest.mark.parametrize("site", ["all+norm", "attention.value:0,2", "attention.output:1", "attention.key@1"])
def test_blocks_are_every_element_once_and_know_where_they_lie(specimen, monkeypatch, size, site):
    if specimen.model.config.model_type in ("llama", "gemma3"):
        site = site.replace("0,2", "1")
    monkeypatch.setattr(blocks, "BLOCK", size)
    for parameter in specimen.model.parameters():
        parameter.data = torch.arange(parameter.numel()).view(parameter.shape).float()
    views = resolve(specimen.model, site)
    found = blocks.cut(specimen.model, views)
    assert [len(group) > 0 for group in blocks.by_view(found)] == [True] * len(views)
    for block in found:
        flat = block.tensor.reshape(-1)
        assert flat[0] == block.start and flat.max() - flat.min() < max(size, block.tensor.shape[-1])
        assert (flat.diff() > 0).all()
    for number, view in enumerate(views):
        mine = torch.cat([b.tensor.reshape(-1) for b in found if b.view == number])
        assert torch.equal(mine, view.tensor.reshape(-1).sort().values)


@pytest.mark.parametrize("specimen", ["tiny-gpt2", "tiny-gpt-neox", "tiny-llama"], indirect=True)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_neither_the_size_of_blocks_nor_threads_nor_memory_reach_the_weights(specimen, monkeypatch, step):
    want = after(specimen, step)
    for size, threads, slots in ((BLOCK, 3, 9), (1000, 1, 9), (333, 4, 0), (BLOCK, 1, 1)):
        monkeypatch.setattr(blocks, "BLOCK", size)
        monkeypatch.setattr(streams, "_memory", Memory(slots * 4 * BLOCK))
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        rounding = 1e-6 if "additive" in str(step) and size != BLOCK else 0  # a standard deviation is a sum over blocks
        for _ in range(2):
            found = after(specimen, step)
            for name, w in want.items():
                torch.testing.assert_close(
                    found[name], w, rtol=rounding, atol=rounding, msg=f"{name} {size} {threads} {slots}"
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_other_types_are_computed_in_floats_and_rounded_once(specimen, dtype, step):
    for parameter in specimen.model.parameters():
        parameter.data = parameter.data.to(dtype)
    found = after(specimen, step)
    wide = torch.promote_types(dtype, torch.float32)
    for parameter in specimen.model.parameters():
        parameter.data = parameter.data.to(wide)
    want = after(specimen, step)
    for name, w in found.items():
        assert w.dtype == dtype
        assert torch.equal(w, want[name].to(dtype)), name
        if isinstance(step, Quantise) and step.channel == "tensor" and "mlp" in name:
            assert len(w.unique()) <= step.levels


def test_the_change_of_large_blocks_is_measured_by_a_sample():
    rng = np.random.default_rng(0)
    w = torch.from_numpy(rng.normal(size=2**19).astype(np.float32))
    was = w.double()
    weight, change = blocks.rewrite(w, lambda array: np.multiply(array, np.float32(1.5), out=array))
    assert torch.equal(w, (was * 1.5).float())
    assert weight == pytest.approx(float(was.square().sum()), rel=0.05)
    assert change == pytest.approx(weight / 4, rel=1e-4)


def test_each_keeps_order_uses_threads_and_lets_errors_out(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    gate, seen = threading.Barrier(4, timeout=20), set()

    def work(i):
        if i < 4:
            gate.wait()  # passes only if four threads are here at once
        seen.add(threading.get_ident())
        return i * i

    assert each(work, range(100)) == [i * i for i in range(100)]
    assert len(seen) <= 4
    assert each(work, []) == []
    with pytest.raises(ZeroDivisionError):
        each(lambda i: 1 // (i - 7), range(20))


# ---- what a step says, and what it refuses


@pytest.mark.parametrize(
    "step",
    [
        *STEPS,
        Ablate(site="mlp", share=0.4, unit="neuron"),
        Ablate(site="attention", share=0.5, unit="head"),
        Ablate(site="attention+mlp", share=0.5, unit="layer"),
    ],
    ids=str,
)
def test_facts_tell_what_was_done(specimen, step):
    was = weights(specimen)
    facts = step.apply(specimen)
    json.dumps(facts, allow_nan=False)
    now = weights(specimen)
    touched = step.touches(specimen)
    assert facts["tensors"] == len(touched)
    assert facts["parameters"] == sum(was[name].numel() for name in touched)
    change = sum((now[n].double() - was[n].double()).square().sum() for n in touched)
    weight = sum(was[n].double().square().sum() for n in touched)
    assert facts["relative_change"] == pytest.approx(math.sqrt(change / weight), rel=2e-3)
    if isinstance(step, Ablate):
        assert facts["zeroed"] == sum(int((now[n] == 0).sum()) - int((was[n] == 0).sum()) for n in touched)


def test_weights_that_are_not_finite_go_through_without_a_warning(specimen):
    w = specimen.model.get_parameter("model.layers.0.mlp.up_proj.weight").data
    w[0, 0], w[1, 1] = math.nan, math.inf
    was = weights(specimen)
    for step in [s.model_copy(update={"site": "mlp"}) for s in STEPS]:
        facts = step.apply(specimen)
        json.dumps(facts, allow_nan=False)
        specimen.model.load_state_dict({**specimen.model.state_dict(), **was})
    found = after(specimen, Noise(site="mlp", sigma=1e6, law="lognormal"))
    assert not torch.isfinite(found["model.layers.0.mlp.up_proj.weight"]).all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Noise(site="mlp", sigma=-0.1), "sigma"),
        (lambda: Noise(site="mlp", sigma=math.nan), "sigma"),
        (lambda: Noise(site="mlp", sigma=math.inf), "sigma"),
        (lambda: Noise(site="mlp", sigma=0.1, law="gaussian"), "multiplicative"),
        (lambda: Noise(site="mlp", sigma=0.1, seed=-1), "seed"),
        (lambda: Noise(site="mlp", sigma=0.1, seed=1.5), "seed"),
        (lambda: Noise(site="mlp", sigma=0.1, dose=1), "dose"),
        (lambda: Noise(site="mlp"), "sigma"),
        (lambda: Ablate(site="mlp", share=1.01), "share"),
        (lambda: Ablate(site="mlp", share=-0.01), "share"),
        (lambda: Ablate(site="mlp", share=math.nan), "share"),
        (lambda: Ablate(site="mlp", share=0.5, unit="row"), "neuron"),
        (lambda: Ablate(site="mlp", share=0.5, order="first"), "largest"),
        (lambda: Ablate(site="mlp", share=0.5, order="largest", seed=1), "order='random' only"),
        (lambda: Quantise(site="mlp", levels=1), "levels"),
        (lambda: Quantise(site="mlp", levels=4.5), "levels"),
        (lambda: Quantise(site="mlp", levels=2**21), "levels"),
        (lambda: Quantise(site="mlp", levels=4, scheme="kmeans"), "minmax"),
        (lambda: Quantise(site="mlp", levels=4, percentile=99), "scheme='percentile' only"),
        (lambda: Quantise(site="mlp", levels=4, scheme="percentile", percentile=0), "percentile"),
        (lambda: Quantise(site="mlp", levels=4, scheme="percentile", percentile=100.1), "percentile"),
    ],
)
def test_bad_fields_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (Noise(site="mpl", sigma=0.1), "no site 'mpl'"),
        (Quantise(site="mlp@9", levels=4), "no layer"),
        (
            Ablate(site="mlp", share=0.5, unit="head"),
            r"needs a site within attention or cross; 'mlp' has mlp.gate, mlp.in, mlp.out",
        ),
        (Ablate(site="attention", share=0.5, unit="neuron"), "needs a site within mlp; 'attention' has attention.key"),
        (
            Ablate(site="mlp.in+attention.query", share=0.5, unit="layer"),
            "of which the site 'mlp.in.attention.query' has none",
        ),
        (Ablate(site="attention.query:0", share=0.5, unit="head"), "must not name heads"),
        (Ablate(site="attention.output:0+mlp", share=0.5, unit="layer"), "must not name heads"),
    ],
)
def test_sites_that_make_no_sense_are_refused_before_anything_is_changed(specimen, step, match):
    was = weights(specimen)
    for act in (step.touches, step.apply):
        with pytest.raises(ValueError, match=match):
            act(specimen)
    assert all(torch.equal(w, was[name]) for name, w in weights(specimen).items())
