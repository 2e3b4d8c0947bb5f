"""Texts without a model: counts and ratios by hand, each clause of the surface rule alone, loops cut until none is left."""

import math
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import wordfreq
from hypothesis import example, given
from hypothesis import strategies as st

from lesion import prose, vocabulary
from lesion.batteries import loops
from lesion.prose import describe, mattr, passes, sentences, truncate_loop
from lesion.vocabulary import CLOSED, base, depth, is_content, lemma, words, zipf

DREAM = (
    "Last night I walked through a forest of glass. Every leaf rang like a bell! I couldn't find the path; however, a "
    'small boy showed me the way. "Don’t be afraid," he said. "The river knows your name."\n\n'
    "1. **First**, we crossed the bridge\n2. Then we met Dr. Smith, who was 3.5 metres tall\n\n"
    "We walked for hours... until the sun rose (at 7:30). "
)
SHORT = st.lists(
    st.sampled_from(["the", "boy", "Boy", "sat.", "sat", "ha", "haha", "ha!", "+", "2", "ß", "İİ", "don't"]),
    max_size=30,
).map(" ".join)


@pytest.fixture
def wordnet(monkeypatch):
    """A WordNet of four words in place of nltk's; the caches that remember the other are emptied before and after."""

    def sense(pos, depth):
        return SimpleNamespace(pos=lambda: pos, min_depth=lambda: depth)

    senses = {"boy": [sense("n", 8), sense("n", 2)], "walk": [sense("v", 1)], "small": [sense("s", 0), sense("n", 9)]}
    corpus = SimpleNamespace(synsets=lambda word: senses.get(word, []))
    depth.cache_clear()
    monkeypatch.setattr(vocabulary, "_wordnet", lambda: corpus)
    yield
    depth.cache_clear()


# words


def test_words_are_lower_case_and_hold_their_apostrophes():
    assert words("Don’t STOP at well-known 3.5 or 1,000 'quoted' dogs' O'Neil's café_bar.") == [
        "don't", "stop", "at", "well", "known", "3.5", "or", "1,000", "quoted", "dogs", "o'neil's", "café", "bar",
    ]  # fmt: skip
    assert words("cafe\u0301") == words("caf\u00e9")  # two spellings of one letter
    assert words("... — !?") == []


def test_lemmas():
    pairs = {
        "was": "be",
        "boys": "boy",
        "dog's": "dog",
        "taking": "take",
        "don't": "do",
        "can't": "can",
        "won't": "will",
    }
    assert {word: lemma(word) for word in pairs} == pairs
    assert lemma("qwzxv") == "qwzxv"
    assert lemma("paris") == "paris"  # in lower case, whatever the dictionary says


def test_the_closed_classes_are_about_250_words_in_lower_case():
    assert 220 < len(CLOSED) < 320
    assert all(word == word.casefold() and words(word) == [word] for word in CLOSED)
    assert prose.AUXILIARY <= CLOSED
    content = [
        word
        for word in words("The boy didn't quickly take 12 of his mother's cookies, he's hungry")
        if is_content(word)
    ]
    assert content == ["boy", "quickly", "take", "mother's", "cookies", "hungry"]


def test_zipf_is_that_of_wordfreq():
    listed = wordfreq.top_n_list("en", 20_000)[::40]
    assert all(
        zipf(word) == wordfreq.zipf_frequency(word, "en") for word in listed if not any(c.isdigit() for c in word)
    )
    assert zipf("the") == 7.73
    assert zipf("qwzxv") is None
    assert zipf("stool's") == zipf("stool") or zipf("stool's") == wordfreq.zipf_frequency("stool's", "en")


def test_caches_are_bounded():
    assert all(f.cache_info().maxsize for f in (lemma, is_content, zipf, depth))


# WordNet


def test_depth_is_that_of_the_first_sense_of_nouns_and_verbs(wordnet):
    assert [depth(word) for word in ("boy", "walk", "small", "qwzxv")] == [8, 1, None, None]
    assert describe("The small boys walked.")["wordnet_depth"] == (8 + 1) / 2
    assert describe("The small one.")["wordnet_depth"] is None


def test_without_wordnet_there_is_no_depth(monkeypatch):
    monkeypatch.setattr(vocabulary, "_wordnet", lambda: None)
    depth.cache_clear()
    assert not vocabulary.wordnet_is_there()
    assert describe(DREAM)["wordnet_depth"] is None
    with pytest.raises(ValueError, match=r"no WordNet: expected nltk"):
        depth("boy")


