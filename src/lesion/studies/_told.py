"""What the accounts of several studies share: rows as arrays [seeds, items], and the loss of trainings as it fell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesion.report.page import CURVES
from lesion.trial import Row

Array = NDArray[np.float64]


def crossed(
    seeds: Sequence[Mapping[str, Row]],
    value: Callable[[Row], float | None],
    items: Iterable[str] | None = None,
) -> Array:
    """`value` of the rows of each seed [seeds, items], NaN where there is no row or no value. `items`: which, in what order;
    without it all that there are, by name: rows of two writers may come in either order."""
    wanted = sorted({item for rows in seeds for item in rows}) if items is None else list(items)
    found = np.full((len(seeds), len(wanted)), np.nan)
    for i, rows in enumerate(seeds):
        for j, item in enumerate(wanted):
            if item in rows and (number := value(rows[item])) is not None:
                found[i, j] = number
    return found


def fell(trainings: Iterable[tuple[str, str, Mapping[str, Any]]], unit: str = "nats a token") -> pl.DataFrame:
    """Curves of the page, of trainings as (measure, site, facts of their ledger)."""
    rows = [
        {**dict.fromkeys(CURVES), "measure": measure, "site": site, "unit": unit, "better": "lower"}
        | {"dose": float(point["step"]), "value": point["loss"]}
        for measure, site, facts in trainings
        for point in facts.get("curve", [])
    ]
    return pl.DataFrame(rows, schema=CURVES)
