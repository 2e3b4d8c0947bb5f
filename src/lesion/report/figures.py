"""Dose–response figures: one for each measure, from rows alone, the same bytes every time.

Each site has a colour of its own (Okabe & Ito 2008, "Color Universal Design") and a marker of its own. The undamaged
model is a dashed line; a dose without a value (the model was not finite) is marked in a strip above the plot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from lesion.report.scales import axis, is_log, limits, marks, tick
from lesion.report.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK, MUTED, RULE, PAPER = "#1b1f24", "#5d6772", "#d8dde2", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b4568f", "#b07d00", "#3a8fbf", "#6b4fa0")
MARKERS = "o^sDvPX"
DASHES = ("-", "--", ":", "-.")  # a second round of colours has another line
UNDAMAGED: dict[str, Any] = {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (5, 3))}
MISSING: dict[str, Any] = {"linestyle": "", "marker": "x", "markersize": 5.5, "markeredgewidth": 1.6}
WIDTH, PLOT, FOOT, LEFT, RIGHT = 4.4, 1.9, 0.46, 0.58, 0.14  # inches
BANDS = 4  # more sites than this show their intervals as bars alone
MARGIN, ROW, KEY = 0.1, 0.2, 0.33  # of the legend: left edge, height of a line, width of a sample
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure does not depend on the machine's fonts
    "font.size": 9.5,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lesion",  # ids are random otherwise
    "axes.edgecolor": RULE,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Drawing:
    """One figure. `name` is its file name without an ending, `caption` says in words what was drawn."""

    name: str
    measure: str
    caption: str
    svg: bytes
    png: bytes
    group: str | None = None


def draw(curves: pl.DataFrame, taken: Sequence[str] = (), dose: str = "dose") -> list[Drawing]:
    """A figure for each measure, in the order of the rows. For the columns see `page.build`; `taken` are file names, `dose` is
    what the horizontal axis is called."""
    from matplotlib import style

    drawings: list[Drawing] = []
    measures = curves.partition_by("measure", maintain_order=True)
    strip = curves["value"].null_count() > 0
    with style.context(["default", STYLE]):  # whatever the user's own matplotlib settings are
        lines = max((_flow(_labels(rows))[-1][0] + 1 for rows in measures), default=1)
        for rows in measures:
            name = unused(slug(rows["measure"][0]) or "measure", [*taken, *(d.name for d in drawings)])
            group = rows["group"][0] if "group" in rows.columns else None
            figure = panel(rows, lines, strip, dose)
            drawings.append(Drawing(name, rows["measure"][0], caption(rows), *saved(figure), group))
    return drawings


def saved(figure: Figure) -> tuple[bytes, bytes]:
    """The figure as SVG and as PNG, without a date or a version in it."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return svg.getvalue().replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif"), png.getvalue()


def panel(rows: pl.DataFrame, lines: int, strip: bool, dose: str = "dose") -> Figure:
    """The figure of one measure: what is measured, a legend of `lines` lines, a strip for missing values, the plot.

    The figures of a report share their layout, so that their plots stand level side by side.
    """
    from matplotlib.figure import Figure

    sites = rows["site"].unique(maintain_order=True).to_list()
    places = axis(rows["dose"].unique(maintain_order=True).to_list())
    base = baseline(rows)
    values = [*rows["value"].drop_nulls().to_list(), *([base] if base is not None else [])]
    known = [*values, *rows["low"].drop_nulls().to_list(), *rows["high"].drop_nulls().to_list()]
    head = 0.5 + ROW * lines + (0.2 if strip else 0.04)
    height = head + PLOT + FOOT

    figure = Figure(figsize=(WIDTH, height), facecolor=PAPER)
    said = rows.row(0, named=True)
    scale = f"{said['unit']}, log scale" if is_log(values) else said["unit"]
    better = f"{scale} · {said['better']} is better"
    figure.text(MARGIN / WIDTH, 1 - 0.2 / height, seen(said["measure"]), weight="bold", size=11, color=INK)
    figure.text(MARGIN / WIDTH, 1 - 0.4 / height, seen(better), size=9, color=MUTED)
    labels = _labels(rows)
    for i, (label, key, (line, x)) in enumerate(zip(labels, _keys(rows), _flow(labels), strict=True)):
        y = 1 - (0.5 + ROW * (line + 0.45)) / height
        key.set_data([x / WIDTH, (x + 0.13) / WIDTH, (x + 0.26) / WIDTH], [y, y, y])
        figure.add_artist(key)
        figure.text((x + KEY) / WIDTH, y, label, va="center_baseline", color=INK, gid=f"legend-{i}", size=9)

    axes = figure.add_axes((LEFT / WIDTH, FOOT / height, 1 - (LEFT + RIGHT) / WIDTH, PLOT / height))
    _ruled(axes, places, known, is_log(values), dose)
    if base is not None:
        axes.axhline(base, zorder=1, gid="baseline", **UNDAMAGED)
    for i, site in enumerate(sites):
        _line(axes, rows.filter(pl.col("site") == site), places, i, bands=len(sites) <= BANDS)
    return figure


def baseline(rows: pl.DataFrame) -> float | None:
    """The undamaged model's value: the reference, or else the value at dose 0; None unless there is exactly one."""
    for found in (rows["reference"], rows.filter(pl.col("dose") == 0)["value"]):
        if len(values := found.drop_nulls().unique()) == 1:
            return float(values[0])
    return None


