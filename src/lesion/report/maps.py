"""Figure of attention: how much of it each head gives to the first tokens, how spread it is beside a uniform head, and what
some heads look at (after Clark et al. 2019, "What does BERT look at?", figures 1 and 2).

Layers go down and heads across. Both scales begin at white: blue is mass, orange is entropy relative to a uniform causal
head (Okabe & Ito 2008, "Color Universal Design"). A head without a value is hatched and never coloured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lesion.report.figures import INK, MUTED, PAPER, RULE, STYLE, Drawing, saved, seen
from lesion.report.heat import ABOVE, BELOW, ZERO
from lesion.report.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

SHOWN = 3  # maps in a column: so many heads with the largest sink mass; fewer with the least, and a uniform head
CELL, SIDE, GAP = 0.17, 1.3, 0.22  # inches: of a head's cell, of a map, between maps
LEAST, MOST = (1.5, 1.6), (3.2, 5.2)  # inches, across and down, within which the cells of all heads lie
EDGE, BETWEEN, TOP, FOOT, HEAD = 0.62, 0.75, 1.14, 0.8, 0.34  # inches; HEAD: above each map
SIZE, SMALL = 9.0, 8.2  # points


def heads(rows: pl.DataFrame) -> pl.DataFrame:
    """Layer, head, `sink` and `ratio` (entropy by that of a uniform head), means over documents; null without any.

    Raises ValueError where a head comes twice for a document: these are rows of several readings.
    """
    if rows.select("document", "layer", "head").is_duplicated().any():
        raise ValueError("expected the rows of one reading of attention, and found a document's head in them twice")
    ratio = pl.col("entropy") / pl.col("entropy_uniform")
    return rows.group_by("layer", "head").agg(pl.mean("sink"), ratio.mean().alias("ratio")).sort("layer", "head")


def chosen(rows: pl.DataFrame) -> list[tuple[str, str, np.ndarray]]:
    """(title, note, map) of the heads with the largest sink mass, of those with the least, and of a uniform head."""
    known = heads(rows).filter(pl.col("sink").is_not_null())
    mapped = rows.filter(pl.col("map").is_not_null()).select("layer", "head", "map", "tokens")
    there = known.join(mapped, on=("layer", "head")).sort("sink", "layer", "head", descending=(True, False, False))
    least = there.tail(max(0, min(SHOWN - 1, len(there) - SHOWN)))
    found = [
        (f"layer {row['layer']}, head {row['head']}", f"sink {row['sink']:.2f}", np.array(row["map"]))
        for row in pl.concat((there.head(SHOWN), least)).iter_rows(named=True)
    ]
    if found:
        found.append(("a uniform head", f"sink {_mean(rows['sink_uniform']):.2f}", uniform(mapped, len(found[0][2]))))
    return found


def uniform(mapped: pl.DataFrame, grid: int) -> np.ndarray:
    """The map [grid, grid] of a head that looks at all tokens up to its own alike."""
    n = int(mapped["tokens"][0])
    starts = np.arange(grid + 1) * n // grid
    p = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    mass = np.add.reduceat(np.add.reduceat(p, starts[:-1], 0), starts[:-1], 1)
    return mass / np.diff(starts)[:, None]


def draw(rows: pl.DataFrame, title: str) -> Drawing:
    """The figure of one reading and its files."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        svg, png = saved(panel(rows, title))
    return Drawing("attention", title, caption(rows), svg, png)


def caption(rows: pl.DataFrame) -> str:
    """How much lies behind the figure, and what its colours mean."""
    each = heads(rows)
    parts = ["maps: share of attention that the tokens of a row give to those of a column, in the first document"]
    if lost := each["sink"].null_count():
        parts.append(f"hatched: no value ({lost} of {len(each)} heads)")
    return "; ".join([_behind(rows), *parts])


def _behind(rows: pl.DataFrame) -> str:
    tokens, n = sorted(rows["tokens"].unique()), rows["document"].n_unique()
    length = str(tokens[0]) if len(tokens) == 1 else f"{tokens[0]}–{tokens[-1]}"
    return f"{len(heads(rows))} heads, means over {n} {'document' if n == 1 else 'documents'} of {length} tokens"


