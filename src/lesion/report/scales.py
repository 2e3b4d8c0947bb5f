"""Scales: where a dose stands, how far an axis reaches, and which round numbers stand beside it."""

from __future__ import annotations

import math
from itertools import pairwise

from lesion.report.tables import RAISED, short


def axis(doses: list[float]) -> dict[float, float]:
    """Where each dose stands, from left to right: a geometric grid by its logarithm, any other grid as it is.

    Damage grows to the right: doses that were named from large to small (1024 levels, 256, …) run that way. Where 0 has
    no place of its own on such an axis, it stands one step before the others.
    """
    named = [dose for dose in doses if dose != 0]
    falling = len(named) > 1 and all(a > b for a, b in pairwise(named))
    some = sorted(named, reverse=falling)
    geometric = is_log(some) and _unevenness(some) >= _unevenness([math.log(dose) for dose in some])
    if not (falling or geometric):
        return {dose: float(dose) for dose in sorted(doses)}
    places = {dose: (-1.0 if falling else 1.0) * (math.log10(dose) if geometric else dose) for dose in some}
    at = list(places.values())
    return {**({0.0: at[0] - (at[-1] - at[0]) / (len(at) - 1)} if 0 in doses else {}), **places}


def _unevenness(values: list[float]) -> float:
    gaps = [abs(b - a) for a, b in pairwise(values)]
    return max(gaps) / min(gaps)


def is_log(values: list[float]) -> bool:
    """Whether these numbers belong on a logarithmic axis: all positive, the largest more than 20 times the smallest."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def limits(known: list[float], log: bool) -> tuple[float, float]:
    """Ends of a value axis with some room beyond the data; it begins at 0 where that costs less than half of it."""
    if log:
        least, most = min(x for x in known if x > 0), max(known)
        room = 0.04 * (math.log10(most) - math.log10(least))
        beyond = 10 ** max(-300.0, math.log10(least) - room), 10 ** min(308.0, math.log10(most) + room)
        return min(least, beyond[0]), max(most, beyond[1])  # at the ends of the float range there is no room
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    low = 0.0 if 0 <= low < 0.5 * high else low
    space = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - space, high + space


def marks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers between two limits; on a log axis 1 3 10 30, or powers of ten, or every so-many-th of them."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((last - first) / 6))
        heads = (1, 3) if last - first <= 3 else (1,)
        found = [float(f"{head}e{power}") for power in range(first, last + 1, every) for head in heads]
    else:
        from matplotlib.ticker import MaxNLocator

        found = [float(x) for x in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)]
    return [x for x in found if low <= x <= high]


def tick(value: float) -> str:
    """0.25, 1000, 10⁵, 1.5×10⁶."""
    value = float(f"{value:.3g}")
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return short(value)
    head, _, power = f"{value:.2e}".partition("e")
    factor = f"{float(head):g}".replace("-", "−")
    return ("" if factor == "1" else f"{factor}×") + "10" + str(int(power)).translate(RAISED)
