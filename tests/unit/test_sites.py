"""Sites against tiny random twins of every family, and against published sizes on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    T5Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from lesion.contents import layer_count
from lesion.families import FAMILIES, Place, Tower
from lesion.sites import View, parse, parts, resolve

# Sizes differ from each other wherever a family allows it, so that no two axes can be confused.
D, LAYERS, HEADS, KV, WIDTH, NEURONS, WORDS = 24, 3, 4, 2, 10, 40, 64
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EQUAL: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": WORDS,
    "max_position_embeddings": 30,
    **IDS,
}
PLAIN = EQUAL | {"intermediate_size": NEURONS}
GROUPED = PLAIN | {"num_key_value_heads": KV}
WIDE = GROUPED | {"head_dim": WIDTH}
T5 = {"d_model": D, "d_kv": WIDTH, "d_ff": NEURONS, "num_heads": HEADS, "vocab_size": WORDS, "num_layers": LAYERS}
T5 |= {"num_decoder_layers": 2, "relative_attention_num_buckets": 16, "eos_token_id": 2, "pad_token_id": 0}
EYE = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
EYE |= {"image_size": 8, "patch_size": 4, "vision_use_head": False}
GPT2 = {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_inner": NEURONS, "n_positions": 30, "vocab_size": WORDS}

TWINS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt_neox": lambda: GPTNeoXConfig(**PLAIN),
    "gpt2": lambda: GPT2Config(**GPT2, **IDS),
    "llama": lambda: LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**PLAIN, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**GROUPED),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**WIDE),
    "smollm3": lambda: SmolLM3Config(**GROUPED),
    "gemma": lambda: GemmaConfig(**WIDE),
    "gemma2": lambda: Gemma2Config(**WIDE, attn_logit_softcapping=None),
    "gemma3_text": lambda: Gemma3TextConfig(**WIDE),
    "gemma3": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**WIDE).to_dict(), vision_config=EYE, mm_tokens_per_image=4, image_token_id=63
    ),
    "opt": lambda: OPTConfig(**EQUAL, ffn_dim=NEURONS, word_embed_proj_dim=D),
    "opt-350m": lambda: OPTConfig(**EQUAL, ffn_dim=NEURONS, word_embed_proj_dim=6, do_layer_norm_before=False),
    "t5": lambda: T5Config(**T5),
    "t5-v1.1": lambda: T5Config(**T5, feed_forward_proj="gated-gelu"),
}
ALL_TWINS = pytest.mark.parametrize("twin", TWINS)
EVERYTHING = {
    "gemma3": "all+norm+vision/all+vision/norm+projector/all+projector/norm",
    **{name: "all+norm" for name in TWINS if name != "gemma3"},
}


def build(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    auto = {"t5": AutoModelForSeq2SeqLM, "gemma3": AutoModelForImageTextToText}
    return auto.get(config.model_type, AutoModelForCausalLM).from_config(config, **kwargs).eval()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


@pytest.fixture
def make() -> Callable[[str], PreTrainedModel]:
    """Builds a twin in float64, with every parameter drawn, biases and norms too."""

    def twin(name: str) -> PreTrainedModel:
        model = build(TWINS[name](), dtype=torch.float64)
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        return model

    return twin


def run(model: PreTrainedModel, tower: str = "text") -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) + 3
    if tower == "vision":
        image = torch.linspace(-1, 1, 192, dtype=torch.float64).view(1, 3, 8, 8)
        return model.model.vision_tower(pixel_values=image).last_hidden_state
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids.flip(1)[:, :5]).logits
    return model(input_ids=ids).logits


def copies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def restore(model: PreTrainedModel, saved: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])


def wipe(model: PreTrainedModel, site: str) -> None:
    for view in resolve(model, site, biases=True):
        view.tensor.zero_()


def one(views: list[View]) -> torch.Tensor:
    (view,) = views
    return view.tensor


# ------------------------------------------------------------------------------------------------- views and addresses


@ALL_TWINS
def test_all_sites_together_hold_every_number_of_the_model_once(make, twin):
    model = make(twin)
    for parameter in model.parameters():
        parameter.zero_()
    views = resolve(model, EVERYTHING[twin], biases=True)
    for view in views:
        view.tensor.add_(1)
    wrong = [name for name, parameter in model.named_parameters() if not (parameter == 1).all()]
    assert wrong == []
    assert len({(view.name, view.part) for view in views}) == len(views)
    assert {view.name for view in views} == {name for name, _ in model.named_parameters()}


@ALL_TWINS
def test_writing_into_a_site_changes_its_parameters_and_nothing_else(make, twin):
    model = make(twin)
    before = copies(model)
    for site in parts(model):
        views = resolve(model, site)
        assert views, site
        for view in views:
            assert not view.tensor.requires_grad
            view.tensor.add_(1)
        changed = {name: int((p != before[name]).sum()) for name, p in model.named_parameters()}
        expected = dict.fromkeys(before, 0)
        for view in views:
            expected[view.name] += view.tensor.numel()
        assert changed == expected, site
        restore(model, before)


@ALL_TWINS
def test_orientation_is_the_same_in_every_family(make, twin):
    model = make(twin)
    config = model.config.get_text_config() if twin == "gemma3" else model.config
    kv = getattr(config, "num_key_value_heads", HEADS)
    width = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or D // HEADS
    narrow = 6 if twin == "opt-350m" else D
    shapes = {
        "query": ((HEADS, width, D), 0, (0, 1)),
        "key": ((kv, width, D), 0, (0, 1)),
        "value": ((kv, width, D), 0, (0, 1)),
        "output": ((D, HEADS, width), 1, (0,)),
        "in": ((NEURONS, D), 0, (0,)),
        "gate": ((NEURONS, D), 0, (0,)),
        "out": ((D, NEURONS), 1, (0,)),
    }
    for view in resolve(model, "attention+mlp" + ("+cross" if "t5" in twin else "")):
        found = (tuple(view.tensor.shape), view.units, view.outputs)
        assert found == shapes[view.part.partition(".")[2]], view.part
    for site in ("embedding", "head"):
        tensor = one(resolve(model, site))
        assert tensor.shape == (WORDS, narrow)
    biases = {v.part: v for v in resolve(model, "attention+mlp", biases=True) if v.part.endswith(".bias")}
    for part, view in biases.items():
        headed = {"attention.query.bias": HEADS, "attention.key.bias": kv, "attention.value.bias": kv}
        if part in headed:
            assert (view.tensor.shape, view.units, view.outputs) == ((headed[part], width), 0, (0, 1))
        else:
            assert (view.tensor.dim(), view.outputs) == (1, (0,))
            assert view.units == (0 if part in ("mlp.in.bias", "mlp.gate.bias") else None)


def test_fused_projections_agree_with_a_split_by_hand(make):
    neox, gpt2 = make("gpt_neox"), make("gpt2")
    for i, part in enumerate(("query", "key", "value")):
        module = neox.gpt_neox.layers[1].attention.query_key_value
        by_hand = torch.stack([module.weight[18 * h + 6 * i : 18 * h + 6 * i + 6] for h in range(HEADS)])
        bias = torch.stack([module.bias[18 * h + 6 * i : 18 * h + 6 * i + 6] for h in range(HEADS)])
        weight_view, bias_view = resolve(neox, f"attention.{part}@1", biases=True)
        assert torch.equal(weight_view.tensor, by_hand)
        assert torch.equal(bias_view.tensor, bias)
        module = gpt2.transformer.h[1].attn.c_attn
        weight_view, bias_view = resolve(gpt2, f"attention.{part}@1", biases=True)
        assert torch.equal(weight_view.tensor, module.weight.split(D, dim=1)[i].T.reshape(HEADS, 6, D))
        assert torch.equal(bias_view.tensor, module.bias.split(D)[i].reshape(HEADS, 6))


@ALL_TWINS
def test_parts_lists_addresses_in_reading_order_without_repeats(make, twin):
    listed = parts(make(twin))
    roles = ["embedding", "projection", "position", "attention", "cross", "mlp", "norm", "head", "all"]
    assert len(set(listed)) == len(listed)
    defaults = [site for site in listed if "/" not in site]
    assert listed[: len(defaults)] == defaults
    ranks = [roles.index(site.partition(".")[0]) for site in defaults]
    assert all(a <= b for a, b in pairwise(ranks))
    towers = {"gemma3": {"vision", "projector"}, "t5": {"encoder", "decoder"}, "t5-v1.1": {"encoder", "decoder"}}
    assert {site.partition("/")[0] for site in listed if "/" in site} == towers.get(twin, set())


def test_parts_of_gpt_neox_are_these(make):
    attention = "attention attention.query attention.key attention.value attention.output"
    assert parts(make("gpt_neox")) == f"embedding {attention} mlp mlp.in mlp.out norm head all".split()
    assert "mlp.gate" in parts(make("llama"))
    assert "position" in parts(make("gpt2"))
    assert "decoder/cross.key" in parts(make("t5"))
    assert "projection.out" in parts(make("opt-350m"))
    assert "text/mlp" not in parts(make("gemma3"))


def test_a_missing_tower_means_the_text_model(make):
    gemma, t5 = make("gemma3"), make("t5")

    def where(model: PreTrainedModel, site: str) -> list[tuple[str, str, int | None]]:
        return [(view.tower, view.name, view.layer) for view in resolve(model, site)]

    assert where(gemma, "attention.value") == where(gemma, "text/attention.value")
    assert {tower for tower, _, _ in where(gemma, "all+norm")} == {"text"}
    assert {tower for tower, _, _ in where(gemma, "vision/mlp")} == {"vision"}
    assert one(resolve(gemma, "projector/projection")).shape == (D, 12)
    assert one(resolve(gemma, "vision/embedding")).shape == (12, 3 * 4 * 4)
    assert where(t5, "mlp") == where(t5, "encoder/mlp") + where(t5, "decoder/mlp")
    assert where(t5, "cross.key") == where(t5, "decoder/cross.key")
    assert [layer for _, _, layer in where(t5, "mlp.in")] == [0, 1, 2, 0, 1]
    assert [layer for _, _, layer in where(t5, "position")] == [None, None]


@pytest.mark.parametrize(
    ("site", "same"),
    [
        ("mlp+attention.output", "attention.output+mlp"),
        ("mlp+mlp.in", "mlp"),
        ("mlp.in+mlp.in", "mlp.in"),
        ("mlp.in@0-1+mlp.in@1-2", "mlp.in"),
        ("mlp.in@2,0,1,1", "mlp.in@0-2"),
        ("attention.value:1+attention.value", "attention.value"),
        ("attention.value+attention.value:1", "attention.value"),
        ("attention.query:0-1+attention.query:1-2", "attention.query:0-2"),
        ("attention.query:3,1,2", "attention.query:1-3"),
        ("all+mlp", "all"),
        ("embedding+attention+mlp+head", "all"),
    ],
)
def test_what_is_addressed_twice_comes_once(make, site, same):
    model = make("llama")
    found, expected = ([(v.name, v.part, v.layer, v.tensor.shape) for v in resolve(model, s)] for s in (site, same))
    assert found == expected
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(resolve(model, site), resolve(model, same), strict=True))


def test_tied_embeddings_are_one_parameter_under_its_first_name(make):
    for twin, name in {"llama-tied": "model.embed_tokens.weight", "t5": "shared.weight"}.items():
        model = make(twin)
        for site in ("embedding", "head", "embedding+head", "head+embedding"):
            (view,) = resolve(model, site)
            assert view.name == name
            assert view.tensor.data_ptr() == model.get_output_embeddings().weight.data_ptr()
        assert sum(view.name == name for view in resolve(model, "all")) == 1
        assert resolve(model, "head")[0].part == "head"
        assert resolve(model, "embedding+head")[0].part == "embedding"
    untied = resolve(make("llama"), "embedding+head")
    assert [(v.name, v.part) for v in untied] == [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
    ]


def test_layers_leave_out_what_is_in_none(make):
    model = make("gpt2")
    views = resolve(model, "all@1+norm@1", biases=True)
    assert {view.layer for view in views} == {1}
    assert {view.name for view in views} == {n for n, _ in model.named_parameters() if n.startswith("transformer.h.1.")}


def test_biases_of_outputs_belong_to_no_head(make):
    model = make("gpt2")
    found = {view.part for view in resolve(model, "attention@0:1", biases=True)}
    assert "attention.output" in found
    assert "attention.output.bias" not in found
    assert "attention.value.bias" in found
    assert all(view.tensor.shape[view.units] == 1 for view in resolve(model, "attention@0:1", biases=True))
    assert "attention.output.bias" in {view.part for view in resolve(model, "attention@0", biases=True)}


numbers = st.sets(st.integers(0, 2), min_size=1)


@given(
    layers=numbers, heads=st.sets(st.integers(0, HEADS - 1), min_size=1), family=st.sampled_from(["gpt_neox", "gpt2"])
)
def test_any_choice_of_layers_and_heads_is_exactly_that_choice(layers, heads, family):
    model = any_twin(family)
    listed = ",".join(map(str, layers)), ",".join(map(str, heads))
    for part in ("query", "key", "value", "output"):
        whole = resolve(model, f"attention.{part}")
        expected = torch.zeros(len(whole), HEADS)
        expected[[[layer] for layer in layers], list(heads)] = 1
        for view in whole:
            view.tensor.zero_()
        for view in resolve(model, f"attention.{part}@{listed[0]}:{listed[1]}"):
            view.tensor.add_(1)
        for view, row in zip(whole, expected, strict=True):
            shape = [-1 if axis == view.units else 1 for axis in range(3)]
            assert torch.equal(view.tensor, row.view(shape).expand_as(view.tensor))


_kept: dict[str, PreTrainedModel] = {}


def any_twin(family: str) -> PreTrainedModel:
    """One twin for all examples of a property, which each write what they read."""
    return _kept[family] if family in _kept else _kept.setdefault(family, build(TWINS[family]()))


# -------------------------------------------------------------------------------------------------- what a site means


def attentions(twin: str, tower: str) -> list[tuple[str, int]]:
    """(role, layer) of every call of an attention function, in order, with the tower for an encoder-decoder."""
    if tower == "vision":
        return [("vision/attention", layer) for layer in range(2)]
    if "t5" in twin:
        encoder = [("encoder/attention", layer) for layer in range(LAYERS)]
        return encoder + [(f"decoder/{role}", layer) for layer in range(2) for role in ("attention", "cross")]
    return [("attention", layer) for layer in range(LAYERS)]


@pytest.fixture
def spied(monkeypatch) -> Callable[..., tuple[torch.Tensor, list[dict[str, torch.Tensor]]]]:
    """Runs a model; returns its output and what each attention was given. `mute` silences one head of one call."""
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]
    given_: list[dict[str, torch.Tensor]] = []
    muted: list[tuple[int, int]] = []

    def spy(module, query, key, value, *args, **kwargs):
        out, weights = real(module, query, key, value, *args, **kwargs)
        given_.append({"query": query.clone(), "key": key.clone(), "value": value.clone()})
        if muted and muted[0][0] == len(given_) - 1:
            out = out.clone()
            out[:, :, muted[0][1]] = 0
        return out, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)

    def spied_run(model, tower="text", mute=None):
        model.config._attn_implementation = "sdpa"  # Gemma 2 would choose the one that caps its scores
        given_.clear()
        muted[:] = [] if mute is None else [mute]
        return run(model, tower), list(given_)

    return spied_run


TOWERS = [(twin, "text") for twin in TWINS] + [("gemma3", "vision")]


@pytest.mark.parametrize(("twin", "tower"), TOWERS)
def test_a_head_of_the_address_is_the_head_that_the_model_computes(make, spied, twin, tower):
    model = make(twin)
    saved = copies(model)
    intact, before = spied(model, tower)
    calls = attentions(twin, tower)
    assert len(calls) == len(before)
    for call, (role, layer) in enumerate(calls):
        if layer != 1:
            continue
        for part in ("query", "key", "value"):
            wipe(model, f"{role}.{part}@{layer}:1")
            damaged, after = spied(model, tower)
            restore(model, saved)
            assert not torch.equal(damaged, intact)
            for other in ("query", "key", "value"):
                was, now = before[call][other], after[call][other]
                if other == part:
                    assert (now[:, 1] == 0).all()
                    assert (was[:, 1] != 0).any()
                    was, now = (x[:, [h for h in range(x.shape[1]) if h != 1]] for x in (was, now))
                torch.testing.assert_close(now, was, rtol=0, atol=1e-12)
        muted, _ = spied(model, tower, mute=(call, 1))
        wipe(model, f"{role}.output@{layer}:1")
        damaged = run(model, tower)
        restore(model, saved)
        torch.testing.assert_close(damaged, muted, rtol=0, atol=1e-9)
        assert not torch.allclose(damaged, intact)


@pytest.mark.parametrize(("twin", "tower"), TOWERS)
def test_a_neuron_is_silent_whichever_of_its_weights_is_gone(make, twin, tower):
    model = make(twin)
    saved, intact = copies(model), run(model, tower)
    for name in {"t5": ("encoder", "decoder"), "t5-v1.1": ("encoder", "decoder")}.get(twin, (tower,)):
        results = []
        for part in ("in", "gate", "out"):
            if part == "gate" and f"{name}/mlp.gate".removeprefix("text/") not in parts(model):
                continue
            views = resolve(model, f"{name}/mlp.{part}@1", biases=part != "out")
            for view in views:
                view.tensor.select(view.units, 5).zero_()
            results.append(run(model, tower))
            restore(model, saved)
        assert not torch.allclose(results[0], intact)
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("twin", ["llama", "qwen3", "gemma", "gemma2", "gemma3", "smollm3", "t5-v1.1"])
def test_the_gate_is_the_half_that_is_activated(make, twin):
    """The other half enters the product as it is, so to double a neuron there is to double its column in mlp.out."""
    model = make(twin)
    saved, doubled = copies(model), {}
    tower = "encoder" if twin == "t5-v1.1" else "text"
    for part in ("in", "gate", "out"):
        for view in resolve(model, f"{tower}/mlp.{part}@1", biases=part != "out"):
            view.tensor.select(view.units, 5).mul_(2)
        doubled[part] = run(model)
        restore(model, saved)
    torch.testing.assert_close(doubled["in"], doubled["out"], rtol=0, atol=1e-9)
    assert not torch.allclose(doubled["gate"], doubled["out"])


@ALL_TWINS
def test_rows_of_embedding_and_head_are_tokens(make, twin):
    model = make(twin)
    embedding, head = one(resolve(model, "embedding")), one(resolve(model, "head"))
    assert torch.equal(embedding[7], model.get_input_embeddings().weight[7])
    assert embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert head.data_ptr() == model.get_output_embeddings().weight.data_ptr()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("twin", "site", "says"),
    [
        ("llama", "mpl", "no site 'mpl' in llama; there are: embedding, attention, attention.query, attention.key"),
        (
            "llama",
            "mlp.gates@0",
            "no site 'mlp.gates' in llama; there are: .*mlp.in, mlp.gate, mlp.out, norm, head, all$",
        ),
        ("gpt2", "mlp.gate", "no site 'mlp.gate' in gpt2"),
        ("gpt_neox", "position", "no site 'position' in gpt_neox"),
        ("gpt_neox", "cross.key", "no site 'cross.key'"),
        ("gpt_neox", "attent", "no site 'attent'"),
        ("gpt_neox", "Attention", "no site 'Attention'"),
        ("gpt_neox", "all.query", "no site 'all.query'"),
        ("gpt_neox", "query_key_value", "no site 'query_key_value'"),
        ("llama", "vision/mlp", "no site 'vision/mlp' in llama"),
        ("gemma3", "vision/head", "no site 'vision/head' in gemma3; .*vision/attention.value"),
        ("gemma3", "projector/mlp", "no site 'projector/mlp'"),
        ("t5", "encoder/cross.key", "no site 'encoder/cross.key' in t5"),
        ("t5", "text/mlp", "no site 'text/mlp' in t5"),
        ("llama", "mlp+mpl", "no site 'mpl'"),
        ("llama", "mlp@3", "no layer 3 in the text tower, as site 'mlp@3' asks; there are: 0-2"),
        ("llama", "mlp@0-999999999999", "no layer 999999999999 in the text tower"),
        ("t5", "mlp@2", "no layer 2 in the decoder tower"),
        ("llama", "embedding@0", "asks for layers, but in llama 'embedding' is in none"),
        ("t5", "position@0", "'position' is in none"),
        (
            "llama",
            "attention.query:4",
            "no head 4 in attention.query, as site 'attention.query:4' asks; there are: 0-3",
        ),
        ("llama", "attention.key:2", "no head 2 in attention.key.*; there are: 0-1"),
        (
            "llama",
            "attention:0",
            "ambiguous: llama has 4 query and 2 key-value heads; name parts, as in 'attention.query",
        ),
        ("gpt2", "mlp:0", "asks for heads, which only 'attention' and 'cross' have"),
        ("gpt2", "all@0:0", "asks for heads"),
        ("gpt2", "norm@0:0", "asks for heads"),
        *(
            ("llama", site, "malformed site")
            for site in (
                *(
                    "",
                    " ",
                    "+",
                    "mlp+",
                    "+mlp",
                    "mlp + attention",
                    "mlp.",
                    ".in",
                    "mlp.in.bias",
                    "mlp@",
                    "mlp@-1",
                    "mlp@1-",
                ),
                *(
                    "mlp@a",
                    "mlp@1,",
                    "mlp@1:0@2",
                    "mlp:",
                    "attention:0@1",
                    "/mlp",
                    "a/b/mlp",
                    "mlp@2-1",
                    "mlp@٣",
                    "mlp\n",
                ),
            )
        ),
    ],
)
def test_an_address_that_matches_nothing_says_what_exists(make, twin, site, says):
    with pytest.raises(ValueError, match=says):
        resolve(make(twin), site)


@given(st.text("mlpin.@+-:,/013a ", max_size=14))
def test_reading_an_address_returns_terms_or_refuses(text):
    try:
        terms = parse(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert "+".join(term.text for term in terms) == text


def test_layer_count_by_tower(make):
    assert layer_count(make("gpt2")) == LAYERS
    gemma, t5 = make("gemma3"), make("t5")
    assert [layer_count(gemma), *(layer_count(gemma, t) for t in ("text", "vision", "projector"))] == [3, 3, 2, 0]
    assert (layer_count(t5, "encoder"), layer_count(t5, "decoder")) == (3, 2)
    assert layer_count(build(T5Config(**T5 | {"num_decoder_layers": LAYERS}))) == LAYERS
    with pytest.raises(ValueError, match=r"towers of t5 differ in layers \(encoder 3, decoder 2\)"):
        layer_count(t5)
    with pytest.raises(ValueError, match="no tower 'ear' in gemma3; there are: text, vision, projector"):
        layer_count(gemma, "ear")


class Params4bit(nn.Parameter):
    """As bitsandbytes calls it."""


class Adapted(nn.Module):
    """As peft wraps a layer: it passes `weight` through."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


