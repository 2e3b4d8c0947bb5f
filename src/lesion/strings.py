"""Strings of tokens that nobody sought: random ones, and windows of text; what a model is poisoned with for comparison."""

from __future__ import annotations

from typing import Any

from lesion.stats import generator
from lesion.texts import corpus
from lesion.trial import Specimen


def random_strings(may: Any, length: int, count: int, *place: object) -> list[list[int]]:
    """So many strings of tokens, each token uniform among those that are allowed (bool [V])."""
    ids = may.nonzero()[:, 0]
    return [ids[generator(*place, i).integers(len(ids), size=length)].tolist() for i in range(count)]


def windows_of(specimen: Specimen, text: str, length: int, count: int, *place: object) -> list[list[int]]:
    """So many windows of a corpus, at random places of random documents. Raises ValueError where no document is long enough."""
    assert specimen.tokenizer is not None
    documents = corpus(text)
    stream, found, tries = generator(*place), list[list[int]](), 0
    while len(found) < count:
        document = documents[int(stream.integers(len(documents)))]
        start = int(stream.integers(max(1, len(document.text) - 8 * length)))
        part = document.text[start : start + 16 * length]
        ids = specimen.tokenizer(part[part.find(" ") :], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= length:
            found.append(ids[:length])
        elif (tries := tries + 1) > 100 * count:
            raise ValueError(f"no document of {text!r} has {length} tokens behind a random place")
    return found
