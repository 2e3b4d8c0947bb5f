"""Prompt batteries: what a model is asked, and graders that say whether a reply is right.

A battery is a packaged name ("small") or the path of a .jsonl or .csv file with the columns prompt, and optionally id,
group, answer and image. An answer is a JSON object that names its grader; a plain string stands for {"any": [string]}:

    {"number": 12}                             the number that the reply states as its answer is 12
    {"any": ["Paris"], "not": ["London"]}      one of these words is in the reply, and none of those ("not" is optional)
    {"any": ["Paris"], "rivals": ["London"]}   of all these words the reply names one of the first list first
    {"yes": true}                              the first "yes" or "no" of the reply is "yes"
    {"choice": "much", "of": ["much", "few"]}  the option that the reply names first is "much"

Words match whole, in upper or lower case; a single letter matches only as it is written, so that option "A" is not the
article. What counts as stated or as named is told at `stated_number` and `first_asserted`. For every grader a reply is
wrong when it is empty, ends in a loop (`loops`) or is no language (`nonsense`), and what it merely repeats of the
question is not looked at (`without_echo`). A prompt without an answer is open: its grade is None.

An image, which the prompt asks about, is the name of a packaged picture ("kitchen") or the path of a .png or .jpg file.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any

from lesion.numerals import stated_number
from lesion.texts import DATA, Shelf, optional_id, records, refuse_duplicates

SHELF = Shelf(
    kind="battery",
    folder=DATA / "batteries",
    pins={
        "dreams.jsonl": "0e371fe0c53b512586d668d8062cfbc6aee03760ef0121bdbad46a707cf07c09",
        "iq.jsonl": "0f5f38dfebd33ea39d507c36bc0c1d80f1dadfef72bc5cb48e82bfc38c65c256",
        "picture.jsonl": "f58826dd0fb2f51e5469de706700c17f905ea32287ab5dcd790f6ce4d44c9f50",
        "picture-told.jsonl": "9f71bfa583ccc483dd9c50917b81ad7bfcf5ccabce335faa9ea8324d8b80eb2e",
        "small.jsonl": "bd2109536fbbf7c1bf77540652d3561a15fe44f2a6ebf844f11b43b4ec11e485",
    },
    suffixes=(".jsonl", ".csv"),
)
PICTURES = Shelf(
    kind="picture",
    folder=DATA / "pictures",
    pins={"kitchen.png": "0ee45b8c86da725cd749cf2751856b06eb1a5dd670007f79ccb77902456c82f0"},
    suffixes=(".png", ".jpg", ".jpeg"),
)
COLUMNS = ("id", "group", "prompt", "answer", "image")
NONSENSE = 0.2  # share of unknown words
START, STOP = r"(?<![^\W_])", r"(?![^\W_])"  # edges of a word; "_Paris_" is emphasis
KEYS = {"number": {"number"}, "any": {"any", "not", "rivals"}, "yes": {"yes"}, "choice": {"choice", "of"}}


@dataclass(frozen=True)
class Prompt:
    """One thing to ask. `answer` is the key that a reply is graded by, None for an open prompt; `image` names the picture
    that is asked about (for `picture`), None for a prompt of words alone.

    Raises ValueError for a prompt without text, for an answer that no grader understands and for an empty image.
    """

    id: str
    group: str
    text: str
    answer: dict[str, Any] | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"prompt {self.id!r} has no text")
        if self.answer is not None:
            _check(self.answer)
        if self.image is not None and not self.image.strip():
            raise ValueError(f"prompt {self.id!r} has an empty image; leave it out, or name a picture or a file")


def batteries() -> list[str]:
    """Names of the packaged batteries."""
    return SHELF.names()


def battery_digest(name: str) -> str:
    """sha256 of the battery file's content, so that a changed file asks for other readings."""
    return SHELF.digest(name)


