"""Spectra against float64 singular value decompositions, of known matrices and of what transformers' own forward gives."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesion import spectra
from lesion.bench import Bench
from lesion.contents import layers
from lesion.lab import product
from lesion.measures import Spectrum
from lesion.measures.spectrum import matrices
from lesion.sites import resolve
from lesion.spectra import NUMBERS, Moments, described_rank, effective_rank, singular_values
from lesion.steps import Noise
from lesion.subjects import Directory, Scratch
from lesion.texts import corpus
from lesion.trial import Step, Trial

CAUSAL = [
    "tiny-llama",
    "tiny-mistral",
    "tiny-qwen2",
    "tiny-gpt2",
    "tiny-gpt-neox",
    "tiny-opt",
    "tiny-gemma3-text",
    "tiny-gemma3",
    "tiny-decoder",
]
HEALTHY = Trial(subject=Scratch(architecture="tiny-llama"))
EVERYWHERE = "embedding+attention+mlp"


class TestCollapse(Step):
    """Leaves every matrix of a site only its largest directions."""

    name = "test-collapse"
    site: str = EVERYWHERE
    kept: int = 2

    def touches(self, specimen):
        return sorted({view.name for view in resolve(specimen.model, self.site)})

    def apply(self, specimen):
        for view in resolve(specimen.model, self.site):
            w = view.tensor.flatten(0, len(view.outputs) - 1).flatten(1)
            u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
            view.tensor.copy_(((u[:, : self.kept] * s[: self.kept]) @ v[: self.kept]).view(view.tensor.shape))
        return {"kept": self.kept}


def loaded(trial):
    bench = Bench(trial.subject.load())
    for step in trial.steps:
        bench.apply(step)
    bench.specimen.bring = loaded
    return bench.specimen


def rows_of(measure, specimen):
    items = measure.items(specimen)
    rows = [row for chunk in measure.chunks(items) for row in measure.read(specimen, chunk)]
    assert [row["item"] for row in rows] == items
    return {row["item"]: row for row in rows}


def naive(matrix):
    """All five numbers, from numpy's decomposition, written out once more."""
    s = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    p = s / s.sum()
    p = p[p > 0]
    return {
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "gap": 1 - s[1] / s[0],
        "top_share": s[0] ** 2 / (s**2).sum(),
    }


def naive_described(matrix):
    s = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    p = s / s.sum()
    assert (abs(p - 0.01) > 1e-6).all(), "a share so near to 0.01 that rounding decides"
    return math.exp(-sum(x * math.log(x) for x in p if x > 0.01))


def states(specimen, texts, length=None):
    """[layers][documents]: what comes out of each layer in float64, [T, D]; with a length, padded and masked."""
    model, found = specimen.model.double(), []
    hooks = [
        layer.register_forward_hook(lambda m, given, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers(model)
    ]
    for ids in texts:
        mask = [1] * len(ids)
        if length is not None:
            mask += [0] * (length - len(ids))
            ids = [*ids, *[specimen.tokenizer.pad_token_id] * (length - len(ids))]
        with torch.no_grad():
            more = {} if length is None else {"attention_mask": torch.tensor([mask])}
            model(input_ids=torch.tensor([ids]), use_cache=False, **more)
    for hook in hooks:
        hook.remove()
    n = len(hooks)
    return [[x[0] for x in found[i::n]] for i in range(n)]


def tokens(specimen, texts, most):
    return [specimen.tokenizer(text)["input_ids"][:most] for text in texts]


@pytest.fixture
def short_texts(tmp_path):
    """A corpus whose documents are of different lengths, all short."""
    texts = [
        "A short one.",
        "One that is a little longer than the first.",
        "Three",
        "And this is the fourth of them all.",
    ]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return str(path), texts


# The numbers


@pytest.mark.parametrize("k", [1, 2, 7, 64])
@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1.0, 1e12])
def test_k_equal_singular_values_are_k(k, scale):
    s = torch.full((k,), scale, dtype=torch.float64)
    for name in ("effective_rank", "participation_ratio", "stable_rank"):
        assert NUMBERS[name](s) == pytest.approx(k, rel=1e-12)
    assert NUMBERS["top_share"](s) == pytest.approx(1 / k, rel=1e-12)
    assert NUMBERS["gap"](s) == (0 if k > 1 else None)
    assert described_rank(s) == pytest.approx(k, rel=1e-12)


