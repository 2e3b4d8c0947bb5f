"""Claims and texts of a report: shown as they are, to one scale, and packed without loss."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import HOSTILE, Page, build, content, generations, strict, understood

from lesion import terminal
from lesion.report import claims, explorer, tables

# ---------------------------------------------------------------------- claims


def stated(**changes: Any) -> pl.DataFrame:
    rows = [
        ("up", 1.3213, 1.1, 1.55, "nats", 40, 3, "sign flip", 0.0002, 0.0012, 0.972, "supported", HOSTILE[1]),
        ("down", -0.41, -0.62, -0.2, "sd", 40, 1, "sign flip", 1e-9, 0.07, None, "contradicted", None),
        ("flat", 0.0, -0.1, 0.1, "sd", 1, 3, "sign flip", 0.995, None, 0.4, "inconclusive", None),
        (HOSTILE[0], None, None, None, "sd", None, None, None, None, None, None, "not tested", "why"),
    ]
    frame = pl.DataFrame(rows, schema=claims.CLAIMS, orient="row")
    return frame.with_columns(**{name: pl.lit(value) for name, value in changes.items()})


def test_claims_are_shown_first_with_verdicts_and_written(tmp_path: Path) -> None:
    build(tmp_path, **content(claims=stated()))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert strict((tmp_path / "tables/claims.json").read_bytes()) == stated().to_dicts()
    with (tmp_path / "tables/claims.csv").open(encoding="utf-8", newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == list(claims.VERDICTS)
    assert "4 claims: 1 supported, 1 contradicted, 1 inconclusive, 1 not tested" in found.text
    assert text.index('class="claims"') < text.index('class="figures"') < text.index('class="summary"')
    assert [a["class"] for t, a in found.elements if t == "li" and "class" in a] == [
        "supported",
        "contradicted",
        "inconclusive",
        "not-tested",
    ]
    assert found.count("svg", **{"class": "interval"}) == 3 and found.count("svg", **{"class": "sign"}) == 4
    signs = re.findall(r'<svg class="sign"[^>]*>(.*?)</svg>', text)
    assert len({re.sub(r'class="[^"]*"', "", sign) for sign in signs}) == 4  # a shape of its own, not only a colour
    for words in ("+1.32", "[1.10, 1.55]", "−0.41", "40 items × 3 seeds", "40 items × 1 seed", "0.0002 (Holm 0.0012)"):
        assert words in found.text, words
    assert "< 0.0001 (Holm 0.07)" in found.text and "</script><script>alert(1)</script>" in found.text


def test_a_terminal_says_what_a_claim_rests_on_as_the_page_does(capsys: pytest.CaptureFixture[str]) -> None:
    frame = stated(p_holm=0.1)
    terminal.print_claims(
        pl.concat([frame, frame[:1].with_columns(items=pl.lit(None, pl.Int64), seeds=pl.lit(10, pl.Int64))])
    )
    said = re.findall(r"n = ([^;\n]*)", capsys.readouterr().out)
    assert said == ["40 items × 3 seeds", "40 items × 1 seed", "1 item × 3 seeds", "10 seeds"]


def test_intervals_in_one_unit_are_drawn_to_one_scale_around_zero() -> None:
    up, down, flat, none = claims.claims(stated())
    assert none.marks is None and none.interval == "" and none.effect == "–" and none.facts == []
    assert up.marks == pytest.approx((92 * 1.3213 / 1.55, 92 * 1.1 / 1.55, 92), abs=0.06)
    assert down.marks == pytest.approx((-92 * 0.41 / 0.62, -92, -92 * 0.2 / 0.62), abs=0.06)
    assert flat.marks == pytest.approx((0, -92 * 0.1 / 0.62, 92 * 0.1 / 0.62), abs=0.06)
    alone = claims.claims(stated(low=None, high=None).cast(claims.CLAIMS))
    assert [c.marks and len(set(c.marks)) for c in alone] == [1, 1, 1, None]
    zero = claims.claims(stated(effect=0.0, low=0.0, high=0.0))
    assert {c.marks for c in zero} == {(0.0, 0.0, 0.0)} and {c.effect for c in zero} == {"0"}


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6), st.floats(1e-4, 1e6))
def test_an_effect_is_said_as_finely_as_it_is_known(effect: float, below: float, above: float) -> None:
    low, high = effect - below, effect + above
    shown, interval = claims.estimate(effect, low, high)
    ends = [understood(text) for text in interval.strip("[]").split(", ")]
    told = understood(shown.removeprefix("+"))
    step = 10.0 ** max(math.floor(math.log10(high - low)) - 1, -6)
    for said, meant in zip((told, *ends), (effect, low, high), strict=True):
        assert math.isclose(said, meant, rel_tol=0.005, abs_tol=0.51 * max(step, 1e-6) if step < 1 else 0.51 * 10)
    assert shown.startswith("+") == (effect > 0)


def test_an_effect_next_to_nothing_keeps_its_sign() -> None:
    assert claims.estimate(-0.00297, -0.11, 0.1) == ("−0.003", "[−0.11, 0.10]")
    assert claims.estimate(0.0, -0.11, 0.1) == ("0.00", "[−0.11, 0.10]")
    assert claims.estimate(1e-9, -0.11, 0.1) == ("+1.00×10⁻⁹", "[−0.11, 0.10]")
    assert claims.estimate(1234.5678, 1200.1, 1300.2) == ("+1\u202f235", "[1\u202f200, 1\u202f300]")


def test_claims_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"verdict": "proven"}, "no verdict 'proven'; there are supported, contradicted, inconclusive, not tested"),
        ({"p_holm": 1.2}, "p_holm should be from 0 to 1, but one is 1.2"),
        ({"power": -0.1}, "power should be from 0 to 1"),
        ({"low": 2.0}, "the interval of 'up' begins above its end"),
        ({"claim": None}, "claims must say claim, verdict in every row, but claim is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, **content(claims=stated(**changes)))
    with pytest.raises(ValueError, match="claims lacks verdict"):
        build(tmp_path, **content(claims=stated().drop("verdict")))
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- texts


def test_the_explorers_data_are_the_generations(tmp_path: Path) -> None:
    found = Page(build(tmp_path, **content()).read_text(encoding="utf-8"))
    data = strict(found.scripts[0][1])
    assert data["doses"] == [[0.0, "0"], [0.2, "0.2"], [0.4, "0.4"], [1.0, "1"]]
    assert len(data["texts"]) == len(set(data["texts"])) == 2 * len(HOSTILE)
    rebuilt = [
        (
            data["sites"][s],
            data["doses"][d][0],
            data["seeds"][k],
            *data["prompts"][p],
            data["texts"][t],
            c,
            data["stops"][e],
            n,
        )
        for s, d, k, p, t, c, e, n, _ in data["rows"]
    ]
    columns = ("site", "dose", "seed", "prompt", "group", "asked", "text", "correct", "stop", "tokens")
    assert rebuilt == generations(HOSTILE).select(columns).rows()
    assert {row[-1] for row in data["rows"]} == {None, -1.25}


def test_the_undamaged_text_stands_first_even_if_it_was_taken_last() -> None:
    data = explorer.explorer(generations(["x"]).sort("dose", descending=True))
    assert [dose for dose, _ in data["doses"]] == [0.0, 1.0, 0.4, 0.2]


def unpacked(island: explorer.Island) -> Any:
    """What a browser makes of it: DecompressionStream("deflate-raw") takes no header and no bytes that are left over."""
    if not island.packed:
        return strict(island.text)
    coder = zlib.decompressobj(-15)
    text = coder.decompress(base64.b64decode(island.text, validate=True))
    assert coder.eof and not coder.unused_data
    return strict(text)


@pytest.mark.parametrize("block", [1, 60, 10_000])
def test_packed_texts_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    rows = tables.finite(generations(HOSTILE)).with_columns(
        text=pl.when(pl.col("dose") < 1).then(pl.concat_str("text", "seed", "dose", "site"))
    )
    whole = strict(json.dumps(explorer.explorer(rows)))
    assert None in whole["texts"] and [*map(unpacked, explorer.islands(rows))] == [whole]
    monkeypatch.setattr(explorer, "PLAIN", 0)
    monkeypatch.setattr(explorer, "BLOCK", block)
    index, lines, *blocks = explorer.islands(rows)
    assert [index.id, lines.id, *(b.id for b in blocks)] == [
        "generations",
        "rows",
        *(f"block-{i}" for i in range(len(blocks))),
    ]
    head, texts = unpacked(index), [unpacked(b) for b in blocks]
    assert head == {**{k: v for k, v in whole.items() if k not in ("rows", "texts")}, "starts": head["starts"]}
    assert unpacked(lines) == whole["rows"] and [text for part in texts for text in part] == whole["texts"]
    assert [b - a for a, b in pairwise(head["starts"])] == [len(part) for part in texts] and all(texts)
    assert len(blocks) == (len(whole["texts"]) if block == 1 else 1 if block == 10_000 else len(blocks))


def test_the_threshold_is_in_bytes_and_a_page_with_packed_texts_holds_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tables.finite(generations(["中" * 50, "plain words"]))
    size = len(explorer.to_json(explorer.explorer(rows)).encode())
    monkeypatch.setattr(explorer, "PLAIN", size)
    assert len(explorer.islands(rows)) == 1
    monkeypatch.setattr(explorer, "PLAIN", size - 1)
    assert len(explorer.islands(rows)) == 3
    shown = Page(build(tmp_path, **content(generations=rows)).read_text(encoding="utf-8"))
    kinds = [(attrs.get("type"), attrs.get("id")) for attrs, _ in shown.scripts]
    assert kinds[:3] == [("application/json", "generations"), ("text/plain", "rows"), ("text/plain", "block-0")]
    assert not any("undamaged plain words" in text for _, text in shown.scripts)
    assert "plain words" in (tmp_path / "tables/generations.json").read_text(encoding="utf-8")


def test_texts_that_are_shown_together_lie_together() -> None:
    data = explorer.explorer(
        generations(["a", "b", "c"]).with_columns(text=pl.concat_str("prompt", "seed", "site", "dose"))
    )
    assert [text[:4] for text in data["texts"]] == sorted(text[:4] for text in data["texts"])
