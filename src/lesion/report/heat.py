"""Heat map of signed effects: parts of the model down the side, measures across the top, a number in every cell.

The scale is symmetric and white at zero: blue above, orange below (Okabe & Ito 2008, "Color Universal Design"), so that
a sign can be told apart by everybody. A cell without a value is hatched and never coloured.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import polars as pl

from lesion.report.figures import INK, MUTED, PAPER, STYLE, Drawing, saved, seen
from lesion.report.tables import MISSING, short

if TYPE_CHECKING:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

HEAT: dict[str, Any] = {
    **dict.fromkeys(("row", "column"), pl.String),
    "value": pl.Float64,
    **dict.fromkeys(("label", "note"), pl.String),
}
BELOW, ZERO, ABOVE = "#b84a00", "#fffffe", "#00609b"  # not the page's paper, which is dark at night
MOST = 3.0  # standard deviations; beyond that a colour says no more, the number in the cell does
HEIGHT, LEAST, GAP = 0.27, 0.54, 0.1  # inches: of a row, of the narrowest cell, between labels and cells
TURN = 38  # degrees of the labels across the top
SIZE, SMALL = 9.0, 8.2  # points: of labels, of the numbers in cells
WRAP = 22  # letters in a line of a label across the top


def grid(frame: pl.DataFrame) -> tuple[list[str], list[str], dict[tuple[str, str], dict[str, Any]]]:
    """Names of rows and columns in the order in which they came first, and the cells that are known."""
    rows, columns = (frame[name].unique(maintain_order=True).to_list() for name in ("row", "column"))
    return rows, columns, {(cell["row"], cell["column"]): cell for cell in frame.iter_rows(named=True)}


def lost(frame: pl.DataFrame) -> int:
    """How many cells of the grid have no value: given as null, or not given at all."""
    rows, columns, _ = grid(frame)
    return len(rows) * len(columns) - frame["value"].drop_nulls().len()


def limit(frame: pl.DataFrame) -> float:
    """Where the colours end, on both sides: the largest size of a value, `MOST` at most; 1 where all are zero."""
    return min(MOST, max((abs(value) for value in frame["value"].drop_nulls()), default=0.0)) or 1.0


def draw(frame: pl.DataFrame, title: str) -> Drawing:
    """The figure and its files. The caption says what the colours mean and how many cells have no value."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        svg, png = saved(panel(frame))
    return Drawing("heat", title, caption(frame), svg, png)


def caption(frame: pl.DataFrame) -> str:
    most = short(limit(frame))
    beyond = any(abs(value) > limit(frame) for value in frame["value"].drop_nulls())
    parts = ["signed standardised effects: blue above zero, orange below, white at zero"]
    parts += [f"beyond ±{most} the colour stays the same"] if beyond else []
    if (n := lost(frame)) > 0:
        rows, columns, _ = grid(frame)
        parts.append(f"hatched: no value ({n} of {len(rows) * len(columns)} cells)")
    return "; ".join(parts)


