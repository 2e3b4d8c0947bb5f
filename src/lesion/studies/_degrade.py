"""What `degrade` says of its sweep: the table, components at matched damage, and claims with verdicts.

The claims are those of the described study, put so that rows can speak against them: effects are signed, tests paired and
corrected together, thresholds have intervals, and components are compared at equal damage and not at equal dose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy import stats as scipy_stats

from lesion.claiming import decided, tested, the_same, untested
from lesion.outcomes import Outcome
from lesion.sweep import Array, Sweep

MARGIN = 0.1  # of a share: a smaller change of accuracy is called none
LOSSES = 0.2, 0.5  # shares of predictions lost between which a failure is called abrupt or gradual
ORDER = ("content units", "accuracy: math", "accuracy: language", "coherence", "grammar")  # as described, first to fail
MAIN = ("accuracy", "content units", "grammar", "surprisal")  # what components are compared by, the first there is
MAPPED = (  # columns of the heat map, beside the accuracies
    *("content units", "perplexity ratio", "same prediction", "surprisal", "looping", "coherence", "grammar"),
    *(
        "unknown words",
        "confidence",
        "length",
        "lexical density",
        "word frequency",
        "largest strongly connected component",
    ),
)
MOST_SITES = 6  # more (a layer-by-layer sweep) get no claims of their own


@dataclass(frozen=True)
class Matched:
    """Strengths at which all sites have done the same damage. `strengths` are those of the middle level."""

    level: float
    strengths: dict[str, float | None]
    note: str
    table: pl.DataFrame


def named(outcomes: Sequence[Outcome], *names: str) -> Outcome | None:
    """The first of these names that there is."""
    known = {outcome.name: outcome for outcome in outcomes}
    return next((known[name] for name in names if name in known), None)


def summary(sweep: Sweep, outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """What a person reads first: a row for each site and dose."""
    columns = ("perplexity ratio", "divergence", "accuracy", "content units", "looping", "grammar", "surprisal")
    shown = [o for name in columns if (o := named(outcomes, name)) is not None]
    rows = []
    for site, dose in itertools.product(sweep.sites, sweep.doses):
        row: dict[str, Any] = {"site": site, "dose": dose}
        for o in shown:
            found = sweep.point(o, site, dose)
            row |= {o.name: found["value"], f"{o.name}_low": found["low"], f"{o.name}_high": found["high"]}
        cells = [sweep.rows.get((site, dose, seed), {}) for seed in sweep.seeds]
        texts = [r for cell in cells for r in cell.get("generation", {}).values()]
        ends = [r.get("stop", r.get("outcome")) for cell in cells for rows_ in cell.values() for r in rows_.values()]
        rows.append({**row, "answers": len(texts), "not finite": sum(end == "not finite" for end in ends)})
    return pl.DataFrame(rows, infer_schema_length=None)


def matched(sweep: Sweep, outcomes: Sequence[Outcome]) -> Matched | None:
    """Sites where their predictions have moved equally far from the healthy model's, at three levels that all reach."""
    damage = named(outcomes, "divergence")
    if damage is None or len(sweep.sites) < 2 or (ends := sweep.range_of(damage)) is None:
        return None
    levels = [math.exp(float(x)) for x in np.quantile(np.log(ends), (0.25, 0.5, 0.75))]
    shown = [
        o for name in ("accuracy", "content units", "looping", "grammar", "surprisal") if (o := named(outcomes, name))
    ]
    rows: list[dict[str, Any]] = []
    strengths = [sweep.at_damage(damage, level) for level in levels]
    for level, found in zip(levels, strengths, strict=True):
        for site, strength in found.items():
            row: dict[str, Any] = {
                "divergence": level,
                "site": site,
                "dose": sweep.strength(strength) if strength else None,
            }
            for o in shown:
                values = None if strength is None else sweep.at(o, site, strength)
                row[o.name] = None if values is None or np.isnan(values).all() else float(np.nanmean(values))
            rows.append(row)
    note = f"each component at the dose at which its predictions diverge by {levels[1]:.2g} nats a token (KL)"
    return Matched(levels[1], strengths[1], note, pl.DataFrame(rows, infer_schema_length=None))


