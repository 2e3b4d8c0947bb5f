"""Fine-tuning: a model is taught the replies of a task, as GPT-2 and T5 were taught theirs (Radford et al. 2018, section 3.2;
Raffel et al. 2020, section 2.4).

    subject >> Finetune(task=Sst2())                      every weight
    subject >> Lora(rank=16) >> Finetune(task=Sst2())     adapters alone; `merge` folds them in
"""

from __future__ import annotations

from lesion.responsetraining import ResponseTraining


class Finetune(ResponseTraining):
    """Teaches a task, in the task's own words."""
