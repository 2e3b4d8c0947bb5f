"""Spectrum: in how many directions a model's activations lie, how many its weights use, and how many a change of them.

    activations   residual stream behind each layer, rows are tokens, about their mean
    weights       W of a site, [out, in] in every family, as it is
    change        ΔW = W − W₀ of the same site, W₀ from the reference, subtracted in float64

Each has the numbers of `lesion.spectra` (Roy & Vetterli 2007 and others). The first position of a document is left out of
the activations, since its huge norm in most models would drown the others (Sun et al. 2024, "Massive activations"); what it
holds of Σ‖x‖² is said apart. Documents are cut, never padded, and seen alone. Beside that stand two other definitions of
the activations' effective rank: `uncentred`, of the same rows as they are, and `described`, which knows no such care:

    described     every document padded on the right to `tokens` with the padding token (else the end token), which no token
                  attends to; all positions of all documents, first ones and padding too; uncentred; p ≤ 0.01 dropped

A rank of n rows is at most n − 1, and comes near that of the distribution only where n is several times the width d.
`few_rows` says where n < 4·d. Memory: two matrices [d, d] in float64 for each layer; no activations are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.contents import layer_count, layers
from lesion.likelihood import BATCH_TOKENS, Window, batches, padded
from lesion.sites import View, parse, resolve
from lesion.spectra import NUMBERS, Moments, described_rank, effective_rank, float64, singular_values
from lesion.texts import corpus, corpus_digest
from lesion.trial import Measure, Row, Specimen, Trial

if TYPE_CHECKING:
    import torch

ENOUGH = 4  # rows for each column
APART = ("uncentred", "described", "first_norm_share")  # said of activations only
LAYERS, MATRICES = 30, 200  # of a small model, roughly: what a plan reckons with before there is a model

Kind = Literal["activations", "weights", "change"]
Hear = Callable[[int, "torch.Tensor", Sequence[int]], None]
"""Told of each layer: its number, what comes out of it [B, T, D], and how many of its tokens are those of a document [B]."""


class Spectrum(Measure):
    """Effective rank, participation ratio, stable rank, gap and top share of layers' outputs, of weights and of their change."""

    chunk = 16

    of: tuple[Kind, ...] = Field(default=("activations",), min_length=1, description="activations, weights, change")
    corpus: str = Field(default="austen", description="packaged corpus, or a .txt, .jsonl or .csv file")
    documents: int = Field(default=16, ge=0, description="first so many documents; 0: all")
    tokens: int = Field(default=256, ge=2, description="first so many tokens of each document")
    site: str = Field(default="attention+mlp", description="matrices whose weights and change are read")
    reference: Trial | None = Field(default=None, description="what a change is counted from; of nothing else")
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.of)) < len(self.of):
            raise ValueError(f"each kind of spectrum is asked for once, not {', '.join(self.of)}")
        if "change" in self.of and self.reference is None:
            raise ValueError("a change is counted from a reference, and none is given")
        if "change" not in self.of and self.reference is not None:
            raise ValueError(f"a reference is for the spectrum of a change; asked for: {', '.join(self.of)}")
        if some := [term.text for term in parse(self.site) if term.heads is not None]:
            raise ValueError(f"site {some[0]!r} chooses heads; a spectrum is of whole matrices: leave the heads out")
        return self

    def pin(self) -> Self:
        pinned = super().pin()
        if "activations" not in self.of:
            return pinned
        return pinned.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def _documents(self) -> dict[str, str]:
        return {d.id: d.text for d in corpus(self.corpus)[: self.documents or None]}

    def items(self, specimen: Specimen) -> list[str]:
        found = []
        for kind in self.of:
            if kind == "activations":
                causal(specimen.model)
                found += [f"{kind}/{layer(i)}" for i in range(layer_count(specimen.model))]
            else:
                found += [f"{kind}/{name}" for name in matrices(specimen.model, self.site)]
        return found

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """All layers come out of the same forwards; of matrices each is for itself."""
        for kind, group in groupby(items, key=kind_of):
            some = list(group)
            step = len(some) if kind == "activations" else self.chunk
            yield from (some[start : start + step] for start in range(0, len(some), step))

    def size(self) -> tuple[int, int]:
        read = "activations" in self.of
        return LAYERS * read + MATRICES * (len(self.of) - read), len(self._documents()) * self.tokens if read else 0

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        rows: dict[str, Row] = {}
        for kind in dict.fromkeys(map(kind_of, items)):
            started, asked = time.perf_counter(), [item for item in items if kind_of(item) == kind]
            for row in self._activations(specimen) if kind == "activations" else self._matrices(specimen, asked):
                rows[row["item"]] = row
            for item in asked:
                rows[item]["duration"] = (time.perf_counter() - started) / len(asked)
        return [rows[item] for item in items]

    def _activations(self, specimen: Specimen) -> list[Row]:
        """A row for each layer."""
        causal(specimen.model)
        documents, tokenizer = self._documents(), specimen.tokenizer
        assert tokenizer is not None
        tokens = {name: tokenizer(text, verbose=False)["input_ids"][: self.tokens] for name, text in documents.items()}
        if short := [name for name, ids in tokens.items() if len(ids) < 2]:
            raise ValueError(f"document {short[0]!r} has fewer than two tokens, and the first one does not count")
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = of_layers(specimen.model, tokens, self.tokens, padding)
        return [{"item": f"activations/{layer(row['layer'])}", **row} for row in rows]

    def _matrices(self, specimen: Specimen, items: Sequence[str]) -> Iterator[Row]:
        """A row for each of these weights or changes of weights."""
        views, before = matrices(specimen.model, self.site), None
        if kind_of(items[0]) == "change":
            assert specimen.bring is not None and self.reference is not None, "the walk can bring a second model"
            before = matrices(specimen.bring(self.reference).model, self.site)
        for item in items:
            name = item.partition("/")[2]
            w = matrix(views[name])
            if before is not None:
                w = changed(float64(w), before, name)
            found = {"rows": w.shape[0], "width": w.shape[1], **numbers(singular_values(w))}
            yield {"item": item, "layer": views[name].layer, **found}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """For each kind the means over its rows that were read, under "weights_effective_rank" and the like; the effective
        rank behind the last layer; how many rows were not read, and how many had too few tokens."""
        found: dict[str, Any] = {}
        for kind in self.of:
            here = [row for row in rows if kind_of(row["item"]) == kind]
            names = (*NUMBERS, *APART) if kind == "activations" else NUMBERS
            found |= {f"{kind}_{name}": mean([row[name] for row in here]) for name in names}
            if kind == "activations":
                found["last_effective_rank"] = max(here, key=lambda row: row["layer"])["effective_rank"]
                found["few_rows"] = sum(row["few_rows"] for row in here)
        for outcome in ("zero", "not finite"):
            found[outcome.replace(" ", "_")] = sum(row["outcome"] == outcome for row in rows)
        return found


