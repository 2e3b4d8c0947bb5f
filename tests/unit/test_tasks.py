"""Tasks: what is asked and graded, that nothing is trained on and tested with, and wrong files refused by their line."""

import json
import os
import tarfile
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesion import packageddata, packagedfiles, task
from lesion.stats import macro_f1
from lesion.task import Example, before, digest, divided, parse, ranked, sampled, shots
from lesion.tasks import Arithmetic, Gsm8k, Instructions, Jsonl, Preferences, Sst2, Summarise
from lesion.tasks.gsm8k import final
from words import TestSums


@pytest.fixture(autouse=True)
def nothing_remembered():
    forget()
    yield
    forget()


def forget():
    task._loaded.cache_clear()
    task._digest_of.cache_clear()


@pytest.fixture
def films(tmp_path, monkeypatch):
    """A few reviews in the place of the packaged ones."""
    lines = [
        "1\t2.5\tA fine film , really !",
        "2\t-2\tDull.",
        "3\t0.2\tIt is a film.",
        "4\t3\tGlorious",
        "5\t3\tGLORIOUS!",
    ]
    (tmp_path / "ratings.txt").write_text("\n".join(lines))
    with tarfile.open(tmp_path / "reviews.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "ratings.txt", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    monkeypatch.setattr(packagedfiles, "path", lambda _: tmp_path / "reviews.tar.gz")
    tested = [{"sentence": "a fine film, really", "label": 1}, {"sentence": "bad ", "label": 0}]
    monkeypatch.setattr(packageddata, "documents", lambda _: ("validation", tested))


def test_reviews_that_are_tested_with_are_not_trained_on(films):
    found = Sst2()
    assert [e.asked for e in found.examples("test")] == ["a fine film, really", "bad"]
    assert [(e.asked, e.answer, e.label) for e in found.examples("train")] == [
        ("Dull.", "negative", 0),
        ("Glorious", "positive", 1),
    ]
    assert found.prompt(found.examples("test")[1]) == "Review: bad\nSentiment:"


@pytest.mark.parametrize(
    ("reply", "right"), [("positive", True), ("Positive.", True), ("negative", False), ("positive or negative", False)]
)
def test_a_sentiment_is_named_and_nothing_else(reply, right):
    e = Example("x", "good", "positive", ("negative", "positive"), 1)
    assert Sst2().grade(e, reply) == {"correct": right}


@pytest.mark.parametrize(
    ("reply", "right", "form"),
    [
        ("2 + 2 = 4. #### 4", True, True),
        ("She has $1,004 left. #### $1,004", False, True),
        ("so the answer is 4", True, False),
        ("#### 4.0", True, True),
        ("#### 5 and the answer is 4", False, True),
        ("no idea", False, False),
        ("", False, False),
    ],
)
def test_the_final_number_is_what_is_graded(reply, right, form):
    e = Example("x", "What is 2 and 2?", "2 + 2 = 4 #### 4")
    found = Gsm8k().grade(e, reply)
    assert (found["correct"], found["form"]) == (right, form)


def test_marks_of_the_calculator_are_taken_out(monkeypatch):
    rows = [
        {"question": f"Q {i}?\n", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(700)
    ]
    monkeypatch.setattr(packageddata, "documents", lambda _: ("test", rows))
    found = Gsm8k()
    assert len(found.examples("test")) == 600 and len(found.examples("train")) == 100
    e = found.examples("test")[0]
    assert e.answer == f"{e.asked[2:-1]} + 1 = {int(e.asked[2:-1]) + 1} #### {int(e.asked[2:-1]) + 1}"
    assert found.grade(e, e.answer)["correct"]


def test_rouge_is_that_of_the_package():
    from rouge_score.rouge_scorer import RougeScorer

    e = Example("x", "…", "the cat sat on the mat")
    reply = "a cat was sitting on a mat"
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(e.answer, reply)
    assert Summarise().grade(e, reply) == {kind: score.fmeasure for kind, score in theirs.items()}
    assert Instructions().grade(e, reply)["rougeL"] == theirs["rougeL"].fmeasure


@given(st.integers(2, 4), st.integers(6, 40), st.integers(0, 99))
def test_sums_are_right_and_none_is_in_both_parts(terms, largest, seed):
    made = Arithmetic(terms=terms, largest=largest, train=30, test=8, seed=seed).load()
    assert (len(made["train"]), len(made["test"])) == (30, 8)
    assert not {e.asked for e in made["train"]} & {e.asked for e in made["test"]}
    for e in made["train"]:
        steps = e.answer.split(" #### ")
        assert int(steps[1]) == eval(e.asked) == final(e.answer)
        for step in steps[0].rstrip(".").split(". "):
            left, right = step.split(" = ")
            assert eval(left) == int(right)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9), st.integers(0, 9))
