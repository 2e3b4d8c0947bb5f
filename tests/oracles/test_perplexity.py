"""Perplexity against the definition in float64 and against transformers' own loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lesion.likelihood import BATCH_TOKENS, Window, batches, windows
from lesion.measures.perplexity import Perplexity
from lesion.subjects import Scratch
from lesion.texts import corpus

FAMILIES = [
    "tiny-llama",
    "tiny-mistral",
    "tiny-qwen2",
    "tiny-gpt2",
    "tiny-gpt-neox",
    "tiny-opt",
    "tiny-gemma3-text",
    "tiny-gemma3",
]


def sharpened(family):
    """Random weights say next to nothing; larger ones make a mistake visible."""
    specimen = Scratch(architecture=family, seed=3).load()
    with torch.no_grad():
        for parameter in specimen.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return specimen


def naive(specimen, document, window, stride, tokens):
    """One forward for each token, in float64: its history is that of the window that scores it."""
    ids = specimen.tokenizer(document.text)["input_ids"][:tokens]
    model, total = specimen.model.double(), 0.0
    for i in range(1, len(ids)):
        start = 0 if i < window else ((i - window) // stride + 1) * stride
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
        total -= torch.log_softmax(logits, -1)[ids[i]].item()
    specimen.model.float()
    return total, len(ids) - 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("window", "stride"), [(64, 32), (48, 47), (40, 1), (512, 256)])
def test_equal_to_the_definition_in_float64(family, window, stride):
    specimen = sharpened(family)
    asked = Perplexity(documents=2, tokens=90, window=window, stride=stride)
    rows = asked.read(specimen, asked.items(specimen))
    for row, document in zip(rows, corpus("austen"), strict=False):
        nll, n = naive(specimen, document, window, stride, 90)
        assert row["tokens"] == n
        assert row["nll"] / n == pytest.approx(nll / n, abs=1e-4, rel=1e-4)
    total, n = sum(r["nll"] for r in rows), sum(r["tokens"] for r in rows)
    assert asked.summarise(rows)["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_loss_of_transformers(family):
    specimen = sharpened(family)
    asked = Perplexity(documents=3, tokens=120)
    rows = asked.read(specimen, asked.items(specimen))
    for row, document in zip(rows, corpus("austen"), strict=False):
        ids = torch.tensor([specimen.tokenizer(document.text)["input_ids"][:120]])
        with torch.no_grad():
            loss = specimen.model(input_ids=ids, labels=ids).loss.item()
        assert row["nll"] / row["tokens"] == pytest.approx(loss, abs=1e-4, rel=1e-4)


def test_bits_per_byte_counts_the_bytes_of_the_scored_text(tmp_path):
    (tmp_path / "t.txt").write_text("aé日x")  # 1 + 2 + 3 + 1 bytes; a byte a token, the first not scored
    specimen = Scratch().load()
    asked = Perplexity(corpus=str(tmp_path / "t.txt"))
    rows = asked.read(specimen, asked.items(specimen))
    assert (rows[0]["tokens"], rows[0]["bytes"]) == (6, 6)
    assert asked.summarise(rows)["bits_per_byte"] == pytest.approx(rows[0]["nll"] / math.log(2) / 6)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_document_that_scores_no_token_is_refused_by_name(tmp_path, text):
    (tmp_path / "t.jsonl").write_text('{"id": "fine", "text": "hello"}\n{"id": "short", "text": "%s"}\n' % text)
    specimen = Scratch().load()
    asked = Perplexity(corpus=str(tmp_path / "t.jsonl"))
    with pytest.raises(ValueError, match="'short' scores no token"):
        asked.read(specimen, asked.items(specimen))


def test_logits_that_are_not_finite_are_an_outcome(lab):
    import json

    from lesion.measures import Generation
    from words import TestNaN

    broken = Scratch() >> TestNaN()
    table = lab.read([broken], [Perplexity(documents=2, tokens=20)])
    assert table["outcome"].to_list() == ["not finite"] * 2 and table["nll"].to_list() == [None] * 2
    said = lab.read([broken], [Generation(prompts=3, new_tokens=4)])
    assert said["stop"].to_list() == ["not finite"] * 3 and said["logprob"].to_list() == [None] * 3
    for line in lab.open().canonical():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@given(st.integers(2, 300), st.integers(2, 80), st.data())
def test_windows_score_every_token_but_the_first_once(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    found = list(windows("d", length, window, stride))
    assert [i for w in found for i in range(w.scored, w.end)] == list(range(1, length))
    assert all(0 <= w.start < w.scored < w.end <= w.start + window for w in found)
    assert all(w.scored - w.start >= min(w.scored, window - stride) for w in found)


@given(st.lists(st.integers(1, 700), max_size=40))
def test_batches_hold_every_window_once_within_their_size(lengths):
    todo = [Window(str(i), 0, 1, n) for i, n in enumerate(lengths)]
    made = list(batches(todo))
    assert sorted(w.item for b in made for w in b) == sorted(w.item for w in todo)
    assert all(len(b) == 1 or len(b) * max(w.end for w in b) <= BATCH_TOKENS for b in made)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="without history"):
        Perplexity(window=8, stride=8)
    with pytest.raises(ValueError, match="austen"):
        Perplexity(corpus="austin").pin()
