"""How many stored texts a second the text measures read, without an encoder and on one thread. Bar: 200.

    python benchmarks/prose.py [--texts 1000] [--words 250] [--shuffles 100]

Texts are stretches of the packaged novel, each with a made-up word in ten, so that no cache has seen them whole.
"""

from __future__ import annotations

import argparse
import random
import time

from lesion.prose import describe, truncate_loop, words
from lesion.speech import graph
from lesion.texts import corpus
from lesion.units import found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--texts", type=int, default=1000)
    options.add_argument("--words", type=int, default=250)
    options.add_argument("--shuffles", type=int, default=100)
    chosen = options.parse_args()
    source, chance = " ".join(d.text for d in corpus("austen")).split(), random.Random(0)
    texts = []
    for i in range(chosen.texts):
        start = i * 80 % (len(source) - chosen.words)
        some = source[start : start + chosen.words]
        texts.append(" ".join(f"qu{chance.randrange(10**6)}x" if chance.random() < 0.1 else word for word in some))
    parts = {
        "words, loops, grammar": describe,
        f"graph, {chosen.shuffles} shuffles": lambda text: graph(
            words(truncate_loop(text)[0]), shuffles=chosen.shuffles, seed=0
        ),
        "content units": found,
    }
    describe(texts[0])  # dictionaries are loaded once
    total = 0.0
    for name, part in parts.items():
        started = time.perf_counter()
        for text in texts:
            part(text)
        total += (spent := time.perf_counter() - started)
        print(f"{name:24}{1e3 * spent / len(texts):8.2f} ms a text")
    print(f"together {len(texts) / total:.0f} texts of {chosen.words} words a second (bar: 200)")


if __name__ == "__main__":
    main()