def test_sums_that_one_task_tests_with_no_other_one_trains_on(one, other, seed, another):
    tested = {e.asked for e in Arithmetic(train=5, test=one, seed=seed).load()["test"]}
    halves = [Arithmetic(train=other, test=3, seed=another, half=half).load()["train"] for half in (0, 1, 2)]
    whole, first, second = ({e.asked for e in half} for half in halves)
    assert not tested & whole and not first & second and not tested & (first | second)


@pytest.mark.parametrize(
    ("reply", "right"), [("30 - 12 = 18. #### 18", True), ("The answer is 18.", True), ("18", True), ("#### 81", False)]
)
def test_a_sum_is_graded_by_its_number_and_its_form_apart(reply, right):
    found = Arithmetic().grade(Example("x", "30 - 12", "30 - 12 = 18. #### 18"), reply)
    assert found["correct"] is right and found["form"] is ("####" in reply)


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        *[("-5", "5", False), ("-0.5", "0.5", False), (".5", "5", False), ("$5", "5", False), ("C++", "c", False)],
        *[
            ("+", "", False),
            ("+", "-", False),
            ("+", "+", True),
            ("Paris", " paris. ", True),
            ("Paris", '"Paris!"', True),
        ],
        *[("Paris", "**Paris**.", True), ("-5", "-5.", True), ("C++", "c++", True), ("wait...", "Wait", True)],
    ],
)
def test_signs_and_points_of_an_answer_count_and_what_surrounds_it_does_not(answer, reply, right, tmp_path):
    task = Jsonl(path=str(tmp_path / "x.jsonl"))
    assert task.grade(Example("x", "?", answer), reply)["correct"] is right


def test_too_many_sums_are_refused():
    with pytest.raises(
        ValueError, match="there are no 200 different problems to train on and 200 to test with, of 2 numbers up to 3"
    ):
        Arithmetic(terms=2, largest=3, train=200, test=200).load()


@given(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=40), st.integers(1, 3))
def test_equal_questions_stay_in_one_part(asked, tested):
    found = divided([Example(f"e{i}", a, "yes") for i, a in enumerate(asked)], tested)
    parts = [{e.asked for e in found[part]} for part in ("train", "test")]
    assert not parts[0] & parts[1] and len(found["train"]) + len(found["test"]) == len(asked)
    assert len(found["test"]) >= tested


def test_a_larger_sample_holds_the_smaller_and_does_not_depend_on_the_order():
    examples = [Example(f"e{i}", str(i), "x") for i in range(50)]
    small, large = sampled(examples, 10, 3), sampled(examples, 20, 3)
    assert {e.id for e in small} < {e.id for e in large} and sampled(examples, 0, 3) == examples
    turned = sampled(examples[::-1], 10, 3)
    assert {e.id for e in turned} == {e.id for e in small}
    assert [int(e.asked) for e in small] == sorted(int(e.asked) for e in small)
    assert sampled(examples, 10, 4) != small and ranked(["a", "b", "c"], 0) == ranked(["a", "b", "c"], 0)


def test_shots_have_all_labels_equally_often_and_come_from_what_is_trained_on(films):
    with pytest.raises(ValueError, match="3 examples were to stand before each question, and 'sst2' has 2"):
        shots(Sst2(), 3, 0)
    assert sorted(e.answer for e in shots(Sst2(), 2, 1)) == ["negative", "positive"]
    text = before(Sst2(), 2, 1)
    assert "Review: Dull.\nSentiment: negative\n\n" in text and before(Sst2(), 0, 1) == ""


