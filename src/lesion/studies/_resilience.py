"""What `resilience` says of its sweep: a row an arm with its ED50, and each arm against the plain one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesion.claiming import decided, tested, the_same
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
# what an arm of training is compared with, where that is there
AGAINST = {"SFT": "more text", "more SFT": "more text", "DPO": "more SFT", "monotone": "more text"}


def nothing() -> pl.DataFrame:
    return pl.DataFrame(schema=GENERATIONS)


def mean_rise(study: Resilience, sweep: Sweep, arm: str) -> Array:
    """The mean over doses of (loss − undamaged loss) / (ln V − undamaged loss), [seeds, documents]: the share of what there is to
    lose until all ids are equally likely. A model that is bad already has less to lose, and would look hard to break in nats."""
    (o,) = OUTCOMES
    _, change = sweep.change(o, arm)
    room = math.log(study.vocabulary) - sweep.array(o, arm, 0.0)[0]
    return np.asarray(change[1:].mean(0) / np.where(room > 0, room, np.nan), float)  # missing where a dose is


def summary(sweep: Sweep) -> pl.DataFrame:
    (o,) = OUTCOMES
    rows = []
    for arm in sweep.sites:
        whole, weights = sweep.array(o, arm, 0.0)
        row: Row = {"arm": arm, "seeds": whole.shape[0], "documents": whole.shape[1]}
        there = np.isfinite(whole)
        loss = float((whole[there] * weights[there]).sum() / weights[there].sum()) if there.any() else None
        row["loss undamaged"] = loss
        half = sweep.half(o, arm) if there.any() else None
        row |= {"ED50 of σ": half.ed50 if half else None}
        row |= {"ED50 of σ_low": half.low if half else None, "ED50 of σ_high": half.high if half else None}
        for dose in sweep.doses[1:]:
            point = sweep.point(o, arm, dose)
            name = f"× perplexity at {dose:g}"
            row |= {name: point["value"], f"{name}_low": point["low"], f"{name}_high": point["high"]}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def claims(study: Resilience, sweep: Sweep) -> pl.DataFrame:
    """Of each arm whether it loses less than the one that it differs from, and whether it loses the same within the margin."""
    from lesion.studies.resilience import PLAIN

    unit, found = "share of what there is to lose, mean over doses", []
    for arm in sweep.sites:
        if arm == PLAIN:
            continue
        other = AGAINST.get(arm, PLAIN) if AGAINST.get(arm) in sweep.sites else PLAIN
        mine, theirs = mean_rise(study, sweep, arm), mean_rise(study, sweep, other)
        text = f"{CALLED[arm]} is harder to break than {other}"
        found.append(tested(text, mine, theirs, unit, text, direction=-1, smallest=study.margin))
        text = f"{arm} breaks as {other} does, within {study.margin:g} of what there is to lose"
        found.append(the_same(text, mine, theirs, unit, study.margin))
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
    made = {"effects": sweep.effects(OUTCOMES), "thresholds": sweep.thresholds(OUTCOMES)}
    if moved:
        made["matched damage"] = pl.DataFrame(moved, infer_schema_length=None)
    return made


def notes(study: Resilience) -> list[str]:
    said = [
        "Every arm is compared with itself undamaged, document by document; arms are compared in that rise as a share of what "
        "each has to lose (from its undamaged loss to ln V), averaged over the doses tested. Intervals: "
        "95 %, crossed over trainings and documents; p values are corrected after Holm.",
        "Noise multiplies each weight by 1 + σz: one dose is the same share of every weight in all arms.",
        "Monotone and SFT are compared with “more text”, DPO with “more SFT”: trained on for as many steps, where those arms are "
        "there. Steps are matched and tokens are not: rows of replies are longer and fewer.",
    ]
    if study.repeats < 3:
        said.append("Fewer than three trainings of each: intervals hardly speak of another training.")
    return said