def test_wordnet_without_data_or_without_nltk_is_not_there(tmp_path):
    """In a process of its own, with a folder in which there is nothing, and then without the library."""
    code = (
        "import sys, types; from lesion import vocabulary as v\n"
        "def missing(): raise LookupError\n"
        "fake = types.ModuleType('nltk'); corpus = types.ModuleType('nltk.corpus'); fake.corpus = corpus\n"
        "corpus.wordnet = types.SimpleNamespace(ensure_loaded=missing)\n"
        "sys.modules |= {'nltk': fake, 'nltk.corpus': corpus}; print(v.wordnet_is_there())\n"
        "v._wordnet.cache_clear(); sys.modules |= {'nltk': None, 'nltk.corpus': None}; print(v.wordnet_is_there())\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# moving-average type-token ratio


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.integers(1, 12))
def test_mattr_is_the_mean_over_windows(tokens, window):
    each = [len(set(tokens[i : i + window])) / window for i in range(len(tokens) - window + 1)]
    assert mattr(tokens, window=window) == (pytest.approx(sum(each) / len(each)) if each else None)


def test_mattr_does_not_depend_on_length_as_the_plain_ratio_does():
    cycle = [f"w{i}" for i in range(70)]
    assert mattr(cycle) == mattr(cycle * 5) == 1
    with pytest.raises(ValueError, match="at least 1 word"):
        mattr(cycle, window=0)


# loops


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The the the the the the", "The"),
        ("I saw it. I went home. I went home. I went home. I went", "I saw it. I went home."),
        ("so it went hahahahahahahahahahahahaha", "so it went ha"),
        ("x " * 3 + "y z y y y y y y", "x x x y z y"),
        ("STRASSE Straße strasse straße straße straße", "STRASSE"),
        ("İ one two three, one two three, one two three", "İ one two three,"),
        ("a b b b b b a b b b b b a b b b b b", "a b"),  # a loop of loops
        ("2 + 2 + 2 + 2 + 2 + 2 +", "2 +"),
    ],
)
def test_a_loop_is_cut_where_it_is_said_again(text, kept):
    assert truncate_loop(text) == (kept, True)


@given(st.one_of(SHORT, st.text(max_size=60)))
@example("")
def test_nothing_loops_that_was_cut_and_nothing_else_is_cut(text):
    kept, looped = truncate_loop(text)
    assert looped == loops(text)
    assert text.startswith(kept)
    assert not loops(kept)
    assert looped or kept == text


@given(
    st.lists(st.sampled_from([f"w{i}q" for i in range(40)]), min_size=1, max_size=12, unique=True), st.integers(5, 9)
)
def test_a_phrase_said_over_and_over_is_left_once(phrase, times):
    text = " ".join(["before", "that", *phrase * times])
    assert truncate_loop(text) == (" ".join(["before", "that", *phrase]), True)


def test_a_loop_is_counted_and_then_left_out():
    alone, looped = describe("The small boy sat."), describe("The small boy sat." + " The small boy sat." * 4)
    assert (looped["words"], looped["loop_words"], looped["kept_words"]) == (20, 16, 4)
    own = {"words", "looped", "loop_words"}
    assert {k: v for k, v in alone.items() if k not in own} == {k: v for k, v in looped.items() if k not in own}


# sentences


def test_sentences():
    assert sentences(DREAM) == [
        "Last night I walked through a forest of glass.",
        "Every leaf rang like a bell!",
        "I couldn't find the path; however, a small boy showed me the way.",
        '"Don\'t be afraid," he said.',
        '"The river knows your name."',
        "**First**, we crossed the bridge",
        "Then we met Dr. Smith, who was 3.5 metres tall",
        "We walked for hours... until the sun rose (at 7:30).",
    ]
    assert sentences("## A heading\n- one thing\n\n---\n...") == ["A heading", "one thing"]
    assert sentences("He ran. she hid. J. Doe saw, e.g. them.") == ["He ran.", "she hid.", "J. Doe saw, e.g. them."]
    assert sentences('"Stop!" he said. So did I. Done') == ['"Stop!" he said.', "So did I.", "Done"]
    assert sentences("  \n ") == []


@given(st.text(alphabet="aB .!?…\"()“”\n-1.*'", max_size=60))
def test_sentences_hold_every_word_but_the_numbers_of_lists(text):
    found = sentences(text)
    assert all(words(sentence) for sentence in found)
    if not prose._MARKER.search(text) and not re.search(r"(?m)^\s*(?:[-*+•>]|#|\(?\w{1,3}[.)])", text):
        assert [word for sentence in found for word in words(sentence)] == words(text)


# surface rule 1, one clause at a time


