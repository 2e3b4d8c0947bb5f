"""The described files of the studies of poison: of every run its configuration and its metrics, aggregates, the summary; and
statistics of groups with and without outliers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lesion import groups, outliers
from lesion.report.tables import to_csv
from lesion.studies._prion import Array, Prion, Runs
from lesion.studies._prion_say import summary

if TYPE_CHECKING:
    from lesion.store import Store


def statistics(study: Prion, values: Mapping[str, Array], by: Mapping[str, Array]) -> dict[str, Any]:
    """ANOVA and pairwise tests over groups of runs, taken as independent; where a filter is asked for, of all runs that have a
    number and of those that the filter keeps. A run without the number that is filtered by is neither kept nor dropped."""
    whole = {name: x[np.isfinite(x)] for name, x in values.items()}
    both = {name: np.isfinite(x) & np.isfinite(by[name]) for name, x in values.items()}
    judged = {name: x[both[name]] for name, x in values.items()}
    if min(map(len, (whole if study.filter_method == "none" else judged).values()), default=0) < 3 or len(whole) < 2:
        sizes = {name: len(x) for name, x in whole.items()}
        return {"not tested": f"a test needs two groups of three runs or more; there are {sizes}"}

    def analysis(some: Mapping[str, Array]) -> dict[str, Any]:
        return {
            "groups": {name: _plain(groups.describe(x)) for name, x in some.items()},
            "anova": _plain(groups.anova(some)),
            "pairwise, unpaired": [_plain(found) for found in groups.pairwise(some)],
        }

    if study.filter_method == "none":
        return {"filter": None, "all runs": analysis(whole)}
    limit = study.filter_iqr_multiplier if study.filter_method == "iqr" else study.filter_zscore_threshold
    measured = {name: x[both[name]] for name, x in by.items()}
    found = _plain(outliers.both(judged, study.filter_method, analysis, limit=limit, by=measured))
    found |= {"unfiltered": analysis(whole), "metric": study.filter_metric}
    found["without that metric"] = {name: len(whole[name]) - len(x) for name, x in judged.items()}
    return {"filter": found}


def table(study: Prion, of: Mapping[str, Mapping[str, Any]]) -> pl.DataFrame:
    """The same for the page: a row for each test, of the change of the rank; arms of one seed are taken as independent here, and
    the claims are the paired tests."""
    rows = []
    for subject, said in of.items():
        analyses = {"all runs": said.get("all runs")}
        if said.get("filter"):
            analyses = {"all runs": said["filter"]["unfiltered"], study.filter_method: said["filter"]["filtered"]}
        for which, found in analyses.items():
            if found is None:
                continue
            here = {"subject": subject, "runs": which}
            anova = found["anova"]
            rows.append({**here, "test": "ANOVA (Fisher)", "value": anova["f"], "p": anova["p"], "p after Holm": None})
            rows.append({**here, "test": "ANOVA (Welch)", "value": anova["welch_f"], "p": anova["welch_p"]})
            for pair in found["pairwise, unpaired"]:
                test = f"{pair['first']} − {pair['second']} (Welch, unpaired)"
                row = {"value": pair["value"], "value_low": pair["low"], "value_high": pair["high"]}
                rows.append({**here, "test": test, **row, "p": pair["p"], "p after Holm": pair["p_holm"]})
    return pl.DataFrame(rows, infer_schema_length=None)


def of_arms(study: Prion, runs: Runs, subject: str) -> dict[str, Any]:
    """Statistics of the change of the rank, over the arms of a subject."""
    values = {arm: runs.array(subject, arm, "rank")[0] for arm in runs.arms(subject)}
    by = {arm: runs.array(subject, arm, study.filter_metric)[0] for arm in runs.arms(subject)}
    return statistics(study, values, by)


def _plain(value: Any) -> Any:
    """A result as JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def files(
    study: Prion, runs: Runs, store: Store, name: str, claims: pl.DataFrame, more: Mapping[str, Any]
) -> dict[str, bytes]:
    """The described files: of every run its configuration and its metrics, aggregates, the summary."""
    found: dict[str, bytes] = {}
    for key, trial in runs.trials.items():
        subject, arm, seed = key
        run = f"raw_data/{_slug(subject)}_{_slug(arm)}_run{seed - study.seed:02d}"
        here = {"model": subject, "arm": arm, "seed": seed, "run": seed - study.seed, "state": trial.key}
        result = runs.run(key)
        found[f"{run}/config.json"] = _json(
            {**here, "sentence": str(trial), "trial": trial.to_json(), "result": result}
        )
        folder = store.state_folder(trial.key)
        if folder is not None and (folder / "metrics.jsonl").is_file():
            found[f"{run}/metrics.jsonl"] = (folder / "metrics.jsonl").read_bytes()
    rows = runs.all()
    for subject in runs.subjects:
        for arm in runs.arms(subject):
            some = [row for row in rows if (row["subject"], row["arm"]) == (subject, arm)]
            file = f"raw_data/aggregate_summary_{_slug(subject)}_{_slug(arm)}.csv"
            found[file] = to_csv(pl.DataFrame(some, infer_schema_length=None))
    table = summary(runs)
    found[f"{name}_summary.csv"] = to_csv(table)
    told: dict[str, Any] = {"study": study.to_json(), "summary": table.to_dicts(), "claims": claims.to_dicts()}
    found[f"{name}_summary.json"] = _json({**told, **more})
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in text).strip("-")