def test_examples_that_have_changed_are_refused(monkeypatch):
    pinned = TestSums().pin()
    assert pinned.sha256 == digest(TestSums().load()) and pinned.pin() == pinned
    forget()
    less = {"train": TestSums().load()["train"], "test": TestSums().load()["test"][:2]}
    monkeypatch.setattr(TestSums, "load", lambda self: less)
    with pytest.raises(ValueError, match="task 'test-sums' was to have sha256"):
        pinned.examples("test")


def test_an_example_in_both_parts_is_refused(monkeypatch):
    same = [Example("a", "x", "y")], [Example("b", "x", "y")]
    monkeypatch.setattr(TestSums, "load", lambda self: dict(zip(("train", "test"), same, strict=True)))
    with pytest.raises(ValueError, match="1 questions are trained on and tested with, such as b"):
        TestSums().examples("test")


def test_a_task_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Q{i}?", "answer": "yes", "choices": ["yes", "no"]} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = parse(str(path))
    assert len(found.examples("train")) == 8 and len(found.examples("test")) == 2
    e = found.examples("test")[0]
    assert (e.choices, e.label, found.prompt(e)) == (("yes", "no"), 0, e.asked)
    assert found.grade(e, "  YES. ") == {"correct": True} and found.grade(e, "yes, no") == {"correct": False}
    pinned = found.pin()
    moved = tmp_path / "moved.jsonl"
    moved.write_text(path.read_text())
    assert Jsonl(path=str(moved), sha256=pinned.sha256).key == Jsonl(path=str(path), sha256=pinned.sha256).key
    with pytest.raises(ValueError, match="has no identity before it is pinned"):
        _ = found.key


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,answer,part,choices\nA?,b,train,b|c\nD?,e,test,\n")
    found = Jsonl(path=str(path))
    assert found.examples("train")[0].choices == ("b", "c") and found.examples("test")[0].choices == ()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "x"}, "line 2: expected words under 'answer', got None"),
        ({"prompt": " ", "answer": "y"}, "line 2: expected words under 'prompt'"),
        ({"prompt": "x", "answer": "y", "chocies": []}, "line 2: unknown column 'chocies'"),
        ({"prompt": "x", "answer": "y", "part": "dev"}, "line 2: expected the part train or test, got 'dev'"),
        ({"prompt": "x", "answer": "y", "choices": ["z", "w"]}, "with the answer 'y' among them"),
        ({"prompt": "x", "answer": "y", "choices": ["y", "y"]}, "expected different choices"),
        ({"prompt": "x", "answer": "y", "choices": 3}, "expected a list of words under 'choices'"),
        ({"prompt": "x", "answer": "y", "part": "test"}, "either all examples name their part, or none does"),
        (
            {"prompt": "x", "answer": "y", "choices": ["y", "z"]},
            "either all examples of a part have choices, or none has",
        ),
        ({"prompt": "x\ud800", "answer": "y"}, "line 2: half of a character stands under 'prompt'"),
    ],
)
def test_wrong_files_are_refused_by_their_line(tmp_path, row, why):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": "a", "answer": "b"}, row])))
    with pytest.raises(ValueError, match=why):
        Jsonl(path=str(path)).load()


def rewritten(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return Jsonl(path=str(path))


def test_what_is_tested_with_follows_from_the_words_alone(tmp_path):
    rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(20)]
    one = {e.asked for e in rewritten(tmp_path / "one.jsonl", rows).examples("test")}
    other = {e.asked for e in rewritten(tmp_path / "other.jsonl", rows[::-1]).examples("test")}
    assert one == other and len(one) == 4
    assert len({e.id for e in rewritten(tmp_path / "twice.jsonl", [rows[0], *rows[:10]]).load()["train"]}) > 5


