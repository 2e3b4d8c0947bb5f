"""`tiny`: trained once, gone on with, kept, known by its digest; and where it is there, better than counting."""

import json
import threading

import pytest

from lesion import packaged, tiny
from lesion.subjects import Tiny, parse

QUICK = {"steps": 6, "batch": 2, "length": 32, "save_every": 2, "warmup": 1, "precision": "float32"}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The same recipe, made in a second."""
    monkeypatch.setenv("LESION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "TRAINING", {**tiny.TRAINING, **QUICK})
    monkeypatch.setattr(tiny, "SHAPE", {**tiny.SHAPE, **SHAPE, "intermediate_size": 64, "vocab_size": 300})


def test_it_is_trained_once_and_known_by_its_digest(quick, monkeypatch):
    first = parse("tiny").pin()
    specimen = first.load()
    assert specimen.tokenizer.decode(specimen.tokenizer("Emma")["input_ids"]) == "Emma"
    assert specimen.model.config.model_type == "lesion-decoder" and len(specimen.tokenizer) == 300
    monkeypatch.setattr(tiny, "_make", lambda target: pytest.fail("it is there already"))
    assert Tiny().pin() == first and Tiny().pin().key == first.key
    assert Tiny().outline().num_parameters() == specimen.model.num_parameters()
    config = tiny.folder() / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 5000.0'))
    with pytest.raises(ValueError, match="tiny was to have sha256"):
        first.pin()


def test_interrupted_it_goes_on_to_the_same_bits(quick, tmp_path, monkeypatch):
    from lesion import fit

    whole = Tiny().pin().sha256
    monkeypatch.setenv("LESION_CACHE", str(tmp_path / "again"))
    step = fit._step

    def dies(team, made, data, how, number, *more):
        if number == 4:
            raise KeyboardInterrupt
        return step(team, made, data, how, number, *more)

    monkeypatch.setattr(fit, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        Tiny().pin()
    (work,) = packaged.cache().glob(".tiny-*.work")
    assert (work / "run" / "step-00000004").is_dir()
    monkeypatch.setattr(fit, "_step", step)
    assert Tiny().pin().sha256 == whole and not work.exists()


def test_of_two_who_want_it_at_once_one_makes_it(quick, monkeypatch):
    made, real = [], tiny._make
    monkeypatch.setattr(tiny, "_make", lambda target: (made.append(target), real(target)))
    both = [threading.Thread(target=tiny.folder) for _ in range(2)]
    [one.start() for one in both]
    [one.join() for one in both]
    assert len(made) == 1 and tiny.folder().is_dir()


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="tiny is held in float32"):
        parse("tiny", "bfloat16")


def test_the_real_one_beats_a_trigram(lab):
    """Three minutes of training are not part of the tests: `lesion run modern-lm --subject tiny` makes it and says the same."""
    from lesion.measures import Ngrams, Perplexity

    if not (packaged.cache() / f"tiny-{tiny.recipe().key[:12]}").is_dir():
        pytest.skip("tiny has not been trained on this machine: lesion run modern-lm --subject tiny")
    how = {"corpus": "austen", "documents": 6, "tokens": 1500}
    read = [Perplexity(**how, window=256, stride=128), Ngrams(**how, order=3, counted="novels")]
    table = lab.read([Tiny()], read)
    bits = {name: group["nll"].sum() / group["bytes"].sum() for (name,), group in table.group_by("measure")}
    assert bits["perplexity"] < 0.97 * bits["ngrams"]
    facts = json.loads((tiny.folder() / "ledger.json").read_text())[-1]["facts"]
    assert facts["steps"] == tiny.TRAINING["steps"] and facts["moved"] > 0.99
