"""Numbers in prose: their values, and which of them a reply states as its answer."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesion.batteries import Prompt, grade, loops
from lesion.numerals import numerals, stated_number

SUM = "What is 7 + 5?"


def graded(number: float, text: str, prompt: str) -> bool | None:
    return grade(Prompt(id="x", group="g", text=prompt, answer={"number": number}), text)


@pytest.mark.parametrize(
    "reply",
    [
        "12",
        "12.",
        "**12**",
        "$12",
        "12.0",
        "Twelve.",
        "The answer is 12.",
        "The answer is twelve",
        "Answer: **12**",
        "The answer to 7 + 5 is 12.",
        "7 + 5 = 12",
        "7+5=12",
        "\\(7 + 5 = 12\\)",
        "7 plus 5 equals 12.",
        "7 and 5 make 12, which is easy.",
        "12 = 7 + 5",
        "The answer is 12, because 7 + 5 = 12 and 5 + 7 = 12.",
        "To add 7 and 5, start at 7 and count on: 8, 9, 10, 11, 12. So there are 12 of them.",
        "1. Start with 7.\n2. Add 5 to it.\n3. You get 12.",
        "You had 7 apples. You bought 5 apples. Now you have 12 apples, and no one can take them away.",
        "7 + 5 is not 13, it is 12.",
        "7 apples + 5 apples = 12 apples",
        "What is 7 + 5? 12",
    ],
)
def test_the_number_stated_is_found(reply: str) -> None:
    assert graded(12, reply, SUM) is True


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "\n",
        "?",
        SUM,
        "what is\n7 + 5? What is 7 + 5?",
        "7, 5, 12",
        "7 5 12",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 12",
        "12 or 13",
        "not 12",
        "112",
        "12.5",
        "-12",
        "1,200",
        "the 12th",
        "x12",
        "12 + ",
        "7 + 5 = 12 + 1 = 13",
        "The answer is 13, not 12.",
        "The answer is 11. 12 is close.",
        "7 + 5 = 11",
        "12 12 12 12 12 12 12 12",
        "1. Add 7.\n2. Add 5.",
    ],
)
def test_a_number_that_is_not_stated_is_not_found(reply: str) -> None:
    assert graded(12, reply, SUM) is False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,200", "1200"),
        ("1,234,567.5", "1234567.5"),
        ("-0.5", "-0.5"),
        ("−3", "-3"),
        (".25", "0.25"),
        ("zero", "0"),
        ("fourteen", "14"),
        ("Twenty-five", "25"),
        ("sixty seven", "67"),
        ("a hundred", "100"),
        ("one hundred and five", "105"),
        ("three thousand two hundred and forty-one", "3241"),
        ("two hundred thousand", "200000"),
        ("5 million", "5000000"),
        ("2.5 thousand", "2500"),
        ("100%", "100"),
        ("12cm", "12"),
        ("one", "1"),
    ],
)
def test_numerals_have_their_value(text: str, value: str) -> None:
    assert [n.value for n in numerals(f"so {text}.")] == [Decimal(value)]


@pytest.mark.parametrize("text", ["1.2.3", "H2O", "3rd", "the third", "GPT2", "someone", "often", "weighty", "tend"])
def test_what_only_looks_like_a_number_is_none(text: str) -> None:
    assert numerals(text) == []


@given(st.integers(0, 999_999))
def test_a_number_in_words_is_the_number_in_digits(number: int) -> None:
    assert stated_number(f"That makes {spoken(number)} in all.") == number
    assert stated_number(f"That makes {number:,} in all.") == number


WORDS = """zero one two three four five six seven eight nine ten
    eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"""
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety"


def spoken(n: int) -> str:
    small, tens = WORDS.split(), TENS.split()
    if n < 20:
        return small[n]
    if n < 100:
        return tens[n // 10] + (f"-{small[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{small[n // 100]} hundred" + (f" and {spoken(n % 100)}" if n % 100 else "")
    return f"{spoken(n // 1000)} thousand" + (f" {spoken(n % 1000)}" if n % 1000 else "")


def test_the_answer_may_be_a_number_of_the_question() -> None:
    asked = "What is 100 divided by 10?"
    for reply in ("10", "100 divided by 10 is 10.", "The answer is ten."):
        assert graded(10, reply, asked) is True
    for reply in (asked, "100 divided by 10", "100 and 10"):
        assert graded(10, reply, asked) is False


def test_decimals_are_compared_exactly() -> None:
    assert graded(0.1, "It is 0.10", SUM) is True
    assert graded(5, "0.10 * 50 = 5.00.", SUM) is True
    assert graded(3.14, "It is 3.1415", SUM) is False
    assert graded(10**400, "It is 5", SUM) is False


PIECES = ["1 ", "answer ", "answer is ", "= ", " ", "\n", "1 or ", "one hundred ", "- ", "1. ", "a"]


@pytest.mark.parametrize("piece", PIECES)
def test_no_reply_takes_long_to_read(piece: str) -> None:
    reply = "7 = " + piece * 3000 + "x 8"
    start = time.perf_counter()
    stated_number(reply)
    loops(reply)
    assert time.perf_counter() - start < 2
