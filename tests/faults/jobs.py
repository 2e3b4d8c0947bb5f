"""What children do while faults are put in: the smallest labs that go through everything, under their names."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import transformers
from pydantic import Field

from lesion import Lab, environment, log
from lesion.lab import product
from lesion.measures import Perplexity
from lesion.steps import Noise, Pretrain
from lesion.subjects import Scratch
from lesion.trial import Measure, Reading

WORDS = ["Straße", "実験", "🙂", "čtvrť"]
TEXTS = [f"{word} is what document {n} is about: {' '.join(WORDS)}. " * 4 for n, word in enumerate(WORDS)]
SMALL = {"num_hidden_layers": 1, "vocab_size": 272}
HOW = {"steps": 4, "batch": 2, "length": 16, "warmup": 0, "save_every": 2, "skip": 1, "eval_every": 2}


class TestWords(Measure):
    """One row a word, in several chunks: texts of more than one byte a character, and a number of the model's."""

    name = "test-words"
    chunk = 2
    seed: int = Field(default=0)

    def items(self, specimen):
        return [f"{word}/{n}" for n, word in enumerate(WORDS)]

    def read(self, specimen, items):
        weight = float(next(specimen.model.parameters()).detach().double().abs().sum())
        return [{"item": item, "text": item * 3, "weight": weight} for item in items]

    def summarise(self, rows):
        return {"texts": len(rows)}


def write_corpus(path: Path) -> Path:
    lines = [json.dumps({"id": f"{n}/{WORDS[n]}", "text": text}, ensure_ascii=False) for n, text in enumerate(TEXTS)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def parts(corpus: str) -> list[list[Reading]]:
    """Readings of a small lab, in the portions in which they are taken."""
    intact = Scratch(architecture="tiny-llama", config=SMALL)
    damaged = intact >> Noise(site="mlp", sigma=0.4, seed=1)
    trained = damaged >> Pretrain(corpus=corpus, **HOW)
    again = trained >> Noise(site="attention.value", sigma=0.2, seed=2)
    read = [Perplexity(corpus=corpus, documents=2, tokens=12), TestWords()]
    return [product(trials, read) for trials in ([intact], [damaged], [trained, again], [intact, again])]


def small_lab(lab: Path, corpus: str) -> int:
    """In-place steps, a kept one, compaction again and again. Returns 1 where a reading failed, if only for a while."""
    log.COMPACT_AT = 2
    missing = 0
    for readings in parts(corpus):
        index = Lab(lab).take(readings).index
        if some := [reading for reading in readings if reading.key not in index.seals]:
            missing += len(some)
            print(*(failure["error"] for failure in index.failures.values()), sep="\n")
    return 1 if missing else 0


def prepare(folder: Path) -> None:
    """Does everything once, so that a child need not import or look up anything."""
    environment.environment = lru_cache(environment.environment)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    small_lab(folder / "warm", str(write_corpus(folder / "warm.jsonl")))
