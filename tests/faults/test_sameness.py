"""The same name and another thing: other weights in the same folder, another tokenizer, a branch that moved, a word of another
version. Keys differ, what was read stays, what is new is taken, and the two are never mixed."""

import json
import shutil
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubserver import FIRST, SECOND, Server, child
from lesion import Lab, spec
from lesion.cli import run
from lesion.lab import product
from lesion.store import Store
from lesion.subjects import Directory, Scratch
from lesion.trial import Measure, Reading, Step, Trial
from words import CALLS, TestNorms, TestShift, TestTrains

KEPT_APART = "another key; the old readings stay byte for byte, only the new are taken"


def edit(name, **fields):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def one_bit(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].view(torch.int32)[:1].bitwise_xor_(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_model(folder):
    Scratch(seed=2).load().model.save_pretrained(folder)


def another_tokenizer(folder):
    tokens = json.loads((folder / "tokenizer.json").read_text())
    words = tokens["model"]["vocab"]
    a, b = list(words)[40:42]
    words[a], words[b] = words[b], words[a]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))


CHANGES = {
    "other weights": another_model,
    "one bit of one weight": one_bit,
    "two tokens exchanged": another_tokenizer,
    "another base of positions": edit("config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "another end token": edit("generation_config.json", eos_token_id=7),
    "another template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
}


def take(lab, trials, measure=None):
    """Takes readings; returns the store and how many were really taken."""
    before = sum(call.startswith("norms") for call in CALLS)
    store = lab.take(product(trials, [measure or TestNorms()]))
    return store, sum(call.startswith("norms") for call in CALLS) - before


@pytest.mark.parametrize("how", CHANGES)
def test_something_else_in_the_same_folder(lab, folder, how, fault):
    trials = [Directory(path=str(folder)), Directory(path=str(folder)) >> TestShift()]
    shutil.copytree(folder, folder.with_name("before"))
    first, taken = take(lab, trials)
    old = set(first.canonical())
    assert taken and take(lab, trials)[1] == 0
    CHANGES[how](folder)
    second, again = take(lab, trials)
    assert again == taken and not second.index.failures and len(second.index.seals) == 4
    assert set(second.canonical()) > old
    alone, _ = take(Lab(lab.path.with_name("alone")), trials)
    assert set(second.canonical()) == old | set(alone.canonical())
    shutil.rmtree(folder)
    folder.with_name("before").rename(folder)
    third, none = take(lab, trials)
    assert none == 0 and set(third.canonical()) == set(second.canonical()), "the first ones count again"
    fault("something else under the same name", how, KEPT_APART)


@pytest.mark.parametrize("how", CHANGES)
def test_something_else_between_the_question_and_the_loading(lab, folder, how, fault):
    asked = product([Directory(path=str(folder))], [TestNorms()])
    CHANGES[how](folder)
    store = lab.take(asked)
    (failure,) = store.index.failures.values()
    assert "was to have sha256" in failure["error"] and not store.index.seals and not store.index.states
    fault("a folder that changes after it was pinned", how, "refused by both digests, recorded, nothing computed")


def test_something_else_while_it_is_being_loaded(lab, folder, monkeypatch, fault):
    from lesion import subjects

    load = subjects.load_folder

    def slowly(*given):
        specimen = load(*given)
        another_model(folder)
        return specimen

    monkeypatch.setattr(subjects, "load_folder", slowly)
    store = lab.take(product([Directory(path=str(folder))], [TestNorms()]))
    (failure,) = store.index.failures.values()
    assert "was written to while it was read" in failure["error"] and not store.index.seals
    fault("a folder that changes while it is loaded", "other weights", "refused by name, recorded, nothing computed")


ACT = """
def act(what, fields):
    if what == "move":
        import os, urllib.request
        return urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/move").status
    from lesion import Lab
    from lesion.measures import Perplexity
    from lesion.subjects import Hub
    lab = Lab("lab")
    table = lab.read([Hub(**fields)], [Perplexity(documents=2, tokens=24)])
    return {"nll": table["nll"].to_list(), "reading": table["reading"][0], "seals": len(lab.open().index.seals)}
"""


class MovingServer(Server):
    """A hub whose branch moves when it is told to."""

    def answer(self, request):
        if request.path != "/move":
            return super().answer(request)
        self.add("org/tiny", self.other, SECOND)
        return self.send(request, b"", SECOND)


def test_a_branch_that_moved_between_two_runs(tmp_path, folder, fault):
    branch, old = {"id": "org/tiny"}, {"id": "org/tiny", "revision": FIRST}
    with closing(MovingServer()) as hub:
        hub.add("org/tiny", folder)
        hub.other = shutil.copytree(folder, tmp_path / "other")
        another_model(hub.other)
        acts = [["read", branch], ["read", branch], ["move", {}], ["read", branch], ["read", old]]
        *before, _, third, fourth = (answer["does"] for answer in child(ACT, tmp_path, hub.url, acts))
    after = [third, fourth]
    assert before[0] == before[1] and [b["seals"] for b in before + after] == [1, 1, 2, 2]
    assert after[0]["reading"] != before[0]["reading"] and after[0]["nll"] != before[0]["nll"]
    assert {**after[1], "seals": 1} == before[0]
    fault("something else under the same name", "a branch of the hub that moved", KEPT_APART)


# ---------------------------------------------------------------------- words of another version


A = Scratch()
VERSIONED = {
    "a measure": (TestNorms, [Trial(subject=A)]),
    "a step": (TestShift, [A >> TestShift()]),
    "a step that keeps its state": (TestTrains, [A >> TestTrains()]),
    "a subject": (Scratch, [Trial(subject=A)]),
}


@pytest.mark.parametrize("what", VERSIONED)
def test_a_word_of_another_version(lab, monkeypatch, what, fault):
    word, trials = VERSIONED[what]
    first, taken = take(lab, trials)
    with monkeypatch.context() as patch:
        patch.setattr(word, "version", 2)
        renewed = [type(t).from_json(_renewed(t.to_json())) for t in trials]  # keys are remembered by the object
        second, again = take(lab, renewed)
        assert again == taken and len(second.index.seals) == 2
        assert set(second.canonical()) > set(first.canonical())
        assert len(list((lab.path / "states").glob("[0-9a-f]*"))) == 2 * any(step.keeps for step in trials[0].steps)
    assert take(lab, trials)[1] == 0
    assert run(["status", "--lab", str(lab.path)]) == 0
    fault("a word of another version", what, KEPT_APART)


def _renewed(value):
    """The JSON of a trial with the versions of today."""
    if isinstance(value, list):
        return [_renewed(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {name: _renewed(inner) for name, inner in value.items()}
    return {**found, "version": spec.find(value["is"]).version} if "is" in value else found


def test_words_that_do_not_exist_any_more_disturb_nobody(lab, capsys, fault):
    class TestGoneStep(TestShift):
        name = "test-gone-step"

    class TestGoneMeasure(TestNorms):
        name = "test-gone-measure"

    gone = [Reading(trial=A >> TestGoneStep(), measure=TestNorms()), Reading(trial=A, measure=TestGoneMeasure())]
    keys = [reading.key for reading in gone]
    lab.take(gone)
    before = set(Store(lab.path).canonical())
    for word in ("step/test-gone-step", "measure/test-gone-measure"):
        spec._words.pop(word)
    with pytest.raises(ValueError, match="no step 'test-gone-step'"):
        Step.from_json(gone[0].trial.steps[0].to_json())
    with pytest.raises(ValueError, match="no measure 'test-gone-measure'"):
        Measure.from_json(gone[1].measure.to_json())
    store, taken = take(lab, [A])
    assert taken and set(store.canonical()) > before
    for command in (
        ["status", "--verbosity", "verbose"],
        ["show", keys[0]],
        ["show", keys[1]],
        ["export", "rows", "-"],
    ):
        assert run([*command, "--lab", str(lab.path)]) == 0
    assert "test-gone" in capsys.readouterr().out
    state = gone[0].trial.key
    assert run(["show", state, "--lab", str(lab.path)]) == 0
    assert run(["export", state, str(lab.path / "out"), "--lab", str(lab.path)]) == 2
    assert "no step 'test-gone-step'; there are: " in capsys.readouterr().err
    fault("a word that does not exist any more", "a step and a measure", "shown and exported as they were; by name", 2)
