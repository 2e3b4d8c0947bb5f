"""Steps that raise when half of their tensors are changed: recorded with their trace and put back, and every other reading
comes out as in a lab that never heard of them."""

import importlib
import json

import pytest
import torch

from lesion import Lab, packaged, steps
from lesion.sites import resolve
from lesion.subjects import Scratch
from lesion.trial import Reading, Step
from words import TestNorms, TestShift

FIRST, SECOND = steps.Noise(site="all", sigma=0.3, seed=1), TestShift(by=0.5)
CLEAN = "recorded with its trace, put back, the others byte-identical"


class TestHalf(Step):
    """Damages half of the views of a site, some of them parts of fused or tied tensors, then raises."""

    name = "test-half"
    site: str

    def touches(self, specimen):
        return list(dict.fromkeys(view.name for view in resolve(specimen.model, self.site)))

    def apply(self, specimen):
        views = resolve(specimen.model, self.site)
        with torch.no_grad():
            for view in views[: (len(views) + 1) // 2]:
                view.tensor.mul_(-1.5).add_(0.25)
        specimen.model.config.vocab_size = 7
        specimen.tokenizer = None
        raise RuntimeError(f"halfway through {self.site}")


def take(path, trials):
    return Lab(path).take([Reading(trial=trial, measure=TestNorms()) for trial in trials])


def sound(subject):
    return [subject >> FIRST, subject >> FIRST >> SECOND, subject >> SECOND]


def without_failures(store):
    """All lines of a lab but what failed."""
    return [text for text in store.canonical() if json.loads(text)["is"] != "failure"]


@pytest.mark.parametrize("site", ["attention.value", "attention", "embedding", "head", "all"])
@pytest.mark.parametrize("family", packaged.TINY)
def test_a_step_that_raises_midway_leaves_no_trace_but_its_own(tmp_path, family, site, fault):
    a, half = Scratch(architecture=family), TestHalf(site=site)
    failing = [a >> half, a >> half >> SECOND, a >> FIRST >> half, a >> FIRST >> SECOND >> half]
    plain = list(take(tmp_path / "plain", sound(a)).canonical())
    for number, order in enumerate((failing + sound(a), sound(a) + failing)):
        store = take(tmp_path / f"{number}", order)
        assert without_failures(store) == plain
        assert store.index.failures.keys() == {(trial >> half).key for trial in (a >> FIRST, a >> FIRST >> SECOND)} | {
            (a >> half).key
        }
        for failure in store.index.failures.values():
            assert failure["error"] == f"RuntimeError: halfway through {site}"
            assert "in apply" in failure["trace"] and __file__ in failure["trace"]
    fault("step raising midway", f"{site}, of every family", CLEAN, 6)


DAMAGE = {
    "noise": steps.Noise(site="attention", sigma=0.4, seed=3),
    "quantise": steps.Quantise(site="attention", levels=6),
    "ablate": steps.Ablate(site="attention", share=0.5, seed=3),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt-neox", "tiny-gpt2", "tiny-t5"])
def test_a_real_step_that_dies_at_any_block_is_put_back(tmp_path, family, name, monkeypatch, fault):
    a, damage = Scratch(architecture=family), DAMAGE[name]
    plain = list(take(tmp_path / "plain", [a, *sound(a)]).canonical())
    module, calls = importlib.import_module(f"lesion.steps.{name}"), []
    rewrite = module.rewrite

    def dies(tensor, act):
        found = rewrite(tensor, act)
        calls.append(None)
        if len(calls) == at:
            raise RuntimeError("the block is changed, and now this")
        return found

    monkeypatch.setattr(module, "rewrite", dies)
    for at in (1, 2, 5):
        calls.clear()
        store = take(tmp_path / f"{at}", [a, a >> damage, a >> damage >> SECOND])
        assert len(calls) >= at and store.index.failures.keys() == {(a >> damage).key}
        monkeypatch.setattr(module, "rewrite", rewrite)
        assert without_failures(take(tmp_path / f"{at}", sound(a))) == plain
        store = take(tmp_path / f"{at}", [a >> damage])
        assert not store.index.failures and len(store.index.seals) == 5
        monkeypatch.setattr(module, "rewrite", dies)
    fault("step raising midway", f"{name}, at a block of its work", CLEAN, 3)
