"""Tables: a frame as CSV, as JSON, and as cells for people.

For machines nothing is rounded, and a number that is not finite is missing. For people a number has three significant
digits and stands with its interval in one cell: 1.23 [1.10, 1.40].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any

import polars as pl

MISSING = "–"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """What one cell shows. `rows` is its height: 0 where the cell above reaches down to here."""

    text: str
    interval: str = ""
    number: bool = False
    rows: int = 1


@dataclass(frozen=True)
class Table:
    """`widths` are those of the longest interval of each column, in widths of a digit."""

    names: list[str]
    numbers: list[bool]
    widths: list[float]
    rows: list[list[Cell]]


def finite(frame: pl.DataFrame) -> pl.DataFrame:
    """The same frame with null in place of NaN and infinities."""
    floats = pl.col(pl.Float32, pl.Float64)
    return frame.with_columns(pl.when(floats.is_finite()).then(floats))


def to_csv(frame: pl.DataFrame) -> bytes:
    """Missing is an empty field, an empty text is a quoted one."""
    return finite(frame).write_csv().encode()


def to_json(frame: pl.DataFrame) -> bytes:
    """A list of records, one a line, so that two reports can be compared line by line."""
    records = (
        json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) for row in finite(frame).iter_rows(named=True)
    )
    return ("[\n" + ",\n".join(records) + "\n]\n").encode()


def table(frame: pl.DataFrame) -> Table:
    """A frame as a person reads it: `x`, `x_low` and `x_high` are one column; runs of a first column of text are one cell."""
    names = [name for name in frame.columns if not _is_bound(name, frame.columns)]
    columns = [_column(frame, name) for name in names]
    if names and frame.schema[names[0]] == pl.String:
        columns[0] = _merged(columns[0])
    numbers = [frame.schema[name].is_numeric() for name in names]
    widths = [round(max((_width(cell.interval) for cell in column), default=0), 1) for column in columns]
    return Table(names, numbers, widths, [list(row) for row in zip(*columns, strict=True)])


def number(value: float | None, places: int | None = None) -> str:
    """Three significant digits or as many places as asked; as 1.20×10⁵ where it is very large or would look like 0."""
    if value is None or not isfinite(value):
        return MISSING
    if isinstance(value, int):
        return _signed(f"{value:,}") if abs(value) >= 10_000 else _signed(str(value))
    size = abs(value)
    places = _places(value) if places is None else places
    if size >= 1e5 or (size and places > 6) or 0 < size < 0.5 * 10.0**-places:
        digits, _, power = f"{value:.2e}".partition("e")
        return _signed(f"{digits}×10") + str(int(power)).translate(RAISED)
    return _signed(f"{value:,.{places}f}")


def short(value: float | None) -> str:
    """A number that somebody chose, such as a dose, as it was written: 0.35, 1024; other numbers as `number` has them."""
    if value is not None and float(f"{value:.4g}") == value and (value == 0 or 1e-4 <= abs(value) < 1e6):
        return _signed(f"{value:.10g}")
    return number(value)


def with_interval(value: float | None, low: float | None, high: float | None, most: int = 300) -> tuple[str, str]:
    """A value and its interval with the same number of places, `most` at most; no interval where it is not known."""
    if value is None or not isfinite(value):
        return MISSING, ""
    if low is None or high is None or not (isfinite(low) and isfinite(high)):
        return number(value, min(_places(value), most)), ""
    widest = _places(max(value, low, high, key=abs))
    places = min(most, widest)
    if value != 0:
        enough = _places(value)
        places = max(min(most, enough, widest + 1), min(enough - 2, 4))
    shown, below, above = (number(x, places) for x in (value, low, high))
    return shown, f"[{below}, {above}]"


def _places(value: float) -> int:
    """Decimal places that show three significant digits."""
    return max(0, 2 - floor(log10(abs(value)))) if value else 0


def _width(text: str) -> float:
    """A digit is one wide, and brackets, points and spaces about half of that."""
    return sum(1.0 if c.isdigit() else 1.3 if c in "−×" else 0.55 for c in text)


def _signed(text: str) -> str:
    return text.replace("-", "−").replace(",", "\u202f")


def _is_bound(name: str, names: list[str]) -> bool:
    base, _, end = name.rpartition("_")
    return end in ("low", "high") and {base, f"{base}_low", f"{base}_high"} <= set(names)


def _column(frame: pl.DataFrame, name: str) -> list[Cell]:
    values = frame[name].to_list()
    if {f"{name}_low", f"{name}_high"} <= set(frame.columns):
        bounds = [*zip(values, frame[f"{name}_low"], frame[f"{name}_high"], strict=True)]
        most = max(
            3, _places(max((abs(x) for bound in bounds for x in bound if x is not None and isfinite(x)), default=0))
        )
        return [Cell(*with_interval(*bound, most), number=True) for bound in bounds]
    return [_cell(value) for value in values]


def _cell(value: Any) -> Cell:
    if value is None:
        return Cell(MISSING)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, (int, float)):
        return Cell(short(value) if isinstance(value, float) else number(value), number=True)
    return Cell(str(value))


def _merged(cells: list[Cell]) -> list[Cell]:
    merged, start = list(cells), 0
    for here in range(1, len(cells) + 1):
        if here == len(cells) or cells[here].text != cells[start].text:
            merged[start:here] = [Cell(cells[start].text, rows=here - start), *[Cell("", rows=0)] * (here - start - 1)]
            start = here
    return merged
