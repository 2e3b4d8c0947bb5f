"""Attention against transformers' own eager probabilities, a Llama written out in float64, and sums done by hand."""

import json
import math
from itertools import pairwise

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import style
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GptOssConfig

from lesion import decoder
from lesion.attention import listening
from lesion.decoder import DecoderConfig, DecoderForCausalLM
from lesion.lab import product
from lesion.measures import Attention
from lesion.measures.attention import of_heads, uniform_sink
from lesion.packaged import TINY
from lesion.report import figures, maps
from lesion.subjects import Scratch

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}
THEIRS = [family for family in TINY if family not in ("tiny-t5", "tiny-decoder")]
ODD = {
    "gpt2, upcast and scaled by layer": GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=128, vocab_size=260,
        reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True,
    ),
    "gemma2, soft caps and windows": Gemma2Config(
        **SHAPE, intermediate_size=96, head_dim=16, sliding_window=16, attn_logit_softcapping=2.0,
    ),
    "gpt-oss, sink logits": GptOssConfig(
        **SHAPE, intermediate_size=32, head_dim=16, sliding_window=16, num_local_experts=2, num_experts_per_tok=1,
    ),
}  # fmt: skip
KINDS = {
    "none": {},
    "logit": {"sinks": "logit"},
    "window": {"sinks": "window", "window": 8},
    "cache": {"sinks": "cache", "window": 8, "sink_tokens": 2},
    "tokens": {"sinks": "tokens", "window": 5, "sink_tokens": 3},
}
IDS = torch.randint(0, 256, (1, 50), generator=torch.Generator().manual_seed(0))


