"""What `monotone` says of its readings: arms in a table, claims with verdicts, and the files that were described."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from lesion.claiming import decided, tested, untested
from lesion.flipping import success
from lesion.report.page import CURVES, GENERATIONS
from lesion.stats import ratio
from lesion.studies._arms import BASELINE, HARDENED, MATCHED, PRETRAINED, Arms
from lesion.studies._told import Array, crossed
from lesion.trial import Row

Value = Callable[[Row], float | None]
THRESHOLD = 0.15  # described: a flip succeeds where it raises the loss by this share of it
DESCRIBED_GAP = 1 - math.log(10.9 / 10.2) / math.log(
    15.8 / 10.2
)  # share of the loss gap that recovery was to close: 0.85
NOTES = [
    "Losses are of tokens that no attack has changed, in nats a token. A constraint is certified for each feed-forward network "
    "in its own input; norms and attention are not monotone, and nothing is claimed of the whole model.",
    "matched: the baseline with noise of the dose at which its clean loss is that of the main constraint. Robust and already bad "
    "look the same without it.",
    "Described for Pythia-1.4B: perplexity 10.2 (baseline), 15.8 (constrained), 10.9 (recovered); HotFlip success 55 % and 18 %; "
    "triggers +16 % and +11 % loss. Such runs really gave 6.7 to 6.9 and 24 to 42, and success 71.5 % and 83.5 %, or 69 % and "
    "42.5 %.",
]


def nll(row: Row) -> float | None:
    return None if row["nll"] is None else row["nll"] / row["tokens"]


def rise(row: Row) -> float | None:
    """Increase of the loss after all flips."""
    return row["losses"][-1] - row["losses"][0] if row["outcome"] == "attacked" else None


def succeeds(row: Row) -> float | None:
    if row["outcome"] != "attacked":
        return None
    return float(success(row["losses"], len(row["losses"]) - 1, THRESHOLD, True))


def delta(row: Row) -> float | None:
    """Of a document with a trigger before it."""
    return row.get("delta")


@dataclass
class Told:
    """One subject's readings, as far as they are there."""

    arms: Arms
    rows: Mapping[str, Mapping[str, Row]]
    states: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.arms.scale.subject

    def seeds(self, arm: str, stage: str) -> list[int]:
        return [seed for (a, s, seed) in self.arms.cells() if (a, s) == (arm, stage)]

    def read(self, arm: str, stage: str, seed: int, name: str) -> Mapping[str, Row]:
        reading = self.arms.cells().get((arm, stage, seed), {}).get(name)
        return {} if reading is None else self.rows.get(reading.key, {})

    def array(self, arm: str, stage: str, name: str, value: Value) -> Array:
        """Values [seeds, items], NaN where there is none."""
        return crossed([self.read(arm, stage, seed, name) for seed in self.seeds(arm, stage)], value)

    def mean(self, arm: str, stage: str, name: str, value: Value) -> dict[str, Any]:
        """value, low and high of the mean over seeds and items, and how many of them there are."""
        found = self.array(arm, stage, name, value)
        known = np.isfinite(found)
        if not known.any():
            return dict.fromkeys(("value", "low", "high", "items", "seeds"))
        e = ratio(np.nan_to_num(found), known.astype(float), purpose=f"monotone {name}")
        return {"value": e.value, "low": e.low, "high": e.high, "items": e.items, "seeds": e.seeds}

    def refuse_sameness(self) -> None:
        """Raises ValueError where two seeds of an arm are one model: three readings of it are not three."""
        for arm in self.arms.scale.arms:
            known: dict[str, int] = {}
            for seed in self.seeds(arm, "after"):
                ledger = self.states.get(self.arms.trial(arm, seed).key, {}).get("ledger")
                if not ledger:
                    continue
                digest = ledger[-1]["after"]
                if digest in known:
                    raise ValueError(
                        f"seeds {known[digest]} and {seed} of {arm} on {self.name} are one model, digest {digest}: "
                        "they would be counted as two"
                    )
                known[digest] = seed


def summary(told: Sequence[Told]) -> pl.DataFrame:
    """A row for each arm: loss, perplexity, what attacks add, what is certified."""
    rows = []
    for one in told:
        for arm, stage in dict.fromkeys((a, s) for a, s, _ in one.arms.cells()):
            row: dict[str, Any] = {"subject": one.name, "arm": arm, "recovery": stage if arm != PRETRAINED else "–"}
            loss = one.mean(arm, stage, "loss", nll)
            if loss["value"] is None:
                continue
            row |= {"loss": loss["value"], "loss_low": loss["low"], "loss_high": loss["high"]}
            row["perplexity"] = math.exp(loss["value"]) if loss["value"] < 700 else None
            for column, name, value in (
                ("hotflip", "iterative", rise),
                ("success at 15 %", "described", succeeds),
                ("query", "query", rise),
                ("random", "random", rise),
                ("trigger", "trigger", delta),
            ):
                found = one.mean(arm, stage, name, value)
                row |= {column: found["value"], f"{column}_low": found["low"], f"{column}_high": found["high"]}
            rows.append({**row, "seeds": len(one.seeds(arm, stage))})
    return pl.DataFrame(rows, infer_schema_length=None)


def claims(told: Sequence[Told]) -> pl.DataFrame:
    found = []
    for one in told:
        found += [{**row, "claim": f"{one.name}: {row['claim']}"} for row in _claims(one)]
    return decided(found)


