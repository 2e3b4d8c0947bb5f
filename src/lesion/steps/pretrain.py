"""Pretraining: random weights become a language model, with a tokenizer learned from the same text.

The tokenizer is learned from exactly the documents that are trained on, with as many ids as the model has rows, so nothing of
the held-out text is known to it. It goes with the model from here on: it is kept beside the weights, and the ledger has its
digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from lesion.packaged import VOCABULARY
from lesion.texts import Document
from lesion.texttraining import TextTraining
from lesion.trial import Specimen
from lesion.vocabularies import train


class Pretrain(TextTraining):
    """Trains random weights on a corpus, and a tokenizer first."""

    corpus: str = Field(default="novels", description=TextTraining.model_fields["corpus"].description)
    skip: int = Field(default=0, ge=0, description=TextTraining.model_fields["skip"].description)
    tokenizer: Literal["train", "keep"] = Field(
        default="train",
        description="train: learned from the same documents, as many ids as the model has; keep: as it is",
    )

    def prepare(self, specimen: Specimen, documents: Sequence[Document]) -> dict[str, Any]:
        if self.tokenizer == "keep":
            return {}
        assert specimen.tokenizer is not None
        if len(specimen.tokenizer) != VOCABULARY:
            raise ValueError(
                f"this model has a tokenizer of {len(specimen.tokenizer)} ids already, which its weights know: "
                "tokenizer='keep' trains on with it"
            )
        config = specimen.model.config.get_text_config()
        begin = config.sink_tokens if getattr(config, "sinks", None) == "tokens" else 0
        specimen.tokenizer = train((d.text for d in documents), config.vocab_size, begin)
        return {"vocabulary": len(specimen.tokenizer)}