class Heard:
    """What has come out of one layer: the rows that count, those that only the described definition counts, and Σ‖x‖² of
    first positions."""

    def __init__(self, width: int, device: torch.device | str):
        self.counted, self.others = Moments(width, device), Moments(width, device)
        self.first = 0.0

    def text(self, out: torch.Tensor, lengths: Sequence[int]) -> None:
        """Documents [B, T, D] of so many tokens each."""
        import torch

        self.counted.add(torch.cat([x[1:n] for x, n in zip(out, lengths, strict=True)]))
        self.others.add(out[:, 0])
        self.first += float(float64(out[:, 0]).square().sum())

    def padding(self, out: torch.Tensor, lengths: Sequence[int]) -> None:
        """The same documents [B, T, D] with their padding, of which only the padding is taken."""
        import torch

        self.others.add(torch.cat([x[n:] for x, n in zip(out, lengths, strict=True)]))

    def row(self, described: bool) -> Row:
        """All numbers of a layer. Not the described one where its padding could not be read, or is not finite."""
        n, width = self.counted.rows, len(self.counted.mean)
        s = self.counted.uncentred()
        every = self.counted.joined(self.others).uncentred() if described else None
        norm = self.first + self.counted.square_sum()
        return {
            "rows": n,
            "width": width,
            "few_rows": n < ENOUGH * width,
            **numbers(self.counted.centred()),
            "uncentred": None if s is None else effective_rank(s),
            "described": None if every is None else described_rank(every),
            "first_norm_share": self.first / norm if norm > 0 and math.isfinite(norm) else None,
        }