def battery(name: str) -> list[Prompt]:
    """The prompts of a battery, in the order of its file. One without an id is called "<file>/prompt-003", one without
    a group is of the group "all".

    Raises ValueError for an unknown name, for a file without prompts, with two of one id or not of its format, and for
    a prompt that is empty, has an unknown column, an answer that no grader understands or an image that is not there
    (each naming the line).
    """
    path, data = SHELF.fetch(name)
    prompts: list[Prompt] = []
    for where, row in records(path, data):
        if unknown := [column for column in row if column not in COLUMNS]:
            raise ValueError(f"{where}: unknown column {unknown[0]!r}; there are: {', '.join(COLUMNS)}")
        if not isinstance(text := row.get("prompt") or "", str):
            raise ValueError(f'{where}: expected a string under "prompt", got {text!r}')
        if not isinstance(group := row.get("group") or "all", str):
            raise ValueError(f'{where}: expected a string under "group", got {group!r}')
        if not isinstance(image := row.get("image"), str | None):
            raise ValueError(f'{where}: expected a string under "image", got {image!r}')
        id = optional_id(row, where) or f"{path.stem}/prompt-{len(prompts) + 1:03d}"
        try:
            prompts.append(Prompt(id=id, group=group, text=text, answer=_answer(row.get("answer")), image=image))
            if image is not None:
                PICTURES.fetch(image)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    refuse_duplicates(path, [prompt.id for prompt in prompts])
    return prompts


def picture(name: str) -> bytes:
    """The content of the image file that a prompt names: a packaged picture or the path of a .png or .jpg file.

    Raises ValueError for a name or a file that does not exist, and for a packaged picture that was changed.
    """
    return PICTURES.fetch(name)[1]


def picture_digest(name: str) -> str:
    """sha256 of that content, so that a changed picture asks for other readings."""
    return PICTURES.digest(name)


def grade(prompt: Prompt, text: str) -> bool | None:
    """Whether a reply is right by the prompt's answer; None where the prompt has none."""
    if prompt.answer is None:
        return None
    if loops(text) or nonsense(text, prompt.text):
        return False
    asked = _plain(prompt.text).strip()
    (grader,) = KEYS.keys() & prompt.answer.keys()
    return _GRADERS[grader](prompt.answer, without_echo(_plain(text), asked), asked)


def loops(text: str) -> bool:
    """Whether a text ends in a loop: one word or two at least five times over, more words at least three times, or,
    within a word, up to eight letters at least ten times.

    A word is a run of letters and digits, or of signs of arithmetic; the last one may be cut off.
    """
    if re.search(r"([^\W\d_]{1,8}?)\1{9,}[^\W\d_]{0,7}\W*\Z", text[-200:]):  # room for ten times eight
        return True
    words = re.findall(r"\w+|[-+*/=×÷]+", text.casefold())
    for end in (len(words), len(words) - 1):
        for period in range(1, end // 3 + 1):
            length = period  # of the longest tail that repeats itself every `period` words
            while length < end and words[end - 1 - length] == words[end - 1 - length + period]:
                length += 1
            if length >= period * (5 if period < 3 else 3):
                return True
    return False


def nonsense(text: str, asked: str) -> bool:
    """Whether a fifth or more of the words, of at least eight, are no English, in reply to a question that is."""
    from lesion.vocabulary import words, zipf

    def strange(text: str) -> float:
        found = [word for word in words(text) if word.isalpha()]
        return sum(zipf(word) is None for word in found) / len(found) if found else 0.0

    return len(words(text)) >= 8 and strange(text) >= NONSENSE > strange(asked)


def without_echo(reply: str, prompt: str) -> str:
    """A reply less what it repeats of the prompt: the whole of it, and every question in it of three words or more.

    Statements stay, because to say again what the prompt states may well be an answer.
    """
    questions = [s for s in re.split(r"(?<=[.?!])\s+", prompt) if s.endswith("?") and len(s.split()) >= 3]
    for part in (prompt, *questions):
        echo = r"\s+".join(re.escape(word) for word in part.split())
        reply = re.sub(rf"{START}{echo}{STOP}", " ", reply, flags=re.IGNORECASE)
    return reply


def first_asserted(reply: str, options: list[str]) -> str | None:
    """The option that a reply names first, as one of `options`, or None.

    A mention does not count where it is denied or is the lesser side ("not red", "than red", "instead of red"), nor
    where different options stand side by side ("red or blue", "red and blue"), which chooses none of them.
    """
    ordered = sorted(options, key=len, reverse=True)  # "light blue" before "light"
    mentions = [(ordered[m.lastindex - 1], m.start(), m.end()) for m in _any_of(ordered).finditer(reply) if m.lastindex]
    side_by_side = set()
    for (left, start, end), (right, begin, _) in pairwise(mentions):
        if left != right and _SIDE_BY_SIDE.fullmatch(reply, end, begin):
            side_by_side |= {start, begin}
    for option, start, _ in mentions:
        if start not in side_by_side and not _DENIED.search(reply, 0, start):
            return option
    return None


_DENIED = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|than|instead of|opposite of)|n't)"
    r"(?:\s+(?:a|an|the|really|necessarily|always|just))*[\s\"'*_]+\Z",
    re.IGNORECASE,
)
_CALLED_WRONG = re.compile(
    r"[\"'*_]*\s+(?:is|was|would\s+be)\s+(?:(?:an?|the)\s+)?(?:\w+ly\s+)?(?:incorrect|wrong|not\s+correct)\b",
    re.IGNORECASE,
)
_SIDE_BY_SIDE = re.compile(r"[\s\"'*]*(?:[,/]|,?\s*\b(?:or|and)\b)\s*(?:(?:the|an?)\s+)?[\s\"'*]*", re.IGNORECASE)
_REFUSES = re.compile(r"\bno,?\s+I(?:\s+am|'m)\s+not\s+(?:familiar|going|able|sure|certain|aware)\b", re.IGNORECASE)
_YES_OR_NO = re.compile(r"\byes[\"']?\s*(?:or|/)\s*[\"']?no\b", re.IGNORECASE)