def panel(rows: pl.DataFrame, title: str) -> Figure:
    """Two grids of heads with their scales, and the maps to the right of them."""
    from matplotlib.figure import Figure

    each, maps = heads(rows), chosen(rows)
    layers, across = (int(each[name].max()) + 1 for name in ("layer", "head"))  # type: ignore[arg-type]
    wide, tall = (min(max(CELL * n, least), most) for n, least, most in zip((across, layers), LEAST, MOST, strict=True))
    columns, lines = -(-len(maps) // SHOWN), min(SHOWN, len(maps))
    left = EDGE + 2 * wide + 2 * BETWEEN
    width = (left + columns * (SIDE + GAP) if maps else left - BETWEEN) + 0.1
    height = TOP + max(tall, lines * (SIDE + HEAD + GAP) - HEAD - GAP) + FOOT
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    figure.text(0.12 / width, 1 - 0.26 / height, seen(title), weight="bold", size=11, color=INK)
    figure.text(0.12 / width, 1 - 0.48 / height, _behind(rows), size=SIZE, color=MUTED)

    said = {"sink": "mass on the first tokens", "ratio": "entropy, share of uniform"}
    for i, (name, words) in enumerate(said.items()):
        x = EDGE + i * (wide + BETWEEN)
        values = np.full((layers, across), np.nan)
        for row in each.iter_rows(named=True):
            values[row["layer"], row["head"]] = np.nan if row[name] is None else row[name]
        axes = figure.add_axes((x / width, 1 - (TOP + tall) / height, wide / width, tall / height))
        colours = _colours(ABOVE if name == "sink" else BELOW)
        _grid(axes, values, colours)
        figure.text(x / width, 1 - (TOP - 0.3) / height, words, size=SIZE, color=INK)
        if i == 0:
            axes.set_ylabel("layer", color=MUTED, size=SIZE, labelpad=2)
            figure.text((x - 0.08) / width, 1 - (TOP - 0.06) / height, "head", size=SIZE, color=MUTED, ha="right")
        mark = _mean(rows["sink_uniform"]) if name == "sink" else 1.0
        _scale(figure, colours, x, height - TOP - tall - 0.46, min(wide, 1.6), mark)
    for i, (head, note, mass) in enumerate(maps):
        column, line = divmod(i, SHOWN)
        x, y = left + column * (SIDE + GAP), TOP + line * (SIDE + HEAD + GAP)
        axes = figure.add_axes((x / width, 1 - (y + SIDE) / height, SIDE / width, SIDE / height))
        _map(axes, mass)
        figure.text(x / width, 1 - (y - 0.24) / height, head, size=SIZE, color=INK)
        figure.text(x / width, 1 - (y - 0.07) / height, note, size=SMALL, color=MUTED)
    if maps:
        words = "down: tokens that look; across: looked at;\ncolour: √ of the mass"
        figure.text(left / width, 0.2 / height, words, size=SMALL, color=MUTED, linespacing=1.3)
    return figure


def _grid(axes: Axes, values: np.ndarray, colours: Colormap) -> None:
    """A cell for each head, from 0 (white) to 1."""
    from matplotlib.patches import Rectangle

    layers, across = values.shape
    _cells(axes, np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1)
    for layer, head in np.argwhere(np.isnan(values)):
        how: dict[str, Any] = {"facecolor": "none", "edgecolor": MUTED, "hatch": "////", "linewidth": 0.0}
        axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, gid=f"no-value-{layer}-{head}", **how))
    axes.set_xticks(_ticks(across, 9))
    axes.set_yticks(_ticks(layers, 12))
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2, labelcolor=MUTED, labelsize=SMALL)
    _framed(axes)


def _map(axes: Axes, mass: np.ndarray) -> None:
    from matplotlib.colors import PowerNorm

    _cells(axes, mass, cmap=_colours(ABOVE), norm=PowerNorm(0.5, 0, 1))
    axes.set_xticks([])
    axes.set_yticks([])
    _framed(axes)


def _cells(axes: Axes, values: np.ndarray, **how: Any) -> None:
    """A cell for each value, the first row on top. Drawn as shapes: a page that loads nothing shows no picture in a picture."""
    down, across = values.shape
    x, y = np.arange(across + 1) - 0.5, np.arange(down + 1) - 0.5
    axes.pcolormesh(x, y, values, edgecolors="face", linewidth=0.2, **how)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[-1], y[0])


def _framed(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.8)


def _ticks(n: int, most: int) -> list[int]:
    """Every so-many-th number below n, `most` of them at most."""
    step = next(s for power in range(10) for s in (1 * 10**power, 2 * 10**power, 5 * 10**power) if n <= most * s)
    return list(range(0, n, step))


def _scale(figure: Figure, colours: Colormap, x: float, y: float, long: float, mark: float | None) -> None:
    """The colours from 0 to 1, and where a uniform head stands on them; x and y in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, y / height, long / width, 0.11 / height))
    edges = np.linspace(0, 1, 65)
    axes.pcolormesh(edges, [0, 1], (edges[:-1] + 1 / 128)[None], cmap=colours, vmin=0, vmax=1, linewidth=0)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.tick_params(length=0, pad=2, labelcolor=MUTED, labelsize=SMALL)
    if mark is not None:
        axes.axvline(mark, color=INK, linewidth=1.2)
        side = "left" if mark < 0.5 else "right"
        axes.text(mark, 1.25, f"uniform {short(round(mark, 2))}", ha=side, size=SMALL, color=MUTED)
    _framed(axes)


def _mean(values: pl.Series) -> float | None:
    found = values.cast(pl.Float64).mean()
    return None if found is None else float(found)  # type: ignore[arg-type]


def _colours(full: str) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("mass", (ZERO, full), N=256)
