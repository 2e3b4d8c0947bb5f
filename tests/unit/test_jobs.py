"""A walk as tasks and arrays: over random sentences and labs, nothing is done twice, too early or not at all."""

from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lesion import jobs
from lesion.forest import Node, quoted
from lesion.jobs import arrays, closure, kept_states, parts, tasks, trials_of
from lesion.subjects import Scratch
from lesion.trial import Reading, Step, Trial
from words import TestNorms, TestQuotes, TestShift, TestTrains

SUBJECTS = [Trial(subject=Scratch(architecture=name)) for name in ("tiny-llama", "tiny-gpt2")]


class TestGuided(TestShift):
    """A cheap step that quotes a reading."""

    name = "test-guided"
    by_what: Reading


class TestTaught(TestTrains):
    """An expensive step that quotes a reading."""

    name = "test-taught"
    keeps: ClassVar[bool] = True
    by_what: Reading


class TestLikened(TestTrains):
    """An expensive step that quotes another model."""

    name = "test-likened"
    keeps: ClassVar[bool] = True
    teacher: Trial


class TestCompares(TestNorms):
    """A measure that quotes another model."""

    name = "test-compares"
    other: Trial


@st.composite
def studies(draw):
    """Readings that grow out of each other: each goes on from a trial there was, and may quote what there was."""
    trials, readings = list(SUBJECTS), []
    for number in range(draw(st.integers(1, 14))):
        trial = draw(st.sampled_from(trials))
        quote = draw(st.sampled_from(readings)) if readings and draw(st.booleans()) else None
        match draw(st.integers(0, 5)):
            case 0 | 1:
                trial = trial >> (TestGuided(by=number, by_what=quote) if quote else TestShift(by=number % 3))
            case 2 | 3:
                trial = trial >> (TestTaught(by_what=quote) if quote else TestTrains(seed=number % 3))
            case 4 if not taught_by_another(teacher := draw(st.sampled_from(trials))):
                trial = trial >> TestLikened(teacher=teacher)
        trials.append(trial)
        other = draw(st.sampled_from(trials))
        for power in range(draw(st.integers(1, 3))):
            readings.append(Reading(trial=trial, measure=TestNorms(power=power + 1)))
        match draw(st.integers(0, 3)):
            case 0:
                readings.append(Reading(trial=trial, measure=TestQuotes(other=draw(st.sampled_from(readings)))))
            case 1 if not taught_by_another(other):
                readings.append(Reading(trial=trial, measure=TestCompares(other=other)))
    return draw(st.lists(st.sampled_from(readings), min_size=1, max_size=len(readings), unique_by=lambda r: r.key))


def taught_by_another(trial):
    return any(isinstance(step, TestLikened) for step in trial.steps)


@st.composite
def labs(draw, readings):
    """A lab that has some of it: any set of seals and of kept states is one that a person can come to."""
    keys = list(closure(readings))
    seals = draw(st.sets(st.sampled_from(keys)))
    states = sorted({kept.key for r in closure(readings).values() for trial in needs(r) for kept in kept_states(trial)})
    there = draw(st.sets(st.sampled_from(states))) if states else set()
    return lab(seals, there)


def lab(seals=(), there=()):
    index = SimpleNamespace(seals=dict.fromkeys(seals))
    return SimpleNamespace(index=index, there=there, state_folder=lambda key: key if key in there else None)


def needs(reading):
    """Trials that a reading needs, and those that these need."""
    for trial in trials_of(reading):
        yield from with_teachers(trial)


def with_teachers(trial):
    yield trial
    for step in trial.steps:
        if isinstance(step, TestLikened):
            yield from with_teachers(step.teacher)


def to_make(trial, store):
    """Kept states that are to be made before a trial can lie on the bench: none that comes before one that is there."""
    chain = list(kept_states(trial))
    there = [number for number, kept in enumerate(chain, 1) if kept.key in store.there]
    return chain[max(there, default=0) :]


def all_to_make(trial, store):
    found = {}
    for kept in to_make(trial, store):
        found[kept.key] = kept
        for step in kept.steps:
            if isinstance(step, TestLikened):
                found |= all_to_make(step.teacher, store)
    return found


