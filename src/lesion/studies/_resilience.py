"""What `resilience` says of its sweep: a row an arm with its ED50, and each arm against the plain one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesion.claiming import averaged, decided, tested, the_same, untested
from lesion.doses import Threshold, threshold
from lesion.outcomes import of_perplexity
from lesion.report.page import GENERATIONS
from lesion.trial import Row

if TYPE_CHECKING:
    from lesion.store import Store
    from lesion.studies.resilience import Resilience
    from lesion.sweep import Sweep

Array = NDArray[np.float64]
OUTCOMES = of_perplexity()
CALLED = {
    "MHA": "A decoder with as many key/value heads as query heads",
    "MoE": "A mixture of experts",
    "sink tokens": "A decoder with learned sink tokens",
    "sink logits": "A decoder with learned sink logits",
    "monotone": "A monotone decoder",
    "more text": "A decoder that was trained for longer",
    "SFT": "An instructed decoder",
    "more SFT": "A decoder that was instructed for longer",
    "DPO": "A decoder trained on preferences",
}
HALF, TENTH = 0.5, 0.1
SHARE = "share of what there is to lose"


def nothing() -> pl.DataFrame:
    return pl.DataFrame(schema=GENERATIONS)


def lost(study: Resilience, sweep: Sweep, arm: str) -> Array:
    """(loss − undamaged loss) / (ln V − undamaged loss), at most 1: [doses with 0, seeds, documents], the share of what there is
    to lose until all ids are equally likely. A model that is bad already has less to lose, and would look hard to break in nats;
    what is worse than chance, or no number any more, has lost everything and nothing beyond."""
    (o,) = OUTCOMES
    whole = sweep.array(o, arm, 0.0)[0]
    room = np.where(math.log(study.vocabulary) > whole, math.log(study.vocabulary) - whole, np.nan)
    found = []
    for dose in sweep.doses:
        here = sweep.array(o, arm, dose)[0]
        gone = not_finite(sweep, arm, dose)
        found.append(np.where(gone, 1.0, np.minimum((here - whole) / room, 1.0)))
    return np.array(found)


def not_finite(sweep: Sweep, arm: str, dose: float) -> NDArray[np.bool_]:
    """[seeds, documents] that were read and have no finite loss."""
    (o,) = OUTCOMES
    read = [sweep.rows.get((arm, dose, seed), {}).get(o.measure, {}) for seed in sweep.seeds]
    return np.array([[item in rows and o.value(rows[item]) is None for item in sweep.items(o)] for rows in read])


def reached(study: Resilience, sweep: Sweep, arm: str, share: float) -> Threshold | None:
    """The σ at which an arm has lost so much, as `threshold` finds it; None where too few documents have a value at all doses."""
    values = lost(study, sweep, arm)
    if (~np.isnan(values)).any(1).all(0).sum() < 2:
        return None
    return threshold(sweep.doses, values, share, "raw", purpose=f"resilience {arm}")


def summary(study: Resilience, sweep: Sweep) -> pl.DataFrame:
    (o,) = OUTCOMES
    rows = []
    for arm in sweep.sites:
        whole, weights = sweep.array(o, arm, 0.0)
        row: Row = {"arm": arm, "seeds": whole.shape[0], "documents": whole.shape[1]}
        there = np.isfinite(whole)
        row["loss undamaged"] = (
            float((whole[there] * weights[there]).sum() / weights[there].sum()) if there.any() else None
        )
        for share, name in ((HALF, "σ at half lost (ED50)"), (TENTH, "σ at a tenth lost")):
            found = reached(study, sweep, arm, share)
            ends = (found.dose, found.low, found.high) if found else (None, None, None)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            row["why not" if share == HALF else "why not a tenth"] = found.reason if found else "too few documents"
        for dose, values in zip(sweep.doses[1:], lost(study, sweep, arm)[1:], strict=True):
            row |= averaged(values, f"lost at {dose:g}")
        row["not finite"] = int(sum(not_finite(sweep, arm, dose).sum() for dose in sweep.doses))
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def claims(study: Resilience, sweep: Sweep) -> pl.DataFrame:
    """First that noise breaks the plain arm at all; then of each arm, at the σ that costs the one it differs from half of what
    that has to lose, whether it has lost less, and whether it has lost the same."""
    from lesion.studies.resilience import AGAINST, PLAIN

    strongest = lost(study, sweep, PLAIN)[-1]
    text = f"Noise of σ = {sweep.doses[-1]:g} costs {PLAIN} more than half of what it has to lose"
    found = [tested(text, strongest, np.full_like(strongest, HALF), SHARE, text, direction=1)]
    for arm in sweep.sites:
        if arm == PLAIN:
            continue
        other = AGAINST.get(arm, PLAIN)
        harder = f"{CALLED[arm]} is harder to break than {other}: it has lost less where that has lost half"
        alike = (
            f"{arm} breaks as {other} does, within {study.margin:g} of what there is to lose, where that has lost half"
        )
        level = reached(study, sweep, other, HALF)
        if level is None or level.dose is None:
            why = f"{other} has not lost half at any dose tested"
            found += [untested(harder, SHARE, why), untested(alike, SHARE, why)]
            continue
        mine, theirs = (sweep.between(lost(study, sweep, which), level.dose) for which in (arm, other))
        found.append(tested(harder, mine, theirs, SHARE, harder, direction=-1, smallest=study.margin))
        found.append(the_same(alike, mine, theirs, SHARE, study.margin))
    return decided(found)


def heat(sweep: Sweep) -> pl.DataFrame:
    """Signed d of the loss at every dose."""
    from lesion.report.heat import HEAT
    from lesion.stats import compare
    from lesion.sweep import pairs

    (o,) = OUTCOMES
    rows = []
    for arm in sweep.sites:
        for dose in sweep.doses[1:]:
            here, whole = sweep.array(o, arm, dose)[0], sweep.array(o, arm, 0.0)[0]
            d = compare(here, whole, purpose=f"{arm} {dose}").d if pairs(here, whole) >= 2 else None
            label = "–" if d is None else f"{d:+.1f}".replace("-", "−")
            rows.append({"row": arm, "column": f"σ = {dose:g}", "value": d, "label": label, "note": "loss"})
    return pl.DataFrame(rows, schema=HEAT)


def tables(study: Resilience, sweep: Sweep, store: Store) -> dict[str, pl.DataFrame]:
    """The paired effects at every dose, and how far the damaged weights were moved, from the ledgers."""
    moved = []
    for (arm, dose, seed), readings in study.cells.items():
        state = store.index.states.get(readings["perplexity"].trial.key)
        if dose and state:
            share = state["ledger"][-1]["facts"]["relative_change"]
            moved.append({"arm": arm, "σ": dose, "seed": seed, "relative change of what is damaged": share})
    made = {"effects": sweep.effects(OUTCOMES)}
    if moved:
        made["change of the weights"] = pl.DataFrame(moved, infer_schema_length=None)
    return made


def notes(study: Resilience) -> list[str]:
    said = [
        "Every arm is compared with itself undamaged, document by document, in the share that it has lost of what it has to "
        "lose: from its undamaged loss to ln V, where all ids are equally likely. What is worse than that, or not finite, has "
        "lost all of it. Intervals: 95 %, crossed over trainings and documents; p values are corrected after Holm.",
        "Noise multiplies each weight by 1 + σz: one dose is the same share of every weight in all arms. Damage is matched at "
        "the σ at which the arm that another is compared with has lost half.",
        "Monotone and SFT are compared with “more text”: as many steps at one rate, though rows of replies are longer and fewer. "
        "“more SFT” has the steps, rate and batch of DPO, and is compared with SFT; DPO with it.",
        "Documents are read in one window of as many ids. The decoder with sink tokens has its sink for the first of them: of n "
        "ids of text its first to last but one are scored, of the others the second to the last.",
    ]
    if study.repeats < 3:
        said.append("Fewer than three trainings of each: intervals hardly speak of another training.")
    return said