class Packed(nn.Module):
    """As GPTQ packs a layer: integers in buffers, and no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(3, dtype=torch.int32))


def frozen(kind: type[nn.Parameter], dtype: torch.dtype) -> nn.Parameter:
    return kind(torch.zeros(KV * WIDTH, D, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize(
    ("parameter", "says"),
    [
        (partial(frozen, nn.Parameter, torch.int8), "packed or quantised .Parameter, int8"),
        (partial(frozen, nn.Parameter, torch.int32), "packed or quantised .Parameter, int32"),
        (partial(frozen, Params4bit, torch.uint8), "packed or quantised .Params4bit, uint8"),
        (partial(frozen, Params4bit, torch.float16), "packed or quantised .Params4bit, float16"),
        (partial(frozen, nn.Parameter, torch.float8_e4m3fn), "packed or quantised .Parameter, float8_e4m3fn"),
    ],
)
def test_quantised_weights_are_refused_by_name(make, parameter, says):
    model = make("llama")
    model.model.layers[1].self_attn.v_proj.weight = parameter()
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.self_attn\.v_proj\.weight is {says}"):
        resolve(model, "attention.value")
    assert len(resolve(model, "attention.value@0,2+mlp")) == 2 + 9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Adapted, r"v_proj is wrapped in a Adapted"),
        (lambda layer: Packed(), r"v_proj is a Packed without a parameter 'weight'; it has: qweight"),
        (lambda layer: nn.Bilinear(2, 2, 2), r"v_proj is a Bilinear, .* not known .* Place\('model.layers.1.*weight'"),
        (lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()), r"weight is parametrized"),
        (lambda layer: parametrize.register_parametrization(layer, "bias", nn.Identity()), r"v_proj.bias is parametri"),
    ],
)
def test_weights_that_are_not_what_is_computed_with_are_refused_by_name(make, change, says):
    model = make("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = change(attention.v_proj)
    with pytest.raises(ValueError, match=says):
        resolve(model, "attention.value", biases=True)
    assert len(resolve(model, "attention.query")) == LAYERS


def test_a_model_that_does_not_fit_its_description_says_where():
    headless = build(TWINS["llama"]()).model
    with pytest.raises(ValueError, match=r"'model\.layers', but 'LlamaModel' .* has no 'model'; it has: embed_tokens"):
        resolve(headless, "mlp")
    model = build(TWINS["llama"]())
    del model.model.layers[2].mlp.up_proj
    with pytest.raises(
        ValueError, match=r"but 'model\.layers\.2\.mlp' .* has no 'up_proj'; it has: gate_proj, down_proj"
    ):
        resolve(model, "mlp")
    with pytest.raises(ValueError, match="gpt2 with cross attention"):
        resolve(build(GPT2Config(**GPT2, **IDS, add_cross_attention=True)), "mlp")


def test_a_classifier_has_no_head():
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**GROUPED, num_labels=2))
    assert "head" not in parts(model)
    assert len(resolve(model, "all")) == 1 + 7 * LAYERS
    with pytest.raises(ValueError, match="no site 'head' in llama"):
        resolve(model, "head")


# ------------------------------------------------------------------------------------------------------ a new family


class MadeUpConfig(PreTrainedConfig):
    model_type = "made_up"


class MadeUp(PreTrainedModel):
    """Unequal projections stacked in a Conv1D, two experts, a norm without weight, a bare router and a bare head."""

    config_class = MadeUpConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(11, 6)
        self.answer = nn.Parameter(torch.randn(6, 11))
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.qkv = Conv1D((4 + 2 + 2) * 3, 6)
            block.o = nn.Linear(12, 6)
            block.router = nn.Parameter(torch.randn(6, 2))
            block.up = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))
            block.down = nn.ModuleList(nn.Linear(5, 6) for _ in range(2))
            block.quiet = nn.LayerNorm(6, elementwise_affine=False)
            block.loud = nn.LayerNorm(6)
            self.blocks.append(block)


def made_up(config: Any, **changes: Any) -> tuple[Tower, ...]:
    inside = {
        "attention.query": Place("qkv", rows=(0, 12)),
        "attention.key": Place("qkv", rows=(12, 18)),
        "attention.value": Place("qkv", rows=(18, 24)),
        "attention.output": "o",
        "router": Place("router", transposed=True),
        "mlp.in": ("up.0", "up.1"),
        "mlp.out": ("down.0", "down.1"),
        "norm": ("quiet", "loud"),
    }
    after = {"head": Place("answer", transposed=True)}
    tower = {"layers": "blocks", "heads": 4, "kv_heads": 2, "before": {"embedding": "words"}, "inside": inside}
    return (Tower(**{**tower, "after": after, **changes}),)


def test_a_family_that_is_described_is_known(monkeypatch):
    model = MadeUp(MadeUpConfig())
    with pytest.raises(ValueError, match=r"no family 'made_up'; there are: gpt_neox, gpt2, llama, .*families\.py"):
        resolve(model, "mlp")
    monkeypatch.setitem(FAMILIES, "made_up", made_up)
    attention = "attention attention.query attention.key attention.value attention.output"
    assert parts(model) == f"embedding {attention} mlp mlp.in mlp.out router norm head all".split()
    for parameter in model.parameters():
        parameter.zero_()
    for view in resolve(model, "all+norm", biases=True):
        view.tensor.add_(1)
    assert all((parameter == 1).all() for parameter in model.parameters())
    assert [v.name for v in resolve(model, "mlp.in@1")] == ["blocks.1.up.0.weight", "blocks.1.up.1.weight"]
    key, value = resolve(model, "attention.key@0")[0].tensor, resolve(model, "attention.value@0:1")[0].tensor
    assert (key.shape, value.shape) == ((2, 3, 6), (1, 3, 6))
    model.blocks[0].qkv.weight.copy_(torch.arange(144.0).view(6, 24))
    assert torch.equal(value[0], model.blocks[0].qkv.weight[:, 21:24].T)
    assert one(resolve(model, "router@0")).shape == (2, 6)
    assert one(resolve(model, "head")).shape == (11, 6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": "block"}, "'MadeUp' .* has no 'block'; it has: words, blocks, answer"),
        ({"layers": "words"}, "'words' should be the ModuleList of the layers, it is a Embedding"),
        ({"inside": {"mlp.in": "up.7"}}, "'blocks.0.up' .* has no '7'; it has: 0, 1"),
        (
            {"inside": {"mlp.in": Place("qkv", rows=(12, 25))}},
            "blocks.0.qkv has 24 rows, not 1 blocks with rows 12 to 25",
        ),
        ({"inside": {"mlp.in": Place("qkv", rows=(0, 1), groups=5)}}, "has 24 rows, not 5 blocks"),
        ({"inside": {"attention.query": "qkv"}, "heads": 5}, "has 24 rows for attention.query, .* split into 5 heads"),
        ({"inside": {"attention.output": "o"}, "heads": 5}, "has 12 columns for attention.output, .* into 5 heads"),
        ({"inside": {"attention.key": "qkv"}, "kv_heads": 0}, "into 0 heads"),
    ],
)
def test_a_wrong_description_is_an_error(monkeypatch, changes, says):
    monkeypatch.setitem(FAMILIES, "made_up", partial(made_up, **changes))
    with pytest.raises(ValueError, match=says):
        resolve(MadeUp(MadeUpConfig()), "all")


# --------------------------------------------------------------------------------------- published sizes, no weights


def pythia(d: int, layers: int, heads: int, words: int = 50304) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * d, vocab_size=words
    )


def llama3_8b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def gemma3_4b() -> Gemma3Config:
    text = Gemma3TextConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=262208,
    )
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}
    return Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=256)


def neox_sites(d: int, layers: int, words: int = 50304) -> dict[str, tuple[int, int]]:
    return {
        "embedding": (1, words * d),
        "head": (1, words * d),
        "attention.value": (layers, layers * d * d),
        "attention": (4 * layers, 4 * layers * d * d),
        "mlp": (2 * layers, 8 * layers * d * d),
        "norm": (2 * layers + 1, (2 * layers + 1) * d),
    }


Sites = dict[str, tuple[int, int]]  # site -> views, numbers in them
PUBLISHED: dict[str, tuple[Callable[[], PreTrainedConfig], int, Sites]] = {
    "pythia-70m": (lambda: pythia(512, 6, 8), 70_426_624, neox_sites(512, 6)),
    "pythia-160m": (lambda: pythia(768, 12, 12), 162_322_944, neox_sites(768, 12)),
    "pythia-410m": (lambda: pythia(1024, 24, 16), 405_334_016, neox_sites(1024, 24)),
    "pythia-1b": (lambda: pythia(2048, 16, 8), 1_011_781_632, neox_sites(2048, 16)),
    "pythia-1.4b": (lambda: pythia(2048, 24, 16), 1_414_647_808, neox_sites(2048, 24)),
    "pythia-2.8b": (lambda: pythia(2560, 32, 32), 2_775_208_960, neox_sites(2560, 32)),
    "pythia-6.9b": (lambda: pythia(4096, 32, 32, 50432), 6_857_302_016, neox_sites(4096, 32, 50432)),
    "pythia-12b": (lambda: pythia(5120, 36, 40, 50688), 11_846_072_320, neox_sites(5120, 36, 50688)),
    "gpt2": (
        GPT2Config,
        124_439_808,
        {
            "embedding+head": (1, 50257 * 768),
            "position": (1, 1024 * 768),
            "attention": (48, 12 * 4 * 768 * 768),
            "mlp": (24, 12 * 8 * 768 * 768),
        },
    ),
    "llama-3-8b": (
        llama3_8b,
        8_030_261_248,
        {
            "embedding+head": (2, 2 * 128256 * 4096),
            "attention.key": (32, 32 * 1024 * 4096),
            "attention": (128, 32 * (2 * 4096 + 2 * 1024) * 4096),
            "mlp": (96, 32 * 3 * 14336 * 4096),
            "norm": (65, 65 * 4096),
        },
    ),
    "gemma-3-4b": (
        gemma3_4b,
        4_300_079_472,
        {
            "embedding+head": (1, 262208 * 2560),
            "attention.value": (34, 34 * 4 * 256 * 2560),
            "mlp": (102, 34 * 3 * 10240 * 2560),
            "vision/attention.value": (27, 27 * 1152 * 1152),
            "vision/mlp": (54, 27 * 2 * 4304 * 1152),
            "projector/projection": (1, 1152 * 2560),
            "norm": (34 * 6 + 1, 34 * (4 * 2560 + 2 * 256) + 2560),
        },
    ),
    "t5-small": (
        T5Config,
        60_506_624,
        {
            "embedding+head": (1, 32128 * 512),
            "attention": (48, 48 * 512 * 512),
            "cross.value": (6, 6 * 512 * 512),
            "mlp": (24, 24 * 2048 * 512),
            "position": (2, 2 * 32 * 8),
        },
    ),
    "opt-125m": (
        OPTConfig,
        125_239_296,
        {
            "embedding+head": (1, 50272 * 768),
            "position": (1, 2050 * 768),
            "attention": (48, 48 * 768 * 768),
            "mlp": (24, 24 * 3072 * 768),
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    config, total, sites = PUBLISHED[name]
    with torch.device("meta"):
        model = build(config())
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    for site, expected in sites.items():
        views = resolve(model, site)
        assert (len(views), sum(view.tensor.numel() for view in views)) == expected, site
    everything = resolve(model, EVERYTHING.get(model.config.model_type, "all+norm"), biases=True)
    assert sum(view.tensor.numel() for view in everything) == total


# ---------------------------------------------------------------------- experts


@pytest.fixture(scope="module")
def mixture():
    from lesion.subjects import Scratch

    return Scratch(architecture="tiny-decoder", config={"experts": 4}).load()


def test_experts_are_addressed_like_an_mlp(mixture):
    views = resolve(mixture.model, "mlp@1")
    shapes = {view.part: tuple(view.tensor.shape) for view in views}
    assert shapes == {"mlp.in": (4, 96, 64), "mlp.gate": (4, 96, 64), "mlp.out": (4, 64, 96), "mlp.router": (4, 64)}
    both = mixture.model.model.layers[1].mlp.gate_up_proj
    gate, up = (next(v.tensor for v in views if v.part == part) for part in ("mlp.gate", "mlp.in"))
    assert torch.equal(torch.cat((gate, up), 1), both), "gate comes first, as `Experts.forward` cuts them"
    assert {v.part for v in resolve(mixture.model, "all")} >= {"mlp.router", "mlp.in", "attention.value"}


def test_what_experts_have_not_is_refused_by_name(mixture):
    from lesion.steps import Ablate, Constrain, Lora

    for step, why in (
        (Ablate(site="mlp", share=0.5, unit="neuron"), "is not divided into such units"),
        (Lora(site="mlp"), "is no module of its own"),
        (Constrain(), "module|matri"),
    ):
        with pytest.raises(ValueError, match=why):
            step.apply(mixture)


def test_noise_on_experts_is_undone_bit_for_bit(mixture):
    from lesion.bench import Bench
    from lesion.digest import digests
    from lesion.steps import Noise, Quantise

    bench, before = Bench(mixture), digests(mixture.model)
    for step in (Noise(site="mlp", sigma=0.3, seed=1), Quantise(site="mlp", levels=8, channel="output")):
        with bench.applied(step):
            assert bench.specimen.ledger[-1]["changed"]
        assert digests(mixture.model) == before