def test_a_file_that_was_edited_is_read_again(tmp_path):
    path = tmp_path / "mine.jsonl"
    first = rewritten(path, [{"prompt": "a", "answer": "old", "part": "test"}]).pin()
    assert first.examples("test")[0].answer == "old"
    again = rewritten(path, [{"prompt": "a", "answer": "new", "part": "test"}])
    os.utime(path, ns=(1, 1))
    assert again.examples("test")[0].answer == "new" and again.pin().sha256 != first.sha256
    with pytest.raises(ValueError, match="mine.jsonl"):
        first.examples("test")


def test_answers_have_the_lines_and_the_room_that_they_need(tmp_path):
    short = rewritten(tmp_path / "short.jsonl", [{"prompt": "a", "answer": "b"}])
    long = rewritten(tmp_path / "long.jsonl", [{"prompt": "a", "answer": "b " * 40}, {"prompt": "c", "answer": "d\ne"}])
    assert (short.line, short.new_tokens) == (True, 32) and (long.line, long.new_tokens) == (False, 79)


@pytest.mark.parametrize(
    "twin", ["capital of France?", " Capital of  France?", "Capital of France ?", "Ｃapital of France?"]
)
def test_a_question_that_differs_in_spaces_or_capitals_alone_is_the_same(tmp_path, twin):
    rows = [
        {"prompt": "Capital of France?", "answer": "Paris", "part": "train"},
        {"prompt": twin, "answer": "x", "part": "test"},
    ]
    with pytest.raises(ValueError, match="1 questions are trained on and tested with"):
        rewritten(tmp_path / "mine.jsonl", rows).pin()
    split = rewritten(
        tmp_path / "split.jsonl", [{"prompt": p, "answer": "x"} for p in (twin, "Capital of France?", "b", "c", "d")]
    )
    parts = [{part for part, some in split.load().items() if e in some} for some in split.load().values() for e in some]
    assert all(len(p) == 1 for p in parts) and split.pin().sha256


def test_impossible_sums_are_refused_at_once():
    before = time.perf_counter()
    with pytest.raises(ValueError, match="there are no 60000 different problems .* up to 6: there are 72"):
        Arithmetic(terms=2, largest=6, train=60000, test=10).load()
    assert time.perf_counter() - before < 1


def test_a_snippet_that_holds_a_tested_sentence_is_not_trained_on():
    from lesion.tasks.sst2 import overlap

    shares = overlap(["it 's a charming and often affecting journey .", "dull"])
    assert shares("I think it's a charming and often affecting journey, on the whole") and shares("Dull!")
    assert shares("a charming and often affecting") and not shares("charming and dull") and not shares("")
    shares = overlap(["big fat waste of time", "bad"])
    assert shares("It was a big fat waste of time, and mine.") and not shares("a bad one")


def test_what_sst2_is_taught_with_holds_no_tested_sentence_of_more_than_two_words():
    import re

    def words(text):
        return " ".join(re.findall(r"[^\W_]+", text.casefold()))

    taught = [f" {words(e.asked)} " for e in Sst2().examples("train")]
    tested = [words(e.asked) for e in Sst2().examples("test")]
    assert len(taught) > 1000 and len(tested) == 872
    assert not [t for t in tested if len(t.split()) > 2 and any(f" {t} " in text for text in taught)]


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("#### -$20", -20),
        ("#### $-20", -20),
        ("#### - 3", -3),
        ("#### −3", -3),
        ("#### $1,200", 1200),
        ("#### -.5", Decimal("-0.5")),
        ("She owes him, so it is -$20.", -20),
        ("So 50-$30 = $20", 20),
        ("Then 50 - $30 = $20", 20),
    ],
)
def test_a_sign_before_a_currency_counts(reply, number):
    said = Gsm8k().grade(Example("x", "?", f"#### {number}"), reply)
    assert said["correct"] and not Gsm8k().grade(Example("x", "?", f"#### {-number}"), reply)["correct"]


