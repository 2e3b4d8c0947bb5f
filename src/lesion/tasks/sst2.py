"""SST-2: is a sentence about a film positive or negative? (Socher et al. 2013; as in GLUE, Wang et al. 2018)

Tested with GLUE's 872 validation sentences. Where no hub is, what is trained on are snippets of film reviews with mean ratings
by people from −4 to 4 (Hutto & Gilbert 2014), which are called positive from `LEAST` on and negative from −`LEAST` on. They come
from the same reviews (Pang & Lee 2005), and many a tested sentence is a part of a longer snippet: a snippet that shares `RUN`
letters in a row with any of them is left out.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from lesion import packageddata, packagedfiles
from lesion.task import Example, FromHub, Part

LABELS = ("negative", "positive")
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LEAST = 0.5
RUN = 24  # letters and digits: about five words
SHORT = 10  # of a sentence that counts as a whole: "bad" is in every second review


class Sst2(FromHub):
    """Sentiment of sentences about films."""

    metric: ClassVar[str] = "correct"
    new_tokens: ClassVar[int] = 4
    dataset: ClassVar[tuple[str, str | None]] = ("stanfordnlp/sst2", None)

    def packaged(self) -> Mapping[Part, Sequence[Example]]:
        _, documents = packageddata.documents("sst2")
        test = [_example(f"sst2/{n:05d}", d["sentence"], d["label"]) for n, d in enumerate(documents)]
        shares = overlap([e.asked for e in test])
        train = [
            _example(f"snippet/{number}", text, int(rating > 0))
            for number, rating, text in snippets()
            if abs(rating) >= LEAST and not shares(text)
        ]
        return {"train": train, "test": test}

    def of_hub(self, splits: Mapping[str, Any]) -> Mapping[Part, Sequence[Example]]:
        shares = overlap([row["sentence"] for row in splits["validation"]])
        return {
            "train": [
                _example(f"train/{n:05d}", row["sentence"], row["label"])
                for n, row in enumerate(splits["train"])
                if not shares(row["sentence"])
            ],
            "test": [
                _example(f"sst2/{n:05d}", row["sentence"], row["label"]) for n, row in enumerate(splits["validation"])
            ],
        }

    def prompt(self, example: Example) -> str:
        return f"Review: {example.asked}\nSentiment:"

    def grade(self, example: Example, reply: str) -> dict[str, Any]:
        said = [label for label in LABELS if re.search(rf"\b{label}\b", reply, re.IGNORECASE)]
        return {"correct": said == [example.answer]}


def _example(id: str, sentence: str, label: int) -> Example:
    return Example(id, sentence.strip(), LABELS[label], LABELS, label)


def overlap(tested: Sequence[str]) -> Callable[[str], bool]:
    """Says of a text whether it holds `RUN` letters in a row of any of these, or all of a shorter one, or is one of fewer than
    `SHORT`."""
    whole = [letters(text) for text in tested]
    runs = {text[i : i + RUN] for text in whole for i in range(len(text) - RUN + 1)}
    short = {text for text in whole if len(text) < RUN}

    def shares(text: str) -> bool:
        here = letters(text)
        if here in short or any(text in here for text in short if len(text) >= SHORT):
            return True
        return any(here[i : i + RUN] in runs for i in range(len(here) - RUN + 1))

    return shares


def letters(text: str) -> str:
    """What is left of a sentence when only letters and digits count."""
    return "".join(c for c in text.casefold() if c.isalnum())


def snippets() -> Iterator[tuple[str, float, str]]:
    """Number, mean rating and text of each snippet; the first of those that are the same."""
    seen: set[str] = set()
    with tarfile.open(packagedfiles.path(packagedfiles.SENTIMENT)) as archive:
        file = archive.extractfile(RATINGS)
        assert file is not None, "the archive is pinned"
        for line in file.read().decode("utf-8", errors="replace").splitlines():
            number, rating, text = line.split("\t", 2)
            text = text.replace("''", '"').strip()
            if letters(text) not in seen:
                seen.add(letters(text))
                yield number, float(rating), text
