"""English words one by one: lemma, open or closed class, frequency, place in WordNet.

Lemmas come from `simplemma`; frequencies from `wordfreq` on the Zipf scale (van Heuven et al. 2014, "SUBTLEX-UK");
depth from WordNet (Fellbaum 1998) through `nltk`, an extra, where its data is installed. A word is in lower case here.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from functools import lru_cache
from math import log10
from typing import Any

import simplemma
import wordfreq

CACHED = 1 << 16  # words; a badly damaged model writes new ones without end

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+(?:[.,:/]\d+)*")
_CLITIC = re.compile(r"(?:n't|'(?:s|re|ve|ll|d|m))\Z")


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


CLOSED = _listed(
    # determiners and numerals
    """a an the this that these those each every either neither some any no all both half several many much more most
    few fewer fewest little less least enough such own other another same zero one two three four five six seven eight
    nine ten eleven twelve twenty thirty forty fifty hundred thousand million billion first second third
    """
    # pronouns and possessives
    """i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one's oneself who whom whose which what whoever whomever
    whichever whatever someone somebody something anyone anybody anything everyone everybody everything nobody nothing
    none others there here
    """
    # prepositions
    """of in on at by for with about against between among amongst into onto through throughout during before after
    above below to from up down out off over under underneath beneath beside besides beyond behind toward towards upon
    within without across along alongside around amid despite except inside outside near since till until unto via per
    like unlike as than past
    """
    # conjunctions and wh-adverbs
    """and but or nor so yet if because although though unless while whilst whereas whether when whenever where wherever
    why how once lest
    """
    # auxiliaries, with what a cut-off "n't" leaves
    """am is are was were be been being do does did doing done have has had having will would shall should can could may
    might must ought need dare used gonna gotta cannot ca wo sha ai
    """
    # particles, negation and adverbs of degree or focus
    "not never too very also just only even quite rather almost then now still already again ever away back"
)
AUXILIARY = _listed(
    "am is are was were be been being do does did done have has had will would shall should can could may might must"
    " ought cannot ca wo sha ai"
)


def normal(text: str) -> str:
    """Composed characters (NFC) and straight apostrophes, so that two spellings of one word are one."""
    return unicodedata.normalize("NFC", text).replace("\u2019", "'")


def words(text: str) -> list[str]:
    """Words in lower case, in their order: runs of letters with apostrophes inside them, and numbers ("3.5", "1,000").
    A hyphen parts two words."""
    return WORD.findall(normal(text).casefold())


def base(word: str) -> str:
    """A word less its clitic: "dog's" → "dog", "don't" → "do", "can't" → "ca", which simplemma knows to be "can"."""
    return _CLITIC.sub("", word) or word


@lru_cache(maxsize=CACHED)
def lemma(word: str) -> str:
    """The English lemma of a word in lower case, its clitic left out; a word that simplemma does not know is its own."""
    return simplemma.lemmatize(base(word), lang="en").casefold()


@lru_cache(maxsize=CACHED)
def is_content(word: str) -> bool:
    """Whether a word in lower case, less its clitic, is neither a number nor in `CLOSED`: determiners, pronouns,
    prepositions, conjunctions, auxiliaries and particles. The word decides and not its use: "can" is never a tin."""
    return not word[0].isdigit() and word not in CLOSED and base(word) not in CLOSED


@lru_cache(maxsize=CACHED)
def zipf(word: str) -> float | None:
    """log₁₀ of how often a word occurs in a thousand million words of English, to two places, as
    `wordfreq.zipf_frequency` has it, by the word or else by what its clitic leaves. None for a word it does not know.
    """
    frequencies = wordfreq.get_frequency_dict("en")  # looked up here: its own function is thirty times slower
    frequency = frequencies.get(word) or frequencies.get(base(word))
    return None if frequency is None else round(log10(frequency) + 9, 2)


@lru_cache(maxsize=1)
def _wordnet() -> Any:
    """nltk's WordNet where both nltk and the data are installed, else None. Nothing is downloaded."""
    try:
        corpus = importlib.import_module("nltk.corpus").wordnet
        corpus.ensure_loaded()
    except (ImportError, LookupError):
        return None
    return corpus


def wordnet_is_there() -> bool:
    """Whether `wordnet_depth` can be had: `pip install nltk`, then `python -m nltk.downloader wordnet`."""
    return _wordnet() is not None


@lru_cache(maxsize=CACHED)
def depth(stem: str) -> int | None:
    """Edges from the first WordNet sense of a lemma up to the root, by the shortest way (`min_depth`): how specific it
    is. None where that sense is no noun or verb, or WordNet does not know the lemma. ValueError without WordNet."""
    if (corpus := _wordnet()) is None:
        raise ValueError("no WordNet: expected nltk and its data ('python -m nltk.downloader wordnet')")
    senses = corpus.synsets(stem)
    return senses[0].min_depth() if senses and senses[0].pos() in ("n", "v") else None
