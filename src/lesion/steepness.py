"""What measures of curvature share: over which weights, on which text, and the steep directions of a model found once.

The steep subspace is spanned by the k eigenvectors of largest |λ|; everything else is called flat. Single null vectors of an
indefinite Hessian with thousands of eigenvalues near zero are not identifiable, their common complement is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from lesion.texts import corpus, corpus_digest
from lesion.trial import Measure, Specimen

if TYPE_CHECKING:
    import torch

    from lesion.curvature import Batch, Curvature
    from lesion.lanczos import Pairs

GIB = 2**30


class OfCurvature(Measure):
    """A base of measures, not a word."""

    family = "measure"

    corpus: str = Field(default="austen", description="text whose loss is differentiated")
    documents: int = Field(default=4, ge=1, description="first so many documents")
    tokens: int = Field(default=128, ge=2, description="first so many tokens of each")
    site: str = Field(default="attention+mlp", description="whole matrices that curvature is over, float32")
    operator: Literal["hessian", "gauss-newton"] = Field(
        default="hessian", description="gauss-newton is never negative"
    )
    directions: int = Field(default=10, ge=1, description="eigenvectors of largest |eigenvalue|: the steep subspace")
    tolerance: float = Field(
        default=1e-3, gt=0, lt=1, description="largest residual, as a share of |largest eigenvalue|"
    )
    restarts: int = Field(default=20, ge=0, description="of Lanczos, at most")
    rows: int = Field(default=0, ge=0, description="documents computed at a time; 0: all")
    keep: bool = Field(default=True, description="keep the gradient's graph: quicker, and more memory")
    memory: float = Field(
        default=0.0, ge=0, description="GiB of basis vectors that are held; what is more lies on disk. 0: what is free"
    )
    seed: int = Field(default=0, ge=0, description="of the start vector and of what is drawn")
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    def pin(self) -> Self:
        return super().pin().with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def products_expected(self) -> int:
        """Roughly how many products with the operator finding the steep subspace takes."""
        return 4 * self.directions + 20

    def batch(self, specimen: Specimen) -> Batch:
        """The documents as one batch. Raises ValueError for a document that predicts nothing, and for more than the context."""
        assert specimen.tokenizer is not None
        texts = {d.id: d.text for d in corpus(self.corpus)[: self.documents]}
        if len(texts) < self.documents:
            raise ValueError(f"corpus {self.corpus!r} has {len(texts)} documents, not {self.documents}")
        read = {i: specimen.tokenizer(t, verbose=False)["input_ids"][: self.tokens] for i, t in texts.items()}
        if short := [item for item, ids in read.items() if len(ids) < 2]:
            raise ValueError(f"document {short[0]!r} has fewer than two tokens, so nothing in it is predicted")
        return as_batch(specimen.model, list(read.values()))

    @contextmanager
    def operated(self, specimen: Specimen, graphs: bool = True) -> Iterator[Curvature]:
        """The operator on this model; without `graphs` for its parameters' sake only.

        Raises ValueError before any compute for what has no second derivative."""
        from lesion.curvature import Curvature, chosen, twice_differentiable

        refuse_encoder(specimen.model)
        parameters = chosen(specimen.model, self.site)
        with (
            twice_differentiable(specimen.model),
            Curvature(
                specimen.model,
                parameters,
                self.batch(specimen),
                self.operator,
                rows=self.rows,
                keep=graphs and self.keep,
            ) as found,
        ):
            yield found

    def steep(self, specimen: Specimen) -> Pairs:
        """The steep subspace of this model, remembered for as long as these are its weights and options."""
        from lesion.digest import combined

        options = (getattr(self, name) for name in OfCurvature.model_fields if name != "memory")
        place = combined(specimen.digests), tuple(options)
        known: Any = specimen.memo.get("steep")
        if known is None or known[0] != place:
            specimen.memo.pop("steep", None)  # before the next one needs the memory
            with self.operated(specimen) as operator:
                known = specimen.memo["steep"] = place, self.find(operator)
        pairs: Pairs = known[1]
        return pairs

    def find(self, operator: Curvature) -> Pairs:
        """Raises `Unfound` where Lanczos ends before its residuals are small, or there are not so many directions."""
        from lesion.lanczos import Unfound, top

        start = random_direction(operator.size, "lanczos", self.seed).to(operator.parameters[0])
        budget = self.memory * GIB or None
        pairs = top(
            operator.times, start, self.directions, tolerance=self.tolerance, restarts=self.restarts, budget=budget
        )
        if pairs.on_disk:
            logging.getLogger("lesion").info("the basis of %d vectors lies on disk", self.directions)
        if not float(pairs.values[0].abs()) > 0 or len(pairs.values) < self.directions:
            raise Unfound(
                "flat", f"a start vector reaches {len(pairs.values)} directions of curvature, not {self.directions}"
            )
        worst = float(pairs.residuals.max() / pairs.values[0].abs())
        if worst > self.tolerance:
            raise Unfound(
                "not converged",
                f"after {pairs.products} products the largest residual is {worst:.2g} of |λ₁|, not {self.tolerance:g}: "
                "more restarts, fewer directions or a larger tolerance",
            )
        return pairs


def as_batch(model: Any, texts: Sequence[Sequence[int]]) -> Batch:
    """Texts of tokens as inputs and targets [B, T]: every token but the first is predicted, padding is not scored."""
    import torch

    from lesion.likelihood import context_of, padded
    from lesion.loss import IGNORE

    longest = max(map(len, texts))
    context = context_of(model.config.get_text_config())
    if context and longest > context:
        raise ValueError(f"a text of {longest} tokens is longer than the context of {context}")
    ids = padded(texts)
    lengths = torch.tensor([len(text) for text in texts])[:, None]
    place = torch.arange(longest).expand(len(texts), -1)
    targets = torch.where(place[:, 1:] < lengths, ids[:, 1:], IGNORE)
    return ids[:, :-1], targets, None, place[:, :-1]


def random_direction(size: int, *place: object) -> torch.Tensor:
    """A vector of independent normals [size], from a stream of its own."""
    import torch

    from lesion.stats import generator

    seed = int(generator(*place).integers(2**62))
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def refuse_encoder(model: Any) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError("curvature is of the loss on running text, and this model is encoder-decoder")
