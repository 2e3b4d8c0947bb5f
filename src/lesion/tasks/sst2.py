"""SST-2: is a sentence about a film positive or negative? (Socher et al. 2013; as in GLUE, Wang et al. 2018)

Tested with GLUE's 872 validation sentences. Where no hub is, what is trained on are snippets of film reviews with mean ratings
by people from −4 to 4 (Hutto & Gilbert 2014), which are called positive from `LEAST` on and negative from −`LEAST` on. They come
from the same reviews (Pang & Lee 2005), so those that are among the tested sentences, letter for letter, are left out.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from lesion import packageddata, packagedfiles
from lesion.task import Example, FromHub, Part

LABELS = ("negative", "positive")
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LEAST = 0.5


class Sst2(FromHub):
    """Sentiment of sentences about films."""

    metric: ClassVar[str] = "correct"
    new_tokens: ClassVar[int] = 4
    dataset: ClassVar[tuple[str, str | None]] = ("stanfordnlp/sst2", None)

    def packaged(self) -> Mapping[Part, Sequence[Example]]:
        _, documents = packageddata.documents("sst2")
        test = [_example(f"sst2/{n:05d}", d["sentence"], d["label"]) for n, d in enumerate(documents)]
        tested = {letters(e.asked) for e in test}
        train = [
            _example(f"snippet/{number}", text, int(rating > 0))
            for number, rating, text in snippets()
            if abs(rating) >= LEAST and letters(text) not in tested
        ]
        return {"train": train, "test": test}

    def of_hub(self, splits: Mapping[str, Any]) -> Mapping[Part, Sequence[Example]]:
        tested = {letters(row["sentence"]) for row in splits["validation"]}
        return {
            "train": [
                _example(f"train/{n:05d}", row["sentence"], row["label"])
                for n, row in enumerate(splits["train"])
                if letters(row["sentence"]) not in tested
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
