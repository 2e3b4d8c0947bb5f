"""What `modern-align` says of its readings: a row a stage, paired claims, and what choosing among solutions is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lesion.claiming import averaged, decided, tested, untested
from lesion.report.page import CURVES, GENERATIONS
from lesion.studies._told import Array, crossed, fell
from lesion.studies.modern_align import BASE, CONTROL, DPO, SFT, SOLVER, STAGES, VERIFIER, ModernAlign
from lesion.trial import Row

if TYPE_CHECKING:
    from lesion.report.figures import Drawing

SHOWN = 24
NOTES = [
    "“base” is whatever the subject is: smollm2 is an instructed model already, so there SFT and DPO are further training.",
    "Responses: the loss of written responses to held-out instructions, in nats a token, end token included; “ended” is the "
    "share of replies that the model ended itself within the tokens it has, which many written responses would not do; “loss of "
    "the end” is that of the end token behind the written response, however long, in nats.",
    "Margins: how much more the better reply has gained than the worse, in nats, against the model before sft (for sft) or after "
    "it. “more sft” went on with instructions for as many steps as dpo had, at its rate: what training alone does. Replies are "
    "cut and long pairs left out as the options say; of a reply that was cut the end is not scored.",
    "Choosing: among the first k solutions to a problem, by the verifier, by the number that most of them state, or the first; "
    "“any” is the mean of the k: a choice at random. AUROC: the chance that the verifier puts a right solution above a wrong "
    "one, of all solutions in the table, of one problem's in the claim: what choosing can use.",
]


@dataclass
class Told:
    """A study, the rows of its readings, and the ledgers."""

    study: ModernAlign
    rows: Mapping[str, Mapping[str, Row]]
    states: Mapping[str, Mapping[str, Any]]

    def of(self, stage: str, name: str, seed: int) -> Mapping[str, Row]:
        first = self.study.seeds[0]
        cell = self.study.cells.get((stage, first if stage == BASE else seed), {})
        return self.rows.get(cell[name].key, {}) if name in cell else {}

    def array(self, stage: str, name: str, column: str, weight: str | None = None) -> Array:
        """[seeds, items] of a column, over another one where that is named."""

        def value(row: Row) -> float | None:
            return None if row.get(column) is None else row[column] / (row[weight] if weight else 1)

        return self._crossed(stage, name, value)

    def stopped(self, stage: str) -> Array:
        """Whether replies ended, [seeds, items]."""
        return self._crossed(stage, "responses", lambda row: row["stop"] == "end")

    def _crossed(self, stage: str, name: str, value: Callable[[Row], float | None]) -> Array:
        """Over the items of all stages, in one order."""
        seeds = self.study.seeds
        items = {item: None for seed in seeds for other in (*STAGES, VERIFIER) for item in self.of(other, name, seed)}
        return crossed([self.of(stage, name, seed) for seed in seeds], value, items)

    def ranked(self) -> Array:
        """AUROC among the solutions of one problem [seeds, problems]; NaN where all of them are right, or none."""
        from lesion import verifying

        every = []
        for seed in self.study.seeds:
            of: dict[str, list[Row]] = {}
            for row in self.of(VERIFIER, "verification", seed).values():
                if row["chance"] is not None:
                    of.setdefault(row["example"], []).append(row)
            every.append({problem: {"rows": some} for problem, some in of.items()})
        return crossed(
            every,
            lambda cell: verifying.auroc(
                [r["chance"] for r in cell["rows"]], [bool(r["correct"]) for r in cell["rows"]]
            ),
        )

    def facts(self, stage: str, seed: int) -> Mapping[str, Any]:
        state = self.states.get(self.study.chains[seed][stage].key)
        found: Mapping[str, Any] = state["ledger"][-1].get("facts", {}) if state else {}
        return found


def summary(told: Told) -> pl.DataFrame:
    rows = []
    for stage in STAGES:
        row: Row = {"after": stage}
        row |= averaged(told.array(stage, "responses", "nll", "nll_tokens"), "loss of responses")
        row |= averaged(told.array(stage, "responses", "nll_end"), "loss of the end")
        row |= averaged(told.stopped(stage), "ended", share=True)
        row |= averaged(told.array(stage, "responses", "rougeL"), "ROUGE-L")
        gained = stage != BASE  # which has nothing to be compared with
        row |= averaged(told.array(stage, "preferences", "correct" if gained else "none"), "pairs right", share=True)
        row |= averaged(told.array(stage, "preferences", "margin" if gained else "none"), "margin")
        row["pairs read"] = _read(told, stage)
        row |= averaged(told.array(stage, "preferences", "kl"), "KL")
        row |= averaged(told.array(stage, "sums", "correct"), "sums right", share=True)
        loss = told.array(stage, "text", "nll", "tokens")
        row["perplexity of text"] = math.exp(float(np.nanmean(loss))) if np.isfinite(loss).any() else None
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _read(told: Told, stage: str) -> str | None:
    """How many held-out pairs there were, and of how many nothing is known: they are too long, or not finite."""
    rows = list(told.of(stage, "preferences", told.study.seeds[0]).values())
    read = [row["outcome"] for row in rows].count("read")
    return f"{read} of {len(rows)}" if rows else None


def claims(told: Told) -> pl.DataFrame:
    """In the order of the chain, corrected together."""
    nats, share = "nats a token", "share of items"
    found = []

    def pair(
        text: str, after: str, before: str, name: str, column: str, unit: str, sign: int, weight: Any = None
    ) -> None:
        a, b = (told.array(stage, name, column, weight) for stage in (after, before))
        found.append(tested(text, a, b, unit, text, direction=sign))

    pair("SFT lowers the loss of held-out responses", SFT, BASE, "responses", "nll", nats, -1, "nll_tokens")
    pair(
        "SFT teaches to stop: behind a written response its end is likelier",
        SFT,
        BASE,
        "responses",
        "nll_end",
        "nats",
        -1,
    )
    text = f"After SFT more replies end within {told.study.new_tokens} tokens"
    found.append(tested(text, told.stopped(SFT), told.stopped(BASE), share, text, direction=1))
    right = told.array(DPO, "preferences", "correct")
    text = "DPO orders held-out pairs better than chance"
    found.append(tested(text, right, np.full_like(right, 0.5), "share of pairs above ½", text, direction=1))
    pair("DPO widens margins more than as much further SFT", DPO, CONTROL, "preferences", "margin", "nats", 1)
    pair("DPO raises the loss of held-out responses", DPO, SFT, "responses", "nll", nats, 1, "nll_tokens")
    pair("SFT and DPO raise the loss of running text", DPO, BASE, "text", "nll", nats, 1, "tokens")
    pair("Training on sums raises their accuracy", SOLVER, DPO, "sums", "correct", share, 1)
    ranked = told.ranked()
    text = "The verifier puts right solutions of a problem above its wrong ones"
    found.append(tested(text, ranked, np.full_like(ranked, 0.5), "AUROC within a problem, above ½", text, direction=1))
    by = chosen(told)
    most = max(by, default=told.study.solutions)
    for text, other in (
        (f"Best of {most} by the verifier beats the first solution", "first"),
        (f"Best of {most} by the verifier beats the majority", "majority"),
        (f"Best of {most} by the verifier beats a choice at random", "any"),
    ):
        if by:
            found.append(tested(text, by[most]["best"], by[most][other], "share of problems", text, direction=1))
        else:
            found.append(untested(text, "share of problems", "no verdicts were read"))
    return decided(found)


def chosen(told: Told) -> dict[int, dict[str, Array]]:
    """For each k and way of choosing among k solutions whether it is right [seeds, problems]; empty where verdicts of a seed are
    missing."""
    from lesion.measures.verification import choices

    seeds = [list(told.of(VERIFIER, "verification", seed).values()) for seed in told.study.seeds]
    if not all(seeds):
        return {}
    made = [choices(rows) for rows in seeds]
    problems = sorted(set.intersection(*(set(ks[1]["first"]) for ks in made)))
    return {
        k: {way: np.array([[ks[k][way][p] for p in problems] for ks in made]) for way in made[0][k]}
        for k in sorted(set.intersection(*map(set, made)))
    }


def tables(told: Told) -> dict[str, pl.DataFrame]:
    """The curve of best of k, what verifiers are worth, and what was trained."""
    found: dict[str, pl.DataFrame] = {}
    if by := chosen(told):
        rows = []
        for k, ways in by.items():
            row: Row = {"k": k}
            for way, values in ways.items():
                row |= averaged(values, way, share=way != "any")
            rows.append(row)
        found["best of k"] = pl.DataFrame(rows, infer_schema_length=None)
        found["verifiers"] = pl.DataFrame(
            [_verifier(told, seed) for seed in told.study.seeds], infer_schema_length=None
        )
    trained = []
    for seed in told.study.seeds:
        for stage in (SFT, DPO, CONTROL, SOLVER, VERIFIER):
            if facts := told.facts(stage, seed):
                curve = facts.get("curve") or [{}]
                row = {"step": stage, "seed": seed, "steps": facts["steps"], "first loss": curve[0].get("loss")}
                row |= {"last loss": facts["loss"], "examples": facts.get("examples", facts.get("solutions"))}
                trained.append({**row, "left out": facts.get("left_out"), "share moved": facts["moved"]})
    if trained:
        found["trainings"] = pl.DataFrame(trained, infer_schema_length=None)
    return found


WAYS = {"best": "by the verifier", "majority": "by the majority", "any": "at random", "first": "the first"}


def drawings(told: Told) -> list[Drawing]:
    """The curve of best of k."""
    from lesion.report.figures import draw

    rows = [
        {
            **dict.fromkeys(CURVES),
            "measure": "right answers among k solutions",
            "site": called,
            "unit": "share of problems",
        }
        | {"better": "higher", "dose": float(k), "value": e["x"], "low": e["x_low"], "high": e["x_high"]}
        | dict(zip(("seeds", "items"), ways[way].shape, strict=True))
        for way, called in WAYS.items()
        for k, ways in chosen(told).items()
        for e in [averaged(ways[way], "x", share=way != "any")]
    ]
    return draw(pl.DataFrame(rows, schema=CURVES), dose="k") if rows else []


def _verifier(told: Told, seed: int) -> Row:
    from lesion import verifying

    rows = [r for r in told.of(VERIFIER, "verification", seed).values() if r["chance"] is not None]
    chances, right = [r["chance"] for r in rows], [bool(r["correct"]) for r in rows]
    facts = told.facts(VERIFIER, seed)
    row: Row = {"seed": seed, "trained on": facts.get("solutions"), "of which right": facts.get("right")}
    row |= {"judged": len(rows), "right": sum(right) / len(right) if right else None}
    row["AUROC"] = verifying.auroc(chances, right) if rows else None
    row["calibration error"] = verifying.calibration_error(chances, right) if rows else None
    return row


def curves(told: Told) -> pl.DataFrame:
    """The loss of each training as it fell, from the ledgers."""
    stages = [(stage, seed) for seed in told.study.seeds for stage in (SFT, DPO, SOLVER, VERIFIER)]
    return fell(
        ((f"training loss of {stage}", f"seed {seed}", told.facts(stage, seed)) for stage, seed in stages), "nats"
    )


def generations(told: Told) -> pl.DataFrame:
    found, seed = [], told.study.seeds[0]
    for stage in STAGES:
        for name in ("responses", "sums"):
            for row in list(told.of(stage, name, seed).values())[:SHOWN]:
                right = row.get("correct")
                found.append(
                    {
                        "site": f"{stage}, {name}",
                        "prompt": row["item"],
                        "group": name,
                        "asked": row["asked"],
                        "dose": 1.0,
                    }
                    | {"text": row["text"] or "", "stop": row["stop"] or row["outcome"], "logprob": None, "seed": seed}
                    | {"tokens": row["tokens"], "correct": None if right is None else bool(right)}
                )
    return pl.DataFrame(found, schema=GENERATIONS)