def shaken(model, seed=0):
    """Weights so large that heads differ; of random ones every head is nearly uniform."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            large = 4 if "q_norm" in name else 0.3 if weight.dim() < 2 or "q_proj" in name else 0.15
            weight.add_(torch.randn(weight.shape, generator=g) * large)
    return model.eval()


def twin(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(AutoModelForCausalLM.from_config(config))


def ours(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(DecoderForCausalLM(DecoderConfig(**SHAPE, intermediate_size=96, **KINDS[kind])))


def heard(model, ids=IDS):
    """Layer by layer, in their order: probabilities and the mass on nothing; and the logits of that forward."""
    found = {}
    with torch.no_grad(), listening(model, lambda layer, p, nothing: found.update({layer: (p, nothing)})):
        logits = model(ids, use_cache=False).logits
    return [found[layer] for layer in range(len(found))], logits


def found_as(model):
    return [
        (type(m).__name__, sorted(m.__dict__), len(m._forward_hooks), getattr(m, "config", model.config)._attn_implementation)
        for m in model.modules()
    ]  # fmt: skip


def sums_and_past(layers):
    for p, nothing in layers:
        torch.testing.assert_close(p.sum(-1) + nothing, torch.ones_like(nothing), atol=1e-5, rtol=0)
        assert (p.triu(1) == 0).all() and (p >= 0).all() and (nothing >= 0).all()


@pytest.mark.parametrize("family", [*THEIRS, *ODD])
def test_probabilities_are_those_of_transformers_eager_attention(family):
    make = lambda: twin(ODD[family]) if family in ODD else shaken(Scratch(architecture=family).load().model)  # noqa: E731
    model, other = make(), make()
    before = found_as(model)
    layers, logits = heard(model)
    assert found_as(model) == before
    other.set_attn_implementation("eager")
    with torch.no_grad():
        want = other(IDS, output_attentions=True, use_cache=False)
    assert len(layers) == len(want.attentions)
    for (p, nothing), w in zip(layers, want.attentions, strict=True):
        torch.testing.assert_close(p, w, atol=1e-5, rtol=0)
        assert (nothing.max() > 0.01) == (family == "gpt-oss, sink logits")
    torch.testing.assert_close(logits, want.logits, atol=1e-4, rtol=1e-4)
    sums_and_past(layers)
    late = torch.stack([p[0, :, 30:] for p, _ in layers])
    assert late.max() > 0.25, "attention of these weights is too even to tell a fault"


def rotated(x, at, base=10000.0):
    half = x.shape[-1] // 2
    angle = at[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def test_a_llama_written_out_in_float64_has_the_same_probabilities():
    model = shaken(Scratch(architecture="tiny-llama").load().model)
    layers, _ = heard(model)
    w = {name: t.detach().double() for name, t in model.named_parameters()}
    norm = lambda x, name: x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * w[name]  # noqa: E731
    x, at, n = w["model.embed_tokens.weight"][IDS[0]], torch.arange(50, dtype=torch.float64), 50
    for i, (got, _) in enumerate(layers):
        here = f"model.layers.{i}."
        h = norm(x, here + "input_layernorm.weight")
        q, k, v = ((h @ w[f"{here}self_attn.{c}_proj.weight"].T).view(n, -1, 16) for c in "qkv")
        mixed = []
        for head in range(4):
            scores = rotated(q[:, head], at) @ rotated(k[:, head // 2], at).T / 4
            p = torch.zeros(n, n, dtype=torch.float64)
            for t in range(n):
                e = (scores[t, : t + 1] - scores[t, : t + 1].max()).exp()
                p[t, : t + 1] = e / e.sum()
            torch.testing.assert_close(got[0, head].double(), p, atol=1e-5, rtol=0)
            mixed.append(p @ v[:, head // 2])
        x = x + torch.cat(mixed, -1) @ w[f"{here}self_attn.o_proj.weight"].T
        h = norm(x, here + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{here}mlp.{c}_proj.weight"].T for c in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{here}mlp.down_proj.weight"].T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", [2**26, 4 * 50 * 7])  # all at once; seven queries at a time
def test_our_decoder_tells_what_its_sinks_do(kind, scores, monkeypatch):
    monkeypatch.setattr(decoder, "SCORES", scores, raising=False)
    model, attend = ours(kind), decoder.attend
    before = found_as(model)
    layers, logits = heard(model)
    assert found_as(model) == before and len(layers) == 3 and decoder.attend is attend
    sums_and_past(layers)
    inputs, n = [], IDS.shape[1]
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0].double()))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, use_cache=False).logits, logits, atol=1e-4, rtol=1e-4)
    window = model.config.window
    first = model.config.sink_tokens if kind in ("cache", "tokens") else 0
    for layer, x, (got, nothing) in zip(model.model.layers, inputs, layers, strict=True):
        a = layer.self_attn
        q, k = ((x @ part.weight.detach().double().T).view(n, -1, 16) for part in (a.q_proj, a.k_proj))
        for head in range(4):
            rest = math.exp(float(a.sink_logit.detach()[head])) if kind == "logit" else 0.0
            for t in range(n):
                held = [j for j in range(t + 1) if window is None or j < first or t - j < window]
                at = torch.arange(len(held), dtype=torch.float64)  # positions are those inside the cache
                scores = rotated(k[held, head // 2], at) @ rotated(q[t, head][None], at[-1:])[0] / 4
                p = torch.zeros(n, dtype=torch.float64)
                p[held] = scores.exp() / (scores.exp().sum() + rest)
                torch.testing.assert_close(got[0, head, t].double(), p, atol=1e-5, rtol=0)
                assert float(nothing[0, head, t]) == pytest.approx(1 - float(p.sum()), abs=1e-5)
        assert (nothing.max() > 0) == (kind == "logit")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["tiny-gemma3-text", "tiny-mistral", "tiny-decoder"])
def test_in_half_precision_it_is_the_same_attention_and_still_hides_the_future(family, kind):
    model = shaken(Scratch(architecture=family).load().model)
    exact, _ = heard(model)
    layers, _ = heard(model.to(kind))
    for (p, nothing), (q, _) in zip(layers, exact, strict=True):
        torch.testing.assert_close(p.sum(-1), torch.ones(1, 4, 50), atol=2e-2, rtol=0, check_dtype=False)
        assert (p.triu(1) == 0).all() and (nothing == 0).all()
        assert (p.float() - q).abs().mean() < 0.004


def test_a_head_that_asks_nothing_is_exactly_uniform():
    specimen = Scratch(architecture="tiny-llama").load()
    with torch.no_grad():
        for layer in specimen.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    measure = Attention(documents=2, tokens=37, sinks=3, grid=37).pin()
    rows = measure.read(specimen, measure.items(specimen))
    each = [1 / (t + 1) for t in range(37)]
    for row in rows:
        assert row["entropy_uniform"] == pytest.approx(math.log(math.factorial(37)) / 37, rel=1e-14)
        assert row["entropy"] == pytest.approx(row["entropy_uniform"], rel=1e-6)
        assert row["sink_uniform"] == pytest.approx(sum(3 * e for e in each[3:]) / 34, rel=1e-14)
        assert row["sink"] == pytest.approx(row["sink_uniform"], rel=1e-6)
        assert row["self"] == pytest.approx(sum(each) / 37, rel=1e-6) and row["nothing"] == 0
        assert row["previous"] == pytest.approx(sum(each[1:]) / 36, rel=1e-6)
    assert rows[0]["map"] == [[round(e, 4) if j <= t else 0.0 for j in range(37)] for t, e in enumerate(each)]
    summary = measure.summarise(rows)
    assert summary["entropy_ratio"] == pytest.approx(1, rel=1e-6) and summary["heads"] == 8


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 13),
    sinks=st.integers(1, 14),
    grid=st.integers(1, 16),
    logit=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_said_of_a_head_is_its_definition(n, sinks, grid, logit, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, n, n + 1, generator=g, dtype=torch.float64) * 3
    scores[:, :, 1:].masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    scores[:, :, 0] = scores[:, :, 0] if logit else -math.inf
    whole = scores.softmax(-1)
    p, nothing = whole[..., 1:], whole[..., 0]
    for head, row in enumerate(of_heads(p, nothing, sinks, grid)):
        a, z = p[head].tolist(), nothing[head].tolist()
        entropy = -sum(x * math.log(x) for t in range(n) for x in [*a[t], z[t]] if x > 0) / n
        sink = [sum(a[t][j] for j in range(sinks)) for t in range(sinks, n)]
        assert row["outcome"] == "mapped" and row["entropy"] == pytest.approx(entropy, rel=1e-12, abs=1e-12)
        assert row["sink"] == (pytest.approx(sum(sink) / len(sink), rel=1e-12) if sink else None)
        assert row["nothing"] == pytest.approx(sum(z) / n, rel=1e-12, abs=0)
        assert row["self"] == pytest.approx(sum(a[t][t] for t in range(n)) / n, rel=1e-12)
        assert row["previous"] == pytest.approx(sum(a[t][t - 1] for t in range(1, n)) / (n - 1), rel=1e-12)
        size = min(grid, n)
        starts = [b * n // size for b in range(size + 1)]
        for b, queries in enumerate(pairwise(starts)):
            for c, keys in enumerate(pairwise(starts)):
                mass = [sum(a[t][slice(*keys)]) for t in range(*queries)]
                assert row["map"][b][c] == pytest.approx(sum(mass) / len(mass), abs=5.1e-5)
    assert all(row["map"] is None for row in of_heads(p, nothing, sinks, None))


def test_a_reading_has_a_row_for_each_head_and_a_map_for_the_first_document(lab):
    measure = Attention(documents=2, tokens=30, grid=6)
    store = lab.take(readings := product([Scratch(architecture="tiny-decoder")], [measure]))
    assert not store.index.failures
    rows = list(store.rows([readings[0].key]))
    names = [f"austen/chapter-{d:02d}@L{i:02d}H{h:02d}" for d in (1, 2) for i in range(2) for h in range(4)]
    assert [row["item"] for row in rows] == names
    assert [row["map"] is not None for row in rows] == [True] * 8 + [False] * 8
    assert all(len(row["map"]) == 6 and sum(row["map"][5]) == pytest.approx(1, abs=1e-3) for row in rows[:8])
    frame = store.table([readings[0].key])
    assert frame["map"].null_count() == 8 and frame.height == 16
    summary = store.index.seals[readings[0].key].summary
    assert summary["heads"] == 8 and summary["not_finite"] == 0 and 0 < summary["entropy_ratio"] <= 1 + 1e-9
    assert summary["sink"] == pytest.approx(sum(row["sink"] for row in rows) / 16)


def test_a_short_text_has_no_sink_and_a_single_token_is_refused(tmp_path):
    file = tmp_path / "short.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "id": text}) for text in ("a@bc", "d")))
    specimen = Scratch(architecture="tiny-gpt2").load()
    measure = Attention(corpus=str(file), tokens=9).pin()
    first, second = measure.chunks(measure.items(specimen))
    rows = measure.read(specimen, first)
    assert rows[3]["item"] == "a@bc@L00H03" and rows[3]["tokens"] == 4 and len(rows[3]["map"]) == 4
    assert rows[3]["sink"] is rows[3]["sink_uniform"] is measure.summarise(rows)["sink"] is None
    with pytest.raises(ValueError, match="'d' has fewer than two tokens"):
        measure.read(specimen, second)


def test_heads_that_are_not_finite_are_an_outcome():
    specimen = Scratch(architecture="tiny-llama").load()
    with torch.no_grad():
        specimen.model.model.layers[1].self_attn.q_proj.weight[16:32] = math.nan  # head 1 of layer 1
    measure = Attention(documents=1, tokens=20).pin()
    rows = measure.read(specimen, measure.items(specimen))
    assert [row["outcome"] == "not finite" for row in rows] == [n == 5 for n in range(8)]
    assert rows[5]["entropy"] is rows[5]["sink"] is rows[5]["map"] is None
    assert measure.summarise(rows)["not_finite"] == 1 and math.isfinite(measure.summarise(rows)["sink"])
    nothing = measure.summarise(rows[5:6])
    assert nothing["entropy_ratio"] is None and nothing["heads"] == 1


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma3", "tiny-decoder"])
def test_a_model_is_left_as_it_was_found_even_by_an_error(family):
    model = Scratch(architecture=family).load().model
    if family == "tiny-gemma3":  # its parts need not agree
        model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    before, attend = found_as(model), decoder.attend

    def hear(layer, p, nothing):
        raise RuntimeError("too loud")

    for ids, error in ((IDS, "too loud"), (None, "input")):
        with pytest.raises((RuntimeError, ValueError, AttributeError, TypeError), match=error), listening(model, hear):
            model(ids, use_cache=False)
        assert found_as(model) == before and decoder.attend is attend
    with listening(model, lambda *told: None), torch.no_grad():
        assert found_as(model) != before
    assert found_as(model) == before


def test_attention_that_is_computed_in_another_way_is_refused_and_so_are_two_towers():
    specimen = Scratch(architecture="tiny-decoder").load()
    module = specimen.model.model.layers[1].self_attn
    module.forward = type(module).forward.__get__(module)  # somebody else's patch stays where it is
    measure = Attention(documents=1, tokens=20).pin()
    with pytest.raises(ValueError, match=r"expected 2 layers of 4 heads .* told of \(layer, heads\) \(0, 4\)"):
        measure.read(specimen, measure.items(specimen))
    assert "forward" in module.__dict__ and "forward" not in specimen.model.model.layers[0].self_attn.__dict__
    t5 = Scratch(architecture="tiny-t5").load()
    for refused in (lambda: measure.items(t5), lambda: measure.read(t5, ["austen/chapter-01@L00H00"])):
        with pytest.raises(ValueError, match="encoder-decoder"):
            refused()


def told(layers, heads, documents=2, tokens=20, **changes):
    """Rows as a reading has them: the further down and across a head is, the more it gives to the first token."""
    rows = []
    for d in range(documents):
        for i in range(layers):
            for h in range(heads):
                first = (i * heads + h) / (layers * heads)
                p = torch.eye(tokens, dtype=torch.float64)[None] * (1 - first)
                p[..., 0] += first
                row = of_heads(p, torch.zeros(1, tokens), 4, 16 if d == 0 else None)[0]
                uniform = {"entropy_uniform": math.lgamma(tokens + 1) / tokens, "sink_uniform": uniform_sink(tokens, 4)}
                rows.append({"document": str(d), "layer": i, "head": h, "tokens": tokens, **uniform, **row})
    for (i, h), change in changes.get("at", {}).items():
        for row in rows:
            if (row["layer"], row["head"]) == (i, h):
                row.update(dict.fromkeys(("entropy", "sink", "nothing", "previous", "self", "map")), outcome=change)
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_figure_shows_the_most_and_the_least_and_hatches_what_is_missing():
    rows = told(3, 4, at={(2, 3): "not finite"})
    names = [name for name, _, _ in maps.chosen(rows)]
    assert names == ["layer 2, head 2", "layer 2, head 1", "layer 2, head 0", "layer 0, head 1", "layer 0, head 0", "a uniform head"]  # fmt: skip
    each = maps.heads(rows)
    assert each["sink"].null_count() == each["ratio"].null_count() == 1
    assert each["sink"][6] == pytest.approx(0.5) and each["ratio"][0] == pytest.approx(0)
    with style.context(["default", figures.STYLE]):
        figure = maps.panel(rows, "Attention")
    grids = figure.axes[0], figure.axes[2]
    for axes, name in zip(grids, ("sink", "ratio"), strict=True):
        shown = axes.collections[0].get_array()
        assert [p.get_gid() for p in axes.patches] == ["no-value-2-3"] and shown.mask.sum() == 1
        assert shown.compressed().tolist() == each[name].drop_nulls().to_list()
    drawing = maps.draw(rows, "Attention <i>")
    assert drawing == maps.draw(rows, "Attention <i>") and drawing.png.startswith(b"\x89PNG")
    assert drawing.caption.startswith("12 heads, means over 2 documents of 20 tokens; ")
    assert drawing.caption.endswith("hatched: no value (1 of 12 heads)")
    figures.inline(drawing)


def test_the_uniform_map_is_that_of_uniform_probabilities():
    for n, grid in ((20, 16), (16, 16), (3, 3), (128, 16), (50, 7)):
        p = torch.ones(1, n, n, dtype=torch.float64).tril()
        want = of_heads(p / p.sum(-1, keepdim=True), torch.zeros(1, n), 4, grid)[0]["map"]
        found = maps.uniform(pl.DataFrame({"tokens": [n]}), grid)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(want, dtype=torch.float64), atol=5.1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "tokens"), [((1, 1), 3), ((1, 1), 20), ((2, 2), 20), ((4, 3), 2), ((25, 14), 20)])
def test_a_figure_of_any_size_is_drawn(shape, tokens):
    rows = told(*shape, documents=1, tokens=tokens)
    maps.draw(rows, "Attention")
    gone = rows.with_columns(pl.lit(None).alias(name) for name in ("entropy", "sink", "map"))
    assert maps.chosen(gone) == [] and b"svg" in maps.draw(gone, "Attention").svg
    with pytest.raises(ValueError, match="rows of one reading"):
        maps.draw(pl.concat((rows, rows)), "Attention")
