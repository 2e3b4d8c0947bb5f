"""Judge: what another language model, behind any OpenAI-compatible endpoint, makes of stored texts.

Never needed and never a default. Each judgment is a row with the raw reply beside the scores, so a judged lab can be read
again without the judge. A judge is a measuring instrument of unknown error: ask two, and look at their agreement (Zheng
et al. 2023, "Judging LLM-as-a-judge").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from lesion.judging import RUBRICS, ask, refuse_secrets
from lesion.trial import MeasureOfTexts, Row, Specimen


class Judge(MeasureOfTexts):
    """Scores of stored texts by a rubric, as a judge model gives them."""

    model_config = ConfigDict(hide_input_in_errors=True)  # what is refused may be a key

    on_bench: ClassVar[bool] = False
    chunk = 8  # what is judged is kept, so that a failing endpoint costs little

    endpoint: str = Field(description="base address, such as http://localhost:8000/v1")
    model: str = Field(min_length=1, description="the judge, as the endpoint names it")
    rubric: Literal["reasoning", "narrative"] = Field(description="what is judged")
    key_variable: str | None = Field(
        default=None, description="name of the environment variable with the API key, which is stored nowhere"
    )
    timeout: float = Field(default=60.0, gt=0, description="seconds of one attempt")
    retries: int = Field(default=4, ge=0, description="further attempts after a failure that may pass")

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        refuse_secrets(self.endpoint, self.key_variable)
        return self

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        rubric, rows = RUBRICS[self.rubric], []
        written = self.written(specimen)
        for item in items:
            said = ask(
                self.endpoint,
                self.model,
                rubric.messages(written[item]["asked"], written[item]["text"]),
                schema=rubric.schema(),
                key=self.key_variable,
                timeout=self.timeout,
                retries=self.retries,
            )
            rows.append({"item": item, **said.pop("scores"), **said, "duration": said["seconds"]})
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        names = [criterion.name for criterion in RUBRICS[self.rubric].criteria]
        return {name: math.fsum(row[name] for row in rows) / len(rows) for name in names} | {"judged": len(rows)}
