"""modern-sinks: what becomes of a decoder far beyond the length it was trained on, and do attention sinks help?

    scratch → pretrain → [streaming] → Extrapolation, Continuation → Prose

for attention × context × seed. One plain decoder is read with full attention, with a rolling window alone, and with its first
tokens kept beside the window; others were trained with learned sink tokens or with a learned sink logit a head (Xiao et al.
2023). All are read on the same tokens of text that none was trained on, up to 16 times the training length.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.studies._decoders import shape, trained
from lesion.study import Answer, Study
from lesion.subjects import parse
from lesion.trial import Reading, Trial, describe

if TYPE_CHECKING:
    from lesion.store import Store
    from lesion.sweep import Sweep

TIERS: dict[str, dict[str, Any]] = {
    "full": {"size": "30m", "vocabulary": 8192, "corpus": "wikitext-103", "held_out": "wikitext-2-test"}
    | {"length": 1024, "steps": 20_000, "batch": 32, "precision": "bfloat16", "lr": 6e-4, "warmup": 500},
    "small": {"size": "small", "vocabulary": 1024, "length": 128, "steps": 700, "batch": 16, "lr": 2e-3}
    | {"precision": "bfloat16", "stretches": 24, "samples": 8, "repeats": 3},
    "smoke": {"size": "smoke", "vocabulary": 512, "length": 16, "steps": 20, "batch": 4, "lr": 1e-2, "warmup": 2}
    | {"stretches": 4, "samples": 2, "new_tokens": 8, "repeats": 1},
}
TRAINED = {"plain": "trained plain", "tokens": "learned sink tokens", "logit": "learned sink logits"}
MARGIN = 0.05  # nats a token: a smaller difference is called none


class ModernSinks(Study):
    """Does a decoder survive beyond its training length, and what do attention sinks do for it?"""

    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="other defaults: hours on a card, a quarter of an hour on two cores, or seconds"
    )
    subject: str = Field(
        default="",
        description="a lesion-decoder that is there already, such as tiny, in the place of those trained here",
    )
    size: str = Field(default="30m", description="1m, 6m, 30m, 125m, 350m, 1b, tiny, small or smoke")
    vocabulary: int = Field(default=8192, ge=260, description="ids of the tokenizer, learned from the corpus")
    corpus: str = Field(default="novels", description="what is trained on: a packaged corpus, a file, or a hub's")
    held_out: str = Field(default="austen", description="what is read: a corpus that is not trained on")
    length: int = Field(default=256, ge=8, description="tokens of a training row, and of the window")
    steps: int = Field(default=1000, ge=1, description="optimizer steps of each training")
    batch: int = Field(default=16, ge=1, description="rows of a step")
    split: int = Field(default=1, ge=1, description="parts that a step's rows are computed in, to save memory")
    lr: float = Field(default=3e-3, gt=0, description="largest learning rate")
    warmup: int = Field(default=50, ge=0, description="steps over which it rises")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of training")
    training: tuple[Literal["plain", "tokens", "logit"], ...] = Field(
        default=("plain", "tokens", "logit"), min_length=1, description="decoders that are trained"
    )
    sinks: int = Field(default=4, ge=1, description="first tokens that are kept beside the window")
    learned: int = Field(default=1, ge=1, description="learned sink tokens that every training row begins with")
    times: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16), min_length=1, description="contexts, × length")
    stretches: int = Field(default=16, ge=2, description="stretches of held-out text")
    samples: int = Field(default=8, ge=0, description="stretches that are continued; 0: none")
    new_tokens: int = Field(default=64, ge=1, description="length of a continuation")
    repeats: int = Field(default=3, ge=1, description="trainings of each decoder: seed, seed + 1, …")
    seed: int = Field(default=0, ge=0, description="first seed")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return TIERS.get(given.get("tier", "full"), {})

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        shape(self.size)
        if self.subject and (self.repeats > 1 or self.training != ("plain",)):
            raise ValueError(
                "a model that is there already is plain and not trained again: --training plain --repeats 1"
            )
        if self.length <= max(self.sinks, self.learned):
            raise ValueError(f"a window of {self.length} has no room beside {max(self.sinks, self.learned)} sinks")
        return self

    @cached_property
    def _trained(self) -> dict[str, dict[int, Trial]]:
        """Kind of training → seed → the decoder as it was trained."""
        return {kind: {seed: self._sentence(kind, seed) for seed in self._seeds} for kind in self.training}

    def _sentence(self, kind: str, seed: int) -> Trial:
        if self.subject:
            return Trial(subject=parse(self.subject)).pin()
        n = self.learned
        kinds: dict[str, dict[str, Any]] = {
            "plain": {},
            "tokens": {"sinks": "tokens", "sink_tokens": n, "window": self.length - n},
            "logit": {"sinks": "logit"},
        }
        room = self.times[-1] * self.length + self.new_tokens + n
        config = {**kinds[kind], "vocab_size": self.vocabulary, "max_position_embeddings": room}
        names = ("corpus", "length", "steps", "batch", "split", "lr", "warmup", "precision")
        training = {name: getattr(self, name) for name in names}
        return trained(self.size, config, {**training, "documents": "joined", "floor": 0.02}, seed)

    @cached_property
    def _arms(self) -> dict[str, dict[int, Trial]]:
        """Attention → seed → the model as it is read."""
        from lesion.steps import Streaming

        found: dict[str, dict[int, Trial]] = {}
        t = self.length
        for kind, of_seed in self._trained.items():
            found[TRAINED[kind] if kind != "plain" else "full attention"] = of_seed
            alone = Streaming(window=t, sinks=0)
            if kind == "plain":
                found["window"] = {s: trial >> alone for s, trial in of_seed.items()}
                kept = Streaming(window=t - self.sinks, sinks=self.sinks)
                found["window + first tokens"] = {s: trial >> kept for s, trial in of_seed.items()}
            if kind == "logit":
                found[f"{TRAINED[kind]} + window"] = {s: trial >> alone for s, trial in of_seed.items()}
        return found

    @property
    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.repeats)

    @cached_property
    def _cells(self) -> dict[tuple[str, int], dict[str, Reading]]:
        """(attention, seed) → its readings."""
        from lesion.measures import Continuation, Extrapolation, Prose

        text: dict[str, Any] = {"corpus": self.held_out, "length": self.length, "times": self.times}
        far = Extrapolation(**text, stretches=self.stretches).pin()
        fresh = Extrapolation(**text, stretches=self.stretches, fresh=True).pin()
        cells: dict[tuple[str, int], dict[str, Reading]] = {}
        for (name, of_seed), seed in itertools.product(self._arms.items(), self._seeds):
            trial = of_seed[seed]
            found = {"extrapolation": Reading(trial=trial, measure=far)}
            if self.samples:
                how = {**text, "stretches": self.samples, "new_tokens": self.new_tokens, "seed": seed}
                found["continuation"] = Reading(trial=trial, measure=Continuation(**how).pin())
                found["prose"] = Reading(trial=trial, measure=Prose(of=found["continuation"]))
            cells[name, seed] = found
            if name == "full attention":
                cells["read afresh", seed] = {"extrapolation": Reading(trial=trial, measure=fresh)}
        return cells

    def readings(self) -> list[Reading]:
        return list({r.key: r for cell in self._cells.values() for r in cell.values()}.values())

    def check(self, store: Store) -> None:
        from lesion.texts import apart

        if not self.subject:
            apart(self.corpus, self.held_out)

    def answer(self, store: Store) -> Answer:
        from lesion.studies import _sinks as say

        rows = self.rows(store)
        sweep = self._sweep(rows)
        return Answer(
            question=f"What becomes of {self.subject or 'a decoder'} trained on {self.length} tokens at up to "
            f"{self.times[-1]} times that?",
            sentences=self._sentences(),
            summary=say.summary(sweep, self._trainings(store)),
            curves=sweep.curves([o for o in say.OUTCOMES if sweep.has(o)]),
            generations=say.generations(self._cells, rows),
            claims=say.claims(sweep, self.times[-1], MARGIN),
            extra={"training": self._trainings(store)},
            notes=[*self._notes(), *self.said_of_missing(store)],
            missing=self.missing(store),
            words=("attention", "context, in training lengths"),
        )

    def _sweep(self, rows: dict[str, dict[str, Any]]) -> Sweep:
        """Cells by context: items of one stretch have one name in all of them."""
        from lesion.sweep import Sweep

        found: dict[tuple[str, float, int], dict[str, dict[str, Any]]] = {}
        for (name, seed), readings in self._cells.items():
            for measure, reading in readings.items():
                for item, row in rows.get(reading.key, {}).items():
                    stretch, _, times = item.rpartition("@")
                    found.setdefault((name, float(times), seed), {}).setdefault(measure, {})[stretch] = row
        names = list(dict.fromkeys(name for name, _ in self._cells))
        return Sweep(names, [float(k) for k in self.times], self._seeds, found)

    def _trainings(self, store: Store) -> Any:
        import polars as pl

        rows = []
        for kind, seed in itertools.product(self.training, self._seeds):
            key = self._trained[kind][seed].key
            ledger = store.index.states[key]["ledger"] if key in store.index.states else []
            facts: dict[str, Any] = next((entry["facts"] for entry in ledger if "facts" in entry), {})
            rows.append({"decoder": TRAINED[kind], "seed": seed, "parameters": facts.get("trained")})
            rows[-1] |= {"last training loss": facts.get("loss"), "rows": facts.get("rows")}
        schema = {"decoder": pl.String, "seed": pl.Int64, "parameters": pl.Int64, "last training loss": pl.Float64}
        return pl.DataFrame(rows, schema={**schema, "rows": pl.Int64})

    def _sentences(self) -> list[str]:
        said = [
            describe(s.model_copy(update={"sha256": None})) for s in self._trained[self.training[0]][self.seed].steps
        ]
        first = self.subject or f"scratch ({self.size}, vocabulary {self.vocabulary})"
        return [
            " → ".join([first, *said, "streaming", "extrapolation, continuation"]),
            f"for attention in {', '.join(dict.fromkeys(name for name, _ in self._cells))}; "
            f"context in {', '.join(f'{k} × {self.length}' for k in self.times)}; seed in {', '.join(map(str, self._seeds))}",
        ]

    def _notes(self) -> list[str]:
        notes = [
            "Every point is the perplexity of the same tokens: the last half of a training length at the end of the context. "
            "Intervals: 95 %, crossed bootstrap over trainings and stretches of text; p values are corrected after Holm.",
            "“read afresh” reads only the last training length of each context: what the plain decoder can do when nothing is "
            "kept, and the yardstick for the others.",
        ]
        if self.repeats == 1:
            notes.append("One training of each: the intervals speak of texts only, not of another training.")
        return notes
