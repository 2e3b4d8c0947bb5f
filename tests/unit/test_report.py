"""The report: whole, the same every time, safe to open whatever a model wrote, and true to its rows."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesion.report import page, record, tables
from lesion.report.claims import CLAIMS
from lesion.report.page import CURVES, GENERATIONS, build

SITES, DOSES, SEEDS = ("attention.value", "mlp", "embedding"), (0.0, 0.2, 0.4, 1.0), (42, 43)
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script> ]]> --> </textarea></style></svg><img src=x onerror=alert(1)>",
    "nul \0, escape \x1b[31m, delete \x7f, carriage\rreturn, turned \u202e text, separators \u2028\u2029",
    "🙂 ünïcödé 中文 \ufeff \uffff",
    "\"quotes\" 'single' \\back\\ {{ 7 * 7 }} {% raw %} &lt; &amp;",
    "",
]
finite = st.floats(-1e308, 1e308)


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, ids, text, and what stands in scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text, self._open = "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._open != "style":
            self.text += data

    def count(self, tag: str, **attrs: str) -> int:
        return sum(t == tag and attrs.items() <= a.items() for t, a in self.elements)


def curves() -> pl.DataFrame:
    """A ratio that spans decades and is lost at (mlp, 1), an accuracy without a reference."""
    rows = []
    for i, site in enumerate(SITES):
        for dose in DOSES:
            ratio = None if (site, dose) == ("mlp", 1.0) else math.exp((2 + 2 * i) * dose)
            spread = (ratio * 0.9, ratio * 1.1) if ratio else (None, None)
            shared = {"site": site, "dose": dose, "items": 30 + i, "seeds": 2}
            one = {"measure": "perplexity ratio", "unit": "× undamaged", "better": "lower", "reference": 1.0}
            two = {"measure": "answer accuracy", "unit": "share right", "better": "higher", "reference": None}
            rows.append({**one, **shared, "value": ratio, "low": spread[0], "high": spread[1]})
            rows.append({**two, **shared, "value": 0.6 - 0.5 * dose, "low": 0.5 - 0.5 * dose, "high": None})
    return pl.DataFrame(rows, schema=CURVES)


def generations(texts: list[str]) -> pl.DataFrame:
    rows = [
        {
            "site": site,
            "dose": dose,
            "seed": seed,
            "prompt": f"p{i}",
            "group": "g" if i else texts[0],
            "asked": f"What is {i}? {texts[i]}",
            "text": text if dose else f"undamaged {text}",
            "correct": (True, False, None)[i % 3],
            "stop": "end" if i else "not finite",
            "tokens": i,
            "logprob": float("nan") if i == 1 else -1.25,
        }
        for site in SITES
        for dose in DOSES
        for seed in SEEDS
        for i, text in enumerate(texts)
    ]
    return pl.DataFrame(rows, schema=GENERATIONS)


def content(**changes: Any) -> dict[str, Any]:
    bad = "lone \ud800 and pair \ud83d\ude42 \0 <b>"
    start = {"subject": {"is": "subject/tiny"}, "tied": {"embed.weight": ["head.weight"]}, "after": "aa" * 16}
    step = {
        "step": {"is": "step/noise", "version": 1, "site": "embedding", "sigma": 0.2, "kind": None},
        "before": "aa" * 16,
        "after": "bb" * 16,
        "changed": ["embed.weight", *(f"model.layers.{i}.mlp.up.weight" for i in (0, 1, 2, 5))],
        "facts": {"moved": 0.99981, "nothing": None, "worst": float("inf"), "of": {"deep": [1, bad]}, bad: bad},
    }
    return {
        "title": "degrade",
        "question": f"How does it fail? {bad}",
        "sentences": [f"tiny → noise(site=mlp) → {bad}", HOSTILE[0]],
        "summary": pl.DataFrame(
            {
                "site": ["a", "a", "b"],
                "ratio": [1.23, 20.0, None],
                "ratio_low": [1.1, None, None],
                "ratio_high": [1.4, 30.0, None],
                "other_low": [float("nan"), float("inf"), 1e-9],
                "ok": [True, False, None],
                "note": HOSTILE[:3],
            }
        ),
        "curves": curves(),
        "generations": generations(HOSTILE),
        "failures": [{"of": "ab" * 16, "error": f"ValueError: {bad}", "trace": f"Traceback\n  {HOSTILE[0]} \x1b[1m"}],
        "ledgers": [
            {"trial": f"tiny {HOSTILE[0]}", "ledger": [start]},
            {"trial": "tiny >> noise", "ledger": [start, {"not used": ["x"]}, step]},
        ],
        "environments": [
            {"python": "3.11", "packages": {"torch": "2.13"}, "cores": 2, "device": bad},
            {"python": "3.12", "packages": {"torch": "2.13"}, "cores": 2, "device": bad, "threads": 1},
        ],
        "notes": [f"honest {bad}", HOSTILE[1]],
        **changes,
    }


def read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def strict(text: str | bytes) -> Any:
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "deep" / "study"
    assert build(folder, **content()) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- files


def test_exactly_these_files_and_nothing_beside_the_folder(folder: Path) -> None:
    names = {f"tables/{t}.{e}" for t in ("summary", "curves", "generations") for e in ("csv", "json")}
    names |= {f"figures/{f}.{e}" for f in ("perplexity-ratio", "answer-accuracy") for e in ("svg", "png")}
    assert set(read(folder)) == names | {"report.html"}
    assert [p.name for p in folder.parent.parent.iterdir()] == ["deep"] and [*folder.parent.iterdir()] == [folder]


def test_the_same_input_gives_the_same_bytes_whatever_the_users_settings(folder: Path) -> None:
    before = read(folder)
    with matplotlib.rc_context(
        {"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path", "savefig.bbox": "tight"}
    ):
        build(folder, **content())
    assert read(folder) == before
    assert matplotlib.rcParams["svg.hashsalt"] is None


def test_a_report_that_cannot_be_made_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(folder)
    with pytest.raises(KeyError, match="trial"):
        build(folder, **content(ledgers=[{"ledger": []}], title="new"))
    assert read(folder) == before

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        build(folder, **content(title="new"))
    assert read(folder) == before  # nothing half written is left behind either


def test_everything_may_be_empty(tmp_path: Path) -> None:
    none = pl.DataFrame()
    nothing: dict[str, Any] = {k: [] for k in ("sentences", "failures", "ledgers", "environments", "notes")}
    frames = {"summary": none, "curves": pl.DataFrame(schema=CURVES), "generations": pl.DataFrame(schema=GENERATIONS)}
    text = build(tmp_path, title="t", question="q?", **nothing, **frames).read_text(encoding="utf-8")
    assert Page(text).count("section") == Page(text).count("script") == 0
    assert strict((tmp_path / "tables/curves.json").read_bytes()) == []


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"curves lacks better, dose; it has: measure, "):
        build(tmp_path, **content(curves=curves().drop("better", "dose")))
    with pytest.raises(ValueError, match="generations should have the columns and types"):
        build(tmp_path, **content(generations=generations(HOSTILE).with_columns(dose=pl.lit("high"))))
    with pytest.raises(ValueError, match="in every row, but dose is missing in some"):
        build(tmp_path, **content(curves=curves().with_columns(dose=pl.lit(float("nan")))))
    with pytest.raises(ValueError, match=r"two rows for \('perplexity ratio'"):
        build(tmp_path, **content(curves=pl.concat([curves(), curves().head(1)])))
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- the page


def test_nothing_a_model_wrote_becomes_markup(found: Page) -> None:
    assert [attrs.get("type") for attrs, _ in found.scripts] == ["application/json", None]
    assert (
        found.count("img") == found.count("textarea") == found.count("b") - 1 == 0
    )  # the one <b> is a failure's error
    assert not [name for _, attrs in found.elements for name in attrs if name.startswith("on")]
    assert found.count("svg") == 2 and "{{ 7 * 7 }}" in found.scripts[0][1]
    assert "<script>alert(1)</script>" in found.text  # seen, as text


def test_only_the_pages_own_script_may_run_and_nothing_is_fetched(folder: Path, found: Page) -> None:
    policy = next(a["content"] for t, a in found.elements if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(found.scripts[1][1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = [a[name] or "" for _, a in found.elements for name in ("src", "href", "xlink:href") if name in a]
    assert all(link.startswith("#") or (folder / link).is_file() for link in links) and len(links) > 10
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "http://" not in text


@pytest.mark.parametrize("whole", [False, True])
def test_ids_are_unique_and_every_reference_is_met(tmp_path: Path, whole: bool) -> None:
    verdict = pl.DataFrame({"claim": "it fails", "verdict": "not tested"})
    claims = pl.concat([pl.DataFrame(schema=CLAIMS), verdict], how="diagonal")
    heat = pl.DataFrame({"row": "a", "column": "b", "value": 1.0, "label": "", "note": None})
    folder = build(tmp_path, **content(**({"claims": claims, "heat": heat} if whole else {}))).parent
    found = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert found.count("nav") == whole
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    text = (folder / "report.html").read_text(encoding="utf-8")
    used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"|aria-labelledby="([^"]*)"', text)
    assert {name for names in used for name in names if name} <= set(ids)
    assert {*re.findall(r'\bat\("([a-z]+)"\)', found.scripts[1][1]), "generations"} <= set(ids)


def test_what_is_said_of_ledgers_failures_and_environments(found: Page) -> None:
    assert found.count("details", **{"class": "trial"}) == 2
    for words in (
        "embed.weight is one tensor with head.weight",
        "model.layers.0–2, 5.mlp.up.weight",
        "5 tensors changed, tied",
        "noise(site=embedding, sigma=0.2)",
        "0.9998",
        "lone � and pair 🙂 ⟨U+0000⟩ <b>",
        "⟨U+001B⟩[1m",
        "ab" * 16,
        "1 failure: what follows is without it",
    ):
        assert words in found.text, words
    assert found.count("tr", **{"class": "differ"}) == 2  # python, and threads that only one of them names


def test_a_large_report_stays_small(tmp_path: Path) -> None:
    texts = [f"{i} " + "a word of an answer " * 11 for i in range(209)]
    many = generations(texts).with_columns(text=pl.col("text") + pl.col("site") + pl.format("{}{}", "dose", "seed"))
    assert len(many) > 5000
    assert build(tmp_path, **content(generations=many)).stat().st_size < 4e6


# ---------------------------------------------------------------------- tables


def test_tables_hold_every_digit_and_no_nan(folder: Path) -> None:
    summary = strict((folder / "tables/summary.json").read_bytes())
    assert summary[0] | {"note": ""} == {
        "site": "a",
        "ratio": 1.23,
        "ratio_low": 1.1,
        "ratio_high": 1.4,
        "other_low": None,
        "ok": True,
        "note": "",
    }
    assert [row["note"] for row in summary] == HOSTILE[:3] and summary[2]["other_low"] == 1e-9
    assert strict((folder / "tables/curves.json").read_bytes()) == curves().to_dicts()
    with (folder / "tables/generations.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == generations(HOSTILE)["text"].to_list()
    assert {row["logprob"] for row in rows} == {"", "-1.25"}


def test_a_value_and_its_interval_are_one_cell() -> None:
    shown = tables.table(content()["summary"])
    assert shown.names == ["site", "ratio", "other_low", "ok", "note"]
    assert shown.numbers == [False, True, True, False, False]
    cells = [[(cell.text, cell.interval, cell.rows) for cell in row[:4]] for row in shown.rows]
    assert cells == [
        [("a", "", 2), ("1.23", "[1.10, 1.40]", 1), ("–", "", 1), ("yes", "", 1)],
        [("", "", 0), ("20.0", "", 1), ("–", "", 1), ("no", "", 1)],
        [("b", "", 1), ("–", "", 1), ("1.00×10⁻⁹", "", 1), ("–", "", 1)],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (-math.inf, "–"),
        (0.0, "0"),
        (0, "0"),
        (1.234, "1.23"),
        (-0.0512, "−0.0512"),
        (18.42, "18.4"),
        (17967.4, "17\u202f967"),
        (123456.0, "1.23×10⁵"),
        (1234567, "1\u202f234\u202f567"),
        (3e-7, "3.00×10⁻⁷"),
    ],
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert tables.number(value) == text


def understood(text: str) -> float:
    """The number that a cell says."""
    plain = re.sub("×?10(?=[⁻⁰¹²³⁴⁵⁶⁷⁸⁹])", "e", text.replace("−", "-").replace("\u202f", ""))
    plain = f"1{plain}" if plain.startswith("e") else plain.replace("-e", "-1e")
    return float(plain.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))


@given(finite)
def test_a_shown_number_is_within_half_a_percent(value: float) -> None:
    assert math.isclose(understood(tables.number(value)), value, rel_tol=0.005, abs_tol=0)
    assert math.isclose(understood(tables.short(value)), value, rel_tol=0.005, abs_tol=0)


@given(*[st.floats(0.001, 1e5)] * 3)
def test_an_interval_is_shown_as_precisely_as_its_value(a: float, b: float, c: float) -> None:
    low, value, high = sorted((a, b, c))
    shown, interval = tables.with_interval(value, low, high)
    below, above = map(understood, interval.strip("[]").split(", "))
    assert below <= understood(shown) <= above
    assert math.isclose(understood(shown), value, rel_tol=0.02 if high < 10 * value else 0.5)


# ---------------------------------------------------------------------- the record


def test_tensor_names_are_folded_by_layer_and_none_is_lost() -> None:
    names = [f"model.layers.{i}.mlp.{p}.weight" for i in range(30) for p in ("up", "down")] + [
        "wte.weight",
        "h.7.b.2.c",
    ]
    assert record.families(names) == [
        ("model.layers.0–29.mlp.up.weight", 30),
        ("model.layers.0–29.mlp.down.weight", 30),
        ("wte.weight", 1),
        ("h.7.b.2.c", 1),
    ]
    assert record.families([]) == []


@given(st.lists(st.text()) | st.floats() | st.none() | st.integers() | st.booleans() | st.text())
def test_any_fact_can_be_said_and_shown(value: Any) -> None:
    shown = page.visible(record.said(value))
    shown.encode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
