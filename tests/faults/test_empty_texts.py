"""Documents without a token, documents of one, prompts of none, corpora of nothing: refused by name, or counted for what they
are; nothing is divided by zero, and no sibling is taken along."""

import json
import math

import pytest

from lesion import measures, steps
from lesion.cli import run
from lesion.subjects import Scratch
from lesion.trial import Reading, Trial
from words import TestNorms

A = Trial(subject=Scratch())
GOOD = ["Hello there, friends of the short text.", "And here is another one, not much longer."]
CORPORA = {
    "an empty document": [GOOD[0], "", GOOD[1]],
    "a document of spaces": [GOOD[0], "  ", GOOD[1]],
    "a document of one token": [GOOD[0], "a", GOOD[1]],
    "nothing but one token": ["a"],
    "nothing but empty documents": ["", " ", "\n"],
    "no document": [],
}
REFUSED, COUNTED = "refused by name, recorded, its siblings taken", "finished, every number finite"


def written(path, texts):
    """A corpus with an empty line between its documents."""
    path.write_text("\n\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return str(path)


MEASURES = {
    "perplexity": lambda corpus: measures.Perplexity(corpus=corpus),
    "displacement": lambda corpus: measures.Displacement(corpus=corpus, reference=A),
    "attention": lambda corpus: measures.Attention(corpus=corpus),
    "ngrams": lambda corpus: measures.Ngrams(corpus=corpus, counted="austen", skip=20),
    "ngrams, counted": lambda corpus: measures.Ngrams(documents=1, tokens=30, counted=corpus),
    "extrapolation": lambda corpus: measures.Extrapolation(corpus=corpus, length=4, times=(1,), stretches=1),
    "continuation": lambda corpus: measures.Continuation(
        corpus=corpus, length=4, times=(1,), stretches=1, new_tokens=2
    ),
}


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float):
        yield value


@pytest.mark.parametrize("what", CORPORA)
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_of_such_a_corpus(lab, tmp_path, name, what, fault):
    corpus = written(tmp_path / "mine.jsonl", CORPORA[what])
    reading = Reading(trial=A, measure=MEASURES[name](corpus).pin())
    store = lab.take([reading, Reading(trial=A, measure=TestNorms())])
    assert len(store.index.seals) + len(store.index.failures) == 2 and len(store.index.seals) >= 1
    for failure in store.index.failures.values():
        assert failure["of"] == reading.key and failure["error"].startswith("ValueError: ")
        assert "'mine/document-000" in failure["error"] or corpus in failure["error"]
    if not store.index.failures:
        found = list(numbers([*store.rows([reading.key]), store.index.seals[reading.key].summary]))
        assert found and all(map(math.isfinite, found))
    if what in ("nothing but empty documents", "no document"):
        assert "holds no text" in next(iter(store.index.failures.values()))["error"]
    fault(f"{what} in a corpus", name, REFUSED if store.index.failures else COUNTED)


@pytest.mark.parametrize("what", ["nothing but one token", "nothing but empty documents", "no document"])
def test_a_command_about_nothing(tmp_path, what, capsys, fault):
    corpus = written(tmp_path / "mine.jsonl", CORPORA[what])
    study = ["run", "degrade", "--subject", "tiny-llama", "--doses", "0", "0.5", "--site", "mlp", "--repeats", "1"]
    study += ["--measures", "perplexity", "--corpus", corpus, "--lab", str(tmp_path / "lab"), "--verbosity", "quiet"]
    code = run(study)
    told = capsys.readouterr()
    assert code in (1, 2) and "mine" in told.err + told.out and "Traceback" not in told.err
    fault(f"{what} in a corpus", "a command", "refused by name, exit code 1 or 2")


BATTERIES = {
    "a prompt of no tokens": {"prompt": ""},
    "a prompt of spaces": {"prompt": " \n "},
    "no prompt at all": None,
    "an answer without a prompt": {"answer": {"number": 4}},
}


@pytest.mark.parametrize("what", BATTERIES)
def test_a_battery_with_nothing_to_ask(tmp_path, what, capsys, fault):
    path = tmp_path / "mine.jsonl"
    lines = [{"id": "a", "prompt": "Hello?"}, {"id": "b", **BATTERIES[what]}] if BATTERIES[what] else []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"mine\.jsonl(, line 2: .*'b' has no text| holds no prompts)"):
        measures.Generation(battery=str(path)).pin()
    study = [
        "run",
        "degrade",
        "--subject",
        "tiny-llama",
        "--doses",
        "0",
        "--measures",
        "generation",
        "--battery",
        str(path),
    ]
    assert run([*study, "--lab", str(tmp_path / "lab")]) == 2
    assert str(path) in capsys.readouterr().err and not (tmp_path / "lab").exists()
    fault(f"{what} in a battery", "a .jsonl file", "refused by the line, exit code 2")


def heal(corpus, **more):
    given = {"steps": 30, "batch": 1, "length": 8, "warmup": 1, "lr": 0.01, "skip": 0, **more}
    return A >> steps.Heal(corpus=corpus, **given).pin()


def test_a_training_on_nothing(lab, tmp_path, fault):
    for number, texts in enumerate((["a"], ["", " "], [])):
        corpus = written(tmp_path / f"mine{number}.jsonl", texts)
        reading = Reading(trial=heal(corpus), measure=TestNorms())
        store = lab.take([reading, Reading(trial=A, measure=TestNorms())])
        (error,) = (f["error"] for f in store.index.failures.values() if f["of"] == reading.trial.key)
        assert "make no row of 8" in error or f"{corpus} holds no text" in error
    fault("nothing to train on", "one token, empty documents, no document", REFUSED, 3)


def test_a_training_that_skips_all_there_is(lab, tmp_path, fault):
    trial = heal(written(tmp_path / "mine.jsonl", GOOD), skip=12)
    store = lab.take([Reading(trial=trial, measure=TestNorms())])
    (failure,) = store.index.failures.values()
    assert "0 tokens of text make no row of 8" in failure["error"]
    fault("nothing to train on", "more documents left out than there are", REFUSED)


@pytest.mark.parametrize("documents", ["apart", "joined"])
def test_a_training_on_a_corpus_with_many_empty_documents(lab, tmp_path, documents, fault):
    full = written(tmp_path / "full.jsonl", GOOD)
    empty = written(tmp_path / "empty.jsonl", [*[""] * 200, GOOD[0], *[""] * 100, GOOD[1]])
    trials = [heal(corpus, documents=documents) for corpus in (full, empty)]
    store = lab.take([Reading(trial=trial, measure=TestNorms()) for trial in trials])
    assert not store.index.failures
    losses = [[e["facts"]["curve"] for e in s["ledger"] if "facts" in e] for s in store.index.states.values()]
    assert losses[0] == losses[1], "an empty document is nothing to learn from"
    fault("many empty documents to train on", documents, "as if they were not there, bit-identical", 300)
