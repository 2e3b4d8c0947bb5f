"""Preference: of two replies, which one does a model find likelier than a reference did, and how far has it gone from there?

    margin = (ln π(y⁺) − ln r(y⁺)) − (ln π(y⁻) − ln r(y⁻))    nats; the implicit reward's difference over β (Rafailov et al. 2023)
    kl     = mean over the tokens of both replies of KL(π ‖ r), over the whole vocabulary, in nats

A pair is right where its margin is positive. Without a reference the margin is ln π(y⁺) − ln π(y⁻), and there is no divergence.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from lesion import asking
from lesion.stats import wilson
from lesion.task import AnyTask, Part, sampled
from lesion.tasks.preferences import Preferences
from lesion.trial import Measure, Row, Specimen, Trial


class Preference(Measure):
    """Margins between preferred and rejected replies, one row a pair."""

    chunk: ClassVar[int] = 8

    task: AnyTask = Field(default=Preferences(), description="pairs of replies, the better one first")
    part: Part = Field(default="test", description="which of its examples")
    sample: int = Field(default=0, ge=0, description="so many of them, drawn at random; 0: all")
    seed: int = Field(default=0, ge=0, description="of the sample")
    chat: asking.Chat = Field(default="auto", description=f"how prompts are put; {asking.TOLD}")
    cut: int = Field(default=0, ge=0, description="first so many tokens of a reply; 0: all")
    length: int = Field(default=512, ge=2, description="tokens of prompt and reply; a longer pair is not read")
    reference: Trial | None = Field(default=None, description="the model that was begun with")

    def items(self, specimen: Specimen) -> list[str]:
        return [e.id for e in sampled(self.task.examples(self.part), self.sample, self.seed)]

    def size(self) -> tuple[int, int]:
        chosen = sampled(self.task.examples(self.part), self.sample, self.seed)
        models = 1 if self.reference is None else 2
        return len(chosen), models * sum(2 * len(e.asked) + sum(map(len, e.choices)) for e in chosen) // 4

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion import preferring

        if specimen.model.config.is_encoder_decoder:
            raise ValueError("preferences are read with causal models, and this one is encoder-decoder")
        started, wanted = time.perf_counter(), set(items)
        examples = {e.id: e for e in self.task.examples(self.part) if e.id in wanted}
        found = preferring.replies(specimen, self.task, [examples[i] for i in items], self.chat, self.cut)
        model, other = specimen.model, self._reference(specimen)
        rows = []
        for item, pair in zip(items, found, strict=True):
            row: Row = {"item": item, "asked": examples[item].asked[-240:], "outcome": "too long"}
            row |= dict.fromkeys(("better", "worse", "better_before", "worse_before", "kl", "margin", "correct"))
            row |= {"better_tokens": len(pair[1]), "worse_tokens": len(pair[2])}
            if not preferring.differ(pair):
                row["outcome"] = "the same after the cut"
            elif len(pair[0]) + max(row["better_tokens"], row["worse_tokens"]) <= self.length:
                row |= _read(model, other, pair)
            rows.append(row)
        return [{**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows]

    def _reference(self, specimen: Specimen) -> Any:
        if self.reference is None:
            return None
        assert specimen.bring is not None, "the walk can bring a second model"
        return specimen.bring(self.reference).model

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        good = [row for row in rows if row["outcome"] == "read"]
        said: dict[str, Any] = {"pairs": len(good), "too_long": sum(row["outcome"] == "too long" for row in rows)}
        said |= {"not_finite": sum(row["outcome"] == "not finite" for row in rows)}
        said["accuracy"] = statistics.fmean(float(row["correct"]) for row in good) if good else None
        if good:
            said["low"], said["high"] = wilson(said["accuracy"], len(good))
        for name in ("margin", "kl"):
            values = [row[name] for row in good if row[name] is not None]
            said[name] = statistics.fmean(values) if values else None
        return said


def _read(model: Any, other: Any, pair: Any) -> Row:
    """Log-probabilities of both replies under both models, and what follows from them."""
    import torch

    from lesion import preferring
    from lesion.inference import inference
    from lesion.loss import IGNORE

    ids, targets, at = (x.flatten(0, 1).to(model.device) for x in preferring.rows([pair]) if x is not None)
    logs, values = [], []
    for one in (model, *([other] if other is not None else [])):
        with inference(one):
            logits = one(input_ids=ids, position_ids=at, use_cache=False).logits[targets != IGNORE].float()
        log = logits.log_softmax(-1)
        chosen = log.gather(1, targets[targets != IGNORE][:, None])[:, 0].double()
        rows = (targets != IGNORE).nonzero()[:, 0]
        values.append([float(chosen[rows == i].sum()) for i in (0, 1)])
        logs.append(log)
    better, worse = values[0]
    row: Row = {"outcome": "read", "better": better, "worse": worse, "margin": better - worse}
    if other is not None:
        row |= {"better_before": values[1][0], "worse_before": values[1][1]}
        row["margin"] -= values[1][0] - values[1][1]
        row["kl"] = float(torch.nn.functional.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True).double())
    row["correct"] = row["margin"] > 0
    numbers = [value for value in row.values() if isinstance(value, float)]
    if not all(map(math.isfinite, numbers)):
        return {"outcome": "not finite"}
    return row
