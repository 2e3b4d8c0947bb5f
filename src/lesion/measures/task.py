"""A task: how well a model replies to its questions, as it is (prompting, Brown et al. 2020) or after it was taught.

    rank        the choice that is the likeliest reply; log p(choice | question) in nats for each
                    total        as it is                     tokens      a token
                    calibrated   less log p(choice | the same prompt about "N/A"), its own taste (Zhao et al. 2021)
    generate    what the model writes, graded by the task

Tasks whose examples have choices are ranked, the others are written, unless `method` says otherwise. Of every right reply the
loss is read too (`nll` over `nll_tokens`, its end token included), which says something where no reply is right yet; of written
ones also that of the end token alone (`nll_end`): whether a model knows where to stop, however long its own replies are. Few-shot
examples are the same for all questions, and are read once for all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lesion import asking
from lesion.likelihood import context_of
from lesion.stats import macro_f1, wilson
from lesion.task import AnyTask, Example, Part, before, sampled, shots
from lesion.trial import Measure, Row, Specimen

if TYPE_CHECKING:
    from lesion.decode import Continuation

SHOWN = 240  # characters of a question that a row quotes: the last ones


class Task(Measure):
    """Replies to the questions of a task, one row each."""

    version: ClassVar[int] = 3  # signs before a currency count; a turn ends with what its template closes it with
    task: AnyTask = Field(description="what is asked")
    part: Part = Field(default="test", description="which of its examples")
    sample: int = Field(default=200, ge=0, description="so many of them, drawn at random; 0: all")
    shots: int = Field(default=0, ge=0, description="examples with their answers before each question")
    seed: int = Field(default=0, ge=0, description="of the sample, of the examples and of what is drawn")
    chat: asking.Chat = Field(default="plain", description=f"how questions are put; {asking.TOLD}")
    method: Literal["auto", "rank", "generate"] = Field(
        default="auto", description="auto: rank where there are choices"
    )
    normalise: Literal["total", "tokens", "calibrated"] = Field(
        default="total", description="of ranked log-likelihoods: none, a token, less that without the question"
    )
    repeats: int = Field(default=1, ge=1, description="replies to each question; several need a temperature")
    temperature: float = Field(default=0.0, ge=0, description="0: greedy")
    new_tokens: int = Field(default=0, ge=0, description="of a reply at most; 0: as the task says")
    batch: int = Field(default=32, ge=1, description="replies that are written at a time")

    def questions(self) -> dict[str, Example]:
        """Examples by item."""
        shown = {e.id for e in shots(self.task, self.shots, self.seed)}  # whose answers stand before every question
        chosen = sampled([e for e in self.task.examples(self.part) if e.id not in shown], self.sample, self.seed)
        if self.repeats == 1:
            return {e.id: e for e in chosen}
        if not self.temperature:
            raise ValueError("several replies to a question are the same without a temperature")
        return {f"{e.id}#{i}": e for e in chosen for i in range(self.repeats)}

    def items(self, specimen: Specimen) -> list[str]:
        return list(self.questions())

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """Four batches at a time, as of `generation`."""
        for start in range(0, len(items), 4 * self.batch):
            yield list(items[start : start + 4 * self.batch])

    def size(self) -> tuple[int, int]:
        asked = self.questions().values()
        some = len(before(self.task, self.shots, self.seed))
        return len(asked), sum((some + len(e.asked) + len(e.answer)) // 4 + self._room() for e in asked)

    def _before(self, specimen: Specimen) -> str:
        return before(self.task, self.shots, self.seed, specimen.model.config.is_encoder_decoder)

    def _room(self) -> int:
        return self.new_tokens or self.task.new_tokens

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        started, known = time.perf_counter(), self.questions()
        asked = {item: known[item] for item in items}
        ranks = self.method == "rank" or (self.method == "auto" and all(e.choices for e in known.values()))
        if ranks and not all(e.choices for e in known.values()):
            raise ValueError(f"the replies of {self.task.name!r} cannot be ranked: its examples have no choices")
        if ranks and self.repeats > 1:
            raise ValueError("a ranking is the same each time: repeats=1")
        examples = self._before(specimen)
        prompts = {i: asking.prompt(specimen, self.task, e, self.chat, examples) for i, e in asked.items()}
        replies = {c: asking.reply(specimen, self.task, c, self.chat) for e in asked.values() for c in e.choices}
        ranked = [(prompts[i], replies[c]) for i, e in asked.items() for c in e.choices] if ranks else []
        last = [asking.end(specimen, self.chat)]
        written: dict[str, tuple[list[int], list[int]]] = {}
        room = self._check(specimen, prompts, ranked)
        for item, e in asked.items():  # sampled replies to one question share their answer
            reply = [*asking.reply(specimen, self.task, e.answer, self.chat), *last]
            written.setdefault(e.id, (prompts[item], reply[: room[item]]))
        ending: dict[str, tuple[list[int], list[int]]] = {}
        if not ranks and not specimen.model.config.is_encoder_decoder:
            ending = {i: ([*p, *r[:-1]], last) for i, (p, r) in written.items() if r[-1:] == last}
        scores = log_likelihoods(specimen.model, [*ranked, *written.values(), *ending.values()])  # which share prompts
        first, end = len(ranked), len(ranked) + len(written)
        losses = dict(zip(written, scores[first:end], strict=True))
        ends = dict(zip(ending, scores[end:], strict=True))
        likely = scores[: len(ranked)]
        found = self._ranked(specimen, asked, replies, likely) if ranks else self._written(specimen, asked, prompts)
        rows = []
        for item, e in asked.items():
            row = {"item": item, "example": e.id, "asked": e.asked[-SHOWN:], "asked_characters": len(e.asked)}
            row |= {"answer": e.answer, **found[item]}
            nll: float | None = -losses[e.id]
            if row["outcome"] == "not finite" or not math.isfinite(losses[e.id]):  # nothing that is said of it counts
                nll = None
                row |= {"outcome": "not finite", "chosen": None, **dict.fromkeys(self.task.grade(e, ""))}
            last_nll = -ends[e.id] if nll is not None and e.id in ends else None
            rows.append({**row, "nll": nll, "nll_tokens": len(written[e.id][1]), "nll_end": last_nll})
        return [{**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows]

    def _check(
        self, specimen: Specimen, prompts: dict[str, list[int]], ranked: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> dict[str, int | None]:
        """How many tokens of a reply fit behind each question: of longer written answers so many are scored. Raises ValueError
        where a question with a ranked reply, or with a single token, is longer than the model's context."""
        context = context_of(specimen.model.config.get_text_config(decoder=False))
        if context is None or specimen.model.config.is_encoder_decoder:
            return dict.fromkeys(prompts)
        longest = max([len(p) + 1 for p in prompts.values()] + [len(p) + len(r) for p, r in ranked])
        if longest > context:
            raise ValueError(
                f"a question of {self.task.called!r} with {self.shots} examples and its reply has {longest} tokens, more than "
                f"the context of {context}" + (": ask with fewer shots" if self.shots else "")
            )
        return {item: context - len(p) for item, p in prompts.items()}

    def _ranked(
        self, specimen: Specimen, asked: dict[str, Example], replies: dict[str, list[int]], scores: list[float]
    ) -> dict[str, Row]:
        chosen = [c for e in asked.values() for c in e.choices]
        if self.normalise == "tokens":
            scores = [s / len(replies[c]) for s, c in zip(scores, chosen, strict=True)]
        if self.normalise == "calibrated":
            empty = Example("", "N/A", "")
            nothing = asking.prompt(specimen, self.task, empty, self.chat, self._before(specimen))
            alone = log_likelihoods(specimen.model, [(nothing, reply) for reply in replies.values()])
            free = dict(zip(replies, alone, strict=True))
            scores = [s - free[c] for s, c in zip(scores, chosen, strict=True)]
        rows, start = {}, 0
        for item, e in asked.items():
            some = scores[start : start + len(e.choices)]
            start += len(e.choices)
            fine = all(map(math.isfinite, some))
            best = max(range(len(some)), key=some.__getitem__) if fine else None
            rows[item] = {
                "outcome": "ranked" if fine else "not finite",
                "text": None if best is None else e.choices[best],
                "label": e.label,
                "chosen": best,
                "loglikelihoods": [s if math.isfinite(s) else None for s in some],
                "tokens": None,
                "stop": None,
                **({k: None for k in self.task.grade(e, "")} | {"correct": None if best is None else best == e.label}),
            }
        return rows

    def _written(self, specimen: Specimen, asked: dict[str, Example], prompts: dict[str, list[int]]) -> dict[str, Row]:
        from lesion import decode

        last, room = asking.end_tokens(specimen, self.chat), self._check(specimen, prompts, ())
        found = decode.continue_texts(
            specimen.model,
            [decode.Prompt(item, tuple(tokens), room=room[item]) for item, tokens in prompts.items()],
            decode.Sampling(temperature=self.temperature, top_k=0, top_p=1.0),
            new_tokens=self._room(),
            ends=last,
            line=asking.one_line(specimen.tokenizer) if self.task.line else None,
            seed=self.seed,
            batch=self.batch,
        )
        rows: dict[str, Row] = {}
        for reply in found:
            e, fine = asked[reply.item], reply.stop != "not finite"
            assert specimen.tokenizer is not None
            text = specimen.tokenizer.decode(reply.tokens, skip_special_tokens=True).strip()
            graded = self.task.grade(e, text)
            rows[reply.item] = {
                "outcome": "written" if fine else "not finite",
                "text": text,
                "label": e.label,
                "chosen": None,
                "loglikelihoods": None,
                "tokens": len(reply.tokens),
                "stop": self._stop(reply, last),
                **(graded if fine else dict.fromkeys(graded)),
            }
        return rows

    def _stop(self, reply: Continuation, last: frozenset[int]) -> str:
        """What ended a reply; "context": it could not become as long as was asked for."""
        if reply.stop == "end" and reply.ended_by not in last:
            return "line"
        return "context" if reply.stop == "length" and len(reply.tokens) < self._room() else reply.stop

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The task's metric with its interval at 95 % (Wilson's for shares), the loss a token of written answers, and of labels
        macro-F1, of what was written the share that an end token ended."""
        metric = self.task.metric
        known = [float(row[metric]) for row in rows if row[metric] is not None]
        said: dict[str, Any] = {"replies": len(known), "not_finite": len(rows) - len(known)}
        said |= {metric: statistics.fmean(known) if known else None}
        if known and set(known) <= {0.0, 1.0}:
            said["low"], said["high"] = wilson(said[metric], len(known))
        if any(row["chosen"] is not None for row in rows):
            said["macro_f1"] = f1(rows)
        written = [row["stop"] for row in rows if row["stop"] is not None]
        said |= {"ended": written.count("end") / len(written)} if written else {}
        losses = [(row["nll"], row["nll_tokens"]) for row in rows if row["nll"] is not None]
        said["loss"] = math.fsum(n for n, _ in losses) / sum(t for _, t in losses) if losses else None
        return said


def f1(rows: Iterable[Row]) -> float | None:
    """Macro-F1 of ranked replies by their words; None where questions have choices of their own, so that there are no classes."""
    there = [row for row in rows if row["chosen"] is not None]
    pairs = [(row["answer"], row["text"]) for row in there]
    classes = sorted({name for pair in pairs for name in pair})
    if not there or len(classes) > max(len(row["loglikelihoods"]) for row in there):
        return None
    right, said = ([classes.index(name) for name in names] for names in zip(*pairs, strict=True))
    return macro_f1(right, said)


def log_likelihoods(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """log p(reply | prompt) in nats of each pair of tokens; what is not finite is returned as it is."""
    from lesion import continuations, passages

    if not model.config.is_encoder_decoder:
        return [logprob for logprob, _ in continuations.score(model, pairs)]
    todo = [passages.Passage(str(i), tuple(r), 0, tuple(p)) for i, (p, r) in enumerate(pairs)]
    return [-mean * len(p.tokens) for mean, p in zip(passages.losses(model, todo), todo, strict=True)]
