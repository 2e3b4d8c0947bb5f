"""Decoding against transformers' generate, its logits processors, and itself in other batches."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lesion import decode, packaged
from lesion.decode import OneLine, Prompt, continue_texts
from lesion.inference import inference
from lesion.sampling import Sampling, choose
from lesion.subjects import Scratch

FAMILIES = list(packaged.TINY)
GREEDY = Sampling(temperature=0)
_models = {}


def model_of(family):
    if family not in _models:
        model = Scratch(architecture=family, seed=5).load().model
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        _models[family] = model
    return _models[family]


def prompts(n=13, seed=0, shared=3, longest=70):
    chance = np.random.default_rng(seed)
    head = tuple(range(60, 60 + shared))
    return [
        Prompt(f"p{i}", head + tuple(map(int, chance.integers(0, 255, chance.integers(1, longest))))) for i in range(n)
    ]


def generated(model, prompt, n, ends):
    ids = torch.tensor([prompt.tokens])
    kw = {"eos_token_id": sorted(ends)} if ends else {"eos_token_id": None, "min_new_tokens": n}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0, **kw
    )[0].tolist()
    new = out[1:] if model.config.is_encoder_decoder else out[len(prompt.tokens) :]
    return new[: next((i for i, t in enumerate(new) if t in ends), len(new))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, 4, 13])
@pytest.mark.parametrize("ends", [frozenset(), frozenset(range(0, 250, 9))])
def test_greedy_equals_generate_of_transformers(family, batch, ends):
    model, asked = model_of(family), prompts()
    found = continue_texts(model, asked, GREEDY, new_tokens=25, ends=ends, seed=0, batch=batch)
    assert [c.item for c in found] == [p.item for p in asked]
    for prompt, c in zip(asked, found, strict=True):
        assert c.tokens == generated(model, prompt, 25, ends)
        assert c.stop == ("length" if len(c.tokens) == 25 else "end")
        assert len(c.logprobs) == len(c.tokens) + (c.stop == "end")


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-qwen2", "tiny-gpt-neox", "tiny-gemma3-text"])
def test_the_arranged_forward_is_the_models_own(family):
    model = model_of(family)
    ids = torch.randint(0, 255, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    with inference(model):
        arranged = model(input_ids=ids).logits
    torch.testing.assert_close(arranged, plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain), "nothing of the arrangement stays"
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_hooked_module_keeps_its_own_forward():
    model = model_of("tiny-llama")
    seen = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    try:
        continue_texts(model, prompts(2), GREEDY, new_tokens=3, ends=frozenset(), seed=0, batch=2)
    finally:
        hook.remove()
    assert len(seen) >= 3


def test_a_line_break_ends_a_text_once_something_stands_before_it(monkeypatch):
    """Many models begin an answer on a new line: what they write there is the answer, and not nothing."""
    written = [10, 32, 10, 65, 66, 10, 67, 68]  # break, blank, break, two letters, break, two more

    def scripted(logits, uniform, how):
        step = next(steps)
        return torch.full((len(logits),), written[step]), torch.zeros(len(logits))

    for line, kept, stop in (
        (OneLine(frozenset({10}), frozenset({10, 32})), written[:5], "end"),
        (None, written, "length"),
    ):
        steps = iter(range(len(written)))
        monkeypatch.setattr(decode, "choose", scripted)
        (c,) = continue_texts(
            model_of("tiny-llama"), prompts()[:1], GREEDY, new_tokens=8, ends=frozenset({2}), seed=0, batch=1, line=line
        )
        assert (c.tokens, c.stop) == (kept, stop) and c.ended_by == (10 if stop == "end" else None)


def test_log_probabilities_are_those_of_the_untempered_model():
    model, (asked, *_) = model_of("tiny-llama"), prompts()
    (c,) = continue_texts(
        model, [asked], Sampling(temperature=0.7, top_k=5), new_tokens=8, ends=frozenset(), seed=1, batch=1
    )
    ids = torch.tensor([[*asked.tokens, *c.tokens]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].double().log_softmax(-1)
    for i, (token, logprob) in enumerate(zip(c.tokens, c.logprobs, strict=True)):
        assert logprob == pytest.approx(expected[len(asked.tokens) - 1 + i, token].item(), abs=1e-4)


@pytest.mark.parametrize("how", [Sampling(top_k=20, top_p=0.9), Sampling(), Sampling(temperature=2.5, top_p=0.99)])
def test_batch_size_and_order_do_not_touch_the_texts(how):
    model, asked = model_of("tiny-llama"), prompts(38, longest=40)
    runs = []
    for batch in (1, 7, 38):
        for order in (asked, list(np.random.default_rng(batch).permutation(np.array(asked, dtype=object)))):
            found = continue_texts(model, order, how, new_tokens=30, ends=frozenset({7, 77}), seed=9, batch=batch)
            runs.append({c.item: (c.tokens, c.stop) for c in found})
    same = sum(run[p.item] == runs[0][p.item] for run in runs for p in asked)
    assert same >= 0.99 * len(runs) * len(asked)


def test_the_same_call_gives_the_same_bits():
    model, asked = model_of("tiny-gpt2"), prompts(9)
    call = lambda seed: [  # noqa: E731
        (c.tokens, c.logprobs)
        for c in continue_texts(model, asked, Sampling(), new_tokens=9, ends=frozenset(), seed=seed, batch=4)
    ]
    assert call(1) == call(1) and call(1) != call(2)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(0, 60), st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]))
def test_choices_follow_the_distribution_of_transformers_processors(seed, temperature, top_k, top_p):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed)) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits.double())
    if 0 < top_k < 50:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    probability = expected.softmax(-1)[0]
    n = 4000  # a grid of uniforms is an exact census of the distribution, to one step at each boundary
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token, logprob = choose(logits.expand(n, -1), uniform, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    frequency = torch.bincount(token, minlength=50) / n
    assert (frequency - probability).abs().max() <= 2 / n + 1e-5
    assert torch.allclose(logprob, logits[0].double().log_softmax(-1)[token], atol=1e-5)


def test_a_nucleus_wider_than_the_guess_is_exact():
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * 0.1
    kept = TopPLogitsWarper(0.9)(None, logits.double()).isfinite()
    token, _ = choose(logits[:1].expand(20000, -1), torch.linspace(0, 0.99999, 20000), Sampling(top_p=0.9))
    assert set(token.tolist()) <= set(kept[0].nonzero().squeeze(1).tolist())
    assert len(set(token.tolist())) > 0.95 * int(kept[0].sum())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_choose_tokens_that_may_be_chosen(uniform):
    logits = torch.tensor([[0.0, float("-inf"), 3.0, float("-inf")]])
    for how in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)):
        token, logprob = choose(logits, torch.tensor([uniform], dtype=torch.float64), how)
        assert token.item() in (0, 2) and logprob.isfinite().all()


def test_a_row_whose_logits_are_not_finite_stops_and_leaves_the_others_alone():
    model, asked = Scratch(seed=5).load().model, prompts(6, shared=0)
    fine = continue_texts(model, asked, GREEDY, new_tokens=6, ends=frozenset(), seed=0, batch=6)
    poisoned = 255
    with torch.no_grad():
        model.get_input_embeddings().weight[poisoned] = float("nan")  # tied: every logit of token 255 is NaN too
        model.lm_head.weight = torch.nn.Parameter(torch.where(model.lm_head.weight.isnan(), 0.0, model.lm_head.weight))
    asked = [*asked, Prompt("bad", (1, poisoned, 2))]
    found = continue_texts(model, asked, GREEDY, new_tokens=6, ends=frozenset(), seed=0, batch=4)
    assert (found[-1].stop, found[-1].tokens, found[-1].logprobs) == ("not finite", [], [])
    assert sum(a.tokens == b.tokens for a, b in zip(fine, found, strict=False)) >= 5


def test_out_of_memory_halves_the_batch_and_says_so(monkeypatch, caplog):
    model, asked = model_of("tiny-llama"), prompts(8)
    from lesion import decode

    whole, run = continue_texts(model, asked, GREEDY, new_tokens=5, ends=frozenset(), seed=0, batch=8), decode._run

    def tight(*args):
        if args[-1] > 2:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            )
        return run(*args)

    monkeypatch.setattr(decode, "_run", tight)
    monkeypatch.setattr(logging.getLogger("lesion"), "propagate", True)
    with caplog.at_level("WARNING", "lesion"):
        found = continue_texts(model, asked, GREEDY, new_tokens=5, ends=frozenset(), seed=0, batch=8)
    assert [c.tokens for c in found] == [c.tokens for c in whole]
    assert [r.args[0] for r in caplog.records] == [4, 2]
    monkeypatch.setattr(decode, "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        continue_texts(model, asked, GREEDY, new_tokens=5, ends=frozenset(), seed=0, batch=8)
    monkeypatch.setattr(decode, "_run", lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        continue_texts(model, asked, GREEDY, new_tokens=5, ends=frozenset(), seed=0, batch=8)


@pytest.mark.parametrize(
    ("asked", "new", "said"),
    [
        ([], 5, "no prompts"),
        ([Prompt("a", ())], 5, "'a' has no tokens"),
        ([Prompt("long", (1,) * 250)], 10, "'long'.*context of 256"),
        ([Prompt("a", (1,))], 0, "at least one"),
    ],
)
def test_bad_prompts_are_refused_by_name(asked, new, said):
    with pytest.raises(ValueError, match=said):
        continue_texts(model_of("tiny-llama"), asked, GREEDY, new_tokens=new, ends=frozenset(), seed=0, batch=4)


def test_a_prompt_as_long_as_the_context_allows_is_continued():
    asked = [Prompt("long", (1,) * 246), Prompt("short", (1, 2))]
    found = continue_texts(model_of("tiny-llama"), asked, GREEDY, new_tokens=10, ends=frozenset(), seed=0, batch=2)
    assert [len(c.tokens) for c in found] == [10, 10]
