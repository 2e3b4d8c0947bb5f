"""degrade: how does a model fail when a part of it is damaged, by how much, and in what order?

    intact >> Noise | Ablate | Quantise (site, dose, seed)  →  Perplexity, Displacement, Generation  →  Prose, Surprisal

for site × dose × repeat. Every damaged model is compared with the undamaged one on the same documents, and on the same
prompts with the same sampling noise. Because equal doses are not equal damage, components are also compared where their
predictions have moved equally far from the healthy model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.studies._methods import PRESETS, Method, step_of
from lesion.study import Answer, Study
from lesion.trial import Reading, Trial, describe

if TYPE_CHECKING:
    from lesion.outcomes import Outcome
    from lesion.store import Store
    from lesion.sweep import Sweep

Asked = Literal["perplexity", "displacement", "generation", "prose", "surprisal"]


class Degrade(Study):
    """How does a model fail when a part of it is damaged?"""

    preset: Literal["none", "dreams", "iq", "picture"] = Field(
        default="none", description="other defaults: a described run, or its small tier; what is said beside it counts"
    )
    tier: Literal["full", "small"] = Field(
        default="full", description="of the preset: as described, or SmolLM2 in minutes"
    )
    subject: str = Field(default="smollm2", description="smollm2, a tiny name, ./folder, or org/name[@revision]")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "nf4"] = Field(
        default="auto",
        description="auto: as stored; nf4: 4-bit loading (bitsandbytes), of which no packed part can be damaged",
    )
    method: Method = Field(default="mult-gauss", description="kind of damage")
    site: tuple[str, ...] = Field(
        default=("attention.value", "mlp", "embedding"), min_length=1, description="parts to damage, each on its own"
    )
    each: Literal["whole", "layer", "head"] = Field(
        default="whole", description="damage every site as a whole, or its layers or heads one by one"
    )
    doses: tuple[float, ...] = Field(
        default=(),
        description="σ for noise, share of units for ablation, levels for quantisation; 0: undamaged. Default: five",
    )
    repeats: int = Field(default=3, ge=1, description="seeds: seed, seed + 1, …")
    seed: int = Field(default=42, ge=0, description="first seed, of the damage and of the sampling")
    measures: tuple[Asked, ...] = Field(
        default=("perplexity", "displacement", "generation", "prose", "surprisal"),
        min_length=1,
        description="what is read",
    )
    battery: str = Field(default="small", description="prompt battery: a packaged name, or a .jsonl or .csv file")
    prompts: int = Field(default=0, ge=0, description="first so many prompts; 0: all")
    new_tokens: int = Field(default=48, ge=1, description="length of an answer, in tokens")
    temperature: float = Field(default=1.0, ge=0, description="0: greedy")
    top_k: int = Field(default=64, ge=0, description="0: all tokens")
    top_p: float = Field(default=0.95, gt=0, le=1, description="1: all tokens")
    batch: int = Field(default=40, ge=1, description="answers that are sampled at a time")
    encoder: Literal["none", "minilm"] = Field(
        default="none", description="minilm: also the coherence of consecutive sentences (fetches 80 MB once)"
    )
    judges: tuple[str, ...] = Field(
        default=(), description="models that judge the texts, as --judge-endpoint names them; of two, their agreement"
    )
    judge_endpoint: str = Field(default="", description="OpenAI-compatible address, such as http://localhost:8000/v1")
    judge_key: str = Field(default="", description="NAME of the environment variable with its key, which is not stored")
    rubric: Literal["reasoning", "narrative"] = Field(default="reasoning", description="what is judged")
    corpus: str = Field(default="austen", description="held-out text: a packaged name, or a .txt, .jsonl or .csv file")
    documents: int = Field(default=0, ge=0, description="first so many documents; 0: all")
    tokens: int = Field(default=128, ge=0, description="first so many tokens of each document; 0: all")
    window: int = Field(default=512, ge=2, description="perplexity window, in tokens")
    stride: int = Field(default=256, ge=1, description="perplexity stride, in tokens")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return PRESETS.get(given.get("preset", "none"), {}).get(given.get("tier", "full"), {})

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.preset == "none" and self.tier != "full":
            raise ValueError("a tier is of a preset: name one of " + ", ".join(PRESETS))
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
        if self.judges and not self.judge_endpoint:
            raise ValueError("judges are asked over the network: name a judge_endpoint")
        for name in [*({"prose", "surprisal"} & set(self.measures)), *self.judges]:
            if "generation" not in self.measures:
                raise ValueError(f"{name} is read of texts, so measures must name generation as well")
        return self

    @cached_property
    def _intact(self) -> Trial:
        from lesion.subjects import parse

        return Trial(subject=parse(self.subject, self.dtype)).pin()

    @cached_property
    def _sites(self) -> list[str]:
        """The sites, or their layers or heads one by one."""
        if self.each == "whole":
            return list(self.site)
        from lesion.sites import resolve

        model, found = self._intact.subject.outline(), []
        for site in self.site:
            for view in resolve(model, site):
                if view.layer is None or (self.each == "head" and (view.units is None or "attention" not in view.part)):
                    raise ValueError(f"{site!r} has no {self.each}s to be damaged one by one; it holds {view.part}")
                heads = view.tensor.shape[view.units] if self.each == "head" and view.units is not None else 1
                found += [f"{site}@{view.layer}" + (f":{h}" if self.each == "head" else "") for h in range(heads)]
        return list(dict.fromkeys(found))

    @cached_property
    def _doses(self) -> list[float]:
        """0, then by growing damage."""
        return [0.0, *sorted((d for d in self.doses if d), reverse="quant" in self.method)]

    @property
    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.repeats)

    def _readings(self, trial: Trial, seed: int) -> dict[str, Reading]:
        """All that is read of one model, and of the texts it writes."""
        from lesion.measures import Displacement, Generation, Judge, Perplexity, Prose, Surprisal

        text = {"corpus": self.corpus, "documents": self.documents, "tokens": self.tokens}
        measures = {
            "perplexity": lambda: Perplexity(**text, window=self.window, stride=self.stride),
            "displacement": lambda: Displacement(
                reference=self._intact, corpus=self.corpus, documents=self.documents, tokens=self.tokens or 512
            ),
            "generation": lambda: Generation(
                battery=self.battery,
                prompts=self.prompts,
                seed=seed,
                new_tokens=self.new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                batch=self.batch,
            ),
        }
        found: dict[str, Reading] = {
            name: Reading(trial=trial, measure=self._pinned(make(), name, seed))
            for name, make in measures.items()
            if name in self.measures
        }
        if "prose" in self.measures:
            found["prose"] = Reading(trial=trial, measure=Prose(of=found["generation"], encoder=self.encoder))
        for judge in self.judges:
            asked = Judge(
                of=found["generation"],
                endpoint=self.judge_endpoint,
                model=judge,
                rubric=self.rubric,
                key_variable=self.judge_key or None,
            )
            found[f"judge {judge}"] = Reading(trial=trial, measure=asked)
        if "surprisal" in self.measures:
            found["surprisal"] = Reading(trial=self._intact, measure=Surprisal(of=found["generation"]))
        return found

    def _pinned(self, measure: Any, name: str, seed: int) -> Any:
        """Files are hashed once for the study and not once for each cell."""
        if (name, seed) not in self._pins:
            self._pins[name, seed] = measure.pin()
        return self._pins[name, seed]

    @cached_property
    def _pins(self) -> dict[tuple[str, int], Any]:
        return {}

    @cached_property
    def _cells(self) -> dict[tuple[str, float, int], dict[str, Reading]]:
        """(site, dose, seed) → its readings. The undamaged model is every site's dose 0."""
        cells = {}
        for site, dose, seed in itertools.product(self._sites, self._doses, self._seeds):
            step = step_of(self.method, site, dose, seed)
            cells[site, dose, seed] = self._readings(self._intact >> step if step else self._intact, seed)
        return cells

    def readings(self) -> list[Reading]:
        return list({r.key: r for cell in self._cells.values() for r in cell.values()}.values())

    def answer(self, store: Store) -> Answer:
        import polars as pl

        from lesion.report.page import GENERATIONS
        from lesion.studies import _degrade as say

        rows = self.rows(store)
        sweep = self._sweep(rows)
        outcomes = [outcome for outcome in self._outcomes(rows) if sweep.has(outcome)]
        matched = say.matched(sweep, outcomes)
        return Answer(
            question=f"How does {self.subject} fail under {self.method} of {', '.join(self.site)}?",
            sentences=self._sentences(),
            summary=say.summary(sweep, outcomes),
            curves=sweep.curves(outcomes),
            generations=pl.DataFrame(self._generations(rows), schema=GENERATIONS),
            claims=say.claims(sweep, outcomes, self.method, matched),
            heat=sweep.heat(say.mapped(outcomes), matched.strengths, matched.note) if matched else None,
            extra={
                "effects": sweep.effects(outcomes),
                "thresholds": sweep.thresholds(outcomes),
                **({"matched damage": matched.table} if matched else {}),
                **({"agreement of judges": say.agreement(sweep, outcomes)} if len(self.judges) > 1 else {}),
            },
            notes=[*self._notes(store), *self.said_of_missing(store)],
            missing=self.missing(store),
            files=self._files(store, rows),
        )

    def _sweep(self, rows: dict[str, dict[str, Any]]) -> Sweep:
        from lesion.sweep import Sweep

        read = {
            cell: {name: rows[reading.key] for name, reading in readings.items() if reading.key in rows}
            for cell, readings in self._cells.items()
        }
        strength = (lambda levels: 1 / levels) if "quant" in self.method else float
        return Sweep(self._sites, self._doses, self._seeds, read, strength)

    def _outcomes(self, rows: dict[str, dict[str, Any]]) -> list[Outcome]:
        from lesion import outcomes as o

        texts = [row for reading in rows.values() for row in reading.values() if "stop" in row]
        graded = dict.fromkeys(row["group"] for row in texts if row["correct"] is not None)
        found = {
            "generation": o.of_generation(graded),
            "perplexity": o.of_perplexity(),
            "displacement": o.of_displacement(),
            "surprisal": o.of_surprisal(),
            "prose": o.of_prose(
                picture=any(row["group"] == "picture" for row in texts), coherence=self.encoder != "none"
            ),
        }
        judged = [outcome for judge in self.judges for outcome in o.of_judge(judge, self.rubric)]
        return [outcome for name, some in found.items() if name in self.measures for outcome in some] + judged

    def _generations(self, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        kept = ("prompt", "group", "asked", "text", "correct", "stop", "tokens", "logprob")
        return [
            {"site": site, "dose": dose, "seed": seed, **{name: row[name] for name in kept}}
            for (site, dose, seed), readings in self._cells.items()
            if "generation" in readings
            for row in rows.get(readings["generation"].key, {}).values()
        ]

    def _files(self, store: Store, rows: dict[str, dict[str, Any]]) -> dict[str, bytes]:
        """The generations in the format of the described study."""
        from lesion.batteries import battery
        from lesion.studies import _outputs as theirs

        number = {prompt.id: i for i, prompt in enumerate(battery(self.battery), 1)}
        shared = {
            name: getattr(self, name) for name in ("method", "temperature", "top_k", "top_p", "new_tokens", "batch")
        }
        found = []
        for (site, dose, seed), readings in self._cells.items():
            seal = store.index.seals.get(readings["generation"].key) if "generation" in readings else None
            if seal is None:
                continue
            scored = store.index.seals.get(readings["perplexity"].key) if "perplexity" in readings else None
            about = {**shared, "model_name": self.subject, "writer": seal.writer, "load_4bit": self.dtype == "nf4"}
            about["perplexity"] = scored.summary.get("perplexity") if scored else None
            found += [
                theirs.record(row, (site, dose, seed), seed - self.seed, number[row["prompt"]], about)
                for row in rows[seal.reading].values()
            ]
        suffix = self.battery.rpartition("/")[2].rpartition(".")[0] or self.battery.rpartition("/")[2]
        name = theirs.file_name(self.method, self.subject, suffix)
        return {f"outputs/{path}": content for path, content in theirs.files(name, found).items()} if found else {}

    def _sentences(self) -> list[str]:
        damage = [step_of(self.method, site, dose, self.seed) for site in self.site for dose in self.doses if dose]
        one = next((step for step in damage if step is not None), None)
        read = self._readings(self._intact, self.seed).items()
        short = {"perplexity": {"sha256": None}, "generation": {"sha256": None}}
        said = [describe(r.measure.model_copy(update=short[n])) if n in short else n for n, r in read]
        return [
            f"{self.subject} → {', '.join(said)}",
            *([f"{self.subject} → {describe(one)} → the same"] if one else []),
            f"for site in {', '.join(self.site)}{'' if self.each == 'whole' else f', each {self.each} on its own'}; "
            f"dose in {', '.join(f'{d:g}' for d in self.doses)}; seed in {', '.join(map(str, self._seeds))}",
        ]

    def _notes(self, store: Store) -> list[str]:
        notes = [
            "Intervals: 95 %, crossed bootstrap over seeds and items. Perplexity ratio and every effect are paired with the "
            "undamaged model on the same documents, prompts and sampling noise; p values are corrected after Holm.",
        ]
        if self.repeats == 1:
            notes.append("One seed: the intervals speak of items only, not of another draw of the damage.")
        if "quant" in self.method and self.subject == "smollm2":
            notes.append("The packaged SmolLM2 was stored in 4 bits: quantising it again understates the effect.")
        tied = [s for s in self.site if s.startswith(("embedding", "head"))]
        ledgers = [state["ledger"] for state in store.index.states.values()]
        if tied and any(entry.get("tied") for ledger in ledgers for entry in ledger):
            notes.append(f"Input embedding and output head are one tensor here: damage to {tied[0]} is damage to both.")
        return notes
