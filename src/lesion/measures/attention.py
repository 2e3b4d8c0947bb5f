"""Attention: where each head looks, by the probabilities that the model really computes, beside a head that looks at all
tokens alike. Entropy of heads: Clark et al. 2019, "What does BERT look at?", section 3; mass on the first tokens:
Xiao et al. 2023, "Efficient streaming language models with attention sinks", section 3.1.

Of a head, with pₜⱼ the attention of position t = 0 … n − 1 to position j ≤ t:

    entropy    (1/n) Σₜ Σⱼ −pₜⱼ ln pₜⱼ, in nats              a uniform causal head: (1/n) Σₜ ln(t + 1) = ln(n!) / n
    sink       mean over t ≥ s of Σ_{j < s} pₜⱼ              a uniform causal head: mean over t ≥ s of s / (t + 1)
    previous   mean over t ≥ 1 of pₜ,ₜ₋₁
    self       mean over t of pₜₜ
    nothing    mean over t of 1 − Σⱼ pₜⱼ                     0 but for heads with a sink logit; counts in the entropy as a
                                                             place of its own
    map        mean over the queries of a block of the mass on the keys of a block: [grid, grid], rows sum to 1 − nothing

All n positions count in the entropy, the first one too, whose entropy is 0 (but for nothing). Each document is seen alone,
without padding. One row for each document and head; maps are those of the first document, since a picture needs no more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from lesion.texts import corpus, corpus_digest
from lesion.trial import Measure, Row, Specimen

if TYPE_CHECKING:
    import torch

HEADS = 200  # of a small model, roughly: what a plan reckons with before there is a model
AVERAGED = ("sink", "sink_uniform", "nothing", "previous", "self")


class Attention(Measure):
    """Entropy, sink mass, mass on the previous and on the own token of every head, beside those of a uniform head."""

    corpus: str = Field(default="austen", description="packaged corpus, or a .txt, .jsonl or .csv file")
    documents: int = Field(default=8, ge=0, description="first so many documents; 0: all")
    tokens: int = Field(default=128, ge=2, description="first so many tokens of each document")
    sinks: int = Field(default=4, ge=1, description="first tokens whose mass is the sink's")
    grid: int = Field(default=16, ge=1, description="blocks along each side of a map; at most one a token")
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    def pin(self) -> Self:
        return self.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def _documents(self) -> dict[str, str]:
        return {d.id: d.text for d in corpus(self.corpus)[: self.documents or None]}

    def items(self, specimen: Specimen) -> list[str]:
        layers, heads = shape(specimen.model)
        return [item(d, i, h) for d in self._documents() for i in range(layers) for h in range(heads)]

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """The heads of a document come out of one forward."""
        for _, heads in groupby(items, key=document):
            yield list(heads)

    def size(self) -> tuple[int, int]:
        n = len(self._documents())
        return n * HEADS, n * self.tokens

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        documents = self._documents()
        found: dict[str, Row] = {}
        first = next(iter(documents))
        for name in dict.fromkeys(map(document, items)):
            started = time.perf_counter()
            rows = self._document(specimen, name, documents[name], mapped=name == first)
            found |= {row["item"]: {**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows}
        return [found[name] for name in items]

    def _document(self, specimen: Specimen, name: str, text: str, mapped: bool) -> list[Row]:
        """The rows of one document, from one forward; every layer is reduced as it comes, none is kept whole."""
        import torch

        from lesion.attention import listening

        assert specimen.tokenizer is not None
        tokens = specimen.tokenizer(text, verbose=False)["input_ids"][: self.tokens]
        if (n := len(tokens)) < 2:
            raise ValueError(f"document {name!r} has fewer than two tokens, so no token in it has another to look at")
        seen: list[tuple[int, list[Row]]] = []

        def hear(layer: int, weights: torch.Tensor, nothing: torch.Tensor) -> None:
            seen.append((layer, of_heads(weights[0], nothing[0], self.sinks, self.grid if mapped else None)))

        ids = torch.tensor([tokens], device=specimen.model.device)
        with torch.inference_mode(), listening(specimen.model, hear):
            specimen.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        layers, heads = shape(specimen.model)
        came = [(layer, len(each)) for layer, each in sorted(seen, key=lambda pair: pair[0])]
        if came != [(layer, heads) for layer in range(layers)]:
            raise ValueError(
                f"expected {layers} layers of {heads} heads from {type(specimen.model).__name__}; its attention told of "
                f"(layer, heads) {', '.join(map(str, came)) or 'none'}: it is computed in another way"
            )
        uniform = {"tokens": n, "entropy_uniform": math.lgamma(n + 1) / n, "sink_uniform": uniform_sink(n, self.sinks)}
        return [
            {"item": item(name, layer, h), "document": name, "layer": layer, "head": h, **uniform, **head}
            for layer, each in seen
            for h, head in enumerate(each)
        ]

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        good = [row for row in rows if row["outcome"] == "mapped"]
        return {
            "entropy_ratio": mean([row["entropy"] / row["entropy_uniform"] for row in good]),
            **{name: mean([row[name] for row in good]) for name in AVERAGED},
            "heads": len({(row["layer"], row["head"]) for row in rows}),
            "not_finite": len(rows) - len(good),
        }


def shape(model: Any) -> tuple[int, int]:
    """Layers of the text model, and query heads of each. Raises ValueError for an encoder-decoder."""
    if model.config.is_encoder_decoder:
        raise ValueError("attention on a text is read from causal models, and this one is encoder-decoder")
    config = model.config.get_text_config()
    return config.num_hidden_layers, config.num_attention_heads


def item(name: str, layer: int, head: int) -> str:
    """ "austen/chapter-01@L00H03" """
    return f"{name}@L{layer:02d}H{head:02d}"


def document(name: str) -> str:
    """The document of an item."""
    return name.rpartition("@")[0]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of those that are known; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def uniform_sink(n: int, sinks: int) -> float | None:
    """Mean over t = sinks … n − 1 of sinks / (t + 1); None where there is no such t."""
    return mean([sinks / (t + 1) for t in range(sinks, n)])


def of_heads(weights_HTS: torch.Tensor, nothing_HT: torch.Tensor, sinks: int, grid: int | None) -> list[Row]:
    """What the probabilities [H, T, T] of one layer say of each head, in float64; see the head of this file.

    Where they are not finite every field is None. `sink` is None where no token comes after the first `sinks`.
    """
    import torch

    p, nothing = weights_HTS.cpu().double(), nothing_HT.cpu().double()
    n = p.shape[1]
    fields = {
        "entropy": (torch.special.entr(p).sum(-1) + torch.special.entr(nothing)).mean(-1),
        "sink": p[:, sinks:, :sinks].sum(-1).mean(-1) if n > sinks else None,
        "nothing": nothing.mean(-1),
        "previous": p.diagonal(-1, 1, 2).mean(-1),
        "self": p.diagonal(0, 1, 2).mean(-1),
    }
    maps = blocks(p, min(grid, n)) if grid is not None else None
    fine = p.isfinite().flatten(1).all(-1) & nothing.isfinite().all(-1)
    rows: list[Row] = []
    for h in range(len(p)):
        known: Row = {name: None if x is None or not fine[h] else float(x[h]) for name, x in fields.items()}
        known["map"] = None if maps is None or not fine[h] else [[round(x, 4) for x in row] for row in maps[h].tolist()]
        rows.append({"outcome": "mapped" if fine[h] else "not finite", **known})
    return rows


def blocks(p_HTS: torch.Tensor, grid: int) -> torch.Tensor:
    """[H, grid, grid]: mean over the queries of a block of the mass on the keys of a block. Block b begins at ⌊b·T/grid⌋."""
    import torch

    n = p_HTS.shape[1]
    sizes = (torch.arange(grid + 1) * n // grid).diff()
    inside = torch.eye(grid, dtype=p_HTS.dtype).repeat_interleave(
        sizes, 0
    )  # [T, grid]: 1 where a token lies in a block
    return (inside / inside.sum(0)).T @ p_HTS @ inside
