"""Loading in 4 bits: it reads and writes texts, and what is packed is not damaged but refused."""

import pytest

from lesion import packaged
from lesion.lab import product
from lesion.measures import Generation, Perplexity
from lesion.steps import Noise
from lesion.subjects import Directory, Scratch

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("nf4")
    shape = {
        **packaged.TINY["tiny-llama"],
        "hidden_size": 128,
        "intermediate_size": 256,
    }  # bitsandbytes wants blocks of 64
    specimen = Scratch(architecture="llama", config=shape, seed=1).load()
    specimen.model.save_pretrained(path)
    specimen.tokenizer.save_pretrained(path)
    return str(path)


def test_a_model_in_four_bits_is_read_and_is_another_subject(folder, lab):
    four, whole = Directory(path=folder, dtype="nf4"), Directory(path=folder)
    table = lab.read([four, whole], [Perplexity(documents=2, tokens=60), Generation(prompts=3, new_tokens=5)])
    nll = table.filter(table["measure"] == "perplexity").group_by("trial", maintain_order=True).agg("nll")["nll"]
    assert nll[0].to_list() != nll[1].to_list()
    assert all(abs(a - b) < 0.2 * b for a, b in zip(*nll, strict=True)), "rounded, not ruined"


def test_what_is_packed_is_refused_by_name_and_the_rest_is_damaged(folder, lab):
    four = Directory(path=folder, dtype="nf4")
    with pytest.raises(ValueError, match=r"mlp.*packed or quantised .*load the model in floats"):
        lab.take(product([four >> Noise(site="mlp", sigma=0.1)], [Perplexity(documents=1, tokens=40)]))
    store = lab.take(product([four >> Noise(site="embedding", sigma=0.1)], [Perplexity(documents=1, tokens=40)]))
    (state,) = store.index.states.values()
    assert state["ledger"][-1]["changed"] == ["model.embed_tokens.weight"] and not store.index.failures