@pytest.mark.parametrize(
    ("sentence", "good"),
    [
        ("The boy sat on a stool.", True),
        ("the boy sat on a stool.", False),
        ('"The boy sat," she said.', True),
        ("3 boys sat.", True),
        ("**The boy sat.**", True),
        ("The boy sat on a stool", False),
        ("The boy sat on a stool:", True),
        ("The boy sat (on a stool.)", True),
        ("The boy sat on on a stool.", False),
        ("On on a stool the boy sat.", False),
        ("He had had enough, enough of it.", True),
        ("He is very very glad.", True),
        ("The theory is the one.", True),
        ("There are 2 2 here.", True),
        ("The boy (sat on a stool.", False),
        ("The boy sat) on a stool.", False),
        ("The (boy [sat) on] a stool.", False),
        ('The "boy sat on a stool.', False),
        ("The “boy” sat on a stool.", True),
        ("The ”boy“ sat on a stool.", False),
        ("The boys' stool isn't the girl's.", True),
        ("The qwzxv sat on a stool.", False),
        ("The Qwzxv sat on a stool.", True),
        ("Stool.", False),
        ("Yes.", True),
        ("Running!", True),
        ("Can't!", True),
        ("Stool sat.", True),
    ],
)
def test_surface_rule(sentence, good):
    assert passes(sentence) is good


@pytest.mark.parametrize(
    ("sentence", "good"),
    [
        ("The boy sat on a", True),
        ("The boy sat on a stoqwz", True),  # half a word
        ('She said, "The boy sat', True),
        ("The boy) sat on a", False),
        ("The qwzxv sat on a", False),
        ("the boy sat on a", False),
    ],
)
def test_the_surface_rule_excuses_what_a_length_limit_breaks_off(sentence, good):
    assert passes(sentence, cut=True) is good


def test_only_the_last_sentence_of_an_unfinished_text_is_excused():
    text = "The boy sat\nThe girl stood"
    assert describe(text)["grammar"] == 0
    assert describe(text, finished=False)["grammar"] == 0.5
    assert describe("1. The boy sat\n2. The girl stood")["grammar"] == 1  # items of a list end as they like


def test_a_quotation_may_run_over_sentences_of_its_paragraph():
    assert describe('"The boy sat. The girl stood," she said.')["grammar"] == 1
    assert describe('"The boy sat. The girl stood.\nShe said it."')["grammar"] == pytest.approx(1 / 3)
    assert describe('"The boy sat. The girl stood.', finished=False)["grammar"] == 0.5


def test_a_sentence_without_a_word_is_refused():
    with pytest.raises(ValueError, match="a word in it"):
        passes("...")


# the whole record


def test_a_small_text_by_hand():
    found = describe("The boys sat on 2 stools. A boy sat. Qwzxv fell")
    assert found == {
        "words": 11, "looped": False, "loop_words": 0, "kept_words": 11, "sentences": 3, "lemmas": 9,
        "type_lemma": 9 / 11, "mattr": None, "lexical_density": 7 / 11, "zipf": found["zipf"],
        "unknown": 1 / 10, "wordnet_depth": found["wordnet_depth"], "grammar": 2 / 3,
    }  # fmt: skip
    known = ["the", "boys", "sat", "on", "stools", "a", "boy", "sat", "fell"]
    assert found["zipf"] == pytest.approx(sum(wordfreq.zipf_frequency(w, "en") for w in known) / 9)


@pytest.mark.parametrize("text", ["", " \n\t", "...", "—?!"])
def test_a_text_without_words_has_counts_and_no_ratios(text):
    found = describe(text)
    counts = {"words", "loop_words", "kept_words", "sentences", "lemmas", "looped"}
    assert all((found[name] == 0) if name in counts else (found[name] is None) for name in found)


@given(
    st.one_of(SHORT, st.text(max_size=80), st.binary(max_size=80).map(lambda b: b.decode("utf-8", "replace"))),
    st.booleans(),
)
@example("\x85A\u2028B\x1c.", True)
@example("²² ½", True)
@example("中文 кот naïve", False)
def test_any_text_has_finite_numbers(text, finished):
    for name, value in describe(text, finished=finished).items():
        assert value is None or type(value) in (int, float, bool), name
        assert value is None or math.isfinite(value)
        if name in ("type_lemma", "mattr", "lexical_density", "unknown", "grammar"):
            assert value is None or 0 <= value <= 1


def test_the_curly_and_the_straight_text_are_one():
    assert describe("He didn’t know the dog’s name.") == describe("He didn't know the dog's name.")
    assert base("didn't") == "did"


@pytest.mark.parametrize(
    "text", ["." * 20_000, "(" * 20_000, "a" * 20_000, "' " * 10_000, "- " * 10_000, '"' * 20_000, ". \n" * 7_000]
)
def test_hostile_texts_take_no_time(text):
    started = time.perf_counter()
    describe(text)
    assert time.perf_counter() - started < 2
