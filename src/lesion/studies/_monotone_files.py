"""The further tables of `monotone`, and the files that were described: results, a summary, a table for a paper."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from lesion.flipping import success
from lesion.studies._arms import CONSTRAINTS, PRETRAINED
from lesion.studies._monotone import NOTES, THRESHOLD, Told, attacked, delta, nll, rise
from lesion.trial import Row


def tables(told: Sequence[Told]) -> dict[str, pl.DataFrame]:
    """Success over thresholds and flips, the transfer matrix, what constraints keep, benchmarks, attacked answers."""
    names = (
        "certificates",
        "success by threshold",
        "transfer",
        "constraints",
        "benchmarks",
        "attacked answers",
        "rates",
    )
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for one in told:
        for arm, stage in dict.fromkeys((a, s) for a, s, _ in one.arms.cells()):
            made["certificates"] += _certified(one, arm, stage)
        for arm in one.arms.scale.arms:
            here = {"subject": one.name, "arm": arm}
            rows = attacked(one, arm, "iterative")
            flips = max((len(r["losses"]) - 1 for r in rows), default=0)
            for n in sorted({1, flips // 2, flips} - {0}):
                shares = {f"{t:g} nats": _share(rows, n, t, False) for t in (0.1, 0.25, 0.5, 1.0)}
                shares |= {f"{100 * t:g} %": _share(rows, n, t, True) for t in (0.05, THRESHOLD, 0.3)}
                made["success by threshold"].append(
                    {**here, "attack": "iterative", "flips": n, **shares, "n": len(rows)}
                )
            for source in one.arms.judged:
                name = "iterative" if source == arm else f"replay of {source}"
                trigger = "trigger" if source == arm else f"trigger of {source}"
                found = {
                    k: one.mean(arm, "after", k2, v)["value"]
                    for k, k2, v in (("flips", name, rise), ("trigger", trigger, delta))
                }
                if found["flips"] is not None:
                    made["transfer"].append({"subject": one.name, "found on": source, "tried on": arm, **found})
            made["constraints"] += _kept(one, arm)
            made["rates"] += _rates(one, arm)
        for arm, stage, seed in one.arms.cells():
            made["benchmarks"] += _benchmarks(one, arm, stage, seed)
            if answers := one.read(arm, stage, seed, "attacked answers"):
                graded = [r for r in answers.values() if r["correct"] is not None]
                made["attacked answers"].append(
                    {
                        "subject": one.name,
                        "arm": arm,
                        "seed": seed,
                        "clean": _mean([float(r["clean_correct"]) for r in graded]),
                    }
                    | {"attacked": _mean([float(r["correct"]) for r in graded]), "n": len(graded)}
                    | {"questions": len(one.read(arm, stage, seed, "answers"))}
                )
    return {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in made.items() if rows}


def _certified(one: Told, arm: str, stage: str) -> list[dict[str, Any]]:
    """Effective weights of a model that were checked, and those of the wrong sign, over all seeds; shares of violations."""
    seeds = [read for seed in one.seeds(arm, stage) if (read := one.read(arm, stage, seed, "monotonicity"))]
    rows: list[Row] = [row for read in seeds for row in read.values()]
    if not rows:
        return []
    found: dict[str, Any] = {"subject": one.name, "arm": arm, "recovery": stage if arm != PRETRAINED else "–"}
    found |= {"models": len(seeds), "weights checked of each": sum(row["checked"] for row in rows) // len(seeds)}
    found["wrong sign, in all"] = sum(row["wrong"] for row in rows)
    for label, key in (("violated pairs", "pairs"), ("violated Jacobian signs", "jacobian")):
        for kind in ("reached", "random"):
            said = one.mean(arm, stage, "monotonicity", lambda row, name=f"{key}_{kind}": row[name])  # type: ignore[misc]
            found[f"{label}, {kind}"] = said["value"]
    found["order τ"] = one.mean(arm, stage, "order", lambda row: row["tau"])["value"]
    return [{**found, "order τ, random directions": one.mean(arm, stage, "order", lambda row: row["random"])["value"]}]


def _share(rows: Sequence[Row], flips: int, threshold: float, relative: bool) -> float | None:
    return _mean([float(success(row["losses"], flips, threshold, relative)) for row in rows])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _kept(one: Told, arm: str) -> list[dict[str, Any]]:
    """Mass that an initialisation keeps, and its loss before and after recovery."""
    if arm not in CONSTRAINTS:
        return []
    ledger = one.states.get(one.arms.constraint(arm).key, {}).get("ledger", [])
    facts: dict[str, Any] = next((e["facts"] for e in reversed(ledger) if "retained" in e.get("facts", {})), {})
    row: dict[str, Any] = {
        "subject": one.name,
        "arm": arm,
        **{k: facts.get(k) for k in ("weights", "retained")},
        "‖W′ − W‖² / ‖W‖²": None if facts.get("relative") is None else facts["relative"] ** 2,
    }
    for stage in ("before", "after"):
        loss = one.mean(arm, stage, "loss", nll)
        row |= {f"loss {stage}": loss["value"], f"loss {stage}_low": loss["low"], f"loss {stage}_high": loss["high"]}
    return [row]


def _rates(one: Told, arm: str) -> list[dict[str, Any]]:
    """Which learning rate was chosen, by the loss on kept text, and whether it lies at an edge of those that were tried."""
    found, rates = [], one.arms.scale.rates
    for seed in one.seeds(arm, "after"):
        trial = one.arms.trial(arm, seed)
        if len(rates) < 2 or trial.steps[-1].name != "choose" or trial.key not in one.states:
            continue
        facts = one.states[trial.key]["ledger"][-1]["facts"]
        row = {"subject": one.name, "arm": arm, "seed": seed, "chosen": rates[facts["chosen"]]}
        row |= {f"loss at {rate:g}": value for rate, value in zip(rates, facts["values"], strict=True)}
        found.append({**row, "at an edge": facts["chosen"] in (0, len(rates) - 1)})
    return found


def _benchmarks(one: Told, arm: str, stage: str, seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, reading in one.arms.cells()[arm, stage, seed].items():
        if name.startswith("benchmark ") and reading.key in one.rows:
            said = reading.measure.summarise(list(one.rows[reading.key].values()))
            numbers = {k: v for k, v in said.items() if isinstance(v, (int, float)) or v is None}
            rows.append(
                {"subject": one.name, "arm": arm, "recovery": stage if arm != PRETRAINED else "–", "seed": seed}
                | {"task": name.removeprefix("benchmark "), **numbers}
            )
    return rows


def files(
    study: Any, table: pl.DataFrame, verdicts: pl.DataFrame, told: Sequence[Told], further: Mapping[str, pl.DataFrame]
) -> dict[str, bytes]:
    """What was described: final_results.json, experiment_summary.txt, and the table for a paper in LaTeX and Markdown."""
    if not len(table):
        return {}
    results = {"study": study.to_json(), "arms": table.to_dicts(), "claims": verdicts.to_dicts()}
    results |= {name: frame.to_dicts() for name, frame in further.items()}
    columns = [c for c in table.columns if not c.endswith(("_low", "_high"))]
    said = ["monotone: " + ", ".join(one.name for one in told), ""]
    said += [" | ".join(columns)] + [" | ".join(_cell(row, c) for c in columns) for row in table.iter_rows(named=True)]
    said += ["", "Claims"]
    for row in verdicts.iter_rows(named=True):
        effect = "" if row["effect"] is None else f" ({row['effect']:+.4g} {row['unit']})"
        said.append(f"  {row['verdict']:12} {row['claim']}{effect}{'; ' + row['note'] if row['note'] else ''}")
    return {
        "final_results.json": (json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "experiment_summary.txt": ("\n".join([*said, "", *NOTES]) + "\n").encode(),
        "paper_table.md": _markdown(table, columns).encode(),
        "paper_table.tex": _latex(table, columns).encode(),
    }


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return "–"
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    return f"{shown} [{low:.3g}, {high:.3g}]" if low is not None and high is not None else shown


def _markdown(table: pl.DataFrame, columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row, c) for c in columns) + " |" for row in table.iter_rows(named=True)]
    return "\n".join(lines) + "\n"


def _latex(table: pl.DataFrame, columns: Sequence[str]) -> str:
    def safe(text: str) -> str:
        for character in "&%_#$":
            text = text.replace(character, "\\" + character)
        return text.replace("τ", "$\\tau$").replace("–", "--")

    lines = [f"\\begin{{tabular}}{{{'l' * 3}{'r' * (len(columns) - 3)}}}", "\\toprule"]
    lines += [" & ".join(map(safe, columns)) + " \\\\", "\\midrule"]
    lines += [" & ".join(safe(_cell(row, c)) for c in columns) + " \\\\" for row in table.iter_rows(named=True)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"
