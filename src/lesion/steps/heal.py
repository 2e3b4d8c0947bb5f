"""Healing: a model is trained further on clean text, after whatever was done to it.

Every weight is trained with the usual loss of language modelling through the one loop (`lesion.fit`). What it brings back is
a question for measures; the ledger says how far the loss fell and what share of the weights moved.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from lesion.fit import Training, fit
from lesion.packing import Packed, pack
from lesion.texts import corpus, corpus_digest
from lesion.trial import Specimen, Step


def packed(specimen: Specimen, name: str, first: int, count: int, how: Training) -> Packed:
    """Documents `first` to `first + count − 1` of a corpus (0: all that follow), as the model's tokens."""
    assert specimen.tokenizer is not None
    if specimen.model.config.is_encoder_decoder:
        raise ValueError("training on running text is defined for causal models, and this one is encoder-decoder")
    end = specimen.tokenizer.eos_token_id
    if end is None:
        raise ValueError("this tokenizer has no end token, which stands between documents")
    chosen = corpus(name)[first : first + count if count else None]
    tokens = [specimen.tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"] for d in chosen]
    return pack(tokens, end, how.length, how.seed, how.documents)


class Heal(Training, Step):
    """Trains every weight on documents of a corpus; the documents before `skip` are left for measures."""

    keeps: ClassVar[bool] = True

    corpus: str = Field(default="austen", description="clean text: a packaged corpus, or a .txt, .jsonl or .csv file")
    skip: int = Field(
        default=12, ge=0, description="first so many documents are not trained on; they are the held-out loss"
    )
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the trial is pinned")

    def pin(self) -> Self:
        return self.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def touches(self, specimen: Specimen) -> list[str]:
        return [name for name, p in specimen.model.named_parameters() if p.requires_grad]

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        data = packed(specimen, self.corpus, self.skip, 0, self)
        held = packed(specimen, self.corpus, 0, self.skip, self) if self.skip and self.eval_every else None
        if specimen.place is not None:
            return fit(specimen.model, data, self, folder=specimen.place, held_out=held, tell=specimen.tell)
        with tempfile.TemporaryDirectory() as folder:  # nobody will come back to it
            return fit(specimen.model, data, self, folder=Path(folder), held_out=held, tell=specimen.tell)
