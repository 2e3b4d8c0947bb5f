"""Numbers in English prose ("12", "1,200", "-0.5", "one hundred and five"), and which of them a reply gives as answer.

The role of a number is read from the words before it, so that "the answer is 12", "7 + 5 = 12" and "7, 5, 12" differ.
Fractions ("3/4") are two numbers and a division; ordinals ("3rd", "third") and versions ("1.2.3") are no numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

_ONES = "one|two|three|four|five|six|seven|eight|nine"
_TEENS = "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_VALUES = {word: value for value, word in enumerate(f"{_ONES}|{_TEENS}".split("|"), 1)}
_VALUES |= {word: 10 * value for value, word in enumerate(_TENS.split("|"), 2)} | {"zero": 0, "a": 1}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}

_BELOW_100 = rf"(?:(?:{_TENS})(?:[\s-]+(?:{_ONES})\b)?|{_TEENS}|{_ONES})\b"
_BELOW_1000 = rf"(?:(?:(?:{_BELOW_100}|a)[\s-]+)?hundred\b(?:(?:\s+and)?\s+{_BELOW_100})?|{_BELOW_100})"
_WORDS = rf"\b(?:zero\b|(?:{_BELOW_1000}|a)\s+thousand\b(?:(?:,|\s+and)?\s+{_BELOW_1000})?|{_BELOW_1000})"
_DIGITS = r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?!\d|\.\d|,\d{3}(?!\d)|(?:st|nd|rd|th)\b)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])[-−])?(?:(?P<digits>{_DIGITS})|(?P<words>{_WORDS}))"
    rf"(?:\s+(?P<scale>{'|'.join(_SCALES)})\b)?",
    re.IGNORECASE,
)

_MARKUP = re.compile(r"\*\*|[$€£%\"'`_()\[\]{}\\#]")
_OWED = re.compile(r"(?<![\w)])[-−][$€£]")  # "-$20" is minus twenty
_UNITS = r"[ \t]*(?:[a-z]+[ \t]+){0,2}"  # "7 apples + 5 apples is 12"
_SIGNS = r"[-−+*×·/÷^]"
_OPERATOR = re.compile(
    rf"{_UNITS}(?:{_SIGNS}|x|plus|minus|times|multiplied by|divided by|div|over|of)[ \t]*", re.IGNORECASE
)
_CUT_OFF = re.compile(rf"\s*{_SIGNS}\s*\Z")
_HEDGE = r"\s*(?:about|approximately|roughly|exactly|also|now|actually|simply|just|only)?\s*"
_EQUALS = re.compile(rf"(?:=|≈|\bequals?(?:\s+to)?){_HEDGE}\Z", re.IGNORECASE)
_IS = re.compile(rf"{_UNITS}(?:is|are|was|makes?|gives?|leaves?)\b{_HEDGE}", re.IGNORECASE)
_ANSWER = re.compile(r"\banswer\b[^.!?\n]{0,60}?(?:\b(?:is|was|be)\b|[:=])[^.!?\n]{0,25}\Z", re.IGNORECASE)
_NOT = re.compile(r"\bnot\s+\Z", re.IGNORECASE)
_COMMA = re.compile(r"\s*(?:[,;]\s*(?:and|or)?|and|or)?\s*", re.IGNORECASE)
_OR = re.compile(r"\bor\b", re.IGNORECASE)
_MARKER = re.compile(r"^[ \t]*(\d+)[.)]\s+(?=\S)", re.MULTILINE)

Role = Literal["announced", "equated", "plain", "pronoun", "operand", "denied", "listed"]


@dataclass(frozen=True)
class Numeral:
    """One number of a text and its role there.

    announced   "the answer is 12"                      operand   both numbers of "7 + 5"
    equated     "= 12", "10 divided by 2 is 5"          denied    "not 12"
    pronoun     "one" that is none of these             listed    any of "7, 5, 12" and of "7 or 5", or the "2." of a
    plain       any other                                         numbered list
    """

    value: Decimal
    start: int
    end: int
    role: Role


def stated_number(reply: str, prompt: str = "") -> Decimal | None:
    """The number that a reply states as its answer, or None. It is the last number of the first kind that occurs:

    1. announced: "the answer is 12", "Answer: twelve";
    2. the right side of an equation: "7 + 5 = 12", "10 divided by 2 is 5", "equals 1,200";
    3. a number that the prompt does not hold: "so she has 12 left" (but not "one", which is mostly a pronoun);
    4. the only number there is: "12."

    An operand ("7 + …"), a denied number and the numbers of a bare enumeration ("7, 5, 12", "7 or 5") state nothing.
    """
    found = [n for n in numerals(reply) if n.role not in ("operand", "denied", "listed")]
    asked = {n.value for n in numerals(prompt)}
    announced = [n.value for n in found if n.role == "announced"]
    equated = [n.value for n in found if n.role == "equated"]
    new = [n.value for n in found if n.role == "plain" and n.value not in asked]
    if stated := announced or equated or new:
        return stated[-1]
    return found[0].value if len({n.value for n in found}) == 1 else None


def numerals(text: str) -> list[Numeral]:
    """All numbers of a text, in their order. Signs of currency, percent and markup are not looked at."""
    text = _OWED.sub(" -", text)
    text = _MARKUP.sub(lambda mark: " " * len(mark[0]), text)
    markers = _markers(text)
    found: list[Numeral] = []
    before = 0
    for match in _NUMBER.finditer(text):
        gap = text[before : match.start()]
        role: Role = "pronoun" if match[0].casefold() == "one" else "plain"
        if match.start() in markers:
            role = "listed"
        elif found and _OPERATOR.fullmatch(gap):
            role = "operand"
            found[-1] = replace(found[-1], role="operand")
        elif _CUT_OFF.match(text, match.end()):
            role = "operand"
        elif _NOT.search(gap):
            role = "denied"
        elif _ANSWER.search(gap):
            role = "announced"
        elif _EQUALS.search(gap) or (found and _IS.fullmatch(gap)):
            role = "equated"
        found.append(Numeral(_value(match), match.start(), match.end(), role))
        before = match.end()
    return _enumerations(text, found)


def _enumerations(text: str, found: list[Numeral]) -> list[Numeral]:
    """Marks different numbers in a row, with nothing but commas, "and", "or" or spaces between them: three or more, or
    two that "or" joins."""
    runs: list[list[Numeral]] = []
    for number in found:
        if runs and _COMMA.fullmatch(text, runs[-1][-1].end, number.start):
            runs[-1].append(number)
        else:
            runs.append([number])
    for run in runs:
        among = text[run[0].start : run[-1].end]
        if len({n.value for n in run}) > 1 and (len(run) >= 3 or _OR.search(among)):
            run[:] = [replace(n, role="listed") for n in run]
    return [number for run in runs for number in run]


def _markers(text: str) -> set[int]:
    """Where "1. …", "2. …" at the start of lines number the items of a list: at least two, counted from one."""
    places: list[int] = []
    for match in _MARKER.finditer(text):
        if int(match[1]) == len(places) + 1:
            places.append(match.start(1))
    return set(places) if len(places) >= 2 else set()


def _value(match: re.Match[str]) -> Decimal:
    if match["digits"]:
        value = Decimal(match["digits"].replace(",", ""))
    else:
        total = group = 0
        for word in re.split(r"[\s,-]+", match["words"].casefold()):
            if word == "hundred":
                group = max(group, 1) * 100
            elif word == "thousand":
                total, group = max(group, 1) * 1000, 0
            elif word != "and":
                group += _VALUES[word]
        value = Decimal(total + group)
    value *= _SCALES[match["scale"].casefold()] if match["scale"] else 1
    return -value if match["sign"] else value
