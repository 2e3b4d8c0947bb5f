"""What `monotone` claims: each sentence with its paired test, or with what was counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from lesion.claiming import decided, tested, the_same, untested
from lesion.studies._arms import BASELINE, CONSTRAINTS, HARDENED, MATCHED
from lesion.studies._monotone import Told, Value, beyond_chance, mean_draw, nll, rise, succeeds, target
from lesion.studies._told import Array

DESCRIBED_GAP = 1 - math.log(10.9 / 10.2) / math.log(
    15.8 / 10.2
)  # share of the loss gap that recovery was to close: 0.85
ALIKE = 0.1  # nats a token: the equal-loss control has the loss of what it controls on the attacked tokens too
NATS = "nats a token"
CERTIFIED = "certified"


def claims(told: Sequence[Told]) -> pl.DataFrame:
    found = []
    for one in told:
        rows = [*_recovery(one), *_attacks(one), *_masking(one), *_controls(one), *_certificates(one)]
        found += [{**row, "claim": f"{one.name}: {row['claim']}"} for row in rows]
    return decided(found)


def _paired(
    one: Told, text: str, this: tuple[str, str, Value], that: tuple[str, str, Value], sign: int = -1, unit: str = NATS
) -> dict[str, Any]:
    """this − that, both (arm, reading, value) after recovery, on the items of both."""
    after, before = _arrays(one, this, that)
    if after.shape != before.shape or not after.size:
        return untested(text, unit, "not both were read on the same seeds")
    return tested(text, after, before, unit, f"{one.name} {text}", direction=sign)


def _arrays(one: Told, *of: tuple[str, str, Value]) -> list[Array]:
    items = sorted({item for arm, name, _ in of for item in one.items(arm, "after", name)})
    return [one.array(arm, "after", name, value, items) for arm, name, value in of]


def _recovery(one: Told) -> list[dict[str, Any]]:
    main, share = one.arms.scale.main, 100 * DESCRIBED_GAP
    closes = f"Recovery of {main} closes {share:.0f} % of the gap in loss to the baseline, as described"
    within = f"After recovery {main} is within 7 % of the baseline's perplexity, as described"
    items = sorted({*one.items(BASELINE, "after", "loss"), *one.items(main, "after", "loss")})
    base, after = (one.array(arm, "after", "loss", nll, items) for arm in (BASELINE, main))
    before = one.array(main, "before", "loss", nll, items)
    if not base.size or base.shape != after.shape or len(before) != 1:
        rows = [untested(text, NATS, "not all of them were read") for text in (closes, within)]
    else:
        before = np.broadcast_to(before, base.shape)
        aim = base + (1 - DESCRIBED_GAP) * (before - base)
        known = np.isfinite(base + before + after)
        row = tested(closes, after, aim, NATS, f"{one.name} gap", direction=-1)
        if known.any():
            closed = 1 - float((after - base)[known].mean() / (before - base)[known].mean())
            row["note"] = " ".join(filter(None, [f"it closes {100 * closed:.1f} % of it", row.get("note")]))
        rows = [row, tested(within, after, base + math.log(1.07), NATS, f"{one.name} within", direction=-1)]
    if {"signature", "abs"} <= set(one.arms.scale.arms):
        text = "Sign structures heal to a lower loss than |W|"
        rows.append(_paired(one, text, ("signature", "loss", nll), ("abs", "loss", nll)))
    return rows


def _attacks(one: Told) -> list[dict[str, Any]]:
    main, arms = one.arms.scale.main, one.arms.scale.arms
    rows = []
    for label, other in (("the baseline", BASELINE), ("the baseline at equal clean loss", MATCHED)):
        if other not in arms:
            continue
        for text, name, value in (
            (f"HotFlip raises the loss of {main} less than that of {label}", "iterative", rise),
            (f"An attack without gradients raises the loss of {main} less than that of {label}", "query", rise),
            (
                f"A universal trigger does less to {main}, beyond what a random string does, than to {label}",
                "trigger",
                beyond_chance,
            ),
        ):
            rows.append(_paired(one, text, (main, name, value), (other, name, value)))
    if MATCHED in arms:
        text = (
            f"On the attacked tokens {main} and its equal-loss control have the same clean loss, within {ALIKE:g} nats"
        )
        mine, theirs = _arrays(one, (main, "iterative", target), (MATCHED, "iterative", target))
        if mine.shape == theirs.shape and mine.size:
            rows.append(the_same(text, mine, theirs, NATS, ALIKE))
        else:
            rows.append(untested(text, NATS, "not both were read on the same seeds"))
    text = f"As described, one-shot HotFlip succeeds less often at 15 % on {main} than on the baseline"
    rows.append(_paired(one, text, (main, "described", succeeds), (BASELINE, "described", succeeds), unit="share"))
    text = f"{main} reads its prompt less than the baseline: random flips, on average, raise its loss less"
    rows.append(_paired(one, text, (main, "random", mean_draw), (BASELINE, "random", mean_draw)))
    text = "One-shot HotFlip, as described, does more to the baseline than random flips do on average"
    rows.append(_paired(one, text, (BASELINE, "described", rise), (BASELINE, "random", mean_draw), 1))
    return rows


def _masking(one: Told) -> list[dict[str, Any]]:
    """Whether what gradients find is all that there is to find: where they are hidden, attacks without them and flips that were
    found elsewhere do as much as HotFlip does."""
    main = one.arms.scale.main
    own = (main, "iterative", rise)
    return [
        _paired(
            one, f"Gradients help against {main}: with as many trials and none of them an attack does less",
            (main, "query", rise), own,
        ),
        _paired(
            one, f"Flips that were found on the baseline do less to {main} than its own",
            (main, f"replay of {BASELINE}", rise), own,
        ),
    ]  # fmt: skip


def _controls(one: Told) -> list[dict[str, Any]]:
    """Arms that differ from a constraint in one thing: nothing is held, or signs are held that give no order."""
    main, arms = one.arms.scale.main, one.arms.scale.arms
    found = []
    for this, other, text in (
        ("abs", "abs-free", "|W| that is held than of |W| that nothing holds"),
        ("signature", "signature-free", "signature that is held than of the same start with nothing held"),
        (main, "sign-frozen", f"{main} than of weights that keep the signs they had"),
        (main, HARDENED, f"{main} than of adversarial training"),
        (CERTIFIED, BASELINE, f"{CERTIFIED} than of the baseline, not at equal clean loss"),
    ):
        if this in arms and other in arms and not (this == CERTIFIED == main):
            text = f"HotFlip raises the loss less of {text}"
            found.append(_paired(one, text, (this, "iterative", rise), (other, "iterative", rise)))
    return found


def _certificates(one: Told) -> list[dict[str, Any]]:
    """What is counted and not estimated."""
    found = []
    for arm in one.arms.scale.arms:
        if not one.arms.holds(arm):
            continue
        rows = [r for seed in one.seeds(arm, "after") for r in one.read(arm, "after", seed, "monotonicity").values()]
        text = f"After recovery no effective weight of {arm} has the wrong sign"
        found.append(_counted(text, [r["wrong"] for r in rows], sum(r["checked"] for r in rows), "weights"))
        if CONSTRAINTS[arm].get("activation") == "monotone":
            kinds = [f"{what}_{where}" for what in ("pairs", "jacobian") for where in ("reached", "random")]
            text = (
                f"No ordered pair and no sign of a Jacobian of {arm} is violated, on reached inputs and on random ones"
            )
            found.append(_counted(text, [r[k] for r in rows for k in kinds], len(rows), "shares of violations, summed"))
    return found


def _counted(text: str, wrong: Sequence[float | None], checked: int, unit: str) -> dict[str, Any]:
    if not checked or any(value is None for value in wrong):
        return untested(text, unit, "nothing was checked" if not checked else "something is not finite")
    total = math.fsum(value for value in wrong if value is not None)
    said = {"test": f"counted, not estimated: {checked:,} checked", "verdict": "contradicted" if total else "supported"}
    return {"claim": text, "effect": total, "unit": unit, **said}
