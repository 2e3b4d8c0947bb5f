"""Figures of a report: what stands where, and that nothing in them is invented or lost."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from test_report import CURVES, DOSES, Page, build, content, curves, strict, understood

from lesion.report import figures, heat, page, scales

# ---------------------------------------------------------------------- heat map


def cells() -> pl.DataFrame:
    """3 × 4 cells: one is null, one is not there, one is beyond the scale."""
    rows = [
        (
            f"part {r}",
            f"measure {c} </svg>",
            None if (r, c) == (1, 1) else -7.0 if (r, c) == (2, 3) else (r - c) / 2,
            None,
            "why",
        )
        for r in range(3)
        for c in range(4)
        if (r, c) != (1, 2)
    ]
    return pl.DataFrame(rows, schema=heat.HEAT, orient="row")


def test_the_heat_map_is_signed_and_what_is_missing_is_hatched_and_said() -> None:
    with style.context(["default", figures.STYLE]):
        figure = heat.panel(cells())
        FigureCanvasAgg(figure).draw()
    patches = {p.get_gid(): p for p in figure.axes[0].patches}
    assert len(patches) == 12
    hatched = {name for name, patch in patches.items() if patch.get_hatch()}
    assert hatched == {"cell-1-1", "cell-1-2"} and all(patches[n].get_facecolor()[3] == 0 for n in hatched)
    red, blue = ({n: p.get_facecolor()[i] for n, p in patches.items()} for i in (0, 2))
    assert blue["cell-1-0"] > red["cell-1-0"] and red["cell-0-1"] > blue["cell-0-1"]
    assert min(patches["cell-0-0"].get_facecolor()) > 0.99  # zero is white
    assert patches["cell-2-0"].get_facecolor() != patches["cell-1-0"].get_facecolor()
    strong = [
        heat.panel(cells().with_columns(value=pl.lit(x))).axes[0].patches[0].get_facecolor() for x in (-9.0, -3.0)
    ]
    assert strong[0] == strong[1]
    numbers = {t.get_gid(): t.get_text() for t in figure.axes[0].texts if t.get_gid()}
    assert len(numbers) == 10 and numbers["number-2-3"] == "−7.00" and numbers["number-1-0"] == "+0.50"
    assert heat.caption(cells()).endswith("beyond ±3 the colour stays the same; hatched: no value (2 of 12 cells)")
    assert "hatched" not in heat.caption(cells().filter(pl.col("row") == "part 2"))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (30, 3), (6, 18)])
def test_the_labels_of_a_heat_map_are_in_the_figure_and_apart(rows: int, columns: int) -> None:
    frame = pl.DataFrame(
        [
            {
                "row": f"layers 1{r}.attention.value",
                "column": "wide and wordy " * (c % 3) + str(c),
                "value": -0.25 * c,
                "label": "−0.25",
            }
            for r in range(rows)
            for c in range(columns)
        ]
    ).with_columns(note=pl.lit(None))
    with style.context(["default", figures.STYLE]):
        figure = heat.panel(frame)
        FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    inside = [t.get_window_extent(renderer) for t in [*figure.axes[0].texts, *figure.texts]]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in inside)
    level = [t.get_window_extent(renderer) for t in [*figure.axes[0].texts, *figure.texts] if not t.get_rotation()]
    assert not any(a.overlaps(b) for i, a in enumerate(level) for b in level[:i])


@given(st.floats(-3, 3))
def test_a_number_is_legible_on_its_colour(value: float) -> None:
    colour = heat._colours()((value + 3) / 6)
    ink = to_rgb(heat._ink(colour))
    light, dark = sorted((_luminance(colour), _luminance(ink)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 4.5


def _luminance(colour: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_heat_map_is_on_the_page_in_colours_and_in_words(tmp_path: Path) -> None:
    twice = curves().with_columns(measure=pl.col("measure").str.replace("answer accuracy", "heat"))
    build(tmp_path, **content(heat=cells(), curves=twice))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert {p.name for p in (tmp_path / "figures").glob("*.svg")} == {"heat.svg", "heat-2.svg", "perplexity-ratio.svg"}
    assert (tmp_path / "figures/heat.png").read_bytes().startswith(b"\x89PNG")
    assert strict((tmp_path / "tables/heat.json").read_bytes()) == cells().to_dicts()
    assert found.count("th", scope="row") >= 3 and "measure 3 </svg>" in found.text
    assert "hatched: no value (2 of 12 cells)" in found.text and found.text.count("why") == 1
    inline = figures.inline(heat.draw(cells(), "h"))
    page_colours = {figures.INK, figures.MUTED, figures.RULE, figures.PAPER, *figures.COLOURS}
    assert not page_colours & set(re.findall(r"#[0-9a-f]{6}\b", inline)) and "#fffffe" in inline
    with pytest.raises(ValueError, match=r"heat has two rows for \('part 0', 'measure 0 </svg>'\)"):
        build(tmp_path, **content(heat=pl.concat([cells(), cells().head(1)])))


def test_a_heat_map_of_nothing_known_is_drawn() -> None:
    nothing = cells().with_columns(value=pl.lit(None, dtype=pl.Float64))
    assert heat.caption(nothing).endswith("(12 of 12 cells)") and heat.draw(nothing, "h").svg
    assert heat.limit(nothing) == heat.limit(cells().with_columns(value=pl.lit(0.0))) == 1.0


# ---------------------------------------------------------------------- figures


def drawn(rows: pl.DataFrame, lines: int = 1) -> Any:
    with style.context(["default", figures.STYLE]):
        figure = figures.panel(rows, lines, strip=True)
        FigureCanvasAgg(figure).draw()
    return figure


def of(measure: str) -> pl.DataFrame:
    return curves().filter(pl.col("measure") == measure)


def test_a_point_without_a_value_is_marked_and_breaks_its_line() -> None:
    axes = drawn(of("perplexity ratio")).axes[0]
    lost = [line for line in axes.lines if str(line.get_gid()).startswith("no-value")]
    assert [line.get_gid() for line in lost] == ["no-value-1-1"]
    assert lost[0].get_ydata()[0] > 1 and not lost[0].get_clip_on()  # above the plot, in units of its height
    lines = [line for line in axes.lines if line.get_gid() is None]
    assert [sum(math.isfinite(y) for y in line.get_ydata()) for line in lines] == [4, 3, 4]
    assert not [line for line in drawn(of("answer accuracy")).axes[0].lines if "no-value" in str(line.get_gid())]


def test_the_axis_is_logarithmic_only_for_values_that_span_decades() -> None:
    assert drawn(of("perplexity ratio")).axes[0].get_yscale() == "log"
    assert drawn(of("answer accuracy")).axes[0].get_yscale() == "linear"
    assert (
        scales.is_log([1, 21]) and not scales.is_log([1, 20]) and not scales.is_log([0, 100]) and not scales.is_log([])
    )


@pytest.mark.parametrize(("measure", "level"), [("perplexity ratio", 1.0), ("answer accuracy", 0.6)])
def test_the_baseline_is_the_reference_or_else_dose_0(measure: str, level: float) -> None:
    figure = drawn(of(measure))
    line = next(line for line in figure.axes[0].lines if line.get_gid() == "baseline")
    assert list(line.get_ydata()) == [level, level]
    assert "undamaged" in [text.get_text() for text in figure.texts]
    differing = of(measure).with_columns(reference=None, value=pl.col("value") + pl.col("items"))
    assert figures.baseline(differing) is None


@pytest.mark.parametrize("n", [1, 3, 9, 17])
def test_the_legend_stays_in_the_figure_and_off_the_data(n: int) -> None:
    one = of("answer accuracy").filter(pl.col("site") == "mlp")
    rows = pl.concat([one.with_columns(site=pl.lit(f"$site^{i}$ " + "layers 0-9" * (i % 3))) for i in range(n)])
    with style.context(["default", figures.STYLE]):
        lines = figures._flow(figures._labels(rows))[-1][0] + 1
    figure = drawn(rows, lines)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    plot = figure.axes[0].get_window_extent(renderer)
    assert len(boxes) == n + 3
    for i, box in enumerate(boxes):
        assert box.y0 >= plot.y1 and box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    styles = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines if line.get_gid() is None]
    assert len(set(styles)) == n


def test_every_dose_label_is_legible() -> None:
    doses = [0.0, 0.01, 0.02, *(i / 20 for i in range(1, 21))]
    rows = pl.concat([of("answer accuracy").head(1).with_columns(dose=pl.lit(dose)) for dose in doses])
    figure = drawn(rows)
    boxes = [t.get_window_extent() for t in figure.axes[0].get_xticklabels()]
    assert len(boxes) > 4 and all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_doses_stand_so_that_damage_grows_to_the_right() -> None:
    assert scales.axis([0.2, 0.7, 0.0]) == {0.0: 0.0, 0.2: 0.2, 0.7: 0.7}
    assert scales.axis([i / 20 for i in range(1, 30)])[0.05] == 0.05  # many doses of a linear grid
    for levels in ([0.0, 1024.0, 256.0, 64.0, 16.0, 4.0], [16.0, 8.0, 0.0, 4.0], [1024.0, 4.0, 0.0]):
        places = scales.axis(levels)
        assert list(places) == sorted(places, key=places.__getitem__) == [0.0, *(x for x in levels if x)]
    steps = scales.axis([0.0, 1024.0, 256.0, 64.0, 16.0, 4.0]).values()
    assert max(steps) - min(steps) == pytest.approx(5 * math.log10(4))
    labels = [t.get_text() for t in drawn(_levels()).axes[0].get_xticklabels()]
    assert labels == ["none", "1024", "64", "4"]  # zero levels would be another thing


def _levels() -> pl.DataFrame:
    levels = dict(zip(DOSES, (0.0, 1024.0, 64.0, 4.0), strict=True))
    return of("answer accuracy").with_columns(dose=pl.col("dose").replace_strict(levels))


@given(
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9)
    | st.lists(st.floats(1e-300, 1e307), min_size=1, max_size=9)
)
def test_limits_hold_all_data_and_a_few_marks(values: list[float]) -> None:
    log = scales.is_log(values)
    low, high = scales.limits(values, log)
    assert low <= min(values) <= max(values) <= high and low < high and math.isfinite(high)
    marks = scales.marks(low, high, log)
    assert len(marks) <= 9 and all(low <= mark <= high for mark in marks)
    assert all(math.isclose(understood(scales.tick(mark)), mark, rel_tol=0.006) for mark in marks)


def test_a_measure_of_nothing_but_missing_values_is_drawn() -> None:
    rows = of("answer accuracy").with_columns(value=None, low=None, high=None)
    drawing = figures.draw(rows.cast(CURVES))[0]
    assert drawing.caption == "30–32 items × 2 seeds; 12 of 12 points have no value"
    assert drawing.svg.count(b'id="no-value-') == 12


def test_names_of_measures_and_sites_are_only_text() -> None:
    wild = "../../<b>&amp;$x$ </svg><script>1</script> --> \0\x1b"
    rows = curves().with_columns(
        measure=pl.when(pl.col("better") == "lower").then(pl.lit(wild)).otherwise(pl.lit(wild.upper())),
        site=pl.concat_str(pl.lit(wild), "site"),
    )
    drawings = figures.draw(rows)
    assert [d.name for d in drawings] == ["b-amp-x-svg-script-1-script", "b-amp-x-svg-script-1-script-2"]
    for drawing in drawings:
        assert drawing.png.startswith(b"\x89PNG")
        inside = Page(figures.inline(drawing))
        assert inside.count("script") == inside.count("b") == 0 and inside.count("svg") == 1
        assert "$x$ </svg><script>" in inside.text or "$X$ </SVG><SCRIPT>" in inside.text


def test_every_colour_of_an_inline_figure_is_the_pages() -> None:
    for drawing in figures.draw(curves()):
        left = re.findall(r"#[0-9a-f]{6}\b", figures.inline(drawing))
        assert not left and b"#0072b2" in drawing.svg
    sheet = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")
    root = sheet[: sheet.index("}")]
    for name, colour in {
        "ink": figures.INK,
        "muted": figures.MUTED,
        "rule": figures.RULE,
        "paper": figures.PAPER,
    }.items():
        assert f"--{name}: {colour};" in root
    for i, colour in enumerate(figures.COLOURS):
        assert f"--line-{i}: {colour};" in root and sheet.count(f"--line-{i}: #") == 2  # light and dark


def test_figures_are_folded_by_group_and_the_first_is_open(tmp_path: Path) -> None:
    rows = curves().with_columns(
        group=pl.when(pl.col("better") == "lower").then(pl.lit("text")).otherwise(pl.lit("answers"))
    )
    build(tmp_path, **content(curves=rows))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('<details class="more">') == 1 and ">By dose: text</h2>" in text
    assert text.index('href="figures/perplexity-ratio.svg"') < text.index('<details class="more">')
    assert text.index('<details class="more">') < text.index('href="figures/answer-accuracy.svg"')
    assert strict((tmp_path / "tables/curves.json").read_bytes())[0]["group"] == "text"
    with pytest.raises(ValueError, match="one is expected for each measure"):
        build(tmp_path, **content(curves=rows.with_columns(group=pl.col("site"))))


def test_further_tables_are_shown_and_written_under_names_of_their_own(tmp_path: Path) -> None:
    more = pl.DataFrame({"site": ["a.b"], "dose": [0.38], "dose_low": [0.3], "dose_high": [0.4]})
    build(tmp_path, **content(extra={"Thresholds: |d| ≥ 0.8": more, "Summary": more, "–": more}))
    names = {p.stem for p in (tmp_path / "tables").glob("*.csv")} - {"summary", "curves", "generations"}
    assert names == {"thresholds-d-0-8", "summary-2", "table"}
    assert strict((tmp_path / "tables/summary.json").read_bytes())[0]["site"] == "a"
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Thresholds: |d| ≥ 0.8" in found.text and found.text.count("[0.300, 0.400]") == 3
