"""evaluate: models that are there already are read and sampled, and nothing is trained.

    kept state, kept state, …  →  Perplexity, Generation

The states are folders of a lab (`lab/states/*`), each of which knows its sentence; models that lie elsewhere are named as
subjects. Every model is compared with the first one, document by document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.study import Answer, Study
from lesion.trial import Reading, Trial, describe

if TYPE_CHECKING:
    from lesion.store import Store

MOST = 40  # letters of a name in a table


class Evaluate(Study):
    """How do models that are there already predict, and what do they write?"""

    tier: Literal["full", "smoke"] = Field(default="full", description="smoke: a few documents and tokens, in seconds")
    states: tuple[str, ...] = Field(default=(), description="folders of kept states, such as lab/states/*")
    subjects: tuple[str, ...] = Field(default=(), description="further models: smollm2, tiny, ./folder, org/name")
    measures: tuple[Literal["perplexity", "generation"], ...] = Field(
        default=("perplexity", "generation"), min_length=1, description="perplexity: evaluate; generation: sample"
    )
    corpus: str = Field(default="austen", description="held-out text: a packaged corpus, a file, or a hub's")
    documents: int = Field(default=0, ge=0, description="first so many documents; 0: all")
    tokens: int = Field(default=0, ge=0, description="first so many tokens of each document; 0: all")
    window: int = Field(default=256, ge=2, description="perplexity window, in tokens")
    stride: int = Field(default=128, ge=1, description="perplexity stride, in tokens")
    battery: str = Field(default="small", description="prompts: a packaged battery, or a .jsonl or .csv file")
    prompts: int = Field(default=0, ge=0, description="first so many prompts; 0: all")
    new_tokens: int = Field(default=48, ge=1, description="length of a sample, in tokens")
    temperature: float = Field(default=0.8, ge=0, description="0: greedy")
    seed: int = Field(default=0, ge=0, description="of the sampling")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"documents": 2, "tokens": 64, "prompts": 4, "new_tokens": 8} if given.get("tier") == "smoke" else {}

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.states and not self.subjects:
            raise ValueError("nothing to evaluate: name --states (folders such as lab/states/*) or --subjects")
        return self

    @cached_property
    def _trials(self) -> dict[str, Trial]:
        """Name → the model. Raises ValueError for a folder that is no kept state, and for two of one name."""
        from lesion.subjects import parse

        found: dict[str, Trial] = {}
        for text in self.states:
            folder = Path(text).expanduser()
            if folder.name.startswith("."):
                continue  # under way
            file = folder / "trial.json"
            if not file.is_file():
                raise ValueError(f"{folder} is no kept state: expected a folder with trial.json, as in lab/states/*")
            trial = Trial.from_json(json.loads(file.read_text(encoding="utf-8")))
            if trial.key != folder.name:
                raise ValueError(f"{folder} holds the sentence of state {trial.key}: it was renamed or edited")
            last = describe(trial.steps[-1].model_copy(update={"sha256": None})) if trial.steps else "as it came"
            found[f"{folder.name[:8]} {last}"[:MOST]] = trial
        for text in self.subjects:
            found[text] = Trial(subject=parse(text)).pin()
        if not found:
            raise ValueError(f"nothing to evaluate: no finished state among {', '.join(self.states)}")
        return found

    def check(self, store: Store) -> None:
        """A state that this lab does not have would be trained again."""
        for text in self.states:
            key = Path(text).name
            if not key.startswith(".") and store.state_folder(key) is None:
                raise ValueError(f"state {key} is not kept in the lab {store.root}: name its own lab with --lab")

    @cached_property
    def _cells(self) -> dict[str, dict[str, Reading]]:
        from lesion.measures import Generation, Perplexity

        text: dict[str, Any] = {"corpus": self.corpus, "documents": self.documents, "tokens": self.tokens}
        how: dict[str, Any] = {"battery": self.battery, "prompts": self.prompts, "new_tokens": self.new_tokens}
        made = {
            "perplexity": lambda: Perplexity(**text, window=self.window, stride=self.stride),
            "generation": lambda: Generation(**how, temperature=self.temperature, seed=self.seed),
        }
        pinned = {name: made[name]().pin() for name in self.measures}
        return {
            name: {kind: Reading(trial=trial, measure=measure) for kind, measure in pinned.items()}
            for name, trial in self._trials.items()
        }

    def readings(self) -> list[Reading]:
        return list({r.key: r for cell in self._cells.values() for r in cell.values()}.values())

    def answer(self, store: Store) -> Answer:
        from lesion.studies import _evaluate as say

        rows = self.rows(store)
        cells = {
            name: {kind: rows[r.key] for kind, r in cell.items() if r.key in rows} for name, cell in self._cells.items()
        }
        notes = [
            "Intervals: 95 %, bootstrap over documents or prompts. All models read the same; tokens are their own."
        ]
        return Answer(
            question=f"How do {len(cells)} models that are there already predict {self.corpus}, and what do they write?",
            sentences=[f"{trial} → {', '.join(self.measures)}" for trial in self._trials.values()],
            summary=say.summary(cells),
            curves=say.no_curves(),
            generations=say.generations(cells, self.seed),
            claims=say.claims(cells) if "perplexity" in self.measures and len(cells) > 1 else None,
            notes=[*notes, *self.said_of_missing(store)],
            missing=self.missing(store),
            files=say.files(cells),
            words=("model", "run"),
        )