def test_spectra_worked_out_by_hand():
    s = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # p = 1/2, 1/4, 1/8, 1/8: an entropy of 7/4 bits
    assert effective_rank(s) == pytest.approx(2**1.75)
    assert NUMBERS["participation_ratio"](s) == pytest.approx(22**2 / (256 + 16 + 1 + 1))
    assert NUMBERS["stable_rank"](s) == pytest.approx(22 / 16) and NUMBERS["top_share"](s) == pytest.approx(16 / 22)
    assert NUMBERS["gap"](s) == 0.5
    nothing = torch.zeros(5, dtype=torch.float64)
    assert described_rank(nothing) is None and all(number(nothing) is None for number in NUMBERS.values())


def test_the_described_rank_drops_small_shares_and_does_not_norm_again():
    s = torch.tensor([0.9, 0.092, *[0.001] * 8], dtype=torch.float64)  # sums to 1
    assert described_rank(s) == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.092 * math.log(0.092)))
    assert described_rank(torch.ones(99, dtype=torch.float64)) == pytest.approx(99)
    assert described_rank(torch.ones(101, dtype=torch.float64)) == 1, "so flat that nothing is kept"


entries = st.floats(-100, 100, allow_nan=False, width=32)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def somehow(draw):
    n, d = draw(shapes)
    return torch.tensor(draw(st.lists(entries, min_size=n * d, max_size=n * d)), dtype=torch.float64).view(n, d)


@settings(max_examples=60)
@given(somehow(), st.integers(-60, 60), st.integers(0, 2**31))
def test_bounds_and_what_changes_nothing(matrix, power, seed):
    s = singular_values(matrix)
    assert len(s) == min(matrix.shape) and (s[:-1] >= s[1:]).all()
    if not matrix.any():
        assert effective_rank(s) is None
        return
    known = torch.linalg.svdvals(matrix)
    rank = int((known > 1e-9 * known[0]).sum())
    for name in ("effective_rank", "participation_ratio", "stable_rank"):
        assert 1 - 1e-9 <= NUMBERS[name](s) <= rank * (1 + 1e-5)
    assert 1 <= described_rank(s) <= effective_rank(s) * (1 + 1e-9)
    g = torch.Generator().manual_seed(seed)
    q, r = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0] for n in matrix.shape)
    # what is as small as rounding may be there or not: up to 9 directions of 2e-8 of the first
    for other in (matrix * 2.0**power, -matrix, q @ matrix, matrix @ r, matrix.T, matrix.flip(0)):
        again = singular_values(other)
        for name, number in NUMBERS.items():
            if name != "gap" or len(s) > 1:
                assert number(again) == pytest.approx(number(s), rel=1e-5, abs=1e-6)


@settings(max_examples=30)
@given(somehow())
def test_singular_values_are_those_of_a_decomposition(matrix):
    want = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(singular_values(matrix), want, rtol=1e-9, atol=float(want[0]) * 6e-8)


