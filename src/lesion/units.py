"""Content units of a picture description: which of 22 things that the kitchen picture shows does a text mention?

The list of yes or no questions is that commonly asked of descriptions of the picture of the Boston Diagnostic Aphasia
Examination (Goodglass & Kaplan 1983, The Assessment of Aphasia and Related Disorders, 2nd edition). The packaged
picture "kitchen" is another picture that holds the same 22 things.

A unit is found where its pattern matches within one sentence and the match is not denied:

- Words match whole, in any case, with their inflections and common synonyms ("lad", "mum", "biscuits").
- A unit that relates things ("boy on stool") needs both of them a few words apart, with neither a negation nor another
  person in between.
- "no boy", "not a boy", "without a boy" and "I cannot see a boy" are no mentions. "She does not notice the boy" is one:
  what a person in the picture fails to notice is there.

This is a reading of words, not of sense: "he" is the boy, "she" the girl or the woman whom the sentence before names
first, and a unit that is told in words nobody thought of is missed.
"""

from __future__ import annotations

import re

BOY = r"(?:school)?boys?|lads?|brothers?|sons?|little (?:guy|man)|young man"
GIRL = r"(?:school)?girls?|sisters?|daughters?|lass(?:es)?"
WOMAN = r"wom[ae]n|mothers?|mom(?:my|s)?|mum(?:my|s)?|mama|lady|ladies|housewife|wife|aunt|grandmother"
CHILDREN = r"child(?:ren)?|kids?|siblings?|toddlers?"
COOKIES = r"cookies?|biscuits?|sweets|treats?"
JAR = rf"jars?|(?:{COOKIES}) (?:tins?|box|pots?|containers?|canisters?)"
PLACE = r"cupboards?|cabinets?|shelf|shelves|larder|pantry|dresser|hutch|closet|wardrobe"
STOOL = r"(?:foot|bar|step[- ]?)?stools?|step-?ladder|chairs?"
DISHES = (
    r"dish(?:es)?(?![- ]?(?:towels?|cloths?|rags?|washers?|racks?|soap)\b)|plates?|cups?|mugs?|bowls?|saucers?|crockery"
)
WATER = r"water|sinks?|basin|taps?|faucets?"
FLOOR = r"floor(?:s|boards)?|ground|tiles?"

_NOT = r"no|not|never|nor|neither|without|cannot|none|nobody|\w+n't"


def _near(first: str, then: str, words: int, bar: str = "-") -> str:
    """`first` and then `then`, with at most so many words in between, no negation and nothing of `bar` among them."""
    between = rf"(?!(?:{_NOT}|{bar})(?!\w))\w[\w'-]*[^\w']+"
    return rf"(?:{first})(?!\w)(?:'\w+)?[^\w']+(?:{between}){{0,{words}}}(?:{then})"


def _both(one: str, other: str, words: int, bar: str = "-") -> str:
    """The two in either order."""
    return f"{_near(one, other, words, bar)}|{_near(other, one, words, bar)}"


_NOT_GIRL = rf"{BOY}|{WOMAN}|he|cat"
_NOT_BOY = rf"{GIRL}|{WOMAN}|she|cat"
_TAKE = (
    r"tak(?:es?|en|ing)|took|steal(?:s|ing)?|stole|stolen|reach\w*|grab\w*|gets?|getting|got|snatch\w*|sneak\w*"
    r"|pinch\w*|swip\w*|fetch\w*|pick\w*|pull\w*|help\w* (?:him|them)sel(?:f|ves)|stretch\w*|hand in|after"
)
_TIP = (
    r"tip(?:s|ped|ping|py)?|tilt\w*|wobbl\w*|toppl\w*|teeter\w*|totter\w*|overturn\w*|unsteady|unstable|off[- ]balance"
    r"|unbalanced|collaps\w*|slip(?:s|ped|ping)|lean\w*|rock(?:s|ed|ing)|giv\w* way|f[ae]ll(?:s|ing|en)? over"
    r"|precarious\w*"
)
_FALL = r"f[ae]ll(?:s|ing|en)?|tumbl\w*|toppl\w*|slip(?:s|ped|ping)?|crash\w*|plung\w*"
_REACH = (
    r"reach\w*|stretch\w*|extend\w*|rais(?:es?|ed|ing)|hold\w* (?:out|up)|outstretched|ask\w* (?:\w+ ){0,3}for|beg\w* for"
    r"|wait\w* for|want\w*|(?:hold|lift|put)\w* (?:(?:out|up) )?(?:her|a|one) (?:\w+ )?(?:hand|arm)"
)
_HAPPY = (
    r"happ(?:y|ily|ier)|smil\w*|laugh\w*|giggl\w*|grin\w*|cheerful\w*|glad|delight\w*|joy\w*|excite[dm]\w*|amused"
    r"|pleased|chuckl\w*|merry|merrily|beam(?:s|ing)|enjoy\w*"
)
_QUIET = r"quiet|silent|silence|secret"
_SPILL = (
    r"spill\w*|spilt|pour\w*|gush\w*|cascad\w*|run\w* over|ran over|flow\w* over|over the (?:\w+ )?(?:edge|rim|side)"
)

