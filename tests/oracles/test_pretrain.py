"""Pretraining: the tokenizer it learns, what is kept of it, and what is read far beyond the training length."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lesion import Lab
from lesion.cli import run
from lesion.lab import product
from lesion.loss import IGNORE
from lesion.measures import Continuation, Extrapolation, Ngrams, Perplexity
from lesion.packing import pack
from lesion.steps import Noise, Pretrain, Streaming
from lesion.subjects import Directory, Scratch
from lesion.texts import corpus
from lesion.vocabularies import tokenizer_digest, train
from lesion.walk import Walk

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 320, "max_position_embeddings": 512,
}  # fmt: skip
HOW = {
    "corpus": "austen",
    "skip": 18,
    "steps": 12,
    "batch": 4,
    "length": 16,
    "warmup": 2,
    "lr": 1e-2,
    "documents": "joined",
}
PLAIN = Scratch(architecture="lesion-decoder", config=SHAPE) >> Pretrain(**HOW)
TOKENS = Scratch(
    architecture="lesion-decoder", config={**SHAPE, "sinks": "tokens", "sink_tokens": 2, "window": 14}
) >> Pretrain(**HOW)
TEXTS = [d.text for d in corpus("austen")[18:]]


@given(st.text())
def test_every_text_comes_back(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def _tokenizer(memo=[]):  # noqa: B006  made once
    if not memo:
        memo.append(train(TEXTS, 400))
    return memo[0]


def test_a_tokenizer_keeps_the_ids_of_bytes_and_learns_the_same_twice():
    tokenizer = _tokenizer()
    assert len(tokenizer) == 400 and tokenizer_digest(tokenizer) == tokenizer_digest(train(TEXTS, 400))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert tokenizer("")["input_ids"] == [] and train(TEXTS, 300, 3)("a")["input_ids"][:3] == [256] * 3
    assert len(tokenizer(TEXTS[0])["input_ids"]) < 0.6 * len(TEXTS[0]), "merges shorten"
    for size, why in ((259, "too small"), (9999, "at most")):
        with pytest.raises(ValueError, match=why):
            train(["to be or not to be"], size)


def test_rows_with_sinks_begin_with_them_and_lose_no_token():
    stream = list(range(10, 60))
    made = pack([stream], 9, 8, 3, "joined", (1, 2))
    assert made.own == 6 and len(made) == 8
    ids, targets, mask, at = made.batch(0, len(made))
    assert mask is None and (at == torch.arange(8)).all()
    assert (ids[:, :2] == torch.tensor([1, 2])).all() and (targets[:, 0] == IGNORE).all()
    assert (targets[:, 1:-1] == ids[:, 2:]).all(), "a sink's target is the first token, each token's the next"
    assert sorted(ids[:, 2:].flatten().tolist()) == stream[:48]
    for wrong in ({"kept": "apart"}, {"kept": "joined", "length": 2}):
        with pytest.raises(ValueError, match=r"joined|no room"):
            pack([stream], 9, wrong.get("length", 8), 3, wrong["kept"], (1, 2))


def test_a_kept_state_brings_its_tokenizer_and_refuses_another(lab, tmp_path):
    read = Perplexity(documents=2, tokens=60, window=16, stride=8)
    first = lab.read([PLAIN], [read])
    store = lab.open()
    folder = store.state_folder(PLAIN.pin().key)
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger[-1]["tokenizer"] and ledger[-1]["facts"]["vocabulary"] == 320
    assert [point["step"] for point in ledger[-1]["facts"]["curve"]] == list(range(1, 13))
    again = Lab(lab.path).read([PLAIN >> Noise(site="mlp", sigma=1e-9), PLAIN], [read])
    assert again.filter(again["state"] == first["state"][0])["nll"].to_list() == first["nll"].to_list()
    other = train(TEXTS, 321)
    other.save_pretrained(folder / "tokenizer")
    failed = Lab(lab.path).take(product([PLAIN], [Perplexity(documents=1, tokens=30)]))
    (failure,) = failed.index.failures.values()
    assert "tokenizer of the kept state" in failure["error"]


def test_one_wrong_key_is_refused(lab, tmp_path):
    """A checkpoint whose weights lie under another name was evaluated for weeks as a random model: not here."""
    lab.read([PLAIN], [Perplexity(documents=1, tokens=30)])
    assert run(["export", PLAIN.pin().key[:12], str(tmp_path / "out"), "--lab", str(lab.path)]) == 0
    good = Directory(path=str(tmp_path / "out")).load()
    assert len(good.tokenizer) == 320 and good.model.config.model_type == "lesion-decoder"
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_projection.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is missing.*up_projection"):
        Directory(path=str(tmp_path / "out")).load()
    kept = lab.open().state_folder(PLAIN.pin().key) / "model.safetensors"
    save_file(weights, kept)
    (failure,) = Lab(lab.path).take(product([PLAIN], [Perplexity(documents=1, tokens=31)])).index.failures.values()
    assert "does not fit its model" in failure["error"] and "up_proj" in failure["error"]


def test_a_tokenizer_is_not_taken_from_a_model_that_knows_it(lab):
    twice = PLAIN >> Pretrain(**HOW)
    (failure,) = lab.take(product([twice], [Perplexity(documents=1, tokens=30)])).index.failures.values()
    assert "tokenizer='keep'" in failure["error"]
    kept = PLAIN >> Pretrain(**HOW, tokenizer="keep")
    assert len(lab.read([kept], [Perplexity(documents=1, tokens=30)])) == 1


@pytest.mark.parametrize("arm", ["plain", "window", "cache", "tokens"])
def test_far_contexts_equal_a_naive_reading_token_by_token(lab, arm):
    """One layer: −ln p of a token is that of a plain forward over just what its attention may see, positions counted anew.
    (Deeper layers remember more than a window shows: `test_decoder` has them, against a rolling cache.)"""
    shallow = {**SHAPE, "num_hidden_layers": 1}
    config = {**shallow, "sinks": "tokens", "sink_tokens": 2, "window": 14} if arm == "tokens" else shallow
    base = Scratch(architecture="lesion-decoder", config=config) >> Pretrain(**HOW)
    sinks, window = {"plain": (0, 10**9), "window": (0, 6), "cache": (2, 6), "tokens": (2, 5)}[arm]
    trial = base if arm == "plain" else base >> Streaming(window=window, sinks=sinks)
    measure = Extrapolation(length=8, times=(1, 3), stretches=2).pin()
    found = {row["item"]: row["nll"] for row in lab.read([trial], [measure]).iter_rows(named=True)}
    specimen = Walk(lab.open()).materialise(base.pin())
    specimen.model.config.sinks, specimen.model.config.window = "none", None
    begin = [256, 256] if arm == "tokens" else []
    coded = specimen.tokenizer([d.text for d in corpus("austen")], add_special_tokens=False, verbose=False)["input_ids"]
    stream = [t for document in coded for t in (*document, 257)]
    for n in range(2):
        text = begin + stream[n * 24 : n * 24 + 24]
        for k in (1, 3):
            total, end = 0.0, len(begin) + 8 * k
            for i in range(end - 4, end):
                history = text[:sinks] + text[max(sinks, i - window) : i]
                with torch.no_grad():
                    logits = specimen.model(torch.tensor([history]), use_cache=False).logits[0, -1].double()
                total -= logits.log_softmax(-1)[text[i]].item()
            assert found[f"austen/{n:03d}@{k}"] == pytest.approx(total, abs=1e-4)


def test_a_fresh_reading_at_one_length_is_the_reading(lab):
    how = {"length": 8, "times": (1, 2), "stretches": 3}
    table = lab.read([PLAIN], [Extrapolation(**how), Extrapolation(**how, fresh=True)])
    first = table.filter(table["times"] == 1)
    assert first["nll"].to_list()[:3] == pytest.approx(first["nll"].to_list()[3:], abs=1e-5)
    assert table["nll"].n_unique() >= 9, "further on it is another reading"
    assert (table["tokens"] == 4).all()


def test_streaming_is_undone_and_refused_where_it_makes_no_sense(lab):
    logit = Scratch(architecture="lesion-decoder", config={**SHAPE, "sinks": "logit"})
    one = Perplexity(documents=1, tokens=40)
    for trial, why in (
        (Scratch() >> Streaming(window=4), "built for a lesion-decoder"),
        (logit >> Streaming(window=4, sinks=2), "sink logits of its own"),
        (TOKENS >> Streaming(window=4, sinks=3), "learned 2 sink tokens"),
    ):
        store = Lab(lab.path / why[:5].strip()).take(product([trial], [one]))
        assert why in next(iter(store.index.failures.values()))["error"]
    both = lab.read([PLAIN >> Streaming(window=3, sinks=0), PLAIN], [one])
    assert both["nll"][1] == Lab(lab.path / "alone").read([PLAIN], [one])["nll"][0], "nothing is left of the window"
    assert both["nll"][0] != both["nll"][1]


def test_samples_follow_their_context_and_stand_beside_what_was_written(lab):
    rows = lab.read([PLAIN], [Continuation(length=8, times=(1, 2), stretches=2, new_tokens=5)])
    assert rows["group"].to_list() == ["1 × 8", "1 × 8", "2 × 8", "2 × 8"]
    text = "\n".join(d.text for d in corpus("austen"))
    for row in rows.iter_rows(named=True):
        assert row["asked"].lstrip("…") + row["written"] in text
        assert row["tokens"] <= 5 and row["stop"] in ("end", "length")


def test_counting_scores_the_same_tokens_as_the_model(lab):
    how = {"documents": 3, "tokens": 50}
    for trial in (PLAIN, TOKENS):
        table = lab.read([trial], [Perplexity(**how, window=16, stride=8), Ngrams(**how, counted="austen", skip=18)])
        model, counted = (table.filter(table["measure"] == name) for name in ("perplexity", "ngrams"))
        for name in ("item", "tokens", "bytes"):
            assert model[name].to_list() == counted[name].to_list()
        assert all(0 < nll / n < math.log(320) + 1 for nll, n in zip(counted["nll"], counted["tokens"], strict=True))


def test_impossible_contexts_are_refused(lab):
    with pytest.raises(ValueError, match="contexts must grow"):
        Extrapolation(times=(2, 1))
    (failure,) = lab.take(product([PLAIN], [Extrapolation(length=4096, stretches=99)])).index.failures.values()
    assert "stretches of 65536" in failure["error"]
