"""Batteries and graders: replies with the grade that a careful reader would give, and files that are refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesion import batteries as module
from lesion.batteries import Prompt, battery, battery_digest, grade, loops, without_echo

KEYED = [prompt for name in ("small", "iq") for prompt in battery(name) if prompt.answer is not None]


def graded(answer: dict[str, Any], text: str, prompt: str = "A question?") -> bool | None:
    return grade(Prompt(id="x", group="g", text=prompt, answer=answer), text)


# ---- any, yes, choice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Paris", True),
        ("It is PARIS.", True),
        ("**Paris**", True),
        ("_Paris_", True),
        ("The capital is Paris, France, not Lyon", True),
        ("New\nYork", True),
        ("Parisian", False),
        ("ParisParis", False),
        ("Paris, or perhaps London", False),
        ("", False),
        ("Paris Paris Paris Paris Paris Paris", False),
        ("It is Paris. It is Paris. It is Paris. It is Par", False),
    ],
)
def test_any_of_the_words(reply: str, right: bool) -> None:
    assert graded({"any": ["Paris", "New York"], "not": ["London"]}, reply) is right


def test_words_with_marks_accents_and_single_letters() -> None:
    assert graded({"any": ["C++"]}, "I like C++, it says.") is True
    assert graded({"any": ["café"]}, "the cafe\u0301") is True  # composed and decomposed spelling
    assert graded({"any": ["don't"]}, "I don’t know") is True
    assert graded({"any": ["O"]}, "The symbol is O.") is True
    assert graded({"any": ["A"]}, "This is a word.") is False


@pytest.mark.parametrize(
    ("reply", "yes"),
    [
        ("Yes.", True),
        ("yes, there is no doubt", True),
        ("**YES**", True),
        ("The answer is yes.", True),
        ("Yes or no? Yes!", True),
        ("No, yes is wrong", False),
        ("No.", False),
        ("yes/no: no", False),
        ("Nobody knows, eyes closed", None),
        ("Answer yes or no.", None),
        ("", None),
        ("yes " * 20, None),
    ],
)
def test_the_first_yes_or_no(reply: str, yes: bool | None) -> None:
    assert graded({"yes": True}, reply) is (yes is True)
    assert graded({"yes": False}, reply) is (yes is False)


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("Blue.", "blue"),
        ("The blue box is bigger; the red box is smaller.", "blue"),
        ("The box is not red but blue.", "blue"),
        ("It isn't the red one, it's blue", "blue"),
        ("Between red and blue, it is blue.", "blue"),
        ("Instead of the red one, take blue.", "blue"),
        ("Light  blue, I think", "light blue"),
        ("Bigger than the red box is the blue box", "blue"),
        ("Red", "red"),
        ("red or blue", None),
        ("Both red and blue are boxes", None),
        ("reddish", None),
        ("not red", None),
        ("", None),
        ("blue, blue, blue, blue, blue, blue", None),
    ],
)
def test_the_option_that_is_asserted_first(reply: str, chosen: str | None) -> None:
    options = ["red", "blue", "light blue"]
    for option in options:
        assert graded({"choice": option, "of": options}, reply) is (option == chosen)


def test_an_open_prompt_has_no_grade_whatever_is_said() -> None:
    prompt = Prompt(id="x", group="open", text="Tell me a dream.")
    assert grade(prompt, "") is None and grade(prompt, "a a a a a a a a") is None and grade(prompt, "Once …") is None


# ---- loops and echoes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["the the the the the", "Paris. " * 9, "A, B, " * 5, "It went and then and then and then and then and then an",
     "D\n" * 30, "- \n" * 30, "hahahahahahahahahahahaha", "so be it " * 3, "Paris " + "no" * 12 + "!"],
)  # fmt: skip
def test_loops(text: str) -> None:
    assert loops(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "Paris", "no no no", "It is very, very, very far.", "4 + 4 + 4 + 4 + 4 = 20", "1, 2, 3, 4, 5, 6",
     "I came. I saw. I won.", "Answer: 10000000000000", "Paris!!!!!!!!!!!!", "20 = 5 + 5 + 5 + 5"],
)  # fmt: skip
def test_no_loops(text: str) -> None:
    assert not loops(text)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("xyz"), min_size=1, max_size=4))
def test_a_text_that_repeats_its_tail_loops(head: list[str], unit: list[str]) -> None:
    assert loops(" ".join(head + 5 * unit))
    assert loops(" ".join(head + 5 * unit + unit[:1]))


def test_an_echo_is_what_repeats_the_question() -> None:
    prompt = "The box is red. What colour is the box, red or blue?"
    assert without_echo(prompt.upper(), prompt).strip() == ""
    assert without_echo("What colour is the box,\nred or blue? Red.", prompt).split() == ["Red."]
    assert without_echo("The box is red.", prompt) == "The box is red."
    assert without_echo("7 + 5 = 12", "7 + 5 =").split() == ["12"]


# ---- grades and digests ---------------------------------------------------------------------------------------------


@given(st.sampled_from(KEYED), st.text(max_size=80))
def test_any_text_has_a_grade(prompt: Prompt, text: str) -> None:
    assert grade(prompt, text) in (True, False)


def test_the_digest_is_that_of_the_file_and_a_changed_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (module.DATA / "batteries" / "small.jsonl").read_bytes()
    assert battery_digest("small") == hashlib.sha256(content).hexdigest()
    (tmp_path / "small.jsonl").write_bytes(content + b"\n")
    monkeypatch.setattr(module, "SHELF", replace(module.SHELF, folder=tmp_path))
    with pytest.raises(ValueError, match="packaged battery 'small' is damaged"):
        battery("small")


# ---- a user's battery -----------------------------------------------------------------------------------------------


def test_csv_and_jsonl_give_the_same_prompts(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "group": "sums", "prompt": 'Say "2 + 2", please', "answer": {"number": 4}},
        {"prompt": "Capital of France?", "answer": "Paris"},
        {"prompt": "Dream!\nNow."},
    ]
    lines, table = tmp_path / "mine.jsonl", tmp_path / "mine.csv"
    lines.write_text("\n".join(map(json.dumps, rows)))
    sums, france, dream = (
        '"Say ""2 + 2"", please","{""number"": 4}",sums,a',
        "Capital of France?,Paris,,",
        '"Dream!\nNow.",,,',
    )
    table.write_text("\n".join(["prompt,answer,group,id", sums, france, dream]))
    expected = [
        Prompt(id="a", group="sums", text='Say "2 + 2", please', answer={"number": 4}),
        Prompt(id="mine/prompt-002", group="all", text="Capital of France?", answer={"any": ["Paris"]}),
        Prompt(id="mine/prompt-003", group="all", text="Dream!\nNow."),
    ]
    assert battery(str(lines)) == expected
    assert battery(str(table)) == expected
    assert battery_digest(str(lines)) == hashlib.sha256(lines.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["smal", "", "iq.txt", "missing.csv"])
def test_an_unknown_battery_says_what_there_is(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"packaged: dreams, iq, picture, picture-told, small; or give the path of a \.jsonl or \.csv file",
    ):
        battery(name)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({}, "names one grader, got {}; the graders are number, any, yes, choice"),
        ({"equals": 3}, "names one grader"),
        ({"number": 3, "yes": True}, "names one grader"),
        ({"number": 3, "tolerance": 1}, "unknown key 'tolerance' .* 'number' takes number"),
        ({"yes": True, "not": ["x"]}, "unknown key 'not' .* 'yes' takes yes"),
        ({"number": "3"}, "'number' expects a finite number"),
        ({"number": True}, "a finite number"),
        ({"number": float("nan")}, "a finite number"),
        ({"any": "Paris"}, "'any' expects lists of words"),
        ({"any": []}, "lists of words"),
        ({"any": ["Paris", " "]}, "lists of words"),
        ({"any": ["Paris"], "not": []}, "lists of words"),
        ({"yes": "yes"}, "'yes' expects true or false"),
        ({"yes": 1}, "true or false"),
        ({"choice": "red"}, "'choice' expects \"of\""),
        ({"choice": "red", "of": ["red"]}, "two or more different options"),
        ({"choice": "red", "of": ["red", "Red"]}, "two or more different options"),
        ({"choice": "green", "of": ["red", "blue"]}, "with the choice among them"),
        (["Paris"], "expected an answer such as"),
        (12, "expected an answer such as"),
    ],
)
def test_an_answer_that_no_grader_understands_is_refused(tmp_path: Path, answer: Any, complaint: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"prompt": "fine"}\n' + json.dumps({"prompt": "p", "answer": answer}))
    with pytest.raises(ValueError, match=rf"b\.jsonl, line 2: .*{complaint}"):
        battery(str(path))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("b.jsonl", "", r"b\.jsonl holds no prompts"),
        ("b.csv", "prompt,answer\n", r"b\.csv holds no prompts"),
        ("b.jsonl", '{"prompt": "a"}\n{"prompt": " "}', r"line 2: prompt 'b/prompt-002' has no text"),
        ("b.jsonl", '{"id": "x"}', r"line 1: prompt 'x' has no text"),
        ("b.csv", 'id,prompt\nx,"a\nb"\ny,\n', r"line 4: prompt 'y' has no text"),
        ("b.jsonl", '{"prompt": 3}', r"line 1: expected a string under \"prompt\", got 3"),
        ("b.jsonl", '{"prompt": "a", "group": ["g"]}', r"line 1: expected a string under \"group\""),
        ("b.jsonl", '{"prompt": "a", "anwser": "b"}', r"line 1: unknown column 'anwser'; there are: id, group, prompt"),
        ("b.csv", "prompt,difficulty\na,3\n", r"line 2: unknown column 'difficulty'"),
        ("b.jsonl", '{"prompt": "a", "image": 3}', r"line 1: expected a string under \"image\", got 3"),
        ("b.jsonl", '{"prompt": "a", "image": " "}', r"line 1: prompt 'b/prompt-001' has an empty image"),
        ("b.jsonl", '{"prompt": "a", "image": "attic"}', r"line 1: no picture 'attic'; packaged: kitchen"),
        ("b.csv", "prompt,image\na,none.png\n", r"line 2: no file 'none.png' for a picture"),
        ("b.jsonl", '{"prompt": "a"', r"b\.jsonl, line 1: not JSON"),
        ("b.csv", 'prompt,answer\na,"{""any"": "\n', r"line 2: the answer .* is not JSON"),
        ("b.csv", 'prompt,answer\na,"[1, 2]"\n', r"line 2: expected an answer such as"),
        ("b.jsonl", '{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}', r"number 1 and number 2 .* same id 'x'"),
        ("b.jsonl", b"\xff", r"b\.jsonl is not UTF-8: byte 0xff at offset 0"),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path: Path, name: str, content: str | bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=complaint):
        battery(str(path))
