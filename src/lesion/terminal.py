"""Sentences and tables for a person at a terminal; plain lines, neither wrapped nor coloured, where there is none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import polars as pl


class Output(Console):
    """Standard output. Where whoever reads it has had enough (`| head`) is for the command line to say."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def say(text: str, style: str = "") -> None:
    """A line for the terminal, wrapped there and nowhere else."""
    console = Output()
    console.print(Text(visible(text), style=style), soft_wrap=not console.is_terminal)


def visible(text: str) -> str:
    """What a model wrote is data: control characters, and those that turn the direction of writing, by their number."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: f"⟨U+{ord(found[0]):04X}⟩", text
    )


def print_frame(frame: pl.DataFrame, most: int = 200, fold: bool = True) -> None:
    """A frame as a table; x, x_low, x_high are "x [low, high]". Where a terminal is too narrow, cells are folded, or else
    have a line each."""
    names = [name for name in frame.columns if not name.endswith(("_low", "_high"))]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(Text(name), justify="right" if frame.schema[name].is_numeric() else "left", overflow="fold")
    lines = [[_cell(row, name) for name in names] for row in frame.head(most).iter_rows(named=True)]
    for cells in lines:
        table.add_row(*map(Text, cells))
    console = Output()
    needed = console.measure(table, options=console.options.update_width(100_000)).maximum
    if not console.is_terminal:
        Output(width=max(needed, 1)).print(table, soft_wrap=True)
    elif fold or needed <= console.width:
        console.print(table)
    else:
        for cells in lines:
            say("")
            for name, cell in zip(names, cells, strict=True):
                say(f"{name:>{max(map(len, names))}}  {cell}")
    if frame.height > most:
        say(f"… {frame.height - most} more")


def print_claims(claims: pl.DataFrame) -> None:
    """A claim on a line with its verdict, and below it what the verdict rests on."""
    from lesion.report.claims import size

    marks = {
        "supported": ("✓", "green"),
        "contradicted": ("✗", "red"),
        "inconclusive": ("?", ""),
        "not tested": ("–", ""),
    }
    for row in claims.iter_rows(named=True):
        mark, style = marks[row["verdict"]]
        say(f"\n{mark} {row['verdict']}: {row['claim']}", style=style)
        said = []
        if row["effect"] is not None:
            interval = "" if row["low"] is None else f" [{row['low']:+.3g}, {row['high']:+.3g}]"
            said.append(f"{row['effect']:+.3g}{interval} {row['unit']}")
        if n := size(row):
            said.append(f"n = {n}")
        if row["p"] is not None:
            said.append(f"{row['test']}, p = {row['p']:.2g}, after Holm {row['p_holm']:.2g}")
        if row["power"] is not None:
            said.append(f"power {row['power']:.2f}")
        if row["note"]:
            said.append(row["note"])
        say(f"  {'; '.join(said)}")


def _cell(row: dict[str, Any], name: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    text = _shown(row[name]) + (f" [{_shown(low)}, {_shown(high)}]" if low is not None else "")
    return visible(text).replace("\n", "\\n")


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)
