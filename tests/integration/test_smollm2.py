"""The packaged SmolLM2, as users meet it: the pinned bits, an answer, texts that batches do not touch, a perplexity.

One thread, as everywhere in the tests: a second one that waits for a busy core makes single rows several times slower.
"""

import itertools

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lesion import packaged, streams
from lesion.asking import end_tokens
from lesion.batteries import Prompt as Question
from lesion.batteries import battery
from lesion.decode import Prompt, continue_texts
from lesion.digest import combined, digests
from lesion.inference import inference
from lesion.measures import Generation, Perplexity
from lesion.sampling import Sampling
from lesion.subjects import SmolLM2
from lesion.texts import corpus

PROMPTS, NEW_TOKENS, SEED = 38, 24, 11
HOW = Sampling(temperature=1.0, top_k=64, top_p=0.95)
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def specimen():
    """The real model, from the cache or fetched now. Where it cannot be had, these tests fail."""
    return SmolLM2().load()


def asked(specimen, questions):
    return [Prompt(q.id, Generation().tokenise(specimen, q.text)) for q in questions]


def test_the_model_is_the_pinned_one(specimen):
    assert sum(p.numel() for p in specimen.model.parameters()) == 134_515_008
    names = [name for name, _ in specimen.model.named_parameters()]
    assert combined(digests(specimen.model, names)) == packaged.SMOLLM2.digests["float32"]
    assert {p.dtype for p in specimen.model.parameters()} == {torch.float32}
    config = specimen.model.config
    sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    assert sizes == (30, 576, 9, 3) and config.tie_word_embeddings and not hasattr(config, "quantization_config")
    assert specimen.tokenizer.chat_template and specimen.ledger == []


def test_bfloat16_is_the_same_model_rounded(specimen):
    rounded = SmolLM2(dtype="bfloat16").load().model
    for (name, full), half in zip(specimen.model.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(full.to(torch.bfloat16), half), name
    assert {b.dtype for b in rounded.buffers()} == {torch.float32}, "the frequencies of the positions stay exact"


def test_it_knows_the_capital_of_france(specimen):
    question = Question(id="france", group="", text="What is the capital of France?")
    (found,) = continue_texts(
        specimen.model,
        asked(specimen, [question]),
        Sampling(temperature=0),
        new_tokens=16,
        ends=end_tokens(specimen),
        seed=0,
        batch=1,
    )
    assert "Paris" in specimen.tokenizer.decode(found.tokens)


def is_near_tie(logits, uniform):
    """Whether rounding decides the draw: the uniform number lies at a boundary of the cumulative distribution, or the
    last candidate is as likely as the first that was left out. logits [V] in float64."""
    kept = TopKLogitsWarper(HOW.top_k)(None, TemperatureLogitsWarper(HOW.temperature)(None, logits[None]))
    probability = TopPLogitsWarper(HOW.top_p)(None, kept)[0].softmax(-1)
    if (probability.cumsum(-1) - uniform).abs().min() < ROUNDING:
        return True
    best = logits.sort(descending=True).values
    share = best[: HOW.top_k].softmax(-1).cumsum(-1)
    return bool(best[HOW.top_k - 1] - best[HOW.top_k] < ROUNDING or (share - HOW.top_p).abs().min() < ROUNDING)


def test_the_judge_of_near_ties_tells_them_from_others():
    logits = torch.full((100,), -30.0, dtype=torch.float64)
    logits[[3, 50]] = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    logits[90:] = torch.linspace(-21, -20, 10, dtype=torch.float64)
    logits += torch.linspace(0, 1, 100, dtype=torch.float64) * 5
    boundary = logits[[3, 50]].softmax(-1)[0].item()
    assert is_near_tie(logits, boundary + 9e-4) and is_near_tie(logits, boundary - 9e-4)
    assert not is_near_tie(logits, boundary + 0.01) and not is_near_tie(logits, boundary - 0.01)
    tied = logits.clone()
    tied[tied.argsort(descending=True)[HOW.top_k]] = tied.sort(descending=True).values[HOW.top_k - 1]
    assert is_near_tie(tied, boundary + 0.01)


def test_batches_and_order_do_not_touch_the_texts(specimen):
    prompts = asked(specimen, battery("small")[:PROMPTS])
    assert len(prompts) == PROMPTS
    runs = []
    for batch in (38, 7, 1):
        order = [prompts[i] for i in np.random.default_rng(batch).permutation(PROMPTS)]
        found = continue_texts(
            specimen.model, order, HOW, new_tokens=NEW_TOKENS, ends=end_tokens(specimen), seed=SEED, batch=batch
        )
        runs.append({c.item: (*c.tokens, c.stop) for c in found})
    pairs = list(itertools.combinations(runs, 2))
    different = [(p, a[p.item], b[p.item]) for a, b in pairs for p in prompts if a[p.item] != b[p.item]]
    assert len(different) <= 0.01 * len(pairs) * PROMPTS
    assert len({run[prompts[0].item] for run in runs} | {run[prompts[-1].item] for run in runs}) > 1, "texts differ"
    for prompt, one, other in different:
        where = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        uniform = streams.uniform01(SEED, prompt.item, "sampling", NEW_TOKENS)[where]
        ids = torch.tensor([[*prompt.tokens, *one[:where]]])
        with torch.no_grad():
            plain = specimen.model(input_ids=ids).logits[0, -1]
        with inference(specimen.model, PROMPTS):
            arranged = specimen.model(input_ids=ids).logits[0, -1]
        for logits in (plain, arranged):
            assert is_near_tie(logits.double(), uniform), f"{prompt.item} differs at token {where} without a tie"


def test_perplexity_is_the_loss_of_transformers(specimen):
    measure = Perplexity(documents=3, tokens=200)
    rows = measure.read(specimen, measure.items(specimen))
    assert [row["tokens"] for row in rows] == [199] * 3
    for row, document in zip(rows, corpus("austen"), strict=False):
        ids = torch.tensor([specimen.tokenizer(document.text)["input_ids"][:200]])
        with torch.no_grad():
            loss = specimen.model(input_ids=ids, labels=ids).loss.item()
        assert row["nll"] / row["tokens"] == pytest.approx(loss, abs=1e-4)
    assert 5 < measure.summarise(rows)["perplexity"] < 60
