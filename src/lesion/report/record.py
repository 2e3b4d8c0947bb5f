"""The record behind a report: what each step changed in each model, and what the readings were taken with."""

from __future__ import annotations

import json
import re
from math import isfinite
from typing import Any

from lesion.report import tables


def history(entry: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one trial: its sentence, and for each step what it changed."""
    ledger = entry["ledger"]
    tied = {name: aliases for item in ledger for name, aliases in (item.get("tied") or {}).items()}
    steps = []
    for item in ledger:
        if "step" not in item:
            continue
        changed = item.get("changed", [])
        steps.append(
            {
                "step": sentence(item["step"]),
                "before": item.get("before"),
                "after": item.get("after"),
                "changed": len(changed),
                "tensors": families(changed),
                "facts": [(name, said(value)) for name, value in (item.get("facts") or {}).items()],
                "tied": [(name, ", ".join(tied[name])) for name in changed if name in tied],
            }
        )
    start: dict[str, Any] = next((item for item in ledger if "subject" in item), {})
    known = ("step", "subject", "tied", "before", "after", "changed", "facts")
    return {
        "trial": entry["trial"],
        "loaded": start.get("after"),
        "steps": steps,
        "changed": sum(step["changed"] for step in steps),
        "other": [(name, said(value)) for item in ledger for name, value in item.items() if name not in known],
    }


def sentence(step: dict[str, Any]) -> str:
    """A step's JSON as a person writes it, every field named: noise(kind=multiplicative, seed=1, sigma=0.3, …)."""
    fields = ", ".join(f"{k}={said(v)}" for k, v in step.items() if k not in ("is", "version") and v is not None)
    return f"{str(step.get('is', '?')).rpartition('/')[2]}({fields})"


def said(value: Any) -> str:
    """A fact as text: numbers with six significant digits, nested values as JSON."""
    match value:
        case None:
            return tables.MISSING
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}".replace("-", "−") if isfinite(value) else tables.MISSING
        case int():
            return tables.number(value)
        case str():
            return value
        case _:
            return json.dumps(value, ensure_ascii=False, default=str)


def families(names: list[str]) -> list[tuple[str, int]]:
    """Tensor names that differ in one layer number as one: model.layers.0–29.mlp.up_proj.weight, 30."""
    found: dict[str, list[int | None]] = {}
    for name in names:
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = f"{name[: layer.start()]}\0{name[layer.end() :]}" if layer else name
        found.setdefault(pattern, []).append(int(layer[0]) if layer else None)
    return [(p.replace("\0", _runs([n for n in layers if n is not None])), len(layers)) for p, layers in found.items()]


def _runs(numbers: list[int]) -> str:
    """0–3, 7 for [0, 1, 2, 3, 7]."""
    ordered = sorted(set(numbers))
    firsts = [n for n in ordered if n - 1 not in ordered]
    lasts = [n for n in ordered if n + 1 not in ordered]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(firsts, lasts, strict=True))


def bench(environments: list[dict[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Environments side by side: (what, its value in each, whether they differ)."""
    flat = [{**{k: v for k, v in e.items() if k != "packages"}, **(e.get("packages") or {})} for e in environments]
    names = dict.fromkeys(name for environment in flat for name in environment)
    rows = [(name, [said(environment.get(name)) for environment in flat]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]
