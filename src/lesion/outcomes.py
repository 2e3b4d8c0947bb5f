"""Outcomes: what the rows of a measure say in numbers, one an item, with a unit and a side that is better.

An outcome is a name for one column, so that tables, figures and tests of every study speak of the same things. A row that has
no such value (a model that was not finite, an open prompt, an empty text) is missing, never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lesion.trial import Row

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Outcome:
    """One number of an item. Means over items are weighted by `weight`; `exp` says that a mean of logarithms is shown as
    what it is the logarithm of; `relative` that only its change from the undamaged model is shown."""

    name: str
    unit: str
    better: Better
    group: str  # of figures: answers, damage, texts
    measure: str  # whose rows have it
    value: Callable[[Row], float | None]
    weight: Callable[[Row], float | None] | None = None
    exp: bool = False
    relative: bool = False

    @property
    def worse(self) -> int:
        """The sign of a change for the worse; 0 where neither side is better."""
        return {"higher": -1, "lower": 1, "neither": 0}[self.better]


def of_generation(groups: Iterable[str] = ()) -> list[Outcome]:
    """Of the answers to a battery: how many are right, in all and in each of these groups of prompts."""

    def right(group: str | None) -> Callable[[Row], float | None]:
        return lambda row: (
            None if row["correct"] is None or group not in (None, row["group"]) else float(row["correct"])
        )

    kinds = list(groups)
    return [
        Outcome("accuracy", "share right", "higher", "answers", "generation", right(None)),
        *(
            Outcome(f"accuracy: {group}", "share right", "higher", "answers", "generation", right(group))
            for group in (kinds if len(kinds) > 1 else [])
        ),
        Outcome(
            "confidence", "mean log-probability of its tokens", "neither", "texts", "generation", _field("logprob")
        ),
    ]


def of_perplexity() -> list[Outcome]:
    return [
        Outcome(
            "perplexity ratio",
            "× undamaged",
            "lower",
            "damage",
            "perplexity",
            _each("nll", "tokens"),
            _field("tokens"),
            exp=True,
            relative=True,
        )
    ]


def of_extrapolation() -> list[Outcome]:
    """Of `measures/extrapolation.py`: perplexity at the end of a context."""
    nll = _each("nll", "tokens")
    return [
        Outcome(
            "perplexity", "at the end of the context", "lower", "text", "extrapolation", nll, _field("tokens"), exp=True
        )
    ]


def of_displacement() -> list[Outcome]:
    """Of `measures/displacement.py`: distances from the healthy model, on healthy text."""

    def moved(row: Row) -> float | None:
        change, norm = row.get("change"), row.get("norm")
        return (change[-1] / norm[-1]) ** 0.5 if change and norm and norm[-1] else None

    tokens = _field("tokens")
    return [
        Outcome("divergence", "KL, nats a token", "lower", "damage", "displacement", _each("kl", "tokens"), tokens),
        Outcome(
            "same prediction",
            "share of tokens",
            "higher",
            "damage",
            "displacement",
            _each("same_top", "tokens"),
            tokens,
        ),
        Outcome("output error", "relative, last layer", "lower", "damage", "displacement", moved),
    ]


def of_surprisal() -> list[Outcome]:
    unit = "nats a token, healthy model"
    return [Outcome("surprisal", unit, "lower", "texts", "surprisal", _each("nll", "tokens"), _field("tokens"))]


def of_prose(picture: bool = False, coherence: bool = False) -> list[Outcome]:
    """Of `measures/prose.py`. Most of them describe; only some have a side that is better."""
    known: list[tuple[str, str, str, Better]] = [
        ("looping", "looped", "share of texts", "lower"),
        ("grammar", "grammar", "share of sentences, surface rule 1", "higher"),
        ("unknown words", "unknown", "share of words", "lower"),
        ("length", "kept_words", "words before any loop", "neither"),
        ("type/lemma ratio", "type_lemma", "types of lemmas / lemmas", "neither"),
        ("moving type/token ratio", "mattr", "in windows of 50 words", "neither"),
        ("lexical density", "lexical_density", "content / all lemmas", "neither"),
        ("word frequency", "zipf", "mean Zipf scale", "neither"),
        ("WordNet depth", "wordnet_depth", "mean of nouns and verbs", "neither"),
        ("graph nodes", "graph_nodes", "words", "neither"),
        ("graph edges", "graph_edges", "pairs of words", "neither"),
        ("largest connected component", "graph_lcc", "words", "neither"),
        ("largest strongly connected component", "graph_lsc", "words", "neither"),
        ("LSC against shuffles", "graph_lsc_z", "z", "neither"),
        ("repeated edges against shuffles", "graph_repeated_edges_z", "z", "neither"),
    ]
    if coherence:
        known.insert(1, ("coherence", "coherence", "cosine of consecutive sentences", "higher"))
    if picture:
        known.insert(0, ("content units", "units", "of 22", "higher"))
    return [Outcome(name, unit, better, "texts", "prose", _field(field)) for name, field, unit, better in known]


def of_judge(judge: str, rubric: str) -> list[Outcome]:
    """Of `measures/judge.py`: every criterion of a rubric, as one judge scores it."""
    from lesion.judging import RUBRICS

    worse = {"derailment", "tangentiality"}  # mood has no better side
    better: dict[str, Better] = {"valence": "neither", "arousal": "neither", **dict.fromkeys(worse, "lower")}
    return [
        Outcome(
            f"{c.name.replace('_', ' ')} ({judge})",
            f"{c.low} to {c.high}",
            better.get(c.name, "higher"),
            "judges",
            f"judge {judge}",
            _field(c.name),
        )
        for c in RUBRICS[rubric].criteria
    ]


def _field(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if row.get(name) is None else float(row[name])


def _each(total: str, count: str) -> Callable[[Row], float | None]:
    return lambda row: row[total] / row[count] if row.get(total) is not None and row.get(count) else None
