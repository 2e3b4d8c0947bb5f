"""Our decoder against transformers' Llama, and its sinks and experts against naive definitions."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lesion import decode
from lesion.decoder import MLP, SIZES, DecoderConfig, DecoderForCausalLM
from lesion.experts import Experts, balance_loss, places, route, z_loss
from lesion.sampling import Sampling
from lesion.sinks import RollingCache, attend, rotate
from lesion.sites import parts, resolve

SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
KINDS = {
    "none": {},
    "logit": {"sinks": "logit"},
    "window": {"sinks": "window", "window": 8},
    "cache": {"sinks": "cache", "window": 8, "sink_tokens": 2},
    "tokens": {"sinks": "tokens", "window": 5, "sink_tokens": 3},
    "experts": {"experts": 4, "experts_per_token": 2},
}
FREQUENCIES = 10000.0 ** (-torch.arange(0, 16, 2) / 16)


def made(kind="none", seed=0, **more):
    """A decoder whose every weight matters."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = DecoderForCausalLM(DecoderConfig(**SHAPE, **KINDS[kind], **more)).eval()
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def tokens(rows=2, length=30, seed=1):
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_with_llamas_weights_it_computes_what_llama_computes(tied, groups):
    shape = {**SHAPE, "num_key_value_heads": groups, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None)).eval()
    ours = DecoderForCausalLM(DecoderConfig(**shape)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-5, rtol=0)
        loss = ours(x, labels=x).loss
        torch.testing.assert_close(loss, theirs(x, labels=x).loss, atol=1e-5, rtol=0)
    for implementation in ("eager", "sdpa"):
        ours.set_attn_implementation(implementation)
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_uncached_and_nothing_sees_the_future(kind):
    model, x = made(kind), tokens()
    with torch.no_grad():
        whole = model(x, use_cache=False).logits
        past, steps = None, []
        for t in range(x.shape[1]):
            out = model(x[:, t : t + 1], cache=past, use_cache=True)
            past = out.cache
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-4)
        other = x.clone()
        other[:, 20:] = tokens(seed=9)[:, 20:]
        torch.testing.assert_close(model(other).logits[:, :20], whole[:, :20], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_generates_what_each_row_does_alone(kind):
    model, x = made(kind), tokens(3, 14)
    how = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = [model.generate(row[None, i:], **how)[0, 14 - i :].tolist() for i, row in enumerate(x)]
    mask = torch.ones_like(x)
    for i in range(3):
        mask[i, :i] = 0
    together = model.generate(x * mask, attention_mask=mask, **how)[:, 14:].tolist()
    assert together == alone


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_decode_works_with_it_unchanged(kind):
    model, x = made(kind), tokens(3, 14)
    prompts = [decode.Prompt(str(i), tuple(row[i:].tolist())) for i, row in enumerate(x)]
    found = decode.continue_texts(
        model, prompts, Sampling(temperature=0), new_tokens=20, ends=frozenset(), seed=0, batch=2
    )
    for i, row in enumerate(x):
        want = model.generate(row[None, i:], max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert found[i].tokens == want[0, 14 - i :].tolist()


def test_rotation_keeps_norms_and_knows_only_distances():
    q, k = torch.randn(2, 1, 1, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = torch.arange(5)[None]
    for shift in (1, 7, 100):
        turned = rotate(q, at + shift, FREQUENCIES.double())
        torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-5, rtol=1e-5)
        scores = rotate(q, at, FREQUENCIES.double()) @ rotate(k, at, FREQUENCIES.double()).transpose(2, 3)
        moved = turned @ rotate(k, at + shift, FREQUENCIES.double()).transpose(2, 3)
        torch.testing.assert_close(moved, scores, atol=1e-4, rtol=1e-4)


def streamed(q, k, v, window, sinks, logit):
    """One head, token by token, as Xiao et al. tell it: evict, then give positions inside the cache."""
    out = []
    for i in range(len(q)):
        cache = [j for j in range(i + 1) if window is None or j < sinks or i - j < window]
        where = torch.arange(len(cache))[None]
        keys = rotate(k[cache][None, None], where, FREQUENCIES)[0, 0]
        query = rotate(q[i][None, None, None], torch.tensor([[len(cache) - 1]]), FREQUENCIES)[0, 0, 0]
        scores = (keys @ query / math.sqrt(len(query))).double()
        nothing = 0.0 if logit is None else math.exp(logit)
        weights = scores.exp() / (scores.exp().sum() + nothing)
        out.append((weights[:, None] * v[cache].double()).sum(0))
    return torch.stack(out).float()


@pytest.mark.parametrize(
    ("window", "sinks", "logit"),
    [(None, 0, None), (4, 0, None), (4, 1, None), (3, 5, None), (1, 2, None), (6, 3, 0.7), (None, 0, -1.0)],
)
def test_sinks_are_what_a_streaming_cache_does(window, sinks, logit):
    q, k, v = torch.randn(3, 17, 16, generator=torch.Generator().manual_seed(3))
    at = torch.arange(17)[None]
    out, weights = attend(
        q[None, None], k[None, None], v[None, None], at_BT=at, key_at_BS=at, seen=None, frequencies=FREQUENCIES,
        window=window, sinks=sinks, sink_logit=None if logit is None else torch.tensor([logit]),
    )  # fmt: skip
    torch.testing.assert_close(out[0, :, 0], streamed(q, k, v, window, sinks, logit), atol=1e-5, rtol=1e-4)
    total = weights.sum(-1)
    assert (total < 1).all() if logit is not None else torch.allclose(total, torch.ones_like(total))


@pytest.mark.parametrize("kind", ["window", "cache", "tokens"])
def test_a_rolling_cache_says_the_same_and_does_not_grow(kind):
    model, x = made(kind), tokens(2, 60)
    sinks = model.config.sink_tokens if kind != "window" else 0
    cache, steps = RollingCache(sinks, model.config.window), []
    with torch.no_grad():
        whole = model(x, use_cache=False).logits
        for part in (x[:, :11], *x[:, 11:].split(1, 1)):
            steps.append(model(part, cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-4)
    assert cache.held[0][0].shape[2] == sinks + model.config.window - 1


def naive_experts(module, x):
    out = torch.zeros_like(x)
    for n, token in enumerate(x):
        probability = (module.router.weight @ token).softmax(-1)
        chosen = probability.topk(module.k).indices
        for e in chosen:
            gate, up = (module.gate_up_proj[e] @ token).chunk(2)
            share = probability[e] / probability[chosen].sum()
            out[n] += share * (module.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    return out


def mixture(experts=5, k=2, factor=None):
    module = Experts(16, 24, experts, k, factor)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(weight.numel()))
    return module


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 1), (5, 2), (5, 5), (8, 3)])
def test_grouped_dispatch_is_the_loop_over_tokens_and_experts(experts, k):
    module = mixture(experts, k)
    x = torch.randn(37, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module(x[None])[0], naive_experts(module, x), atol=1e-5, rtol=1e-4)
    assert module.counts["dropped"] == 0 and module.counts["load"].sum() == 37 * k
    x.requires_grad_(True)
    ours = torch.autograd.grad(module(x[None]).square().sum(), [x, *module.parameters()])
    theirs = torch.autograd.grad(naive_experts(module, x).square().sum(), [x, *module.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_one_expert_is_a_dense_mlp():
    module = mixture(1, 1)
    dense = MLP(DecoderConfig(**{**SHAPE, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}))
    with torch.no_grad():
        gate, up = module.gate_up_proj[0].chunk(2)
        for target, source in ((dense.gate_proj, gate), (dense.up_proj, up), (dense.down_proj, module.down_proj[0])):
            target.weight.copy_(source)
        x = torch.randn(2, 9, 16)
        torch.testing.assert_close(module(x), dense(x), atol=1e-6, rtol=1e-5)


def test_a_capacity_drops_the_last_tokens_and_counts_them():
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]])
    table, load, dropped = places(chosen, 3, 2)
    assert table.tolist() == [[0, 2], [1, 5], [3, 7]] and load.tolist() == [4, 2, 2] and int(dropped) == 2
    module = mixture(4, 2, factor=0.5)
    module(torch.randn(1, 40, 16))
    assert 0 < int(module.counts["dropped"]) < 80 and module.counts["load"].sum() == 80