def panel(frame: pl.DataFrame) -> Figure:
    """The map: labels left and above, cells with their numbers, the scale below."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns, cells = grid(frame)
    labels = {at: _label(cell) for at, cell in cells.items()}
    wide = max([LEAST, *(_width(label, SMALL) + 0.16 for label in labels.values())])
    left = 0.1 + max((_width(row, SIZE) for row in rows), default=0.0) + GAP
    heads = [textwrap.wrap(seen(column), WRAP, break_on_hyphens=False) or [" "] for column in columns]
    turned = [max(_width(line, SIZE) for line in head) for head in heads]
    top = (
        0.1 + max((w * 0.616 + 0.12 * len(head) for w, head in zip(turned, heads, strict=True)), default=0.0) + GAP
    )  # sin 38°
    beyond = max((wide * (i + 0.5) + w * 0.788 for i, w in enumerate(turned)), default=0.0)  # cos 38°
    width = max(left + max(beyond, wide * len(columns)) + 0.15, 4.2)
    height = top + HEIGHT * len(rows) + 0.62
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    across, down = wide * len(columns) / width, HEIGHT * len(rows) / height
    axes = figure.add_axes((left / width, 1 - top / height - down, across, down))
    axes.set(xlim=(0, len(columns) or 1), ylim=(len(rows) or 1, 0))
    axes.axis("off")

    most, colours = limit(frame), _colours()
    scale = Normalize(-most, most, clip=True)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            cell = cells.get((row, column))
            how: dict[str, Any] = {"edgecolor": PAPER, "linewidth": 1.2}
            if cell is None or cell["value"] is None:
                how = {"facecolor": "none", "edgecolor": MUTED, "hatch": "////", "linewidth": 0.0}
            else:
                how["facecolor"] = colours(scale(cell["value"]))
            axes.add_patch(Rectangle((x, y), 1, 1, gid=f"cell-{y}-{x}", **how))
            if cell is not None and cell["value"] is not None:
                ink = _ink(how["facecolor"])
                at: dict[str, Any] = {"ha": "center", "va": "center_baseline", "size": SMALL}
                axes.text(x + 0.5, y + 0.5, labels[row, column], color=ink, gid=f"number-{y}-{x}", **at)
    for y, row in enumerate(rows):
        axes.text(-GAP / wide, y + 0.5, seen(row), ha="right", va="center_baseline", color=INK, size=SIZE)
    for x, head in enumerate(heads):
        turn: dict[str, Any] = {"rotation": TURN, "rotation_mode": "anchor", "ha": "left", "va": "baseline"}
        aside = 0.1 * (len(head) - 1) / wide  # the last line begins above its cell, the others to the left of it
        axes.text(x + 0.45 + aside, -GAP / HEIGHT, "\n".join(head), color=INK, size=SIZE, linespacing=1.05, **turn)
    _scale(figure, left / width, most, bool(lost(frame)))
    return figure


def _scale(figure: Figure, left: float, most: float, hatched: bool) -> None:
    """The colours with their numbers, and what hatching means."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    steps, long, colours = 48, 1.6, _colours()
    y, tall = 0.3 / height, 0.12 / height
    for i in range(steps):
        x = left + long * i / steps / width
        colour = colours((i + 0.5) / steps)
        wide = long / steps / width * 1.05
        figure.add_artist(Rectangle((x, y), wide, tall, facecolor=colour, linewidth=0, transform=figure.transFigure))
    for part, text in ((0.0, f"−{short(most)}"), (0.5, "0"), (1.0, f"+{short(most)}")):
        figure.text(left + part * long / width, 0.12 / height, text, ha="center", color=MUTED, size=SMALL)
    if hatched:
        x = left + (long + 0.35) / width
        how: dict[str, Any] = {"facecolor": "none", "edgecolor": MUTED, "hatch": "////", "linewidth": 0.0}
        figure.add_artist(Rectangle((x, y), 0.26 / width, tall, transform=figure.transFigure, **how))
        figure.text(x + 0.33 / width, y + tall / 2, "no value", va="center_baseline", color=MUTED, size=SMALL)


def _label(cell: dict[str, Any]) -> str:
    if cell["value"] is None:
        return ""
    signed = f"{cell['value']:+.2f}".replace("-", "−")
    return seen(cell["label"]) if cell["label"] else signed


def _colours() -> LinearSegmentedColormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", (BELOW, ZERO, ABOVE), N=511)


def _ink(colour: tuple[float, float, float, float]) -> str:
    """Dark or light, whichever has more contrast (WCAG 2.2, relative luminance); neither is a colour of the page."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#fffffe"


def _width(text: str, size: float) -> float:
    """Width of a text in inches."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), seen(text), size=size).get_extents().x1 / 72 if text.strip() else 0.0


def table(frame: pl.DataFrame) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The map as words: names of the columns, and each row with its labels; – where there is no value."""
    rows, columns, cells = grid(frame)
    words = {at: _label(cell) or MISSING for at, cell in cells.items()}
    return columns, [(row, [words.get((row, column), MISSING) for column in columns]) for row in rows]


def notes(frame: pl.DataFrame) -> list[tuple[str, str]]:
    """Each note once, with the cells that it is about."""
    found: dict[str, list[str]] = {}
    for cell in frame.filter(pl.col("note").is_not_null() & (pl.col("note") != "")).iter_rows(named=True):
        found.setdefault(cell["note"], []).append(f"{cell['row']} · {cell['column']}")
    return [(note, ", ".join(cells)) for note, cells in found.items()]
