"""Specs: object ⇄ JSON ⇄ key, without a bit lost on the way."""

import json
import math
import subprocess
import sys
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from lesion import Scratch
from lesion.spec import Spec, dashed, key_of, words
from lesion.trial import Measure, Reading, Step, Subject, Trial
from words import TestQuotes, TestShift

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_a_key_is_that_of_the_value_after_any_json_round_trip(value):
    assert key_of(json.loads(json.dumps(value))) == key_of(value)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_no_dose_is_ever_rounded_in_a_key(a, b):
    assert (TestShift(by=a).key == TestShift(by=b).key) == (a == b)


@given(st.lists(st.floats(-9, 9), max_size=4), st.integers(0, 3))
def test_a_prefix_of_a_sentence_has_the_key_of_its_state(doses, n):
    trial = Trial(subject=Scratch())
    keys = [trial.key]
    for dose in doses:
        trial = trial >> TestShift(by=dose)
        keys.append(trial.key)
    n = min(n, len(doses))
    assert Trial(subject=Scratch(), steps=trial.steps[:n]).key == keys[n]
    assert len(set(keys)) == len(keys)
    assert Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial


def test_one_and_one_point_zero_are_one_dose():
    assert TestShift(by=1).key == TestShift(by=1.0).key


def test_keys_are_the_same_in_another_process():
    code = "import sys; sys.path[:0] = ['src', 'tests']\nfrom words import *\nfrom lesion import Scratch\nprint((Scratch() >> TestShift(by=0.1)).key)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == (Scratch() >> TestShift(by=0.1)).key


def test_the_key_of_a_changed_copy_is_its_own():
    spec = TestShift(by=1.0)
    assert spec.key != spec.model_copy(update={"by": 2.0}).key == TestShift(by=2.0).key


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_has_no_json_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        TestShift(by=value)
    with pytest.raises(ValueError, match="JSON"):
        key_of(value)


def test_specs_are_frozen_strict_and_keyword_only():
    spec = TestShift()
    with pytest.raises(ValueError, match="frozen"):
        spec.by = 2.0
    with pytest.raises(ValueError, match="[Ee]xtra"):
        TestShift(bye=1)
    with pytest.raises(TypeError):
        TestShift(1.0)


def test_quoted_sentences_go_round_trip():
    reading = Reading(
        trial=Scratch() >> TestShift(),
        measure=TestQuotes(
            other=Reading(trial=Scratch(), measure=TestQuotes(other=Reading(trial=Scratch(), measure=_norms())))
        ),
    )
    again = Reading.from_json(json.loads(json.dumps(reading.to_json())))
    assert again == reading and again.key == reading.key
    assert [type(q) for q in again.measure.quotes()] == [Reading]


def _norms():
    from words import TestNorms

    return TestNorms()


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two classes are called 'step/test-shift'"):

        class Other(Step):
            name: ClassVar[str] = "test-shift"
            by: float = Field(default=1)

            def touches(self, specimen):
                return []

            def apply(self, specimen):
                return {}


def test_words_are_found_in_their_folders_without_a_list():
    assert {"noise", "ablate", "quantise"} <= set(words("step"))
    assert {"perplexity", "generation"} <= set(words("measure"))
    assert {"degrade", "monotone", "prion-scaling"} <= set(words("study"))
    assert {"smollm2", "hub", "directory", "scratch"} <= set(words("subject"))
    assert {Subject, Step, Measure} <= set(Spec.__subclasses__())


@pytest.mark.parametrize(("name", "said"), [("TestShift", "test-shift"), ("SmolLM2", "smol-lm2"), ("Noise", "noise")])
def test_names(name, said):
    assert dashed(name) == said