def _any_of(words: list[str]) -> re.Pattern[str]:
    """Matches any of some words or phrases, whole; group n is the n-th of them."""
    groups = []
    for word in words:
        phrase = r"\s+".join(map(re.escape, _plain(word).split()))
        groups.append(f"((?-i:{phrase}))" if len(word.strip()) == 1 else f"({phrase})")
    return re.compile(rf"{START}(?:{'|'.join(groups)}){STOP}", re.IGNORECASE)


def _plain(text: str) -> str:
    """Composed characters and straight quotes, so that two spellings of one text are equal."""
    return unicodedata.normalize("NFC", text).translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})


def _number(answer: dict[str, Any], reply: str, prompt: str) -> bool:
    return stated_number(reply, prompt) == Decimal(str(answer["number"]))


def _any(answer: dict[str, Any], reply: str, prompt: str) -> bool:
    if "not" in answer and _any_of(answer["not"]).search(reply):
        return False
    found = _any_of(answer["any"]).search(reply)
    if found is None or _CALLED_WRONG.match(reply, found.end()):
        return False
    return "rivals" not in answer or first_asserted(reply, [*answer["any"], *answer["rivals"]]) in answer["any"]


def _yes(answer: dict[str, Any], reply: str, prompt: str) -> bool:
    said = _any_of(["yes", "no"]).search(_REFUSES.sub(" ", _YES_OR_NO.sub(" ", reply)))
    return said is not None and (said[0].casefold() == "yes") is answer["yes"]


def _choice(answer: dict[str, Any], reply: str, prompt: str) -> bool:
    return first_asserted(reply, answer["of"]) == answer["choice"]


_GRADERS: dict[str, Callable[[dict[str, Any], str, str], bool]] = {
    "number": _number,
    "any": _any,
    "yes": _yes,
    "choice": _choice,
}


def _answer(value: Any) -> Any:
    """An answer as it stands in a file: an object, or a string that holds one, or a plain string."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith(("{", "[")):
        return {"any": [value]}
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"the answer {value!r} is not JSON, {error.msg} at column {error.colno}") from error


def _check(answer: Any) -> None:
    """Raises ValueError unless an answer names one grader, with the keys and the values that it takes."""
    graders = f"the graders are {', '.join(KEYS)}"
    if not isinstance(answer, dict):
        raise ValueError(f'expected an answer such as {{"number": 12}}, got {answer!r}; {graders}')
    if len(named := [key for key in answer if key in KEYS]) != 1:
        raise ValueError(f"expected an answer that names one grader, got {answer!r}; {graders}")
    grader = named[0]
    if unknown := [key for key in answer if key not in KEYS[grader]]:
        raise ValueError(
            f"unknown key {unknown[0]!r} in {answer!r}; {grader!r} takes {', '.join(sorted(KEYS[grader]))}"
        )
    value = answer[grader]
    match grader:
        case "number":
            expected = "a finite number"
            whole = isinstance(value, int) and not isinstance(value, bool)
            good = whole or (isinstance(value, float) and math.isfinite(value))
        case "any":
            expected = "lists of words"
            good = _is_words(value) and all(_is_words(answer.get(key, ["-"])) for key in ("not", "rivals"))
        case "yes":
            expected, good = "true or false", isinstance(value, bool)
        case _:
            expected = '"of", two or more different options, with the choice among them'
            options = answer.get("of", [])
            good = _is_words(options) and len({word.casefold() for word in options}) == len(options) > 1
            good = good and value in options
    if not good:
        raise ValueError(f"the grader {grader!r} expects {expected}, got {answer!r}")


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(w, str) and w.strip() for w in value)