def before(found):
    """Task → all tasks that are over when it starts."""
    known = {}
    for task in found:
        known[task.number] = set(task.after).union(*(known[number] for number in task.after))
    return known


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), studies(), st.integers(1, 5))
def test_everything_is_done_once_and_after_what_it_needs(data, readings, width):
    store = data.draw(labs(readings))
    found = tasks(readings, store, width)
    assert [task.number for task in found] == list(range(len(found)))
    assert all(number < task.number for task in found for number in task.after), "no ring, and in order"
    missing = {key: r for key, r in closure(readings).items() if key not in store.index.seals}
    taken = [reading.key for task in found for reading in task.readings]
    assert sorted(taken) == sorted(missing)
    made = [task.makes.key for task in found if task.makes is not None]
    wanted = {key for r in missing.values() for trial in trials_of(r) for key in all_to_make(trial, store)}
    assert sorted(made) == sorted(wanted)
    assert all((task.makes is None) == bool(task.readings) for task in found)

    over = before(found)
    maker = {task.makes.key: task.number for task in found if task.makes is not None}
    taker = {reading.key: task.number for task in found for reading in task.readings}
    needed = {task.number: set() for task in found}
    for task in found:
        if task.makes is not None:
            for kept in to_make(task.makes, store)[:-1]:
                assert maker[kept.key] in over[task.number]
            for quote in (q for step in task.makes.steps for q in step.quotes()):
                if isinstance(quote, Reading):
                    assert quote.key not in taker or taker[quote.key] in over[task.number]
                else:
                    assert {maker[key] for key in all_to_make(quote, store)} <= over[task.number]
        for reading in task.readings:
            for trial in trials_of(reading):
                assert {maker[kept.key] for kept in to_make(trial, store)} <= over[task.number]
            for quote in quoted(reading):
                if quote.key in taker and taker[quote.key] != task.number:
                    assert taker[quote.key] in over[task.number]
                    needed[taker[quote.key]].add(quote.key)
    assert {task.number: task.needed for task in found} == needed


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), studies(), st.integers(1, 5), st.integers(2, 4))
def test_arrays_hold_every_task_once_and_wait_as_their_tasks_do(data, readings, width, largest):
    found = tasks(readings, data.draw(labs(readings)), width)
    with mock.patch.object(jobs, "LARGEST", largest):
        made = arrays(found)
    assert sorted(task.number for array in made for task in array.tasks) == [task.number for task in found]
    submitted = set()
    for number, array in enumerate(made):
        assert 1 <= len(array.tasks) <= largest
        assert {task.makes is not None for task in array.tasks} == {array.makes}
        if array.follows is None:
            assert all(task.after == array.after for task in array.tasks) and array.after <= submitted
        else:
            followed = made[array.follows].tasks
            assert array.follows < number and len(followed) == len(array.tasks) > 1
            assert [task.after for task in array.tasks] == [{task.number} for task in followed]
        submitted |= {task.number for task in array.tasks}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 30))
def test_parts_are_balanced_and_keep_the_order(sizes, width):
    nodes = [Node(None, str(n), measures=dict.fromkeys(range(size))) for n, size in enumerate(sizes)]
    found = parts(nodes, width)
    assert [node.key for some in found for node in some] == [node.key for node in nodes]
    assert len(found) <= width and all(found)
    share = sum(sizes) / width
    assert all(sum(len(node.measures) for node in some) <= share + max(sizes) for some in found)


def test_a_teacher_is_made_before_its_pupil_and_stays_with_it():
    teacher = SUBJECTS[1] >> TestTrains(seed=1)
    pupil = SUBJECTS[0] >> TestLikened(teacher=teacher)
    first, second, last = tasks([Reading(trial=pupil, measure=TestNorms())], lab(), 1)
    assert [first.makes.key, second.makes.key, last.makes] == [teacher.key, pupil.key, None]
    assert (second.after, last.after) == ({0}, {0, 1})


def test_with_everything_in_the_lab_there_is_no_task():
    readings = [Reading(trial=SUBJECTS[0] >> TestTrains(), measure=TestNorms())]
    assert tasks(readings, lab([readings[0].key]), 3) == [] and arrays([]) == []


def test_what_came_before_a_state_that_is_there_is_not_made_again():
    """Trained states are large, and people remove those that they need no more."""
    first = SUBJECTS[0] >> TestTrains(seed=1)
    second = first >> TestTrains(seed=2)
    (task,) = tasks([Reading(trial=second, measure=TestNorms())], lab(there=[second.key]), 1)
    assert task.readings and not task.after


def test_elements_of_one_array_follow_those_of_another():
    trained = [SUBJECTS[0] >> TestTrains(seed=seed) for seed in range(5)]
    readings = [Reading(trial=t >> TestShift(by=by), measure=TestNorms()) for t in trained for by in (1, 2)]
    made = arrays(tasks(readings, lab(), 1))
    assert [(array.makes, len(array.tasks), array.follows) for array in made] == [(True, 5, None), (False, 5, 0)]


@pytest.mark.parametrize("count", [999, 1000, 1001])
def test_no_array_is_larger_than_a_scheduler_takes(count):
    readings = [Reading(trial=SUBJECTS[0] >> TestTrains(seed=s), measure=TestNorms()) for s in range(count)]
    made = arrays(tasks(readings, lab(), 1))
    assert max(len(array.tasks) for array in made) == min(count, jobs.LARGEST)
    assert sum(len(array.tasks) for array in made) == 2 * count
    for array in made:
        assert array.makes or array.follows is not None or len(array.tasks) == 1, "each when its own state is there"


class TestOneMore(Step):
    """A step that quotes a model; the quoted one may quote another."""

    name = "test-one-more"
    teacher: Trial
    touches = TestShift.touches
    apply = TestShift.apply


def test_a_reading_that_a_teachers_teacher_quotes_is_taken_first():
    quote = Reading(trial=SUBJECTS[0], measure=TestNorms())
    grand = SUBJECTS[0] >> TestGuided(by_what=quote)
    parent = SUBJECTS[0] >> TestOneMore(teacher=grand)
    reading = Reading(trial=SUBJECTS[0] >> TestOneMore(teacher=parent), measure=TestNorms())
    assert set(closure([reading])) == {quote.key, reading.key}


def test_a_reading_that_compares_with_what_its_neighbour_has_taught_waits_for_nobody_who_waits_for_it():
    """Both are of one part: the one is quoted by the training of the model that the other is compared with."""
    intact = SUBJECTS[0]
    first = Reading(trial=intact, measure=TestNorms())
    taught = intact >> TestTaught(by_what=first)
    second = Reading(trial=intact, measure=TestCompares(other=taught))
    nothing = SimpleNamespace(index=SimpleNamespace(seals={}), state_folder=lambda key: None)
    found = tasks([first, second], nothing, width=1)
    assert [[r.key for r in task.readings] or task.makes.key for task in found] == [
        [first.key],
        taught.key,
        [second.key],
    ]
    assert [task.after for task in found] == [frozenset(), {0}, {1}] or found[2].after == {0, 1}
