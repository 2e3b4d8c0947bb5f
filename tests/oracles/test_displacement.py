"""Displacement and surprisal against naive float64 computations on transformers' own outputs."""

import math

import pytest
import torch

from lesion.lab import product
from lesion.measures import Displacement, Generation, Surprisal
from lesion.steps import Noise
from lesion.subjects import Scratch
from lesion.trial import Reading, Trial

CAUSAL = [
    "tiny-llama",
    "tiny-mistral",
    "tiny-qwen2",
    "tiny-gpt2",
    "tiny-gpt-neox",
    "tiny-opt",
    "tiny-gemma3-text",
    "tiny-gemma3",
]


def loaded(trial):
    from lesion.bench import Bench

    bench = Bench(trial.subject.load())
    for step in trial.steps:
        bench.apply(step)
    return bench.specimen


@pytest.mark.parametrize("family", CAUSAL)
def test_displacement_is_its_definition(lab, family):
    healthy = Trial(subject=Scratch(architecture=family))
    damaged = healthy >> Noise(site="mlp", sigma=0.2)
    measure = Displacement(reference=healthy, documents=2, tokens=30).pin()
    store = lab.take(readings := product([damaged, healthy], [measure]))
    assert not store.index.failures
    one, other = loaded(healthy), loaded(damaged)
    from lesion.texts import corpus

    kl = tokens = 0
    change, norm = None, None
    for document in corpus("austen")[:2]:
        ids = torch.tensor([one.tokenizer(document.text)["input_ids"][:30]])
        with torch.no_grad():
            a, b = (s.model.double()(ids, output_hidden_states=True, use_cache=False) for s in (one, other))
        p, q = (x.logits[0, :-1].log_softmax(-1) for x in (a, b))
        kl += float((p.exp() * (p - q)).sum())
        tokens += ids.shape[1] - 1
        last = len(a.hidden_states) - 1  # the last one is normed in most families: left out
        here = [
            float((y - x)[0, 1:].square().sum())
            for x, y in zip(a.hidden_states[1:last], b.hidden_states[1:last], strict=True)
        ]
        size = [float(x[0, 1:].square().sum()) for x in a.hidden_states[1:last]]
        change = here if change is None else [x + y for x, y in zip(change, here, strict=True)]
        norm = size if norm is None else [x + y for x, y in zip(norm, size, strict=True)]
    summary = store.index.seals[readings[0].key].summary
    assert summary["kl"] == pytest.approx(kl / tokens, rel=1e-4, abs=1e-7)
    assert summary["layers"][:-1] == pytest.approx(
        [math.sqrt(c / n) for c, n in zip(change, norm, strict=True)], rel=1e-4
    )
    weights = [(w.detach(), dict(other.model.named_parameters())[n].detach()) for n, w in one.model.named_parameters()]
    moved = sum(float((v - w).square().sum()) for w, v in weights) / sum(float(w.square().sum()) for w, _ in weights)
    assert summary["weights"] == pytest.approx(math.sqrt(moved), rel=1e-5)
    none = store.index.seals[readings[1].key].summary
    assert none["weights"] == none["kl"] == none["output"] == 0 and none["same_top"] == 1


def test_surprisal_is_the_likelihood_of_the_text_after_its_prompt(lab):
    healthy = Trial(subject=Scratch(architecture="tiny-llama"))
    damaged = healthy >> Noise(site="mlp", sigma=0.2)
    texts = Reading(trial=damaged, measure=Generation(prompts=4, new_tokens=9, batch=2).pin())
    asked = Reading(trial=healthy, measure=Surprisal(of=texts))
    store = lab.take([asked])
    assert not store.index.failures
    model = loaded(healthy)
    written = {row["item"]: row for row in store.rows([texts.key])}
    for row in store.rows([asked.key]):
        source = written[row["item"]]
        before = list(texts.measure.tokenise(model, source["asked"]))
        after = model.tokenizer(source["text"], add_special_tokens=False)["input_ids"]
        if not after:
            assert row["outcome"] == "empty" and row["nll"] is None
            continue
        with torch.no_grad():
            logits = model.model.double()(torch.tensor([before + after])).logits[0].log_softmax(-1)
        want = -sum(float(logits[len(before) + i - 1, t]) for i, t in enumerate(after))
        assert row["nll"] == pytest.approx(want, rel=1e-5) and row["tokens"] == len(after)


def test_a_model_that_is_not_finite_is_an_outcome(lab):
    healthy = Trial(subject=Scratch(architecture="tiny-llama"))
    ruined = (
        healthy
        >> Noise(site="all", sigma=1e6)
        >> Noise(site="all", sigma=1e6)
        >> Noise(site="all", sigma=1e6)
        >> Noise(site="all", sigma=1e6)
        >> Noise(site="all", sigma=1e6)
        >> Noise(site="all", sigma=1e6)
        >> Noise(site="all", sigma=1e6)
    )
    store = lab.take(readings := product([ruined], [Displacement(reference=healthy, documents=2, tokens=20).pin()]))
    summary = store.index.seals[readings[0].key].summary
    assert summary["not_finite"] == 2 and summary["kl"] is None and summary["layers"] == []
