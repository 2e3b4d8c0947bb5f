"""prion-scaling: are larger models more vulnerable to a catalyst?

    model of size N → poison(eigen-prion) → Spectrum, Perplexity        for size, for seed

Described: damage grows exponentially with size, −26.5 % at one billion parameters. What was published was |change|; the signed
slope was none. Here the signed change is regressed on log₁₀ N. Runs of one model speak of that model only, so a slope over
sizes is judged by the scatter of the sizes' means about the line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from pydantic import Field

from lesion.studies._prion import EIGEN, Prion, Runs
from lesion.trial import Trial

if TYPE_CHECKING:
    from lesion.report.figures import Drawing

PYTHIA = tuple(f"EleutherAI/pythia-{size}" for size in ("70m", "160m", "410m", "1b"))
LARGE = 9e8  # parameters from which the described settings differ
OURS = {"0.3m": 64, "1m": 128, "2m": 192}  # name → width of a decoder that is trained as `tiny` is
TIERS: dict[str, dict[str, Any]] = {
    "full": {"sizes": PYTHIA},
    "small": {"sizes": (*OURS, "tiny")},
    "smoke": {"sizes": ("tiny-gpt-neox", "tiny-llama", "tiny-gpt2")},
}
NOTE = "One model stands for each size, so the slope is judged by the scatter of their means: four sizes have little power."
DESCRIBED = (
    (
        "inverse scaling",
        "−3 % at 70M, −4 % at 160M, −5.8 % at 410M, −26.5 % at 1B: an exponential curve",
        "−2.97, −2.50, −1.95, −7.65 (all ten runs at 1B had in fact raised the rank); ANOVA p .12",
        lambda claim: "for" if "larger models" in claim or claim.startswith(f"{EIGEN} lowers") else "",
    ),
    (
        "alignment",
        "a catalyst aligned with null directions of the Hessian",
        "62 to 64 of 64 tokens were the random ones it began with",
        lambda claim: "for" if claim.startswith("Catalysts of") else "",
    ),
)


class PrionScaling(Prion):
    """Does the rank fall more in larger models?"""

    files = ("scaling_law", "scaling_law_curve")
    called = ("change", "log₁₀ of the parameters")
    claimed = DESCRIBED
    noted = (NOTE,)

    sizes: tuple[str, ...] = Field(
        default=PYTHIA, min_length=1, description=f"models, small to large; {', '.join(OURS)}: trained here as tiny is"
    )
    large_lr: float = Field(default=0.0, ge=0, description="learning rate from about one billion parameters; 0: as all")
    large_directions: int = Field(default=0, ge=0, description="steep directions there; 0: as all")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        found = {**super().defaults(given), **TIERS.get(given.get("tier", "full"), {})}
        described = given.get("preset") == "described"
        large = {"large_lr": 2e-4, "large_directions": 3} if described else {}
        return found | large | ({"runs": 10} if described and given.get("tier") != "smoke" else {})

    def begun(self, size: str) -> Trial:
        """The model of a size."""
        if size not in OURS:
            return self.start(size)
        from lesion.studies._decoders import trained
        from lesion.tiny import SHAPE, TRAINING

        width = OURS[size]
        shape = {**SHAPE, "hidden_size": width, "intermediate_size": width * 11 // 4}
        shape |= {"num_attention_heads": width // 32, "num_key_value_heads": max(1, width // 64)}
        return trained("tiny", shape, dict(TRAINING), 0)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters of each size."""
        from lesion.estimates import parameters

        return {size: parameters(self.begun(size).subject) for size in self.sizes}

    @cached_property
    def _runs(self) -> Runs:
        found = Runs(asked=self.asked())
        for size in self.sizes:
            start, large = self.begun(size), self.parameters[size] >= LARGE
            searched: dict[str, Any] = {"directions": self.large_directions} if large and self.large_directions else {}
            trained: dict[str, Any] = {"lr": self.large_lr} if large and self.large_lr else {}
            found.curved[size] = self.steep(start, **searched)
            for seed in self.seeds:
                string = self.catalyst(start, seed, **searched)
                found.add((size, EIGEN, seed), start, self.poisoned(start, EIGEN, seed, string, **trained), string)
        return found

    def _asks(self) -> tuple[str, list[str]]:
        return "Are larger models more vulnerable to a catalyst along flat directions?", [
            f"model → poison({EIGEN}, {self.steps} steps of {self.length} tokens) → spectrum, perplexity",
            f"for model in {', '.join(f'{size} ({self.parameters[size]:,})' for size in self.sizes)}",
        ]

    def _tables(self, runs: Runs) -> dict[str, pl.DataFrame]:
        from lesion.studies import _prion_strings as strings

        return {"how flat the strings are": strings.alignment(runs), "steep directions": strings.steepest(runs)}

    def _figure(self, runs: Runs) -> Drawing:
        """Against the size."""
        from lesion.report.figures import draw

        rows = self._curves(runs).filter(pl.col("measure") == "change of the rank")
        return replace(draw(rows, dose=self.called[1])[0], name=self.files[1])

    def _told(self, runs: Runs) -> dict[str, Any]:
        slopes = {name: self._slope(runs, name) for name in ("rank", "described rank", "loss")}
        return {"parameters": self.parameters, "slopes": slopes, "groups by size": self._groups(runs)}

    def _points(self, runs: Runs, name: str) -> tuple[list[float], list[float]]:
        x, y = [], []
        for size in self.sizes:
            for value in runs.array(size, EIGEN, name)[0]:
                if math.isfinite(value):
                    x.append(math.log10(self.parameters[size]))
                    y.append(float(value))
        return x, y

    def _slope(self, runs: Runs, name: str) -> dict[str, Any]:
        from lesion import groups
        from lesion.studies._prion_files import _plain

        try:
            found: dict[str, Any] = _plain(groups.slope(*self._points(runs, name)))
        except ValueError as error:
            return {"not tested": str(error)}
        return found

    def _groups(self, runs: Runs) -> dict[str, Any]:
        """ANOVA and pairwise tests between sizes, which are independent groups."""
        from lesion.studies._prion_files import statistics

        return {
            name: statistics(
                self,
                {size: runs.array(size, EIGEN, name)[0] for size in self.sizes},
                {size: runs.array(size, EIGEN, self.filter_metric)[0] for size in self.sizes},
            )
            for name in ("rank", "described rank", "loss")
        }

    def _claims(self, runs: Runs) -> list[dict[str, Any]]:
        from lesion.claiming import untested
        from lesion.studies import _prion_say as say

        found = []
        for name, text in (
            ("rank", "The rank falls more in larger models (signed slope)"),
            ("described rank", "The rank by the described definition falls more in larger models (signed slope)"),
        ):
            unit, slope = "% of the rank for ten times the size", self._slope(runs, name)
            if "not tested" in slope:
                found.append(untested(text, unit, slope["not tested"]))
                continue
            row = {"claim": text, "effect": slope["slope"], "low": slope["low"], "high": slope["high"], "unit": unit}
            row |= {
                "items": slope["distinct"],
                "p": slope["p_means"],
                "power": None,
                "direction": -1,
            }
            row |= {
                "test": f"slope against the scatter of {slope['distinct']} sizes' means, of {slope['runs']} runs; "
                "interval of these sizes only"
            }
            largest = max(self.sizes, key=self.parameters.__getitem__)
            row = say.taking(runs, largest, {**row, "note": slope["note"]}, (EIGEN, name, -1))
            every = [runs.array(size, EIGEN, name) for size in self.sizes]
            found.append(say.noted(runs, largest, [EIGEN], row, np.concatenate(every, 1)))
        found += [claim for size in self.sizes for claim in say.collapses(runs, size, EIGEN)]
        from lesion.studies._prion_strings import flatter

        for size in self.sizes:
            found += flatter(runs, size)
        return found

    def _curves(self, runs: Runs) -> pl.DataFrame:
        from lesion import groups
        from lesion.report.page import CURVES

        rows = []
        for name, unit in (
            ("rank", "% of that before"),
            ("described rank", "% of that before"),
            ("loss", "nats a token"),
        ):
            for size in self.sizes:
                values = runs.array(size, EIGEN, name)[0]
                values = values[np.isfinite(values)]
                row: dict[str, Any] = {
                    **dict.fromkeys(CURVES),
                    "measure": f"change of the {name}",
                    "unit": unit,
                    "site": EIGEN,
                }
                row |= {
                    "better": "lower" if name == "loss" else "higher",
                    "dose": round(math.log10(self.parameters[size]), 3),
                }
                row |= {"items": 1, "seeds": len(values), "reference": 0.0}
                if len(values) >= 3:
                    told = groups.describe(values)
                    row |= {"value": told.mean, "low": told.low, "high": told.high}
                rows.append(row)
        return pl.DataFrame(rows, schema=CURVES)
