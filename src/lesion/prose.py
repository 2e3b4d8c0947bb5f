"""What can be said of a generated text without a model: its length, loops, words and the surface of its grammar.

Every number but the counts of the whole text is taken of the text less its terminal repetition (`truncate_loop`), so
that a loop shows as a loop and not as a poor vocabulary as well. Sources: type/token ratios and their moving average,
Covington & McFall (2010), "Cutting the Gordian knot", J. Quantitative Linguistics 17(2); lexical density, Ure (1971);
the Zipf scale, van Heuven et al. (2014), through `wordfreq`; lemmas through `simplemma`; noun and verb depth in
WordNet (Fellbaum 1998) through `nltk`, where its data is installed. All of it is about English.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from lesion.batteries import loops
from lesion.vocabulary import AUXILIARY, WORD, base, depth, is_content, lemma, normal, wordnet_is_there, words, zipf

WINDOW = 50  # words; the usual width for texts of a few hundred

Fact = float | int | bool | None

INTERJECTIONS = frozenset(
    ["yes", "no", "okay", "ok", "sure", "please", "thanks", "hello", "hi", "hey", "sorry", "well", "oh", "ah", "alas"]
)
MAY_DOUBLE = frozenset(["had", "that", "very", "no", "ha", "bye", "so", "really"])  # "the dog that had had enough"

_OPEN, _CLOSE = "([{\u201c", ")]}\u201d"
_MARKER = re.compile(r"\s*(?:(?:[-*+•>]|#{1,6}|\(?(?:\d{1,3}|[A-Za-z])[.)])\s+)+")
_ENDING = re.compile(r"(?<![.!?…])([.!?…]++)([\"'\u201d)\]}*_]*+)\s+(?=\S)")
_ABBREVIATION = re.compile(r"\b(?:(?i:mrs?|ms|dr|prof|st|vs|etc|cf|jr|sr|(?:[a-z]\.)+[a-z])|[A-HJ-Z])\Z")
_FIRST = re.compile(r"[\W_]*(\w)")
_LAST = re.compile(r"[.!?…:][\"'\u201d)\]}*_\s]*\Z")


def describe(text: str, *, finished: bool = True) -> dict[str, Fact]:
    """All that this file can say of one text, as one flat record. `finished`: it was not cut off at a length limit.

    Of the whole text: `words`, `looped` (it ends in a terminal repetition) and `loop_words` (words of that repetition,
    its first saying left out). Of the rest:

        kept_words        n = words − loop_words
        sentences         as `sentences` finds them
        lemmas            V = different lemmas, one lemma a word
        type_lemma        V / n
        mattr             mean over all windows of 50 words of (different lemmas in it) / 50; None where n < 50
        lexical_density   words outside the closed classes / n
        zipf              mean of log₁₀(occurrences in 10⁹ words) over the words of letters that wordfreq knows
        unknown           share of the words of letters that wordfreq does not know
        wordnet_depth     mean depth in WordNet (`depth`) of content words whose first sense is a noun or a verb
        grammar           share of sentences that pass surface rule 1 (`passes`)

    A ratio of nothing is None; so is `wordnet_depth` where WordNet is not installed.
    """
    text = normal(text)
    kept, looped = truncate_loop(text)
    said = words(kept)
    whole = len(words(text)) if looped else len(said)
    stems = [lemma(word) for word in said]
    content = [stem for word, stem in zip(said, stems, strict=True) if is_content(word)]
    spelled = [word for word in said if not word[0].isdigit()]
    zipfs = [value for word in spelled if (value := zipf(word)) is not None]
    depths = [value for stem in content if (value := depth(stem)) is not None] if wordnet_is_there() else []
    found = _sentences(kept)
    cut = looped or not finished
    passed = [_passes(s, cut=cut and s is found[-1]) for s in found]
    return {
        "words": whole,
        "looped": looped,
        "loop_words": whole - len(said),
        "kept_words": len(said),
        "sentences": len(found),
        "lemmas": len(set(stems)),
        "type_lemma": _share(len(set(stems)), len(stems)),
        "mattr": mattr(stems),
        "lexical_density": _share(len(content), len(said)),
        "zipf": _share(sum(zipfs), len(zipfs)),
        "unknown": _share(len(spelled) - len(zipfs), len(spelled)),
        "wordnet_depth": _share(sum(depths), len(depths)),
        "grammar": _share(sum(passed), len(passed)),
    }


def truncate_loop(text: str) -> tuple[str, bool]:
    """A text up to where it begins to say again what it goes on saying until its end, and whether it does (`loops`).

    The first saying stays. Nested loops are cut until none is left, so that `loops` of the result is False.
    """
    looped = False
    while loops(text):
        looped = True
        text = text[: _loop_start(text)].rstrip()
    return text, looped


def _loop_start(text: str) -> int:
    """Where a text that ends in a loop says the second time what it loops over: the earliest such place."""
    tail = text[-200:]
    if match := re.search(r"([^\W\d_]{1,8}?)\1{9,}[^\W\d_]{0,7}\W*\Z", tail):  # as `loops` looks for it
        start, period = len(text) - len(tail) + match.start(), len(match[1])
        while start and text[start - 1] == text[start - 1 + period]:
            start -= 1
        return start + period
    folded = text.casefold()
    places: Sequence[int] = range(len(text))
    if len(folded) != len(text):  # "ß" is "ss"
        places = [place for place, character in enumerate(text) for _ in character.casefold()]
    found = list(re.finditer(r"\w+|[-+*/=×÷]+", folded))
    said = [match[0] for match in found]
    first = len(said)
    for end in (len(said), len(said) - 1):
        for period in range(1, end // 3 + 1):
            if period >= first:
                break
            start = end - period
            while start and said[start - 1] == said[start - 1 + period]:
                start -= 1
            if end - start >= period * (5 if period < 3 else 3):
                first = min(first, start + period)
    assert first < len(said), "`loops` saw a loop that is not there"
    return places[found[first].start()]


def mattr(tokens: Sequence[str], *, window: int = WINDOW) -> float | None:
    """Moving-average type-token ratio (Covington & McFall 2010): (1/(n−w+1)) Σᵢ |{tᵢ, …, tᵢ₊w₋₁}| / w. It does not
    depend on the length n; None where n < w."""
    if window < 1:
        raise ValueError(f"a window holds at least 1 word, not {window}")
    if len(tokens) < window:
        return None
    counts = Counter(tokens[:window])
    types = total = len(counts)
    for leaving, coming in zip(tokens, tokens[window:], strict=False):
        types += not counts[coming]
        counts[coming] += 1
        counts[leaving] -= 1
        types -= not counts[leaving]
        total += types
    return total / window / (len(tokens) - window + 1)


def _share(total: float, count: int) -> float | None:
    return total / count if count else None


class Sentence(NamedTuple):
    """A sentence of a text. `item`: of a list or a heading, whose terminal mark is not asked for. `paired`: all its
    quotes and brackets find their other half in its paragraph; `awaits`: those that do not only wait to be closed."""

    text: str
    item: bool
    paired: bool
    awaits: bool


def sentences(text: str) -> list[str]:
    """The sentences of a text: what holds a word and ends in . ! ? or …, or at the end of a line, without the marks of
    lists and headings. A full stop after an initial or a common abbreviation ends none, nor does an ellipsis or a
    closed quote before a small letter."""
    return [sentence.text for sentence in _sentences(normal(text))]


def _sentences(text: str) -> list[Sentence]:
    found = []
    for line in text.splitlines():
        marker = _MARKER.match(line)
        line = line[marker.end() :] if marker else line
        stray, waiting = _unpaired(line)
        start = 0
        for end in [*_endings(line), len(line)]:
            inside = [place for place in stray if start <= place < end]
            if WORD.search(line, start, end):
                awaits = all(place in waiting for place in inside)
                found.append(Sentence(line[start:end].strip(), marker is not None, not inside, awaits))
            start = end
    return found


def _endings(line: str) -> list[int]:
    """Where sentences end within a line: offsets just after the mark and its quotes."""
    ends = []
    for match in _ENDING.finditer(line):
        small = line[match.end()].islower()
        if small and (match[2].strip("*_") or match[1].startswith(("..", "…"))):
            continue
        if match[1] == "." and not match[2] and _ABBREVIATION.search(line, max(0, match.start() - 12), match.start()):
            continue
        ends.append(match.end(2))
    return ends


def _unpaired(line: str) -> tuple[list[int], set[int]]:
    """Offsets of quotes and brackets without their other half, and those of them that were opened."""
    opened: list[tuple[str, int]] = []
    stray = []
    for match in re.finditer(r"[\"()\[\]{}\u201c\u201d]", line):
        mark, place = match[0], match.start()
        expected = '"' if mark == '"' else _OPEN[_CLOSE.index(mark)] if mark in _CLOSE else None
        if expected and opened and opened[-1][0] == expected:
            opened.pop()
        elif mark in _CLOSE:
            stray.append(place)
        else:
            opened.append((mark, place))
    waiting = {place for _, place in opened}
    return sorted([*stray, *waiting]), waiting


def passes(sentence: str, *, cut: bool = False) -> bool:
    """Surface rule 1: whether a sentence, seen from outside, looks like one. It

    - begins with a capital or a digit,
    - ends in . ! ? … or : (`cut`: a text broken off here, so no mark is asked for and a quote may stay open),
    - has two words or more, or one that is an auxiliary, an interjection, or ends in -ed or -ing,
    - has no word twice in a row ("the the"; "had had" and a few more are English),
    - has every quote and bracket in pairs, and
    - has no word in lower case that wordfreq does not know.

    Passing is no proof of grammar; it is what damaged text loses. Raises ValueError for a text without a word.
    """
    sentence = normal(sentence)
    if not WORD.search(sentence):
        raise ValueError(f"expected a sentence with a word in it, got {sentence!r}")
    stray, waiting = _unpaired(sentence)
    return _passes(Sentence(sentence, False, not stray, all(place in waiting for place in stray)), cut=cut)


def _passes(sentence: Sentence, *, cut: bool) -> bool:
    text = sentence.text
    first = _FIRST.match(text)
    if first is None or not (first[1].isupper() or first[1].istitle() or first[1].isdigit()):
        return False
    if not (cut or sentence.item or _LAST.search(text)):
        return False
    if not (sentence.paired or (cut and sentence.awaits)):
        return False
    said = WORD.findall(text)
    if len(said) == 1 and not _stands_alone(said[0].casefold()):
        return False
    if _doubled(text):
        return False
    if cut:
        said.pop()  # the last word may be half a word
    return all(zipf(word) is not None for word in said if word.islower())


def _doubled(text: str) -> bool:
    """Whether a word stands twice in a row with nothing but space between, where English does not do that."""
    for one, other in pairwise(WORD.finditer(text)):
        word = one[0].casefold()
        twice = word == other[0].casefold() and text[one.end() : other.start()].isspace()
        if twice and word not in MAY_DOUBLE and not word[0].isdigit():
            return True
    return False


def _stands_alone(word: str) -> bool:
    verb = len(word) > 4 and word.endswith(("ed", "ing"))
    return verb or word in INTERJECTIONS or word in AUXILIARY or base(word) in AUXILIARY