_GLAD = rf"(?:{_HAPPY})(?! (?:{BOY}|{WOMAN})(?!\w))"  # "looks at the smiling woman" tells nothing of the girl

UNITS: dict[str, re.Pattern[str]] = {
    unit: re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE)
    for unit, pattern in {
        "boy": BOY,
        "jar": JAR,
        "taking cookies": "|".join(
            (_near(_TAKE, COOKIES, 7, DISHES), _near(COOKIES, "taken|stolen", 3), "cookie (?:thief|theft)")
        ),
        "where the jar is": _both(PLACE, f"{JAR}|{COOKIES}", 9),
        "stool": STOOL,
        "boy on stool": "|".join(
            (
                _near(f"{BOY}|{CHILDREN}|he", _near("on|onto|upon|atop|climb(?:s|ed|ing)", STOOL, 4), 8, _NOT_BOY),
                _near(STOOL, f"{BOY}|he", 3, _NOT_BOY) + r" (?:is |was )?(?:stand\w*|stood|climb\w*|balanc\w*)",
                _near(STOOL, f"(?:under|beneath|underneath) (?:the |a |his )?(?:{BOY}|him|feet)", 4),
            )
        ),
        "stool tipping": f"{_near(STOOL, _TIP, 6)}|{_near(_TIP, STOOL, 3)}",
        "falling or hurt": "|".join(
            (
                _near(
                    f"{BOY}|{CHILDREN}|he|they|someone",
                    _FALL,
                    9,
                    rf"{WATER}|{COOKIES}|{WOMAN}|{GIRL}|that|which|whose|it",
                ),
                _near(_FALL, f"(?:off|from) (?:\\w+ )?(?:{STOOL})", 1, WATER),
                r"hurt(?:s|ing)?|injur\w*|los\w* (?:his |their |the )?balance|break his neck",
            )
        ),
        "girl": GIRL,
        "girl reaching": f"{_near(GIRL, _REACH, 20, _NOT_GIRL)}|{_near('she', _near(_REACH, COOKIES, 6), 3)}",
        "shushing": "|".join(
            (
                r"shush\w*|hush(?:es|ed|ing)?|s+h{2,}",
                _both("fingers?", "lips?|mouth", 6),
                _near(
                    rf"{GIRL}|she|her|gestur\w*|sign\w*|tell\w*|ask\w*|motion\w*|warn\w*|urg\w*|keep\w*",
                    _QUIET,
                    6,
                    WOMAN,
                ),
            )
        ),
        "girl happy": f"{_near(f'{GIRL}|{CHILDREN}', _GLAD, 9, _NOT_GIRL)}|{_near(_HAPPY, GIRL, 2, _NOT_GIRL)}",
        "woman": WOMAN,
        "washing or drying": "|".join(
            (
                r"wash(?:es|ed|ing)?(?![- ]?machines?\b)|drying|dries|dried|wip(?:es?|ed|ing)|scrub\w*",
                r"rins(?:es?|ed|ing)|clean(?:s|ed|ing)|polish(?:es|ed|ing)",
                _near("dry|clean|do|does|doing", DISHES, 2),
            )
        ),
        "sink": r"sinks?|(?:wash)?basins?",
        "overflowing": rf"overflow\w*|overrun\w*|flood\w*|{_both(WATER, _SPILL, 6)}",
        "water on floor": "|".join(
            (
                _both(r"water|wet|flood\w*|overflow\w*|spill\w*", FLOOR, 7, rf"{BOY}|{GIRL}|{WOMAN}|cat|{COOKIES}"),
                r"puddles?|pools? of water",
                _near(r"flood\w*", "kitchen|room", 2),
            )
        ),
        "kitchen": r"kitchens?|kitchenette",
        "window": r"windows?|window-?(?:sill|pane)s?",
        "curtains": r"curtains?|drapes|draper(?:y|ies)",
        "outside": (
            r"outside|outdoors?|gardens?|(?:back)?yard|lawn|meadow|landscape|scenery|trees?|fence|hills?|sky"
            r"|bush(?:es)?|shrubs?"
        ),
        "dishes": DISHES,
    }.items()
}

