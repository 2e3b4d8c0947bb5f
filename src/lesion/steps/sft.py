"""Supervised fine-tuning on instructions: a model of text becomes one that answers and then stops (Ouyang et al. 2022, section
3.5, step 1; the data of Alpaca, Taori et al. 2023).
"""

from __future__ import annotations

from pydantic import Field

from lesion import asking
from lesion.responsetraining import ResponseTraining
from lesion.task import AnyTask
from lesion.tasks.instructions import Instructions


class Sft(ResponseTraining):
    """Teaches responses to instructions, in the chat template where there is one."""

    task: AnyTask = Field(default=Instructions(), description="instructions with responses")
    chat: asking.Chat = Field(default="auto", description=f"how they are put; {asking.TOLD}")
    length: int = Field(default=512, ge=2, description="tokens of a row; a longer example is left out")
    lr: float = Field(default=2e-5, gt=0, description="largest learning rate")