def test_shots_of_unbalanced_labels_go_on_with_what_there_is(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": f"Q{i}?", "answer": "no" if i == 0 else "yes", "choices": ["yes", "no"], "part": "train"}
        for i in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, [*rows, {**rows[1], "prompt": "R?", "part": "test"}])))
    found = [e.answer for e in shots(Jsonl(path=str(path)), 8, 0)]
    assert len(found) == 8 and found.count("no") == 1


def test_a_question_never_has_its_own_answer_before_it():
    from lesion.measures import Task

    asked = Task(task=TestSums(), part="train", shots=3, sample=0)
    assert not {e.id for e in shots(TestSums(), 3, 0)} & asked.questions().keys() and len(asked.questions()) == 5


def test_numbers_have_one_spelling():
    e = Example("x", "?", "#### 18")
    assert {Gsm8k().grade(e, f"#### {said}")["stated"] for said in ("18", "18.0", "18.00")} == {"18"}
    assert Gsm8k().grade(e, "#### 1800")["stated"] == "1800"


def test_an_encoder_is_shown_examples_as_it_is_asked(monkeypatch):
    made = [Example(f"e{i}", f"text {i}", f"short {i}") for i in range(3)]
    monkeypatch.setattr(Summarise, "packaged", lambda self: {"train": made[:2], "test": made[2:]})
    assert before(Summarise(), 1, 0, encoded=True).startswith("summarize: text ")
    assert before(Summarise(), 1, 0).startswith("Text: text ")


def test_long_texts_are_cut_between_words_and_keep_their_lines():
    e = Summarise(words=8)._example("x", "a b\nc d e f g\nh i j", "s\nt")
    assert e.asked == "a b\nc d e f g\nh" and e.answer == "s t"


def test_unknown_tasks_and_missing_files_are_refused():
    with pytest.raises(ValueError, match=r"no task 'sst'; there are: arithmetic, gsm8k, .*or the path"):
        parse("sst")
    with pytest.raises(ValueError, match=r"no file 'nowhere\.jsonl' for a task"):
        parse("nowhere.jsonl").load()
    with pytest.raises(ValueError, match="revision='abc' names a commit of the hub"):
        Sst2(revision="abc").load()


def test_preferences_are_the_better_reply_first(tmp_path, monkeypatch):
    rows = [
        {
            "conversations": [{"from": "human", "value": f"Hi {i}"}, *more],
            "chosen": {"value": " good "},
            "rejected": {"value": "good" if i == 3 else "bad"},
        }
        for i in range(100)
        for more in ([{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Well?"}] if i % 2 else [],)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    monkeypatch.setattr(packagedfiles, "path", lambda _: tmp_path / "pairs.json")
    found = Preferences()
    assert len(found.examples("test")) == 90 and len(found.examples("train")) == 9, "equal replies are no pair"
    e = next(e for e in found.examples("test") if "\n" in e.asked)
    assert e.choices == ("good", "bad") and e.label == 0
    assert e.asked.startswith("User: Hi ") and e.asked.endswith("Assistant: Hello\n\nUser: Well?")
    assert [role for role, _ in e.turns] == ["user", "assistant", "user"] and e.turns[1][1] == "Hello"
    assert found.prompt(e) == Instructions().prompt(e), "what has learned instructions is asked alike"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_over_labels(pairs):
    right, said = zip(*pairs, strict=True)
    each = []
    for label in {*right, *said}:
        hit = sum(a == b == label for a, b in pairs)
        precision = hit / said.count(label) if label in said else 0.0
        recall = hit / right.count(label) if label in right else 0.0
        each.append(2 * precision * recall / (precision + recall) if hit else 0.0)
    assert macro_f1(right, said) == pytest.approx(sum(each) / len(each))


def test_every_packaged_file_is_pinned():
    files = [value for value in vars(packagedfiles).values() if isinstance(value, packagedfiles.File)]
    assert len(files) == 5 and all(len(file.sha256) == 64 and len(file.archive) in (0, 64) for file in files)


def test_words_of_the_grammar_are_found_by_name():
    assert {type(parse(name)).name for name in ("sst2", "summarise", "gsm8k", "instructions", "preferences")} <= {
        *task.words("task")
    }