def _claims(one: Told) -> list[dict[str, Any]]:
    main, unit = one.arms.scale.main, "nats a token"

    def paired(
        text: str, arm: tuple[str, str, Value], other: tuple[str, str, Value], direction: int, unit: str = unit
    ) -> dict[str, Any]:
        """arm − other, both (arm, reading, value) after recovery."""
        after, before = (one.array(a, "after", name, value) for a, name, value in (arm, other))
        if after.shape != before.shape or not after.size:
            return untested(text, unit, "not both were read on the same seeds and items")
        return tested(text, after, before, unit, f"{one.name} {text}", direction=direction)

    rows = [_recovers(one)]
    rows.append(_within(one))
    for label, other in (("the baseline", BASELINE), ("the baseline at equal clean loss", MATCHED)):
        if other not in one.arms.scale.arms:
            continue
        rows += [
            paired(
                f"HotFlip raises the loss of {main} less than that of {label}",
                (main, "iterative", rise),
                (other, "iterative", rise),
                -1,
            ),
            paired(
                f"A universal trigger raises the loss of {main} less than that of {label}",
                (main, "trigger", delta),
                (other, "trigger", delta),
                -1,
            ),
        ]
    rows.append(
        paired(
            "As described, one-shot HotFlip succeeds less often at 15 %",
            (main, "described", succeeds),
            (BASELINE, "described", succeeds),
            -1,
            "share",
        )
    )
    rows.append(
        paired(
            f"Gradients are not masked: without them an attack on {main} does less",
            (main, "query", rise),
            (main, "iterative", rise),
            -1,
        )
    )
    rows.append(
        paired(
            f"Flips found on the baseline do less to {main} than its own",
            (main, f"replay of {BASELINE}", rise),
            (main, "iterative", rise),
            -1,
        )
    )
    rows.append(
        paired(f"HotFlip does more to {main} than random flips", (main, "iterative", rise), (main, "random", rise), 1)
    )
    if "signature" in one.arms.scale.arms and "abs" in one.arms.scale.arms:
        rows.append(
            paired(
                "Sign structures heal to a lower loss than |W|", ("signature", "loss", nll), ("abs", "loss", nll), -1
            )
        )
    for arm, text in (("abs-free", "|W| without a constraint"), (HARDENED, "adversarial training")):
        if arm in one.arms.scale.arms:
            rows.append(
                paired(
                    f"HotFlip raises the loss of {main} less than that of {text}",
                    (main, "iterative", rise),
                    (arm, "iterative", rise),
                    -1,
                )
            )
    return rows


def _gaps(one: Told) -> tuple[Array, Array, Array] | None:
    """Losses of the baseline and of the main arm before and after recovery [seeds, items]."""
    main = one.arms.scale.main
    base, after = (one.array(arm, "after", "loss", nll) for arm in (BASELINE, main))
    before = one.array(main, "before", "loss", nll)
    if not (base.size and base.shape == after.shape and before.shape[1] == base.shape[1]):
        return None
    return base, np.broadcast_to(before, base.shape), after


def _recovers(one: Told) -> dict[str, Any]:
    main, share = one.arms.scale.main, 100 * DESCRIBED_GAP
    text = f"Recovery of {main} closes {share:.0f} % of the gap in loss to the baseline, as described"
    if (found := _gaps(one)) is None:
        return untested(text, "nats a token", "not all three were read")
    base, before, after = found
    closed = 1 - np.nanmean(after - base) / np.nanmean(before - base)
    row = tested(
        text, after, base + (1 - DESCRIBED_GAP) * (before - base), "nats a token", f"{one.name} gap", direction=-1
    )
    return {**row, "note": " ".join(filter(None, [f"it closes {100 * closed:.1f} % of it", row.get("note")]))}


def _within(one: Told) -> dict[str, Any]:
    text = f"After recovery {one.arms.scale.main} is within 7 % of the baseline's perplexity, as described"
    if (found := _gaps(one)) is None:
        return untested(text, "nats a token", "not all three were read")
    base, _, after = found
    return tested(text, after, base + math.log(1.07), "nats a token", f"{one.name} within", direction=-1)


def curves(told: Sequence[Told]) -> pl.DataFrame:
    """The rise of the loss and the share of successes, flip by flip, for each arm and manner."""
    rows = []
    for one in told:
        for arm in one.arms.scale.arms:
            for manner in ("iterative", "query"):
                most = max((len(r["losses"]) - 1 for r in attacked(one, arm, manner)), default=0)
                for n in range(most + 1):

                    def value(row: Row, n: int = n) -> float | None:
                        if row["outcome"] != "attacked":
                            return None
                        return row["losses"][min(n, len(row["losses"]) - 1)] - row["losses"][0]

                    e = one.mean(arm, "after", manner, value)
                    said = {
                        "measure": f"rise of the loss, {manner}, {one.name}",
                        "unit": "nats a token",
                        "better": "lower",
                    }
                    rows.append({**dict.fromkeys(CURVES), **said, "site": arm, "dose": float(n), **e, "reference": 0.0})
    return pl.DataFrame(rows, schema=CURVES)


def attacked(one: Told, arm: str, manner: str) -> list[Row]:
    cells = (one.read(arm, "after", seed, manner) for seed in one.seeds(arm, "after"))
    return [row for rows in cells for row in rows.values() if row["outcome"] == "attacked"]


def generations(told: Sequence[Told]) -> pl.DataFrame:
    found = []
    for one in told:
        for arm, stage, seed in one.arms.cells():
            for name, dose in (("answers", 0.0), ("attacked answers", 1.0)):
                for row in one.read(arm, stage, seed, name).values():
                    kept = {
                        k: row[k] for k in ("prompt", "text", "correct", "stop", "tokens", "logprob", "asked", "group")
                    }
                    found.append({"site": f"{one.name}, {arm}", "dose": dose, "seed": seed, **kept})
    return pl.DataFrame(found, schema=GENERATIONS)
