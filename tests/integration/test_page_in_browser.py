"""The page in a browser: what a person chooses is what is shown, from a disk, with the keyboard, on a phone, at night.

Skipped on a machine without playwright or without a Chromium; nothing is downloaded.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lesion.report import explorer
from lesion.report.page import CURVES, GENERATIONS, build

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
expect = playwright.expect
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
SITES, DOSES, SEEDS = ("attention.value", "mlp", "embedding <b>"), (0.0, 0.2, 0.4, 0.8, 1.6), (42, 43)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> <!-- \x1b[31m \u202e turned"
PROMPTS = {
    "cat": "Where did the cat sit?",
    "long": "Say at length " + "what you would do if nothing were asked of you, " * 12 + "and why.",
    "hostile": f"Repeat: {HOSTILE}",
    "unbroken": "W" * 300,
}
WIDTH = "document.documentElement.scrollWidth"


def text_of(site: str, dose: float, seed: int, prompt: str) -> str | None:
    if prompt == "cat":
        return "the cat sat on the mat" if dose == 0 else f"the dog sat on  the big mat\n{site} at {dose} by {seed}"
    if prompt == "hostile":
        return HOSTILE if dose < 1 else None if seed == 42 else ""
    if prompt == "unbroken":
        return "V" * (200 if dose == 0 else 300)
    return f"Undamaged {seed}. " * 40 if dose == 0 else f"Seldom (very {site}) {dose:g} + {seed}? " * 40


def generations() -> pl.DataFrame:
    rows = [
        {
            "site": site,
            "dose": dose,
            "seed": seed,
            "prompt": prompt,
            "group": "short" if prompt == "cat" else "other",
            "asked": PROMPTS[prompt],
            "text": text_of(site, dose, seed, prompt),
            "correct": (dose < 0.5) if prompt == "cat" else None,
            "stop": "not finite" if dose > 1 else "end",
            "tokens": 7,
            "logprob": -1 - dose,
        }
        for site, dose, seed, prompt in itertools.product(SITES, DOSES, SEEDS, PROMPTS)
    ]
    return pl.DataFrame(rows, schema=GENERATIONS)


def content() -> dict[str, Any]:
    measures = [("answers", "accuracy of " + "long " * 9), ("text", "density"), ("text", "coherence")]
    curves = [
        {"measure": m, "group": g, "unit": "share", "better": "higher", "site": s, "dose": d, "value": 1 - d}
        for (g, m), s, d in itertools.product(measures, SITES, DOSES)
    ]
    nothing = dict.fromkeys(("low", "high", "reference", "items", "seeds"))
    claims = [
        {"claim": f"A claim that is {verdict}, {'wordily ' * 30}", "effect": effect, "low": effect, "high": effect}
        | {"unit": "standard deviations", "items": 3, "seeds": 2, "test": "sign flip", "verdict": verdict}
        for verdict, effect in zip(("supported", "contradicted", "inconclusive"), (-1.0, 0.5, 0.0), strict=True)
    ]
    left = dict.fromkeys(("p", "p_holm", "power", "note"))
    heat = [
        {"row": f"part {r}", "column": f"a measure with a name {c}", "value": r - c, "label": None, "note": HOSTILE}
        for r, c in itertools.product(range(4), range(14))
    ]
    wide = pl.DataFrame({f"column {i}": ["text " * 5] for i in range(14)})
    return {
        "title": "degrade",
        "question": "How does it fail?",
        "sentences": [f"tiny → noise → {HOSTILE}"],
        "summary": wide,
        "curves": pl.DataFrame([{**nothing, **row} for row in curves], schema={**CURVES, "group": pl.String}),
        "generations": generations(),
        "failures": [{"of": "ab" * 16, "error": "ValueError: no", "trace": "Traceback " + "x" * 400}],
        "ledgers": [{"trial": f"tiny → {'noise ' * 30}", "ledger": [{"subject": {}, "after": "aa" * 16}]}],
        "environments": [{"python": "3.11", "device": "cpu " * 40}],
        "notes": ["A note. " * 20],
        "claims": pl.DataFrame([{**left, **claim} for claim in claims], infer_schema_length=None),
        "heat": pl.DataFrame(heat),
        "extra": {"Thresholds": wide},
    }


@pytest.fixture(scope="module", params=["plain", "packed"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same report, its texts as they are or in blocks of a few."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "packed":
            patch.setattr(explorer, "PLAIN", 0)
            patch.setattr(explorer, "BLOCK", 4000)
        page: Path = build(tmp_path_factory.mktemp(request.param), **content())
    assert ('id="block-3"' in page.read_text(encoding="utf-8")) == (request.param == "packed")
    return page.as_uri()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """A tab that writes down what must not happen."""

    def __init__(self, chromium: Any, **options: Any):
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.tab = self.context.new_page()
        self.tab.on("console", lambda said: self.faults.append(said.text))
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.faults.append("dialog"), dialog.dismiss()))
        self.tab.on("request", lambda asked: self.requests.append(asked.url))


@pytest.fixture
def watched(chromium: Any) -> Iterator[Watched]:
    watched = Watched(chromium)
    yield watched
    watched.context.close()
    assert watched.faults == []


@pytest.fixture
def tab(watched: Watched, address: str) -> Any:
    watched.tab.goto(address)
    expect(watched.tab.locator("#explorer")).to_be_visible()
    return watched.tab


def choose(tab: Any, name: str, place: int) -> None:
    tab.locator(f"input[name={name}][value='{place}']").check(force=True)


def shown(tab: Any) -> list[str]:
    return tab.locator("#cards .said").evaluate_all("all => all.map((said) => said.textContent)")


def seen(text: str | None) -> str:
    whole = "–" if text is None else text or "(empty text)"
    return whole.replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")


# ---------------------------------------------------------------------- choosing


def test_the_texts_shown_are_those_of_the_data_wherever_one_looks(tab: Any) -> None:
    for (s, site), (k, seed), (p, prompt) in itertools.product(*map(enumerate, (SITES, SEEDS, PROMPTS))):
        choose(tab, "site", s)
        choose(tab, "seed", k)
        choose(tab, "prompt", p)
        expect(tab.locator("#asked")).to_contain_text(seen(PROMPTS[prompt]))
        expect(tab.locator("#cards article")).to_have_count(len(DOSES))
        expected = [seen(text_of(site, dose, seed, prompt)) for dose in DOSES]
        expect(tab.locator("#cards .said").last).to_have_text(expected[-1], use_inner_text=False)
        assert shown(tab) == expected


def test_the_slider_goes_through_the_doses_by_keyboard(tab: Any) -> None:
    tab.locator("input[name=view][value=one]").check(force=True)
    expect(tab.locator("#cards article")).to_have_count(2)
    slider = tab.locator("#slider")
    slider.focus()
    places = ["Home", "ArrowRight", "ArrowRight", "End", "ArrowLeft", "Home"]
    for key, dose in zip(places, (0.2, 0.4, 0.8, 1.6, 0.8, 0.2), strict=True):
        slider.press(key)
        expect(tab.locator("#value")).to_have_text(f"{dose:g}")
        expect(tab.locator("#cards h3").last).to_contain_text(f"{dose:g}")
        assert shown(tab) == [text_of(SITES[0], d, 42, "cat") for d in (0.0, dose)]
        assert slider.get_attribute("aria-valuetext") == f"{dose:g}, {'right' if dose < 0.5 else 'wrong'}"
        assert tab.locator(".tick.now").inner_text() == f"{dose:g}"
    tab.locator("input[name=view][value=all]").check(force=True)
    expect(tab.locator("#cards article")).to_have_count(5)
    expect(slider).to_be_hidden()


def test_a_tick_stands_below_the_thumb(tab: Any) -> None:
    tab.locator("input[name=view][value=one]").check(force=True)
    box = tab.locator("#slider").bounding_box()
    for i in range(4):
        thumb = box["x"] + 10 + (box["width"] - 20) * i / 3
        tick = tab.locator(".tick").nth(i).bounding_box()
        assert abs(tick["x"] + tick["width"] / 2 - thumb) < 1.5


def test_words_that_the_undamaged_model_did_not_write_are_marked(tab: Any) -> None:
    marks = tab.locator("article[data-dose='1'] mark.new")
    assert [mark.strip() for mark in marks.all_text_contents()] == ["dog", "big", "attention.value at 0.2 by 42"]
    assert tab.locator("article[data-dose='0'] mark").count() == 0
    assert marks.first.evaluate("mark => getComputedStyle(mark).backgroundColor") not in ("rgba(0, 0, 0, 0)", "")


@pytest.mark.parametrize("doses", [(0.0,), (0.4,), (0.4, 0.8), (0.0, 0.4)])
def test_a_report_of_few_doses_or_of_no_undamaged_model(watched: Watched, tmp_path: Path, doses: tuple[float]) -> None:
    rows = generations().filter(pl.col("dose").is_in(doses))
    watched.tab.goto(build(tmp_path, **{**content(), "generations": rows}).as_uri())
    expect(watched.tab.locator("#cards article")).to_have_count(len(doses))
    assert shown(watched.tab) == [text_of(SITES[0], dose, 42, "cat") for dose in doses]
    assert watched.tab.locator("mark.new").count() == (3 if len(doses) == 2 and doses[0] == 0 else 0)
    damaged = [dose for dose in doses if dose]
    assert watched.tab.locator("#views").is_visible() == (len(damaged) > 1)
    watched.tab.fill("#search", "sat on")
    watched.tab.press("#search", "Enter")
    expect(watched.tab.locator("#count")).to_contain_text(f"1 of {2 * (3 * len(damaged) + (0.0 in doses))} texts")


# ---------------------------------------------------------------------- searching


def test_search_finds_texts_counts_them_and_goes_from_one_to_the_next(tab: Any) -> None:
    tab.fill("#search", "seldom  (VERY mlp) 0.4 + 43?")
    tab.press("#search", "Enter")  # at once, before the search has begun by itself
    expect(tab.locator("#count")).to_have_text("0 of 4 prompts · 1 of 1 text")
    chosen = tab.locator(":is(#sites, #seeds) input:checked + span").all_text_contents()
    assert chosen == ["mlp", "43"] and tab.locator("#prompts input:checked").input_value() == "1"
    expect(tab.locator("article.now h3")).to_have_text("0.4")
    hits = tab.locator("article.now mark.hit").all_text_contents()
    assert "".join(hits) == "Seldom (very mlp) 0.4 + 43?" * 40
    tab.fill("#search", "sat on the")
    expect(tab.locator("#count")).to_have_text(f"0 of 4 prompts · {2 + 3 * 4 * 2} texts")  # undamaged: once a seed
    seen_at = set()
    for n in range(1, 27):
        tab.locator("#next").click()
        expect(tab.locator("#count")).to_contain_text(f" {n} of 26")
        here = tab.locator(":is(#sites, #seeds) input:checked + span").all_text_contents()
        seen_at.add((*here, tab.locator("article.now h3").inner_text().split("\n")[0].split(" ")[0]))
    assert len(seen_at) == 26
    expect(tab.locator("#count")).to_contain_text("26 of 26")
    tab.press("#search", "Enter")
    expect(tab.locator("#count")).to_contain_text(" 1 of 26")
    tab.press("#search", "Shift+Enter")
    expect(tab.locator("#count")).to_contain_text("26 of 26")


def test_search_finds_prompts_and_leaves_nothing_behind(tab: Any) -> None:
    tab.fill("#search", "did cat where")
    expect(tab.locator("#count")).to_have_text("1 of 4 prompts · 0 texts")
    assert tab.locator("#prompts label:visible").count() == 1 and tab.locator("#prompts h3:visible").count() == 1
    expect(tab.locator("#steps")).to_be_hidden()
    tab.fill("#search", "(.*[")
    expect(tab.locator("#count")).to_have_text("0 of 4 prompts · 0 texts")
    tab.fill("#search", "ONERROR=alert(1)>")
    expect(tab.locator("#count")).to_have_text(f"1 of 4 prompts · {2 + 3 * 3 * 2} texts")
    tab.fill("#search", "")
    expect(tab.locator("#count")).to_have_text("4 prompts")
    assert tab.locator("mark.hit").count() == 0 and tab.locator("#prompts label:visible").count() == 4


# ---------------------------------------------------------------------- safe, alone, everywhere


def test_a_hostile_text_stays_text_and_nothing_is_requested(tab: Any, watched: Watched, address: str) -> None:
    choose(tab, "prompt", 2)
    expect(tab.locator("#cards .said").first).to_contain_text("</script><script>alert(1)</script><img src=x")
    tab.fill("#search", "<img src=x")
    expect(tab.locator("#count")).to_contain_text("texts")
    assert tab.locator("img, iframe, object, link, [onerror], .cards script, .prompts b").count() == 0
    closed = tab.locator("details:not([open]) > summary:visible")
    while closed.count():
        closed.first.click()
    assert {url for url in watched.requests if not url.startswith("blob:")} == {address}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(chromium: Any, address: str, scheme: str) -> None:
    phone = Watched(chromium, color_scheme=scheme)
    phone.tab.set_viewport_size({"width": 390, "height": 844})
    phone.tab.goto(address)
    expect(phone.tab.locator("#cards article")).to_have_count(2)  # one dose beside the undamaged model
    phone.tab.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    for place in range(len(PROMPTS)):
        choose(phone.tab, "prompt", place)
        expect(phone.tab.locator("#asked")).to_contain_text([*map(seen, PROMPTS.values())][place])
        assert phone.tab.evaluate(WIDTH) <= 390
    phone.tab.locator("input[name=view][value=all]").check(force=True)
    expect(phone.tab.locator("#cards article")).to_have_count(5)
    assert phone.tab.evaluate(WIDTH) <= 390
    dark = phone.tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    phone.context.close()
    assert phone.faults == []


def test_the_whole_page_can_be_walked_by_tab_and_the_focus_is_always_seen(tab: Any) -> None:
    tab.locator("input[name=view][value=one]").check(force=True)
    tab.fill("#search", "sat on")
    expect(tab.locator("#next")).to_be_visible()
    tab.locator("h1").click()  # the walk begins there
    visited = []
    for _ in range(200):
        tab.keyboard.press("Tab")
        here = tab.evaluate(
            """() => {
                const here = document.activeElement;
                if (here === document.body) return null;
                const seen = [here, here.nextElementSibling].filter(Boolean).map((x) => getComputedStyle(x));
                const box = (here.type === "radio" ? here.nextElementSibling : here).getBoundingClientRect();
                return {
                    id: here.id || here.name || here.tagName,
                    name: (here.ariaLabel ?? "") + here.textContent + (here.closest("label")?.textContent ?? "")
                        + [...(here.labels ?? [])].map((x) => x.textContent).join(""),
                    outlined: seen.some((style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1),
                    inView: box.bottom > 0 && box.top < innerHeight && box.width > 0,
                };
            }"""
        )
        if here is None:
            break
        visited.append(here["id"])
        assert here["outlined"] and here["name"].strip() and here["inView"], here
    else:
        raise AssertionError(f"the focus does not leave the page: {visited[-5:]}")
    order = ["search", "previous", "next", "prompt", "site", "seed", "view", "slider", "cards"]
    assert [name for name in visited if name in order] == order


def test_print_shows_the_chosen_texts_and_no_controls(tab: Any) -> None:
    tab.emulate_media(media="print")
    for hidden in ("#search", "#prompts", "#slider"):
        expect(tab.locator(hidden)).to_be_hidden()
    for visible in ("#asked", "#cards article >> nth=0", ".claims li >> nth=0", ".heat svg"):
        expect(tab.locator(visible)).to_be_visible()


def test_a_browser_that_cannot_unpack_is_told_where_the_texts_are(chromium: Any, address: str) -> None:
    old = Watched(chromium)
    old.tab.add_init_script("delete window.DecompressionStream")
    old.tab.goto(address)
    if "packed" in address:
        expect(old.tab.locator("#problem")).to_contain_text("tables/generations.csv")
        expect(old.tab.locator("#explorer")).to_be_hidden()
    else:
        expect(old.tab.locator("#explorer")).to_be_visible()
    old.context.close()
    assert old.faults == []


def test_without_a_script_the_results_are_there(chromium: Any, address: str) -> None:
    still = Watched(chromium, java_script_enabled=False)
    still.tab.goto(address)
    expect(still.tab.locator("noscript a")).to_be_visible()
    assert still.tab.locator(".claims li:visible").count() == 3 and still.tab.locator("figure svg:visible").count() == 2
    still.context.close()