@pytest.mark.parametrize(("n", "d"), [(1500, 80), (80, 1500), (300, 300), (40, 1), (1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_shape_and_spectrum_agrees_with_float64(n, d, dtype):
    g = torch.Generator().manual_seed(n)
    x = (torch.randn(n, d, generator=g) * torch.logspace(0, -3, d)).to(dtype)
    s, want = singular_values(x), torch.linalg.svdvals(x.double())
    torch.testing.assert_close(s, want, rtol=1e-7, atol=0)
    if min(n, d) > 1:
        assert {name: number(s) for name, number in NUMBERS.items()} == pytest.approx(naive(x.double()), rel=1e-8)


def test_what_is_collapsed_is_seen_to_be():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 400, generator=g, dtype=torch.float64)
    assert int((singular_values(x) > 0).sum()) == 3
    assert effective_rank(singular_values(x)) == pytest.approx(effective_rank(torch.linalg.svdvals(x)), rel=1e-6)
    in_float32 = (x.float().T @ x.float()).double()
    assert effective_rank(spectra.roots(in_float32)) > 3.03, "products in float32 are not enough"


@pytest.mark.parametrize("away", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("cuts", [[600], [1, 599], [7, 300, 293], [1] * 20 + [580]])
def test_moments_do_not_mind_how_far_the_mean_is_nor_how_rows_come(away, cuts):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(600, 48, generator=g, dtype=torch.float64) * torch.logspace(0, -3, 48) + away
    x[0] *= 50  # the first row, which the others are taken relative to, may be far away itself
    whole, parts = Moments(48), [Moments(48), Moments(48), Moments(48)]
    for i, some in enumerate(x.split(cuts)):
        whole.add(some)
        parts[i % 2].add(some)
    want = torch.linalg.svdvals(x - x.mean(0))
    for found in (whole, parts[0].joined(parts[1]), parts[2].joined(parts[0]).joined(parts[1]).joined(parts[2])):
        assert found.rows == 600
        floor = float(want[0]) * 6e-8
        torch.testing.assert_close(found.centred(), want, rtol=1e-6, atol=floor)
        assert effective_rank(found.centred()) == pytest.approx(effective_rank(want), rel=1e-5)
        at_zero = torch.linalg.svdvals(x)
        assert effective_rank(found.uncentred()) == pytest.approx(effective_rank(at_zero), rel=1e-5)
        assert found.square_sum() == pytest.approx(float(x.square().sum()), rel=1e-12)


def test_a_float32_mean_of_a_million_does_not_show():
    g = torch.Generator().manual_seed(2)
    x = (torch.randn(500, 20, generator=g) * 30 + 1e6).float()  # with what float32 leaves of them
    found = Moments(20)
    found.add(x)
    want = torch.linalg.svdvals(x.double() - x.double().mean(0))
    torch.testing.assert_close(found.centred(), want, rtol=1e-9, atol=0)


def test_rows_that_are_all_the_same_have_no_spectrum_and_what_is_not_finite_none():
    same, broken = Moments(5), Moments(5)
    same.add(torch.full((9, 5), 1 / 3))
    same.add(torch.full((4, 5), 1 / 3))
    assert not same.centred().any() and effective_rank(same.uncentred()) == pytest.approx(1)
    broken.add(torch.tensor([[1.0, 2, 3, 4, 5], [1, 2, math.inf, 4, 5]]))
    assert broken.centred() is None and broken.uncentred() is None and same.joined(broken).centred() is None
    assert singular_values(torch.tensor([[1.0, math.nan]])) is None


# The measure


@pytest.mark.parametrize("family", CAUSAL)
def test_activations_are_those_of_transformers_own_forward(family):
    specimen = loaded(Trial(subject=Scratch(architecture=family)))
    rows = rows_of(Spectrum(documents=3, tokens=100), specimen)
    texts = tokens(specimen, [d.text for d in corpus("austen")[:3]], 100)
    for i, each in enumerate(states(specimen, texts)):
        row, x = rows[f"activations/layer-{i:02d}"], torch.cat([x[1:] for x in each])
        assert (
            row["outcome"] == "read"
            and row["rows"] == len(x) == 297
            and row["width"] == 64
            and row["few_rows"] is False
        )
        assert {name: row[name] for name in NUMBERS} == pytest.approx(naive(x - x.mean(0)), rel=1e-4)
        assert row["uncentred"] == pytest.approx(naive(x)["effective_rank"], rel=1e-4)
        assert row["described"] == pytest.approx(naive_described(torch.cat(each)), rel=1e-4)
        first = sum(float(x[0].square().sum()) for x in each)
        assert row["first_norm_share"] == pytest.approx(first / sum(float(x.square().sum()) for x in each), rel=1e-4)
    assert len(rows) == len(layers(specimen.model))


@pytest.mark.parametrize("family", CAUSAL)
def test_padding_counts_in_the_described_rank_and_nowhere_else(family, short_texts):
    path, texts = short_texts
    specimen = loaded(Trial(subject=Scratch(architecture=family)))
    rows = rows_of(Spectrum(corpus=path, tokens=60), specimen)
    alone = states(specimen, ids := tokens(specimen, texts, 60))
    for i, (each, filled) in enumerate(zip(alone, states(specimen, ids, 60), strict=True)):
        row, x = rows[f"activations/layer-{i:02d}"], torch.cat([x[1:] for x in each])
        assert row["rows"] == len(x) and row["few_rows"] is True
        assert {name: row[name] for name in NUMBERS} == pytest.approx(naive(x - x.mean(0)), rel=1e-4)
        assert row["described"] == pytest.approx(naive_described(torch.cat(filled)), rel=1e-4)
        assert abs(row["described"] / naive_described(torch.cat(each)) - 1) > 1e-3, "padding shows"


def test_padding_that_is_not_finite_reaches_no_text_and_a_tokenizer_may_have_none(short_texts):
    specimen = loaded(HEALTHY)
    measure = Spectrum(corpus=short_texts[0], tokens=60)
    before = rows_of(measure, specimen)
    with torch.no_grad():
        specimen.model.get_input_embeddings().weight[specimen.tokenizer.pad_token_id] = math.nan
    after = rows_of(measure, specimen)
    plain = lambda row: {k: v for k, v in row.items() if k not in ("described", "duration")}  # noqa: E731
    for item, row in before.items():
        assert plain(after[item]) == plain(row) and row["described"] > 1 and after[item]["described"] is None
    specimen.tokenizer.pad_token = specimen.tokenizer.eos_token
    assert all(row["described"] > 1 for row in rows_of(measure, specimen).values())
    specimen.tokenizer.pad_token = specimen.tokenizer.eos_token = None
    assert all(row["described"] is None and row["outcome"] == "read" for row in rows_of(measure, specimen).values())
    whole = rows_of(Spectrum(documents=2, tokens=30), specimen)  # whose documents need no padding
    assert all(row["described"] > 1 for row in whole.values())


def test_a_huge_first_position_is_told_apart_and_does_not_drown_the_rest():
    specimen = loaded(HEALTHY)
    measure = Spectrum(documents=4, tokens=80)
    before = rows_of(measure, specimen)
    model = specimen.model

    def grown(module, given, out):
        out = out.clone()
        out[:, 0, 3] = 1e5
        return out

    hook = model.model.embed_tokens.register_forward_hook(grown)
    after = rows_of(measure, specimen)
    hook.remove()
    for item, row in after.items():
        assert row["first_norm_share"] > 0.999 > 0.2 > before[item]["first_norm_share"]
        assert row["effective_rank"] == pytest.approx(before[item]["effective_rank"], rel=0.2)
        assert row["described"] < 2 < before[item]["described"]


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-smolvlm", "tiny-t5"])
def test_weights_and_their_change_are_those_of_the_matrices(family):
    healthy = Trial(subject=Scratch(architecture=family))
    damaged = healthy >> Noise(site="mlp.in", sigma=0.2)
    one, other = loaded(healthy), loaded(damaged)
    rows = rows_of(Spectrum(of=("weights", "change"), site="mlp.in+attention.value", reference=healthy), other)
    assert len(rows) == 2 * len(resolve(one.model, "mlp.in+attention.value"))
    seen = set()
    for view, before in zip(*(resolve(s.model, "mlp.in+attention.value") for s in (other, one)), strict=True):
        fused = "" if view.tensor.numel() == one.model.get_parameter(view.name).numel() else f":{view.part}"
        w, w0 = (v.tensor.double().reshape(-1, v.tensor.shape[-1]) for v in (view, before))
        row, moved = rows[f"weights/{view.name}{fused}"], rows[f"change/{view.name}{fused}"]
        assert {name: row[name] for name in NUMBERS} == pytest.approx(naive(w), rel=1e-6)
        assert (row["rows"], row["width"], row["layer"]) == (*w.shape, view.layer)
        if view.part == "mlp.in":
            assert moved["outcome"] == "read"
            assert {name: moved[name] for name in NUMBERS} == pytest.approx(naive(w - w0), rel=1e-6)
        else:
            assert moved["outcome"] == "zero" and all(moved[name] is None for name in NUMBERS)
        seen.add(view.part)
    assert seen == {"mlp.in", "attention.value"}


def test_fused_matrices_are_read_part_by_part():
    model = loaded(Trial(subject=Scratch(architecture="tiny-gpt2"))).model
    name = "transformer.h.1.attn.c_attn.weight"
    found = [n for n in matrices(model, "attention") if n.startswith(name)]
    assert found == [f"{name}:attention.{part}" for part in ("query", "key", "value")]
    value = model.get_parameter(name).detach()[:, 128:].T
    row = rows_of(Spectrum(of=("weights",), site="attention"), loaded(Trial(subject=Scratch(architecture="tiny-gpt2"))))
    assert row[f"weights/{found[2]}"]["effective_rank"] == pytest.approx(naive(value)["effective_rank"], rel=1e-8)


def test_a_planted_collapse_is_found_and_a_planted_nothing_is_not(lab):
    collapsed = HEALTHY >> TestCollapse(kept=2)
    touched = HEALTHY >> Noise(site=EVERYWHERE, sigma=1e-5)
    kinds = {"of": ("activations", "weights", "change"), "site": EVERYWHERE, "documents": 4, "tokens": 80}
    measure = Spectrum(reference=HEALTHY, **kinds).pin()
    store = lab.take(readings := product([HEALTHY, collapsed, touched], [measure]))
    assert not store.index.failures
    healthy, fallen, same = (store.index.seals[r.key].summary for r in readings)
    for name in ("activations_effective_rank", "last_effective_rank", "activations_uncentred", "activations_described"):
        assert fallen[name] < 0.5 * healthy[name], name
        assert same[name] == pytest.approx(healthy[name], rel=1e-3), name
    # the embedding's 2 directions, and 2 from each of 2 matrices that write in each of 2 layers
    assert 1 < fallen["last_effective_rank"] < 10
    assert fallen["weights_effective_rank"] < 2.001 < 40 < healthy["weights_effective_rank"]
    assert same["weights_effective_rank"] == pytest.approx(healthy["weights_effective_rank"], rel=1e-4)
    assert healthy["change_effective_rank"] is None and healthy["zero"] == 15 and same["zero"] == 0
    assert same["change_effective_rank"] > 40, "noise has all directions"
    assert healthy["few_rows"] == 0 and healthy["not_finite"] == 0


def test_the_summary_is_the_mean_of_the_rows():
    measure = Spectrum(of=("weights", "activations"), documents=2, tokens=20)
    rows = list(rows_of(measure, loaded(HEALTHY)).values())
    summary = measure.summarise(rows)
    ours = [row for row in rows if row["item"].startswith("activations/")]
    for name in (*NUMBERS, "uncentred", "described", "first_norm_share"):
        assert summary[f"activations_{name}"] == pytest.approx(np.mean([row[name] for row in ours]))
    assert summary["last_effective_rank"] == ours[-1]["effective_rank"] and summary["few_rows"] == len(ours)
    assert summary["weights_gap"] == pytest.approx(
        np.mean([r["gap"] for r in rows if r["item"].startswith("weights/")])
    )
    assert not any(name.startswith("change_") for name in summary)


def test_a_model_that_is_not_finite_is_an_outcome(lab):
    ruined = HEALTHY
    for _ in range(7):
        ruined >>= Noise(site="all", sigma=1e6)
    measure = Spectrum(of=("activations", "weights", "change"), reference=HEALTHY, documents=2, tokens=20).pin()
    store = lab.take(readings := product([ruined], [measure]))
    rows = list(store.rows([readings[0].key]))
    assert len(rows) == 2 + 2 * 14 and {row["outcome"] for row in rows} == {"not finite"}
    for row in rows:
        assert all(row[name] is None for name in NUMBERS)
        assert all(row.get(name) is None for name in ("uncentred", "described", "first_norm_share"))
    summary = store.index.seals[readings[0].key].summary
    assert summary["not_finite"] == 30
    assert all(
        value is None
        for name, value in summary.items()
        if name.startswith(("activations", "weights", "change", "last"))
    )


# What is refused


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"of": ("change",)}, "counted from a reference, and none is given"),
        ({"of": ("weights",), "reference": HEALTHY}, "a reference is for the spectrum of a change; asked for: weights"),
        ({"of": ("weights", "weights")}, "once, not weights, weights"),
        ({"of": ()}, "at least 1 item"),
        ({"of": ("wieghts",)}, "'activations', 'weights' or 'change'"),
        ({"site": "attention.value:0+mlp"}, "'attention.value:0' chooses heads"),
        ({"site": "mlp..in"}, "malformed site"),
        ({"tokens": 1}, "greater than or equal to 2"),
    ],
)
def test_what_does_not_fit_together_is_refused(asked, why):
    with pytest.raises(ValueError, match=why):
        Spectrum(**asked)


