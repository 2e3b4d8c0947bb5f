"""modern: everything that is described of a modern language model, in one command.

    modern-lm      a decoder from random weights, beside counting
    modern-sinks   the same far beyond its training length
    modern-tasks   prompting, adapters and fine-tuning on tasks
    modern-align   instructions, preferences, a verifier

Each is a study of its own and can be run alone, from the same lab: what one has read, the other finds. Here their claims stand
together, corrected within each study.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
from pydantic import Field

from lesion.study import Answer, Study, study
from lesion.trial import Reading

if TYPE_CHECKING:
    from lesion.store import Store

DESCRIBED = {"modern-lm": ("rtx3060",), "modern-tasks": ("gpt2", "t5-small")}  # presets of the tier full
PARTS = ("modern-lm", "modern-sinks", "modern-tasks", "modern-align")


class Modern(Study):
    """A decoder from scratch, its sinks, tasks and alignment."""

    tier: Literal["full", "small", "smoke"] = Field(
        default="full", description="of every part: as described, an hour or two on two cores, or a minute"
    )
    parts: tuple[Literal["modern-lm", "modern-sinks", "modern-tasks", "modern-align"], ...] = Field(
        default=("modern-lm", "modern-sinks", "modern-tasks", "modern-align"),
        min_length=1,
        description=", ".join(PARTS),
    )

    @cached_property
    def studies(self) -> dict[str, Study]:
        """Parts by name; at full the described models, of which tasks have two."""
        found: dict[str, Study] = {}
        for name in self.parts:
            for preset in DESCRIBED.get(name, ("",)) if self.tier == "full" else ("",):
                how = {"tier": self.tier} | ({"preset": preset} if preset else {})
                found[f"{name} ({preset})" if preset else name] = study(name).model_validate(how)
        return found

    def readings(self) -> list[Reading]:
        return list({r.key: r for part in self.studies.values() for r in part.readings()}.values())

    def check(self, store: Store) -> None:
        for part in self.studies.values():
            part.check(store)

    def answer(self, store: Store) -> Answer:
        answers = {name: part.answer(store) for name, part in self.studies.items()}
        extra: dict[str, pl.DataFrame] = {}
        files: dict[str, bytes] = {}
        for name, one in answers.items():
            extra |= {f"{name}": one.summary} | {f"{name}: {title}": frame for title, frame in one.extra.items()}
            files |= {f"{name}/{path}": content for path, content in one.files.items()}
        return Answer(
            question="What does a modern language model learn, from random weights to preferences?",
            sentences=[sentence for one in answers.values() for sentence in one.sentences],
            summary=pl.DataFrame([_row(name, one) for name, one in answers.items()], infer_schema_length=None),
            curves=_together(answers, "curves", ("measure",)),
            generations=_together(answers, "generations", ("site",)),
            claims=_together(answers, "claims", ("claim",)),
            extra=extra,
            notes=[f"{name}: {note}" for name, one in answers.items() for note in one.notes],
            missing=sum(one.missing for one in answers.values()),
            files=files,
            drawings=[drawing for one in answers.values() for drawing in one.drawings],
            words=("model", "step (modern-sinks: context, in training lengths)"),
        )


def _row(name: str, one: Answer) -> dict[str, Any]:
    """A part in a line: its question, and what became of its claims."""
    verdicts = Counter(one.claims["verdict"].to_list() if one.claims is not None else [])
    kinds = ("supported", "contradicted", "inconclusive", "not tested")
    return {
        "study": name,
        "question": one.question,
        **{kind: verdicts.get(kind, 0) for kind in kinds},
        "missing": one.missing,
    }


def _together(answers: Mapping[str, Answer], frame: str, named: tuple[str, ...]) -> Any:
    """One frame of all parts, with the part in front of what names a row."""
    found = []
    for name, one in answers.items():
        some = getattr(one, frame)
        if some is not None:
            some = some.drop("group") if frame == "curves" and "group" in some.columns else some
            found.append(
                some.with_columns(pl.format("{}: {}", pl.lit(name), pl.col(column)).alias(column) for column in named)
            )
    return pl.concat(found) if found else None
