"""Signs, their inverses and their structures: pure functions against brute force and float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.activations import ACT2FN

from lesion.constraints import FLOOR, Envelope, Signed, free, hold, inverse, magnitude, materialise, project, signed
from lesion.optimizers import groups
from lesion.signature import signature
from lesion.stats import generator
from lesion.steps import Constrain
from lesion.steps.match_loss import search
from lesion.subjects import Scratch

FORMS = ("softplus", "exponential", "projected")


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=8))
def test_v_gives_back_its_weight(form, weights):
    w = torch.tensor(weights, dtype=torch.float64)
    rms = float(w.square().mean().sqrt())
    back = magnitude(inverse(w, form), form).double()
    expected = w if form == "projected" else w.clamp(min=FLOOR * rms)
    assert torch.allclose(back, expected, rtol=2e-5), (
        back,
        expected,
    )  # V is float32, and e^V of V = 7 has ten times its error


def test_softplus_is_not_inverted_by_way_of_an_overflow():
    w = torch.tensor([25.0, 90.0, 1e4])  # e⁹⁰ is no float32
    assert torch.allclose(magnitude(inverse(w, "softplus"), "softplus"), w)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [[float("nan"), 1.0], [float("inf"), 1.0]])
def test_v_overflow_is_refused(form, bad):
    with pytest.raises(ValueError, match=f"V overflows: . of 2 weights have no finite V under the form '{form}'"):
        inverse(torch.tensor(bad), form)


def test_all_zero_weights_have_no_logarithm():
    with pytest.raises(ValueError, match="V overflows: 4 of 4"):
        inverse(torch.zeros(2, 2), "softplus")


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_the_best_signs_are_those_of_brute_force(seed, m, d):
    drawn = generator("test", seed)
    first, last = (torch.from_numpy(drawn.standard_normal((m, d))) for _ in range(2))
    found = signature([first, last], starts=20)
    total = float(sum(a.square().sum() for a in (first, last)))
    best = 0.0
    for units in itertools.product((-1.0, 1.0), repeat=m):
        for stream in itertools.product((-1.0, 1.0), repeat=d):
            signs = torch.tensor(units)[:, None] * torch.tensor(stream)
            best = max(best, float(sum(a[a.sign() == signs].square().sum() for a in (first, last))) / total)
    kept = sum(float(a[a.sign() == found.units[:, None] * found.stream].square().sum()) for a in (first, last)) / total
    assert math.isclose(kept, found.kept, abs_tol=1e-12)
    assert found.kept <= best + 1e-12 and found.kept >= best - 0.05


@given(st.integers(0, 10**6))
def test_a_planted_structure_is_found_whole(seed):
    drawn = generator("test", seed)
    units, stream = (torch.from_numpy(drawn.choice([-1.0, 1.0], n)) for n in (12, 7))
    planted = torch.from_numpy(abs(drawn.standard_normal((12, 7)))) * units[:, None] * stream
    found = signature([planted, 2 * planted], seed=seed)
    assert found.kept == pytest.approx(1.0, abs=1e-12)
    assert torch.equal(found.units[:, None] * found.stream, units[:, None] * stream)


def test_signs_of_nothing_are_refused():
    with pytest.raises(ValueError, match="not all zero"):
        signature([torch.zeros(3, 2)])


@pytest.mark.parametrize(
    ("name", "least"), [("gelu", -0.7518), ("silu", -1.2785), ("gelu_new", -0.7524), ("relu", 0.0)]
)
def test_the_envelope_is_monotone_and_the_activation_itself_right_of_its_minimum(name, least):
    act = ACT2FN[name]
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    for positive in (False, True):
        envelope = Envelope(act, positive)
        y = envelope(x)
        assert envelope.least == pytest.approx(least, abs=2e-4)
        assert (y.diff() >= 0).all() and (not positive or (y >= 0).all())
        right = x > envelope.least
        assert torch.allclose(y[right], act(x[right]) - envelope.below)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signs", ["none", "outer", "each"])
def test_no_v_decays_and_everything_else_does_as_before(form, signs):
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    hold(layer[0], form, signs)
    decaying, still = groups(layer, 0.3)
    assert [p.shape for p in decaying["params"]] == [(2, 4)]
    assert any(p is free(layer[0]) for p in still["params"]) and still["weight_decay"] == 0


def test_projection_touches_only_what_is_projected():
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    hold(layer[0], "projected", "outer")
    hold(layer[1], "softplus", "none")
    plain, v = layer[2].weight.clone(), free(layer[1]).clone()
    with torch.no_grad():
        free(layer[0]).fill_(-1.0)
    project(layer)
    assert (free(layer[0]) == 0).all() and torch.equal(free(layer[1]), v) and torch.equal(layer[2].weight, plain)


def test_v_is_float32_whatever_the_model_is_held_in():
    layer = nn.Linear(3, 4, dtype=torch.bfloat16)
    hold(layer, "softplus", "none")
    assert free(layer).dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    layer.float()
    assert layer.weight.dtype == torch.float32
    assert isinstance(signed(layer), Signed)


def test_a_plain_model_comes_out_of_a_constrained_one():
    layer = nn.Sequential(nn.Linear(3, 4))
    hold(layer[0], "softplus", "none")
    weight = layer[0].weight.clone()
    materialise(layer)
    assert type(layer[0]) is nn.Linear and torch.equal(layer[0].weight, weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"site": "embedding"}, "matrices of mlp and attention are held to a sign; the site 'embedding' has embedding"),
        ({"site": "attention.query"}, "attention.query is a part of"),
        ({"site": "mpl"}, "no site 'mpl'"),
        ({"site": "mlp@7"}, "no layer 7"),
    ],
)
def test_sites_that_cannot_be_constrained_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Constrain(**options).apply(Scratch(architecture="tiny-gpt-neox").load())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"site": "attention:0"}, "must not name heads"),
        ({"init": "abs-free", "form": "projected"}, "holds nothing"),
        ({"init": "clamp", "seed": 3}, "seed=3 has a meaning for init='signature' only"),
        ({"init": "sqrt"}, "abs"),
    ],
)
def test_options_without_a_meaning_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Constrain(**options)


def test_nothing_is_constrained_twice():
    specimen = Scratch(architecture="tiny-llama").load()
    Constrain().apply(specimen)
    with pytest.raises(ValueError, match="parametrized"):
        Constrain().apply(specimen)


@given(st.floats(0.3, 5.0), st.floats(0.5, 3.0), st.floats(0.02, 4.0))
def test_a_dose_is_found_for_any_loss_that_rises(scale, power, begin):
    def loss(dose):
        return 2.0 + scale * dose**power

    dose = search(loss, begin, 2.0, 2.5, 0.01)
    assert abs(loss(dose) - 2.5) <= 0.01


def test_a_loss_that_jumps_or_never_arrives_is_said():
    with pytest.raises(ValueError, match="it jumps there"):
        search(lambda dose: 2.0 if dose < 0.3 else 9.0, 0.1, 2.0, 3.0, 0.01)
    with pytest.raises(ValueError, match="do not reach"):
        search(lambda dose: 2.0, 0.1, 2.0, 3.0, 0.01)
    assert search(lambda dose: 2.0, 0.1, 2.0, 2.005, 0.01) == 0.0


def test_a_released_model_computes_the_same_and_can_be_damaged():
    import torch

    from lesion.bench import Bench
    from lesion.steps import Constrain, Noise, Release
    from lesion.subjects import Scratch

    bench = Bench(Scratch().load())
    with pytest.raises(ValueError, match="nothing in this model is held to a sign"):
        Release().apply(bench.specimen)
    bench.apply(Constrain(init="signature"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = bench.specimen.model(input_ids=ids).logits
    with pytest.raises(ValueError, match="is parametrized"):
        Noise(site="mlp", sigma=0.1).apply(bench.specimen)
    bench.apply(Release())
    assert bench.specimen.ledger[-1]["facts"]["matrices"] == 6
    with torch.no_grad():
        assert torch.equal(bench.specimen.model(input_ids=ids).logits, before)
    with bench.applied(Noise(site="mlp", sigma=0.1)):
        assert bench.specimen.ledger[-1]["changed"]


def test_a_damage_behind_a_release_is_read(lab):
    from lesion.measures import Perplexity
    from lesion.steps import Constrain, Noise, Release
    from lesion.subjects import Scratch

    trial = Scratch() >> Constrain() >> Release()
    read = Perplexity(documents=1, tokens=24, window=24, stride=12)
    rows = lab.read([trial, trial >> Noise(site="mlp", sigma=0.5)], [read])
    assert rows.height == 2 and rows["nll"].n_unique() == 2