def agreement(sweep: Sweep, outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """Cohen's kappa of every two judges, over all texts of the sweep: a row for each criterion."""
    from lesion.judging import agreement as kappa

    judged = [o for o in outcomes if o.group == "judges"]
    rows = []
    for one, other in itertools.combinations(judged, 2):
        if (criterion := one.name.partition(" (")[0]) == other.name.partition(" (")[0]:
            scores: list[list[float | None]] = [[], []]
            for site, dose in itertools.product(sweep.sites, sweep.doses):
                for side, o in zip(scores, (one, other), strict=True):
                    side += [None if math.isnan(x) else float(x) for x in sweep.array(o, site, dose)[0].ravel()]
            judges = f"{one.measure} and {other.measure}".replace("judge ", "")
            rows.append({"criterion": criterion, "judges": judges, **kappa(*scores)})
    return pl.DataFrame(rows, schema={"criterion": pl.String, "judges": pl.String, "kappa": pl.Float64, "n": pl.Int64})


def mapped(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The columns of the heat map: what a person can take in at a glance."""
    return [o for o in outcomes if o.group == "answers" or o.name in MAPPED]


def claims(sweep: Sweep, outcomes: Sequence[Outcome], method: str, at: Matched | None) -> pl.DataFrame:
    """Every claim that can be tested on this sweep, with its verdict after Holm's correction over all of them."""
    found: list[dict[str, Any]] = []
    if len(sweep.sites) <= MOST_SITES:
        found += _harm(sweep, outcomes)
        found += _abrupt(sweep, outcomes)
        found += _order(sweep, outcomes)
        if "quant" in method:
            found += _harmless(sweep, outcomes)
        if at is not None:
            found += _equal_damage(sweep, outcomes, at)
    return decided(found)


def _harm(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The strongest damage does harm: a positive control, for a study in which nothing moves says nothing of order."""
    found = []
    dose = sweep.doses[-1]
    for name, unit, what in (
        ("perplexity ratio", "nats a token", "raises the perplexity of held-out text"),
        ("accuracy", "share right", "lowers the accuracy of answers"),
    ):
        if (o := named(outcomes, name)) is not None:
            for site in sweep.sites:
                after, before = (sweep.array(o, site, d)[0] for d in (dose, 0.0))
                text = f"The strongest damage to {site} ({dose:g}) {what}"
                found.append(tested(text, after, before, unit, o.name, direction=o.worse))
    return found


def _abrupt(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Attention fails gradually and the mlp abruptly: between losing a fifth and a half of the predictions, the dose grows by
    a larger factor for attention. Document by document; the effect is a difference of natural logarithms of factors."""
    o = named(outcomes, "same prediction")
    pairs = [(a, m) for a in sweep.sites for m in sweep.sites if a.startswith("attention") and m.startswith("mlp")]
    if o is None or not pairs:
        return []
    found = []
    for attention, mlp in pairs:
        gradual, abrupt = (_width(sweep, o, site) for site in (attention, mlp))
        text = f"{attention} fails gradually, {mlp} abruptly"
        row = tested(text, gradual, abrupt, "log of a ratio of doses", "abruptness", direction=1)
        if row.get("verdict") == "not tested":
            row["note"] = "one of them does not lose half of its predictions in too many documents, at the doses tested"
        found.append(row)
    return found


def _width(sweep: Sweep, outcome: Outcome, site: str) -> Array:
    """ln(dose at the larger loss / dose at the smaller loss), [seeds, items]; NaN where the larger is not reached."""
    strengths, change = sweep.change(outcome, site)
    crossed = []
    for loss in LOSSES:
        where = np.full(change.shape[1:], np.nan)
        for index in np.ndindex(*where.shape):
            lost = -change[(slice(None), *index)]
            over = np.flatnonzero(lost >= loss)
            if len(over) and over[0] > 0 and np.isfinite(lost[: over[0] + 1]).all():
                i = over[0]
                share = (loss - lost[i - 1]) / (lost[i] - lost[i - 1])
                where[index] = strengths[i - 1] + share * (strengths[i] - strengths[i - 1])
        crossed.append(where)
    width: Array = np.log(crossed[1] / crossed[0])
    return width


def _order(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What is described to fail first has lost half of what it can lose at a smaller dose. Different items are behind the
    two, so that their intervals are taken as independent: z of the difference of ln ED50."""
    there = [o for name in ORDER if (o := named(outcomes, name)) is not None]
    found = []
    for site in sweep.sites:
        for first, second in itertools.pairwise(there):
            (a, _), (b, _) = sweep.half(first, site), sweep.half(second, site)
            said = f"{first.name} fails before {second.name} under damage to {site}"
            row: dict[str, Any] = {"claim": said, "unit": "log of a ratio of ED50s"}
            if a is None or b is None or a.ed50 is None or b.ed50 is None:
                late = [o.name for o, fit in ((first, a), (second, b)) if fit is None or fit.ed50 is None]
                row |= {
                    "verdict": "not tested",
                    "note": f"no dose of half effect within these doses: {', '.join(late)}",
                }
            elif not (a.low and a.high and b.low and b.high):
                row |= {"effect": math.log(b.ed50 / a.ed50), "verdict": "inconclusive"}
                row["note"] = "an end of the interval of an ED50 lies outside the doses tested"
            else:
                errors = [math.log(high / low) / (2 * 1.96) for low, high in ((a.low, a.high), (b.low, b.high))]
                effect, error = math.log(b.ed50 / a.ed50), math.hypot(*errors)
                p = float(2 * scipy_stats.norm.sf(abs(effect) / error)) if error else None
                row |= {"effect": effect, "low": effect - 1.96 * error, "high": effect + 1.96 * error, "p": p}
                row |= {"items": min(a.items, b.items), "seeds": a.seeds, "test": "z of two ED50s", "power": None}
            found.append(row)
    return found


def _harmless(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Quantisation is harmless down to 16 levels: two one-sided tests within ±MARGIN of accuracy."""
    o = named(outcomes, "accuracy")
    levels = [dose for dose in sweep.doses if dose >= 16]
    if o is None or not levels:
        return []
    found = []
    for site in sweep.sites:
        after, before = (sweep.array(o, site, d)[0] for d in (min(levels), 0.0))
        text = f"{min(levels):g} levels in {site} change accuracy by less than {MARGIN:g}"
        found.append(the_same(text, after, before, "share right", MARGIN))
    return found


def _equal_damage(sweep: Sweep, outcomes: Sequence[Outcome], at: Matched) -> list[dict[str, Any]]:
    """At equal damage, does it matter where it was done? Items are interpolated between the doses next to the match."""
    o = named(outcomes, *MAIN)
    if o is None:
        return []
    found = []
    for one, other in itertools.combinations(sweep.sites, 2):
        strengths = at.strengths.get(one), at.strengths.get(other)
        text = f"At equal divergence ({at.level:.2g} nats), damage to {other} and to {one} leave different {o.name}"
        if None in strengths:
            found.append(untested(text, o.unit, "not reached by both"))
            continue
        a, b = (sweep.at(o, site, s or 0.0) for site, s in zip((one, other), strengths, strict=True))
        row = tested(text, b, a, o.unit, o.name, smallest=MARGIN if "share" in o.unit else 0.0)
        found.append({**row, "direction": 1 if row.get("effect", 0) >= 0 else -1})
    return found
