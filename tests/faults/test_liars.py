"""Steps and measures that change what they did not announce: named, the model loaded afresh, and nothing of them counts."""

import json

import pytest
import torch

from lesion import Lab, steps
from lesion.store import Store
from lesion.subjects import Scratch
from lesion.trial import Reading, Step
from words import TestMeddles, TestNorms, TestShift

FIRST, SECOND = steps.Noise(site="all", sigma=0.3, seed=1), TestShift(by=0.5)


def take(path, trials, measure=None):
    return Lab(path).take([Reading(trial=trial, measure=measure or TestNorms()) for trial in trials])


def sound(subject):
    return [subject >> FIRST, subject >> FIRST >> SECOND, subject >> SECOND]


def without_failures(store):
    """All lines of a lab but what failed."""
    return [text for text in store.canonical() if json.loads(text)["is"] != "failure"]


def last(model):
    return list(model.parameters())[-1]


def replaced(model):
    model.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach() * 2)


def reshaped(model):
    embedding = model.get_input_embeddings()
    embedding.weight.data = embedding.weight.data[:-1].clone()


def of_a_buffer(model):
    next(model.buffers()).add_(0.25)


LIES = {
    "a weight": lambda model: last(model).add_(1),
    "one bit of a weight": lambda model: last(model).view(-1)[:1].view(torch.int32).bitwise_xor_(1),
    "a sign of zero": lambda model: last(model).view(-1)[:1].mul_(-0.0),
    "a NaN": lambda model: last(model).view(-1)[:1].fill_(float("nan")),
    "a buffer": of_a_buffer,
    "another parameter in its place": replaced,
    "another shape": reshaped,
    "another type": lambda model: model.to(torch.float16),
    "one parameter more": lambda model: model.register_parameter("more", torch.nn.Parameter(torch.ones(2))),
    "one buffer more": lambda model: model.register_buffer("more", torch.ones(2)),
    "the mode of training": lambda model: model.train(),
    "a hook": lambda model: model.get_input_embeddings().register_forward_hook(lambda m, args, out: out * 2),
}


class TestLiesMore(Step):
    """Announces the first tensor, changes something else, and raises or does not."""

    name = "test-lies-more"
    how: str
    raises: bool

    def touches(self, specimen):
        return list(dict(specimen.model.named_parameters()))[1:2]

    def apply(self, specimen):
        with torch.no_grad():
            LIES[self.how](specimen.model)
        if self.raises:
            raise RuntimeError("and raises")
        return {}


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("how", LIES)
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt-neox"])
def test_what_was_not_announced_is_found_and_the_model_is_loaded_afresh(tmp_path, family, how, raises, fault):
    a, lies = Scratch(architecture=family), TestLiesMore(how=how, raises=raises)
    plain = list(take(tmp_path / "plain", sound(a)).canonical())
    store = take(tmp_path / "lab", [a >> lies, a >> FIRST >> lies, *sound(a)])
    assert without_failures(store) == plain
    assert store.index.failures.keys() == {(a >> lies).key, (a >> FIRST >> lies).key}
    for failure in store.index.failures.values():
        assert failure["error"].startswith("Changed: ") and "must not be" in failure["error"]
        assert ("and raises" in failure["trace"]) == raises
    assert Store(tmp_path / "lab").index.failures.keys() == store.index.failures.keys()
    fault("step changing what it did not announce", how, "named, model loaded afresh, the others byte-identical", 4)


def test_what_lied_is_still_on_record_when_the_lab_is_opened_again(tmp_path, fault):
    a, lies = Scratch(), TestLiesMore(how="a weight", raises=False)
    store = take(tmp_path / "lab", [a, a >> lies])
    assert Store(tmp_path / "lab").index.failures.keys() == store.index.failures.keys() == {(a >> lies).key}
    fault("step changing what it did not announce", "looked at by another process", "still recorded as a failure")


def test_a_measure_that_changes_the_model_is_not_taken(tmp_path, fault):
    a = Scratch()
    store = take(tmp_path / "lab", [a], TestMeddles())
    assert not store.index.seals and len(store.index.failures) == 1
    again = Store(tmp_path / "lab")
    assert not again.index.seals and again.index.failures.keys() == store.index.failures.keys()
    plain = list(take(tmp_path / "plain", sound(a)).canonical())
    assert set(take(tmp_path / "lab", sound(a)).canonical()) >= set(plain)
    fault("measure changing the model", "a weight", "named, not taken, the others byte-identical")