def caption(rows: pl.DataFrame) -> str:
    """How much lies behind the figure, and what is not in it."""
    counted = rows["items"].drop_nulls().len() > 0
    parts = [f"{_range(rows['items'])} items × {_range(rows['seeds'])} seeds" if counted else "single values"]
    if rows["low"].drop_nulls().len():
        parts.append(f"{'bands' if rows['site'].n_unique() <= BANDS else 'bars'} are intervals")
    if (lost := rows["value"].null_count()) > 0:
        parts.append(f"{lost} of {len(rows)} points {'has' if lost == 1 else 'have'} no value")
    return "; ".join(parts)


def inline(drawing: Drawing) -> str:
    """The SVG as an element of a page: ids of its own, the page's font and colours, no fixed size."""
    text = drawing.svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"| xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", text, count=5)
    text = text.replace(" xlink:href=", " href=").replace("'DejaVu Sans', Verdana, sans-serif", "var(--sans)")
    names = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {c: f"line-{i}" for i, c in enumerate(COLOURS)}
    for colour, name in names.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    return text.strip()


def _line(axes: Axes, rows: pl.DataFrame, places: dict[float, float], i: int, bands: bool) -> None:
    """One site: band, line and markers, broken where a value is missing; the missing ones in the strip above."""
    rows = rows.with_columns(at=pl.col("dose").replace_strict(places, return_dtype=pl.Float64)).sort("at")
    style = _style(i)
    x, value, low, high = (rows[name].to_numpy() for name in ("at", "value", "low", "high"))
    if bands:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0, zorder=2)
    axes.vlines(x, low, high, color=style["color"], alpha=0.45, linewidth=0.9, zorder=2)
    axes.plot(x, value, zorder=3, **style)
    aside = 0.02 * (max(places.values()) - min(places.values()) or 1.0)  # several sites may fail at the same dose
    for place in rows.filter(pl.col("value").is_null())["at"]:
        how = {**MISSING, "color": style["color"], "transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(place + aside * (i % 3 - 1), 1.06, gid=f"no-value-{i}-{place:g}", **how)


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        "linewidth": 1.7,
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 6,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.8,
    }


def _ruled(axes: Axes, places: dict[float, float], known: list[float], log: bool, called: str) -> None:
    """Limits, ticks and rules: as few as can be read."""
    at = list(places.values())
    pad = 0.03 * (at[-1] - at[0] or 1.0)
    axes.set_xlim(at[0] - pad, at[-1] + pad)
    ticks: dict[float, str] = {}
    aside = any(dose != place for dose, place in places.items())  # then 0 is not the beginning of a scale
    for dose, place in places.items():  # a dose too close to its neighbour goes without a label
        if not ticks or place - max(ticks) > 0.07 * (at[-1] - at[0]):
            ticks[place] = "none" if aside and dose == 0 else short(dose)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(called, color=MUTED, size=9, labelpad=2)
    low, high = limits(known, log)
    axes.set_yscale("log" if log else "linear")
    axes.set_ylim(low, high)
    levels = marks(low, high, log)
    axes.set_yticks(levels, [tick(level) for level in levels] if known else [""] * len(levels))
    axes.minorticks_off()
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4, labelcolor=MUTED, labelsize=9)
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _labels(rows: pl.DataFrame) -> list[str]:
    """The legend: sites, then the undamaged model, then the mark of missing values, where there are any."""
    sites = [seen(site) for site in rows["site"].unique(maintain_order=True)]
    base = ["undamaged"] if baseline(rows) is not None else []
    return [*sites, *base, *(["no value"] if rows["value"].null_count() else [])]


def _keys(rows: pl.DataFrame) -> list[Line2D]:
    """What each label stands for."""
    from matplotlib.lines import Line2D

    styles = [_style(i) for i in range(rows["site"].n_unique())]
    styles += [UNDAMAGED] if baseline(rows) is not None else []
    styles += [{**MISSING, "color": MUTED}] if rows["value"].null_count() else []
    return [Line2D([], [], markevery=[1], **style) for style in styles]


def _flow(labels: list[str]) -> list[tuple[int, float]]:
    """(line, left edge in inches) of each entry of the legend, wrapped at the figure's width."""
    from matplotlib.textpath import TextPath

    found, line, x = [], 0, MARGIN
    for label in labels:
        width = KEY + (TextPath((0, 0), label, size=9).get_extents().x1 / 72 if label.strip() else 0.1)
        if x > MARGIN and x + width > WIDTH - 0.05:
            line, x = line + 1, MARGIN
        found.append((line, x))
        x += width + 0.2
    return found


def _range(values: pl.Series) -> str:
    known = sorted(values.drop_nulls().unique())
    return "no" if not known else str(known[0]) if len(known) == 1 else f"{known[0]}–{known[-1]}"


def seen(text: str) -> str:
    """A label without control characters, which XML does not know."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", text)


def slug(text: str) -> str:
    """A text as a file name: small letters, digits and hyphens; empty if it has none of them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def unused(name: str, taken: list[str]) -> str:
    """The name itself, or the first of name-2, name-3, … that is not taken."""
    names = (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3)))
    return next(n for n in names if n not in taken)