def of_layers(model: Any, tokens: Mapping[str, Sequence[int]], length: int, padding: int | None) -> list[Row]:
    """A row for each layer, of documents of at most `length` tokens that are read without padding; those that are shorter are
    read once more, padded to this length, so that no token of theirs could ever have met a padding that is not finite."""
    import torch

    heard: dict[int, Heard] = {}

    def text(i: int, out: torch.Tensor, lengths: Sequence[int]) -> None:
        if i not in heard:
            heard[i] = Heard(out.shape[-1], float64(out[:0]).device)
        heard[i].text(out, lengths)

    def rest(i: int, out: torch.Tensor, lengths: Sequence[int]) -> None:
        heard[i].padding(out, lengths)

    for batch in batches([Window(name, 0, 1, len(ids)) for name, ids in tokens.items()]):
        texts = [tokens[window.item] for window in batch]
        listen(model, padded(texts), list(map(len, texts)), text)
    short = [ids for ids in tokens.values() if len(ids) < length]
    if padding is not None:
        together = max(1, BATCH_TOKENS // length)
        for some in (short[start : start + together] for start in range(0, len(short), together)):
            filled = torch.tensor([[*ids, *[padding] * (length - len(ids))] for ids in some])
            listen(model, filled, list(map(len, some)), rest, masked=True)
    described = padding is not None or not short
    return [{"layer": i, **each.row(described)} for i, each in sorted(heard.items())]


def listen(model: Any, ids: torch.Tensor, lengths: Sequence[int], hear: Hear, masked: bool = False) -> None:
    """Tells `hear` of every layer's output in one forward over token ids [B, T], the first so many of each row a document's.
    Masked: what stands behind a document is attended to by nothing. Without a mask only what stands further behind does."""
    import torch

    from lesion.inference import inference

    def told(i: int) -> Callable[..., None]:
        return lambda module, given, out: hear(i, out[0] if isinstance(out, tuple) else out, lengths)

    more = {}
    if masked:
        seen = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        more = {"attention_mask": seen.long().to(model.device)}
    with inference(model):
        hooks = [module.register_forward_hook(told(i)) for i, module in enumerate(layers(model))]
        try:
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1, **more)
        finally:
            for hook in hooks:
                hook.remove()


def matrices(model: Any, site: str) -> dict[str, View]:
    """The matrices of a site by the names of their tensors; one that is fused with others has its part after a colon.

    Raises ValueError where `resolve` does, and for vectors.
    """
    found = {}
    for view in resolve(model, site):
        if view.tensor.dim() < 2:
            raise ValueError(
                f"{view.name} of site {site!r} is a vector [{len(view.tensor)}]; a spectrum is of matrices"
            )
        whole = view.tensor.numel() == model.get_parameter(view.name).numel()
        found[view.name if whole else f"{view.name}:{view.part}"] = view
    return found


def matrix(view: View) -> torch.Tensor:
    """[out, in], heads put together; of an embedding [vocabulary, d]."""
    return view.tensor.flatten(0, len(view.outputs) - 1).flatten(1)


def changed(w: torch.Tensor, before: Mapping[str, View], name: str) -> torch.Tensor:
    """W − W₀ [out, in] in float64. Raises ValueError where the reference has no such matrix."""
    if name not in before:
        raise ValueError(f"the reference has no {name!r} to count a change from; there are: {', '.join(before)}")
    earlier = matrix(before[name])
    if earlier.shape != w.shape:
        raise ValueError(f"{name!r} is {list(w.shape)} here and {list(earlier.shape)} in the reference")
    return w - float64(earlier).to(w.device)


def numbers(s: torch.Tensor | None) -> Row:
    """Outcome and numbers of singular values, all None where they are not finite (None) or all zero."""
    outcome = "not finite" if s is None else "read" if s[0] > 0 else "zero"
    return {"outcome": outcome, **{name: None if s is None else number(s) for name, number in NUMBERS.items()}}


def causal(model: Any) -> None:
    """Raises ValueError for an encoder-decoder, in which no one stack of layers reads a text."""
    if model.config.is_encoder_decoder:
        raise ValueError("the spectrum of activations is read from causal models, and this one is encoder-decoder")


def layer(i: int) -> str:
    """ "layer-03" """
    return f"layer-{i:02d}"


def kind_of(item: str) -> str:
    """ "weights" of "weights/model.layers.0.mlp.up_proj.weight" """
    return item.partition("/")[0]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of those that are known; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