def test_what_a_model_does_not_have_is_refused_by_name(tmp_path):
    coder = loaded(Trial(subject=Scratch(architecture="tiny-t5")))
    with pytest.raises(ValueError, match="this one is encoder-decoder"):
        Spectrum().items(coder)
    here = loaded(HEALTHY)
    with pytest.raises(ValueError, match=r"model.layers.0.input_layernorm.weight of site 'norm' is a vector \[64\]"):
        Spectrum(of=("weights",), site="norm").items(here)
    with pytest.raises(ValueError, match="no site 'mpl'"):
        Spectrum(of=("weights",), site="mpl").items(here)
    asked = {"of": ("change",), "site": "mlp.out"}
    other = Spectrum(reference=Trial(subject=Scratch(architecture="tiny-gpt2")), **asked)
    with pytest.raises(
        ValueError, match="reference has no 'model.layers.0.mlp.down_proj.weight'.* there are: transformer.h.0"
    ):
        other.read(here, other.items(here))
    wide = Trial(subject=Scratch(architecture="tiny-llama", config={"intermediate_size": 128}))
    with pytest.raises(ValueError, match=r"is \[64, 96\] here and \[64, 128\] in the reference"):
        (measure := Spectrum(reference=wide, **asked)).read(here, measure.items(here))
    (tmp_path / "one.jsonl").write_text('{"id": "a", "text": "x"}\n')
    with pytest.raises(ValueError, match="document 'a' has fewer than two tokens"):
        (measure := Spectrum(corpus=str(tmp_path / "one.jsonl"))).read(here, measure.items(here))