def test_router_losses():
    even = torch.zeros(12, 4)
    chosen = torch.arange(24).reshape(12, 2) % 4
    assert float(balance_loss(even, chosen)) == pytest.approx(1) and float(z_loss(even)) == pytest.approx(
        math.log(4) ** 2
    )
    all_to_one = torch.zeros(12, 4)
    all_to_one[:, 0] = 50
    assert float(balance_loss(all_to_one, route(all_to_one, 1)[0])) == pytest.approx(4)
    model, x = made("experts"), tokens()
    with torch.no_grad():
        assert float(model(x, labels=x).loss) > float(model.loss_function(model(x).logits, x, vocab_size=300))


def test_residual_projections_begin_smaller_and_norms_at_one():
    model = DecoderForCausalLM(
        DecoderConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8})
    )
    layer = model.model.layers[3]
    for weight, want in (
        (layer.self_attn.q_proj.weight, 0.02), (layer.mlp.up_proj.weight, 0.02), (model.model.embed_tokens.weight, 0.02),
        (layer.self_attn.o_proj.weight, 0.005), (layer.mlp.down_proj.weight, 0.005),
    ):  # fmt: skip
        assert float(weight.detach().std()) == pytest.approx(want, rel=0.05)
    assert (layer.input_layernorm.weight == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gradients_are_the_gradients(kind):
    def gradients(checkpointing):
        model = made(kind).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        x = tokens()
        model(x, labels=x).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, again = gradients(False), gradients(True)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-4, msg=name)
        assert grad is not None and (kind == "experts" or grad.abs().max() > 0), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded_as_any_model_and_a_wrong_key_is_refused(kind, tmp_path):
    model, x = made(kind), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is DecoderForCausalLM and again.config.to_dict() == {
        **model.config.to_dict(),
        **{
            k: again.config.to_dict()[k]
            for k in ("dtype", "architectures", "_name_or_path")
            if k in again.config.to_dict()
        },
    }
    torch.testing.assert_close(again(x).logits, model(x).logits)
    state = model.state_dict()
    state["model.layers.0.self_attn.query.weight"] = state.pop("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(RuntimeError, match="q_proj"):
        model.load_state_dict(state)


def test_options_that_cannot_be_are_refused_by_name():
    for options, said in (
        ({"zap": 3}, "no option 'zap' of a decoder; there are: vocab_size, "),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
        ({"sinks": "cache"}, "sinks='cache' needs window"),
        ({"window": 4}, "sinks='none' has no window"),
        ({"sinks": "cache", "window": 4, "sink_tokens": 0}, "needs one sink token"),
        ({"experts": 2, "experts_per_token": 3}, "1 to 2 experts, not 3"),
        ({"head_dim": 15}, "even head_dim"),
        ({"sinks": "stars"}, "sinks"),
        ({"hidden_size": "big"}, "hidden_size"),
    ):
        with pytest.raises(Exception, match=said) as error:
            DecoderConfig(**{**SHAPE, **options})
        assert isinstance(error.value, (ValueError, TypeError)) or "Strict" in type(error.value).__name__


def test_sizes_and_sites():
    counts = {}
    for name, shape in SIZES.items():
        with torch.device("meta"):
            counts[name] = sum(
                p.numel() for p in DecoderForCausalLM(DecoderConfig(**shape, vocab_size=16_384)).parameters()
            )
    assert list(counts) == sorted(counts, key=counts.__getitem__) and counts["1b"] > 9e8
    model = made()
    assert {"embedding", "attention.value", "mlp.gate", "head"} <= set(parts(model))
    assert len(resolve(model, "mlp")) == 9
    mixture = made("experts")
    of_experts = [view for view in resolve(mixture, "mlp") if view.part != "mlp.router"]
    assert {view.tensor.dim() for view in of_experts} == {3} and "mlp.router" in parts(mixture)
