"""degrade: how does a model fail when a part of it is damaged, by how much, and in what order?

    intact >> Noise | Ablate | Quantise (site, dose, seed)  →  Perplexity, Generation      for site × dose × repeat

Every damaged model is compared with the undamaged one on the same documents, and on the same prompts with the same
sampling noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from lesion.study import Answer, Study
from lesion.trial import Measure, Reading, Step, Trial

if TYPE_CHECKING:
    from lesion.store import Store

Method = Literal[
    "mult-gauss",
    "add-gauss",
    "lognormal",
    "ablation",
    "ablate-largest",
    "ablate-smallest",
    "ablate-heads",
    "ablate-neurons",
    "ablate-layers",
    "uni-quant",
    "quant-symmetric",
    "quant-percentile",
    "quant-channel",
]


def step_of(method: str, site: str, dose: float, seed: int) -> Step | None:
    """The step that a method means at a dose, or None where the dose is none. Unseeded methods ignore the seed."""
    from lesion.steps import Ablate, Noise, Quantise

    noise = {"mult-gauss": "multiplicative", "add-gauss": "additive", "lognormal": "lognormal"}
    ablate: dict[str, dict[str, Any]] = {
        "ablation": {"seed": seed},
        "ablate-largest": {"order": "largest"},
        "ablate-smallest": {"order": "smallest"},
        "ablate-heads": {"unit": "head", "seed": seed},
        "ablate-neurons": {"unit": "neuron", "seed": seed},
        "ablate-layers": {"unit": "layer", "seed": seed},
    }
    quantise: dict[str, dict[str, Any]] = {
        "uni-quant": {},
        "quant-symmetric": {"scheme": "symmetric"},
        "quant-percentile": {"scheme": "percentile"},
        "quant-channel": {"channel": "output"},
    }
    if dose == 0:
        return None
    if method in noise:
        return Noise(site=site, sigma=dose, law=noise[method], seed=seed)
    if method in ablate:
        return Ablate(site=site, share=dose, **ablate[method])
    if dose != int(dose):
        raise ValueError(f"{method} takes a whole number of levels, not {dose}")
    return Quantise(site=site, levels=int(dose), **quantise[method])


class Degrade(Study):
    """How does a model fail when a part of it is damaged?"""

    subject: str = Field(default="smollm2", description="smollm2, a tiny name, ./folder, or org/name[@revision]")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="auto: as stored")
    method: Method = Field(default="mult-gauss", description="kind of damage")
    site: tuple[str, ...] = Field(
        default=("attention.value", "mlp", "embedding"), min_length=1, description="parts to damage, each on its own"
    )
    doses: tuple[float, ...] = Field(
        default=(),
        description="σ for noise, share of units for ablation, levels for quantisation; 0: undamaged. Default: five",
    )
    repeats: int = Field(default=3, ge=1, description="seeds: seed, seed + 1, …")
    seed: int = Field(default=42, ge=0, description="first seed, of the damage and of the sampling")
    battery: str = Field(default="small", description="prompt battery: a packaged name, or a .jsonl or .csv file")
    prompts: int = Field(default=0, ge=0, description="first so many prompts; 0: all")
    new_tokens: int = Field(default=48, ge=1, description="length of an answer, in tokens")
    temperature: float = Field(default=1.0, ge=0, description="0: greedy")
    top_k: int = Field(default=64, ge=0, description="0: all tokens")
    top_p: float = Field(default=0.95, gt=0, le=1, description="1: all tokens")
    batch: int = Field(default=40, ge=1, description="answers that are sampled at a time")
    corpus: str = Field(default="austen", description="held-out text: a packaged name, or a .txt, .jsonl or .csv file")
    documents: int = Field(default=0, ge=0, description="first so many documents; 0: all")
    tokens: int = Field(default=128, ge=0, description="first so many tokens of each document; 0: all")
    window: int = Field(default=512, ge=2, description="perplexity window, in tokens")
    stride: int = Field(default=256, ge=1, description="perplexity stride, in tokens")

    @model_validator(mode="after")
    def _default_doses(self) -> Self:
        if not self.doses:
            quantising, ablating = "quant" in self.method, "abla" in self.method
            chosen = (
                (1024, 256, 64, 16, 4)
                if quantising
                else (0, 0.2, 0.4, 0.6, 0.8)
                if ablating
                else (0, 0.35, 0.7, 1.05, 1.4)
            )
            object.__setattr__(self, "doses", tuple(map(float, chosen)))
        if len(set(self.doses)) < len(self.doses):
            raise ValueError(f"a dose is named twice in {self.doses}")
        for dose in self.doses:
            step_of(self.method, self.site[0], dose, self.seed)  # an impossible dose is refused here, before any work
        return self

    def _measures(self, seed: int) -> tuple[Measure, Measure]:
        from lesion.measures import Generation, Perplexity

        perplexity = Perplexity(
            corpus=self.corpus, documents=self.documents, tokens=self.tokens, window=self.window, stride=self.stride
        )
        generation = Generation(
            battery=self.battery,
            prompts=self.prompts,
            seed=seed,
            new_tokens=self.new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            batch=self.batch,
        )
        return perplexity.pin(), generation.pin()

    @cached_property
    def _cells(self) -> dict[tuple[str, float, int], tuple[Reading, Reading]]:
        """(site, dose, seed) → its perplexity and its generation. The undamaged model is every site's dose 0."""
        from lesion.subjects import parse

        intact = Trial(subject=parse(self.subject, self.dtype)).pin()
        seeds = range(self.seed, self.seed + self.repeats)
        measures = {seed: self._measures(seed) for seed in seeds}
        doses = (0.0, *sorted((d for d in self.doses if d), reverse="quant" in self.method))  # by growing damage
        cells = {}
        for site, dose, seed in itertools.product(self.site, doses, seeds):
            step = step_of(self.method, site, dose, seed)
            trial = intact >> step if step else intact
            first, second = (Reading(trial=trial, measure=measure) for measure in measures[seed])
            cells[site, dose, seed] = first, second
        return cells

    def readings(self) -> list[Reading]:
        return list({r.key: r for pair in self._cells.values() for r in pair}.values())

    def answer(self, store: Store) -> Answer:
        import polars as pl

        rows: dict[str, dict[str, Any]] = {}
        for row in store.rows(r.key for r in self.readings()):
            rows.setdefault(row["reading"], {})[row["item"]] = row
        table, curves = [], []
        for site in self.site:
            for dose in dict.fromkeys(d for s, d, _ in self._cells if s == site):
                found = self._compare(rows, site, dose)
                table.append({"site": site, "dose": dose, **_flat(found)})
                curves += [{"site": site, "dose": dose, **point} for point in self._points(found)]
        missing = sum(r.key not in store.index.seals for r in self.readings())
        return Answer(
            question=f"How does {self.subject} fail under {self.method} of {', '.join(self.site)}?",
            sentences=self._sentences(),
            summary=pl.DataFrame(table, infer_schema_length=None),
            curves=pl.DataFrame(curves, schema=CURVES),
            generations=pl.DataFrame(self._generations(rows), schema=GENERATIONS),
            notes=self._notes(store, missing),
            missing=missing,
        )

    def _compare(self, rows: dict[str, dict[str, Any]], site: str, dose: float) -> dict[str, Any]:
        """Estimates at one dose, against the undamaged model on the same items and seeds."""
        from math import exp

        seeds = range(self.seed, self.seed + self.repeats)
        here = [[rows.get(r.key, {}) for r in self._cells[site, dose, seed]] for seed in seeds]
        whole = [[rows.get(r.key, {}) for r in self._cells[site, 0.0, seed]] for seed in seeds]

        def estimate(kind: int, value: Callable[[Any, Any], tuple[float, float] | None], purpose: str) -> Any:
            from lesion.stats import ratio

            items = list(whole[0][kind])
            cells = [[value(h[kind].get(i), w[kind].get(i)) for i in items] for h, w in zip(here, whole, strict=True)]
            filled = np.array([[cell or (0.0, 0.0) for cell in line] for line in cells])
            if not items or not filled[..., 1].any():
                return None
            return ratio(filled[..., 0], filled[..., 1], purpose=purpose)

        def nll(h: Any, w: Any) -> tuple[float, float] | None:
            return (h["nll"], h["tokens"]) if h and h["nll"] is not None else None

        def more_nll(h: Any, w: Any) -> tuple[float, float] | None:
            both = h and w and h["nll"] is not None and w["nll"] is not None
            return (h["nll"] - w["nll"], h["tokens"]) if both else None

        def right(h: Any, w: Any) -> tuple[float, float] | None:
            return (float(h["correct"]), 1.0) if h and h["correct"] is not None else None

        def more_right(h: Any, w: Any) -> tuple[float, float] | None:
            both = h and w and h["correct"] is not None and w["correct"] is not None
            return (float(h["correct"]) - float(w["correct"]), 1.0) if both else None

        answers = [row for h in here for row in h[1].values()]
        return {
            "perplexity": _mapped(exp, estimate(0, nll, "perplexity")),
            "ratio": _mapped(exp, estimate(0, more_nll, "perplexity ratio")),
            "accuracy": estimate(1, right, "accuracy"),
            "change": estimate(1, more_right, "accuracy change"),
            "not finite": sum(row["stop"] == "not finite" for row in answers)
            + sum(row["nll"] is None for h in here for row in h[0].values()),
            "answers": len(answers),
        }

    def _points(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        named = [
            ("ratio", "perplexity ratio", "× undamaged", "lower", 1.0),
            ("accuracy", "answer accuracy", "share right", "higher", None),
            ("change", "change in accuracy", "points of share, paired", "higher", 0.0),
        ]
        points = []
        for key, measure, unit, better, reference in named:
            e = found[key]
            value = {"value": e.value, "low": e.low, "high": e.high, "items": e.items, "seeds": e.seeds} if e else {}
            points.append({"measure": measure, "unit": unit, "better": better, "reference": reference, **value})
        return points

    def _generations(self, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        kept = ("prompt", "group", "asked", "text", "correct", "stop", "tokens", "logprob")
        return [
            {"site": site, "dose": dose, "seed": seed, **{name: row[name] for name in kept}}
            for (site, dose, seed), (_, generation) in self._cells.items()
            for row in rows.get(generation.key, {}).values()
        ]

    def _sentences(self) -> list[str]:
        damage = [step_of(self.method, site, dose, self.seed) for site in self.site for dose in self.doses if dose]
        one = next((step for step in damage if step is not None), None)
        from lesion.trial import describe

        first, second = self._measures(self.seed)
        short = {"sha256": None}
        measures = ", ".join(describe(m.model_copy(update=short)) for m in (first, second))
        return [
            f"{self.subject} → {measures}",
            *([f"{self.subject} → {describe(one)} → the same"] if one else []),
            f"for site in {', '.join(self.site)}; dose in {', '.join(f'{d:g}' for d in self.doses)}; "
            f"seed in {', '.join(map(str, range(self.seed, self.seed + self.repeats)))}",
        ]

    def _notes(self, store: Store, missing: int) -> list[str]:
        notes = [
            "Intervals: 95 %, crossed bootstrap over seeds and items. Perplexity ratio and change in accuracy are paired "
            "with the undamaged model on the same documents, prompts and sampling noise.",
        ]
        if self.repeats == 1:
            notes.append("One seed: the intervals speak of items only, not of another draw of the damage.")
        if "quant" in self.method and self.subject == "smollm2":
            notes.append("The packaged SmolLM2 was stored in 4 bits: quantising it again understates the effect.")
        tied = [s for s in self.site if s.startswith(("embedding", "head"))]
        ledgers = [state["ledger"] for state in store.index.states.values()]
        if tied and any(entry.get("tied") for ledger in ledgers for entry in ledger):
            notes.append(f"Input embedding and output head are one tensor here: damage to {tied[0]} is damage to both.")
        if missing:
            notes.append(f"{missing} of {len(self.readings())} readings are missing: run the same command again.")
        return notes


def _mapped(function: Callable[[float], float], estimate: Any) -> Any:
    """An estimate on another scale, by a monotone function."""
    from lesion.stats import Estimate

    if estimate is None or estimate.value > 700:
        return None
    low, high = (None if x is None or x > 700 else function(x) for x in (estimate.low, estimate.high))
    return Estimate(function(estimate.value), low, high, estimate.seeds, estimate.items)


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name in ("perplexity", "ratio", "accuracy", "change"):
        e = found[name]
        flat |= {
            name: e.value if e else None,
            f"{name}_low": e.low if e else None,
            f"{name}_high": e.high if e else None,
        }
    return {**flat, "answers": found["answers"], "not finite": found["not finite"]}


CURVES: dict[str, Any] = {
    **dict.fromkeys(("measure", "unit", "better", "site"), str),
    **dict.fromkeys(("dose", "value", "low", "high", "reference"), float),
    **dict.fromkeys(("items", "seeds"), int),
}
GENERATIONS: dict[str, Any] = {
    **dict.fromkeys(("site", "prompt", "group", "asked", "text", "stop"), str),
    **dict.fromkeys(("seed", "tokens"), int),
    **dict.fromkeys(("dose", "logprob"), float),
    "correct": bool,
}
