"""Training on running text: what pretraining and healing share. Not a word of the grammar, a base of such words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import Field

from lesion.fit import Training, fit
from lesion.packing import Packed, pack
from lesion.texts import Document, corpus, corpus_digest
from lesion.trial import Specimen, Step


class TextTraining(Training, Step):
    """Trains every weight on documents of a corpus; the documents before `skip` are left for measures."""

    family: ClassVar[str] = "step"
    keeps: ClassVar[bool] = True

    corpus: str = Field(
        default="austen",
        description="text: a packaged corpus, a .txt, .jsonl or .csv file, wikitext-2, wikitext-103, tinystories, "
        "or hub:org/name[@revision]:files",
    )
    skip: int = Field(
        default=12, ge=0, description="first so many documents are not trained on; they are the held-out loss"
    )
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the trial is pinned")

    def pin(self) -> Self:
        return self.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def touches(self, specimen: Specimen) -> list[str]:
        return [name for name, p in specimen.model.named_parameters() if p.requires_grad]

    def prepare(self, specimen: Specimen, documents: Sequence[Document]) -> dict[str, Any]:
        """What is done before the first step, with the documents that are trained on. Returns facts for the ledger."""
        return {}

    def guidance(self, specimen: Specimen) -> dict[str, Any]:
        """What else the loop is given: a teacher, what is done before each step, or to its rows."""
        return {}

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        if specimen.model.config.is_encoder_decoder:
            raise ValueError("training on running text is defined for causal models, and this one is encoder-decoder")
        documents = corpus(self.corpus)
        facts = self.prepare(specimen, documents[self.skip :])
        data = packed(specimen, documents[self.skip :], self)
        held = packed(specimen, documents[: self.skip], self) if self.skip and self.eval_every else None
        more = {"held_out": held, "tell": specimen.tell, **self.guidance(specimen)}
        with specimen.workplace() as place:
            return facts | fit(specimen.model, data, self, folder=place, **more)


def packed(specimen: Specimen, documents: Sequence[Document], how: Training) -> Packed:
    """Documents as rows of the model's tokens. For a model with learned sink tokens every row begins with them."""
    config = specimen.model.config
    assert specimen.tokenizer is not None
    end = specimen.tokenizer.eos_token_id
    if end is None:
        raise ValueError("this tokenizer has no end token, which stands between documents")
    begin: tuple[int, ...] = ()
    if getattr(config, "sinks", None) == "tokens":
        if specimen.tokenizer.bos_token_id is None:
            raise ValueError("learned sink tokens are start tokens, and this tokenizer has none")
        begin = (specimen.tokenizer.bos_token_id,) * config.sink_tokens
    texts = [d.text for d in documents]
    tokens: list[list[int]] = []
    for first in range(0, len(texts), 1000):  # a batch is split over threads where the user allows it
        some = texts[first : first + 1000]
        tokens += specimen.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
    return pack(tokens, end, how.length, how.seed, how.documents, begin)