def test_activations_of_a_model_with_adapters_are_read_and_its_wrapped_weights_are_not():
    from peft import LoraConfig, inject_adapter_in_model

    specimen = loaded(HEALTHY)
    before = rows_of(Spectrum(documents=2, tokens=40), specimen)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "up_proj"], r=2), specimen.model)
    for item, row in rows_of(Spectrum(documents=2, tokens=40), specimen).items():  # which add nothing yet
        assert row["effective_rank"] == pytest.approx(before[item]["effective_rank"], rel=1e-4)
    with pytest.raises(ValueError, match="merge or remove the adapter first"):
        Spectrum(of=("weights",)).items(specimen)


def test_activations_of_a_model_in_four_bits_are_read_and_its_codes_are_not(tmp_path):
    pytest.importorskip("bitsandbytes")
    shape = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    whole = Scratch(architecture="llama", config={**shape, "num_attention_heads": 4, "vocab_size": 260}).load()
    whole.model.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    four = loaded(Trial(subject=Directory(path=str(tmp_path), dtype="nf4")))
    measure = Spectrum(documents=2, tokens=40)
    exact = rows_of(measure, whole)
    for item, row in rows_of(measure, four).items():
        assert row["outcome"] == "read" and row["effective_rank"] == pytest.approx(
            exact[item]["effective_rank"], rel=0.1
        )
    with pytest.raises(ValueError, match="packed or quantised"):
        Spectrum(of=("weights",)).items(four)


def test_a_reference_is_pinned_with_the_measure_and_a_corpus_only_where_it_is_read(short_texts):
    path, _ = short_texts
    assert Spectrum(corpus=path).pin().sha256 and Spectrum(of=("weights",), corpus=path).pin().sha256 is None
    moving = Trial(subject=Scratch()) >> Noise(site="mlp", sigma=0.1)
    measure = Spectrum(of=("change",), reference=moving).pin()
    assert measure.reference == moving.pin() and list(measure.quotes()) == [moving.pin()]
    assert Spectrum(of=("activations", "weights")).size() == (230, 16 * 256)
    assert Spectrum(of=("weights",)).size() == (200, 0)