_END = re.compile(r"(?<=[.!?;])[\"')\]*]*\s+|\n\s*\n|\n\s*(?:[-*•]|\d+[.)])\s+")
_DENIED = re.compile(
    r"(?P<negation>(?<!\w)(?:no|not|never|nor|neither|without|cannot|none|nobody|no one|\w+n't))"
    r"(?P<gap>(?:\s+[\w'-]+){0,4})[\s\"*_(]*\Z",
    re.IGNORECASE,
)
_GOES_ON = re.compile(
    r"(?<!\w)(?:and|but|while|because|so|as|although|though|who|which|that|when|far|only|just|merely)(?!\w)"
)
_UNNOTICED = re.compile(r"(?<!\w)(?:notic|reali[sz]|aware|attention|see|watch|look|hear|mind|car(?:e|ing)|know|pay)")
_SHE = re.compile(rf"(?<!\w)(?:{GIRL}|{WOMAN}|she)(?!\w)", re.IGNORECASE)
_TELLER = re.compile(r"(?<!\w)(?:i|we|you|one)(?: (?:can|could|do|did|would|really|also))* ?\Z", re.IGNORECASE)


def found(text: str) -> dict[str, bool]:
    """Which units a text mentions: each name of `UNITS`, in their order, with True or False. An empty text has none."""
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    sentences = [" ".join(part.split()) for part in _END.split(text)]
    sentences = _named(sentences)
    return {unit: any(_mentions(pattern, sentence) for sentence in sentences) for unit, pattern in UNITS.items()}


def _named(sentences: list[str]) -> list[str]:
    """The sentences, where the first "she" is "the girl" or "the woman" if no earlier word of its sentence says who she
    is: the one who was named first in the last sentence that names either."""
    named, last = [], None
    for sentence in sentences:
        names = [match[0] for match in _SHE.finditer(sentence)]
        if last and names and names[0].casefold() == "she":
            sentence = _SHE.sub(last, sentence, count=1)
        known = [name for name in names if name.casefold() != "she"]
        if known:
            last = "the girl" if re.fullmatch(GIRL, known[0], re.IGNORECASE) else "the woman"
        named.append(sentence)
    return named


def _mentions(pattern: re.Pattern[str], sentence: str) -> bool:
    """Whether a sentence holds a match that is not denied. Matches are looked for at every place, for a denied one may
    overlap with one that is not."""
    match = pattern.search(sentence)
    while match is not None:
        if not _denied(sentence[max(0, match.start() - 200) : match.start()]):  # more than a negation is away
            return True
        match = pattern.search(sentence, match.start() + 1)
    return False


def _denied(before: str) -> bool:
    """Whether the words before a mention deny it: a negation at most four words away, in the same clause. A failure to
    notice denies only where the teller is who does not see."""
    denial = _DENIED.search(before)
    if denial is None or _GOES_ON.search(denial["gap"].casefold()):
        return False
    if _UNNOTICED.search(denial["gap"].casefold()):
        subject = re.sub(r"\w+n't\Z|cannot\Z|not\Z", "", before[: denial.end("negation")], flags=re.IGNORECASE)
        return _TELLER.search(subject.rstrip() + " ") is not None
    return True
