"""A NaN belongs to the row that met it: what shares its batch, its padding or its place in the cache does not catch it.

What is masked has the weight 0 in attention, and 0 · NaN is NaN. So a row must not even lie beside one.
"""

import json

import pytest
import torch

from lesion import Lab
from lesion.batteries import battery
from lesion.measures import Displacement, Generation, Perplexity
from lesion.subjects import Directory, Scratch
from lesion.trial import Reading, Step, Trial
from lesion.walk import Bench

FAMILIES = ["tiny-gpt-neox", "tiny-qwen2", "tiny-mistral", "tiny-opt"]  # whose head is not tied to the embedding


class TestTrap(Step):
    """Makes the embeddings of some tokens NaN: nothing happens before one of them is read."""

    name = "test-trap"
    tokens: tuple[int, ...]

    def touches(self, specimen):
        here = specimen.model.get_input_embeddings().weight
        return [name for name, p in specimen.model.named_parameters() if p is here]

    def apply(self, specimen):
        with torch.no_grad():
            specimen.model.get_input_embeddings().weight[list(self.tokens)] = float("nan")
        return {}


def untied(family):
    return Scratch(architecture=family, config={"tie_word_embeddings": False})


def unasked(texts, every):
    """Every so many tokens that the tokenizer of bytes does not read in these texts, the padding among them."""
    asked = set(Scratch().load().tokenizer("".join(texts))["input_ids"])
    found = [token for token in range(256) if token not in asked]
    assert found[0] == 0
    return tuple(found[::every])


def told(row):
    return {name: row[name] for name in ("text", "tokens", "stop")}


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_meets_a_nan_halfway_stops_alone(tmp_path, family, batch, fault):
    measure = Generation(prompts=8, new_tokens=12, seed=1, batch=batch).pin()
    trap = TestTrap(tokens=unasked([prompt.text for prompt in battery(measure.battery)], 20))
    a = untied(family)
    whole, cut = (
        {row["item"]: row for row in Lab(tmp_path / "lab").take([reading]).rows([reading.key])}
        for reading in (Reading(trial=a, measure=measure), Reading(trial=a >> trap, measure=measure))
    )
    bench = Bench(a.load())
    with bench.applied(trap):
        alone = {item: told(*measure.read(bench.specimen, [item])) for item in cut}
    assert {item: told(row) for item, row in cut.items()} == alone
    stopped = [row for row in cut.values() if row["stop"] == "not finite"]
    assert stopped and any(row["tokens"] for row in stopped) and len(stopped) < len(cut)
    for item, row in cut.items():
        assert row["stop"] == "not finite" or row["text"] == whole[item]["text"]
        assert row["tokens"] <= whole[item]["tokens"]
    fault(
        "NaN in the middle of a generation", f"a token that is NaN to the model ({family})", "that row stops, no other"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_that_is_nan_to_the_model_reaches_no_document(tmp_path, family, fault):
    texts = ["Short.", "A longer one, of some words.", "It was " + "very " * 12 + "long indeed."]
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    a = untied(family)
    trial = a >> TestTrap(tokens=unasked(texts, 1))
    perplexity = Perplexity(corpus=str(corpus)).pin()
    displacement = Displacement(corpus=str(corpus), reference=Trial(subject=a)).pin()
    store = Lab(tmp_path / "lab").take([Reading(trial=t, measure=perplexity) for t in (Trial(subject=a), trial)])
    same = [
        [row["nll"] for row in store.rows([Reading(trial=t, measure=perplexity).key])]
        for t in (Trial(subject=a), trial)
    ]
    assert same[0] == same[1] and None not in same[0]
    rows = Lab(tmp_path / "lab").take([Reading(trial=trial, measure=displacement)]).rows([
        Reading(trial=trial, measure=displacement).key
    ])  # fmt: skip
    assert [row["kl"] for row in rows if row["item"] != "weights"] == [0.0] * len(texts)
    fault(
        "NaN in the padding of a batch", f"every token that no document has ({family})", "byte-identical without it", 2
    )


def test_a_llama_in_float16_is_read_on_any_processor(tmp_path):
    specimen = Scratch(seed=1).load()
    specimen.model.save_pretrained(tmp_path / "model")
    specimen.tokenizer.save_pretrained(tmp_path / "model")
    half = Directory(path=str(tmp_path / "model"), dtype="float16").pin()
    store = Lab(tmp_path / "lab").take([Reading(trial=half, measure=Perplexity(documents=2, tokens=24).pin())])
    assert not store.index.failures
