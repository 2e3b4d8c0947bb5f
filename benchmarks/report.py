"""A report of 20,000 texts of about 350 tokens: how long it takes to build, how large it is, how long it takes to open.

    python benchmarks/report.py [--texts 20000] [--words 270] [--browser /usr/bin/chromium] [--keep FOLDER]

The texts are made of the sentences of the packaged corpus, drawn without end: each prompt, seed and dose has sentences of
its own, as sampling at temperature 1 has; with the dose, words are replaced by others and the end of the text repeats
itself. Opening is timed in a headless browser, from the request for the page until its explorer can be used, and once
more until a text at the other end of the page has been unpacked and a search has gone through all texts.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shutil
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import polars as pl

from lesion.report.page import CURVES, GENERATIONS, build

SITES, SEEDS = ("attention.value", "mlp", "embedding", "attention.query"), range(42, 47)
DOSES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
READY = "#explorer:not([hidden]) #cards article"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--texts", type=int, default=20_000)
    options.add_argument("--words", type=int, default=270)
    options.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome") or "")
    options.add_argument("--keep", type=Path)
    chosen = options.parse_args()

    rows = generations(chosen.texts, chosen.words)
    characters = rows["text"].str.len_chars().sum()
    print(f"{len(rows):,} texts, {rows['text'].n_unique():,} of them different, {characters / 1e6:.1f} M characters")
    with tempfile.TemporaryDirectory() as aside:
        folder = chosen.keep or Path(aside)
        begun = time.perf_counter()
        page = build(
            folder,
            title="benchmark",
            question="How large is a large report?",
            sentences=[],
            summary=pl.DataFrame({"texts": [len(rows)]}),
            curves=pl.DataFrame(schema=CURVES),
            generations=rows,
            failures=[],
            ledgers=[],
            environments=[],
            notes=[],
        )
        print(f"built in {time.perf_counter() - begun:.1f} s; report.html has {page.stat().st_size / 1e6:.2f} MB")
        if chosen.browser:
            opened(page, chosen.browser)
        else:
            print("not opened: no browser found, name one with --browser")


def generations(texts: int, words: int) -> pl.DataFrame:
    """So many texts over sites, doses and seeds; the undamaged model's are the same for every site."""
    corpus = re.sub(r"\s+", " ", (files("lesion") / "data/corpora/austen.txt").read_text(encoding="utf-8"))
    sentences = [found.split() for found in re.findall(r"[A-Z][^.!?]{20,250}[.!?]", corpus)]
    vocabulary = corpus.split()
    prompts = -(-texts // (len(SITES) * len(DOSES) * len(SEEDS)))
    rows = []
    for prompt, seed, site, dose in itertools.product(range(prompts), SEEDS, SITES, DOSES):
        draw = random.Random(f"{prompt} {seed} {site if dose else ''} {dose}")
        said: list[str] = []
        while len(said) < words:
            said += draw.choice(sentences)
        said = [draw.choice(vocabulary) if draw.random() < 0.6 * dose else word for word in said[:words]]
        if draw.random() < dose:  # a broken model goes round and round
            begin = draw.randrange(words // 2, words)
            said[begin:] = list(
                itertools.islice(itertools.cycle(said[begin - draw.randrange(1, 12) : begin]), words - begin)
            )
        rows.append(
            {
                "site": site,
                "dose": dose,
                "seed": seed,
                "prompt": f"p{prompt:03}",
                "group": f"group {prompt // 25}",
                "asked": " ".join(random.Random(prompt).choice(sentences)),
                "text": " ".join(said),
                "correct": (None, draw.random() > dose)[prompt % 2],
                "stop": "length",
                "tokens": int(words * 1.3),
                "logprob": -1.5 - dose * draw.random(),
            }
        )
    return pl.DataFrame(rows[:texts], schema=GENERATIONS)


def opened(page: Path, browser: str) -> None:
    """Prints the time until the explorer can be used, until the last prompt is shown, and until a search has ended."""
    from playwright.sync_api import expect, sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as play:
        chrome = play.chromium.launch(executable_path=browser, args=[*flags, "--disable-component-update"])
        for turn in ("first", "second"):
            tab = chrome.new_page(viewport={"width": 1280, "height": 900})
            begun = time.perf_counter()
            tab.goto(page.resolve().as_uri(), wait_until="commit")
            tab.wait_for_selector(READY)
            ready = time.perf_counter() - begun
            begun = time.perf_counter()
            last = tab.locator("#prompts label").last
            last.click()
            expect(tab.locator("#asked")).to_contain_text(last.get_attribute("title") or "?")
            shown = time.perf_counter() - begun
            begun = time.perf_counter()
            tab.fill("#search", "in the evening")
            expect(tab.locator("#count")).to_have_text(re.compile(r"prompts · \d+ texts?$"), timeout=60_000)
            print(f"{turn} opening: explorer ready in {ready:.2f} s, the last prompt in {shown:.2f} s, ", end="")
            print(f"a search of all texts in {time.perf_counter() - begun:.2f} s: {tab.inner_text('#count')}")
            tab.close()
        chrome.close()


if __name__ == "__main__":
    main()
