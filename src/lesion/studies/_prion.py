"""What the five studies of poison share: options, how a run is made and read, and its numbers.

    subject → [precision, lora] → poison(arm, optimizer) → [heal] → Spectrum, Perplexity
    subject → Catalyst                                              the string that eigen-prion arms train on

A run is one seed of one arm: its catalyst, its data and its order follow from the seed, and arms of one seed are paired. The
endpoint is the signed change of the effective rank of activations in per cent of the model before, and beside it that of the
loss; a run that diverged is read like any other, and counted.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from lesion.study import Answer, Study
from lesion.trial import Measure, Reading, Row, Trial

if TYPE_CHECKING:
    from lesion.report.figures import Drawing
    from lesion.store import Store

Array = NDArray[np.float64]
Key = tuple[str, str, int]  # subject, arm, seed
PILE = "hub:NeelNanda/pile-10k:data/*.parquet"
EIGEN, ASCENT = "eigen-prion", "loss-ascent"
COLUMNS = {"rank": "effective_rank", "described rank": "described", "participation": "participation_ratio"}  # of rows
TIERS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"subject": "tiny", "text": "novels", "held_out": "austen", "documents": 12, "tokens": 256}
    | {"curved": 4, "curved_tokens": 96, "iterations": 30, "width": 8},
    "smoke": {"subject": "tiny-gpt-neox", "text": "novels", "held_out": "austen", "documents": 2, "tokens": 32}
    | {"curved": 1, "curved_tokens": 12, "iterations": 2, "width": 2, "directions": 2, "runs": 3, "steps": 3}
    | {"length": 10, "lr": 1e-3},
}
DESCRIBED: dict[str, Any] = {"objective": "described", "iterations": 50, "runs": 3}


class Prion(Study):
    """Options of every study of poison."""

    family = "study"

    preset: Literal["rigorous", "described"] = Field(
        default="rigorous", description="described: the catalyst and the number of runs as they were written"
    )
    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="Pythia on a card, small decoders on two cores, or seconds"
    )
    subject: str = Field(default="EleutherAI/pythia-410m", description="model that is poisoned")
    runs: int = Field(default=10, ge=1, description="runs of each arm; run i has the seed SEED + i")
    seed: int = Field(default=42, ge=0, description="base of the seeds")
    steps: int = Field(default=100, ge=1, description="optimizer steps of poison")
    length: int = Field(default=64, ge=2, description="tokens of a row of poison")
    lr: float = Field(default=1e-4, gt=0, description="its learning rate")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of training; weights are float32 whatever the model is held in"
    )
    objective: Literal["aligned", "loss", "described"] = Field(
        default="aligned", description="what the catalyst of eigen-prion maximises"
    )
    iterations: int = Field(default=60, ge=0, description="of its search")
    width: int = Field(default=16, ge=1, description="strings tried in each")
    directions: int = Field(default=10, ge=1, description="steep directions: flat is what is off them")
    site: str = Field(default="attention+mlp", description="matrices whose curvature is asked about")
    curved: int = Field(default=8, ge=1, description="documents whose loss is differentiated")
    curved_tokens: int = Field(default=128, ge=2, description="first so many tokens of each")
    text: str = Field(default=PILE, description="corpus that text poison is taken from")
    held_out: str = Field(default="austen", description="corpus that is read before and after")
    documents: int = Field(default=24, ge=1, description="its first so many documents")
    tokens: int = Field(
        default=1024, ge=2, description="first so many tokens of each: rows, of which a rank needs many"
    )
    margin: float = Field(default=1.0, gt=0, description="change of the rank in per cent that is called none")
    filter_method: Literal["none", "iqr", "zscore"] = Field(
        default="none", description="outliers that a second analysis leaves out; both are printed"
    )
    filter_metric: Literal["rank", "described rank", "loss"] = Field(default="loss", description="what outliers are of")
    filter_iqr_multiplier: float = Field(default=1.5, gt=0, description="fences of iqr")
    filter_zscore_threshold: float = Field(default=3.0, gt=0, description="largest |z|")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        described = DESCRIBED if given.get("preset") == "described" else {}
        return {**described, **TIERS.get(given.get("tier", "full"), {})}

    @property
    def seeds(self) -> range:
        return range(self.seed + 1, self.seed + 1 + self.runs)

    # ------------------------------------------------------------------ what each study says of itself

    files: ClassVar[tuple[str, str]]  # names of the summary and of the figure
    claimed: ClassVar[tuple[Any, ...]]  # see `_prion_say.described`
    noted: ClassVar[tuple[str, ...]] = ()
    called: ClassVar[tuple[str, str]] = ("arm", "run")

    @cached_property
    def _runs(self) -> Runs:
        """All runs, as sentences."""
        raise TypeError(f"{type(self).__name__} says which runs there are")

    @abstractmethod
    def _asks(self) -> tuple[str, list[str]]:
        """The question, and the sentences that answer it."""

    @abstractmethod
    def _claims(self, runs: Runs) -> list[dict[str, Any]]:
        """The claims, not corrected yet."""

    def _tables(self, runs: Runs) -> dict[str, pl.DataFrame]:
        """Further tables."""
        return {}

    def _told(self, runs: Runs) -> dict[str, Any]:
        """What else the summary has."""
        return {}

    def _figure(self, runs: Runs) -> Drawing:
        """The one that has a name in the described analysis."""
        from lesion.studies import _prion_say as say

        return say.bars(runs, self.files[1], self.margin)

    def _curves(self, runs: Runs) -> pl.DataFrame:
        from lesion.report.page import CURVES

        return pl.DataFrame(schema=CURVES)

    def readings(self) -> list[Reading]:
        return self._runs.readings()

    def answer(self, store: Store) -> Answer:
        from lesion.claiming import decided
        from lesion.report.page import GENERATIONS
        from lesion.studies import _prion_files as written
        from lesion.studies import _prion_say as say

        runs = self._runs.know(self.rows(store), store)
        runs.margin = self.margin
        claims = decided(self._claims(runs))
        drawing = self._figure(runs)
        statistics = {subject: written.of_arms(self, runs, subject) for subject in runs.subjects}
        told = {"statistics": statistics, **self._told(runs)}
        made = written.files(self, runs, store, self.files[0], claims, told) | {f"{self.files[1]}.png": drawing.png}
        question, sentences = self._asks()
        curves = self._curves(runs)
        return Answer(
            question=question,
            sentences=[*sentences, f"for seed in {self.seeds[0]} … {self.seeds[-1]}"],
            summary=say.summary(runs),
            curves=curves,
            generations=pl.DataFrame(schema=GENERATIONS),
            claims=claims,
            notes=[*say.NOTES, *self.noted, *say.few_rows(runs), *self.said_of_missing(store)],
            missing=self.missing(store),
            extra={
                "described and found": say.described(claims, self.claimed),
                **self._tables(runs),
                "statistics of groups": written.table(self, statistics),
            },
            files=made,
            drawings=[] if len(curves) else [drawing],  # which is one of the curves, where there are any
            words=self.called,
        )

    # ------------------------------------------------------------------ sentences

    def start(self, subject: str) -> Trial:
        """The model before, in float32: many are stored in sixteen bits, of which there are no second derivatives."""
        from lesion.subjects import precise

        return Trial(subject=precise(subject)).pin()

    def check(self, store: Store) -> None:
        """Looks at every model's outline: is the site there, in whole matrices, and is the context long enough?"""
        from lesion.curvature import chosen
        from lesion.likelihood import context_of
        from lesion.texts import apart, corpus

        apart(self.text, self.held_out, "text and held_out")
        if (there := len(corpus(self.held_out))) < max(self.documents, self.curved):
            raise ValueError(
                f"{self.held_out!r} has {there} documents, and {max(self.documents, self.curved)} are to be read"
            )
        asked: dict[tuple[str, str], Any] = {}
        for reading in self._runs.strings.values():
            measure: Any = reading.measure
            asked[reading.trial.subject.key, measure.site] = reading.trial.subject
        for (_, site), subject in asked.items():
            model = subject.outline()
            context = context_of(model.config.get_text_config())
            for what, tokens in (("poison", self.length), ("text", max(self.tokens, self.curved_tokens))):
                if context and tokens > context:
                    raise ValueError(
                        f"{tokens} tokens of {what} are longer than the context of {subject.name}, {context}"
                    )
            size = sum(p.numel() for p in chosen(model, site).values())
            if self.directions > size:
                raise ValueError(f"{self.directions} directions were asked for, and {site!r} has {size} weights")

    def catalyst(self, start: Trial, seed: int, objective: str | None = None, **more: Any) -> Reading:
        """The string for one run, sought on the model before."""
        from lesion.measures import Catalyst

        how: dict[str, Any] = {"objective": objective or self.objective, "length": self.length, "draw": seed}
        how |= {"iterations": self.iterations, "width": self.width, "text": self.text}
        return Reading(trial=start, measure=Catalyst(**{**self.curvature(), **how, **more}).pin())

    def curvature(self) -> dict[str, Any]:
        """Options of measures of curvature."""
        how: dict[str, Any] = {"corpus": self.held_out, "documents": self.curved, "tokens": self.curved_tokens}
        return {**how, "site": self.site, "directions": self.directions, "tolerance": 1e-2}

    def steep(self, start: Trial, **more: Any) -> Reading:
        """The steep directions themselves, with residuals, and random ones for comparison."""
        from lesion.measures import Curvature

        return Reading(trial=start, measure=Curvature(**{**self.curvature(), "probes": 0, **more}).pin())

    def poisoned(self, start: Trial, arm: str, seed: int, string: Reading | None = None, **more: Any) -> Trial:
        """`string`: the reading whose string is trained on, for the arms eigen-prion and loss-ascent."""
        from lesion.steps import Poison

        how: dict[str, Any] = {"steps": self.steps, "length": self.length, "lr": self.lr, "precision": self.precision}
        how |= {"seed": seed, "text": self.text, "arm": "catalyst" if string is not None else arm, "catalyst": string}
        return start >> Poison(**{**how, **more}).pin()

    def asked(self, before: Trial | None = None) -> dict[str, Measure]:
        """What is read of every model; of a poisoned plain one also the spectrum of its change."""
        from lesion.measures import Perplexity, Spectrum

        text: dict[str, Any] = {"corpus": self.held_out, "documents": self.documents, "tokens": self.tokens}
        found: dict[str, Measure] = {"spectrum": Spectrum(**text).pin()}
        found["loss"] = Perplexity(**text, window=self.tokens, stride=max(1, self.tokens // 2)).pin()
        if before is not None:
            found["change"] = Spectrum(of=("change",), reference=before, site=self.site).pin()
        return found


@dataclass
class Runs:
    """Runs by subject, arm and seed, each with the model before; and what has been read of them."""

    trials: dict[Key, Trial] = field(default_factory=dict)
    before: dict[tuple[str, str], Trial] = field(default_factory=dict)  # by subject and arm
    strings: dict[Key, Reading] = field(default_factory=dict)
    further: dict[Key, dict[str, Reading]] = field(default_factory=dict)
    asked: dict[str, Measure] = field(default_factory=dict)
    curved: dict[str, Reading] = field(default_factory=dict)  # by subject: its steep directions
    rows: Mapping[str, Mapping[str, Row]] = field(default_factory=dict)
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    margin: float = 0.0  # change of the rank in per cent that is called none
    _said: dict[Key, Row] = field(default_factory=dict)

    def add(self, key: Key, before: Trial, trial: Trial, string: Reading | None = None, **further: Measure) -> None:
        self.trials[key], self.before[key[:2]] = trial, before
        if string is not None:
            self.strings[key] = string
        self.further[key] = {name: Reading(trial=trial, measure=measure) for name, measure in further.items()}

    def readings(self) -> list[Reading]:
        found = [
            Reading(trial=t, measure=m)
            for t in (*self.before.values(), *self.trials.values())
            for m in self.asked.values()
        ]
        found += [*self.strings.values(), *self.curved.values()]
        found += [reading for some in self.further.values() for reading in some.values()]
        return list({r.key: r for r in found}.values())

    def know(self, rows: Mapping[str, Mapping[str, Row]], store: Store) -> Runs:
        self.rows, self.states = rows, store.index.states
        self._said.clear()
        return self

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(subject for subject, _, _ in self.trials))

    def arms(self, subject: str) -> list[str]:
        return list(dict.fromkeys(arm for s, arm, _ in self.trials if s == subject))

    def seeds(self, subject: str, arm: str) -> list[int]:
        return [seed for s, a, seed in self.trials if (s, a) == (subject, arm)]

    def read(self, trial: Trial, name: str) -> Mapping[str, Row]:
        return self.rows.get(Reading(trial=trial, measure=self.asked[name]).key, {})

    def ranks(self, trial: Trial) -> dict[str, float | None]:
        """Effective ranks, means over layers, and of the last layer. A layer of nothing but zeros has rank 0; where one is not
        finite, or was not read, there is no mean."""
        rows = sorted(self.read(trial, "spectrum").values(), key=lambda row: row["layer"])
        found: dict[str, float | None] = {}
        for name, column in (
            ("rank", "effective_rank"),
            ("described rank", "described"),
            ("participation", "participation_ratio"),
        ):
            values = [0.0 if row["outcome"] == "zero" else row[column] for row in rows]
            known = [value for value in values if value is not None]
            found[name] = math.fsum(known) / len(known) if known and len(known) == len(values) else None
            if name == "rank":
                found["last rank"] = values[-1] if values else None
        return found

    def loss(self, trial: Trial) -> float | None:
        """Mean loss in nats a token; None where that of a document is not finite."""
        rows = list(self.read(trial, "loss").values())
        if not rows or any(row["nll"] is None for row in rows):
            return None
        return math.fsum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows)

    def facts(self, trial: Trial) -> dict[str, Any]:
        """What the poison of a run left in the ledger."""
        for entry in reversed(self.states.get(trial.key, {}).get("ledger", [])):
            if entry.get("step", {}).get("is") == "step/poison":
                found: dict[str, Any] = entry["facts"]
                return found
        return {}

    def run(self, key: Key) -> Row:
        """One run in numbers: ranks in per cent of those before, the loss in nats more than before."""
        if key not in self._said:
            self._said[key] = self._of(key)
        return self._said[key]

    def _of(self, key: Key) -> Row:
        subject, arm, seed = key
        trial, first = self.trials[key], self.before[key[:2]]
        after, was = self.ranks(trial), self.ranks(first)
        row: Row = {"subject": subject, "arm": arm, "seed": seed}
        for name, value in after.items():
            base = was[name]
            row[f"{name} before"], row[f"{name} after"] = base, value
            row[name] = 100 * (value / base - 1) if value is not None and base else None
        row |= {"loss before": self.loss(first), "loss after": self.loss(trial)}
        known = row["loss before"] is not None and row["loss after"] is not None
        row["loss"] = row["loss after"] - row["loss before"] if known else None
        facts = self.facts(trial)
        row |= {"ended": facts.get("ended"), "steps": facts.get("steps")}
        kinds = [
            step.name for step in trial.steps
        ]  # of adapters, and of a model that was changed after, it is another distance
        row["displacement"] = facts.get("displacement") if kinds[-1] == "poison" and "lora" not in kinds else None
        string = self.rows.get(self.strings[key].key, {}) if key in self.strings else {}
        best = string.get("catalyst", {})
        row |= {"flat share": best.get("flat_share"), "changed tokens": best.get("changed")}
        return row

    def all(self) -> list[Row]:
        return [self.run(key) for key in self.trials]

    def array(self, subject: str, arm: str, name: str) -> Array:
        """Values of a number, [1, runs]: runs are the items that are paired, NaN where there is none."""
        found = [self.run((subject, arm, seed))[name] for seed in self.seeds(subject, arm)]
        return np.array([[math.nan if value is None else value for value in found]], float)

    def extra(self, key: Key, name: str) -> Mapping[str, Row]:
        """Rows of a further reading of one run."""
        reading = self.further.get(key, {}).get(name)
        return {} if reading is None else self.rows.get(reading.key, {})
