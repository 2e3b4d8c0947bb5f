"""A site is an address inside a model: "attention.value", "mlp.in@3-5", "vision/mlp"; `resolve` turns it into views.

    address   one or more terms joined by "+"
    term      [tower/]role[.part][@layers][:heads]

    mlp                     every weight matrix of every mlp
    attention.value@0,2-4   value projections of layers 0, 2, 3 and 4
    attention@5:0-1         query, key, value and output of the first two heads of layer 5
    decoder/cross.key       keys of the decoder's cross attention
    all                     every weight matrix; norms are vectors and have the role `norm`

A role without a part means all its parts. Without a tower the text model is meant (both towers of an encoder-decoder).
"@" keeps what lies in those layers, so "norm@3" leaves the last norm out. Heads are those of attention or cross; where
queries are grouped, .query and .output count query heads, .key and .value the fewer key-value heads, and to ask for
heads of the whole attention at once is refused, because one number would mean two things. What is addressed twice
("mlp+mlp.in", or "embedding+head" where they are tied) comes once. `lesion.families` says which module holds what.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from lesion.coded import Coded
from lesion.contents import Entry, contents, depth, is_bare, no_such, type_of, walk
from lesion.families import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class View:
    """A part of one parameter, in the same orientation in every family.

    attention, cross  .query [heads, head_dim, in], .key .value [kv_heads, head_dim, in], .output [out, heads, head_dim]
    mlp               .in .gate [neurons, in], .out [out, neurons]
    embedding, head   [vocabulary, d]; of images [d, values of a patch]
    position          [positions, d]; of T5 [distances, heads]
    projection        [out, in]
    norm              [d]; of queries and keys [head_dim]
    biases            .query .key .value [heads, head_dim], all others [n]

    (name, part) is unique within one `resolve`, except that heads which are not neighbours come as several views, one
    for each run of neighbours; these differ in `tensor.storage_offset()`.
    """

    name: str  # the parameter's first name in model.named_parameters()
    part: str  # "attention.value", "mlp.in", "embedding", …, with ".bias" appended for biases
    tower: str  # "text", "vision", "projector", "encoder", "decoder"
    layer: int | None  # None outside the layers
    tensor: torch.Tensor  # shares the memory of the parameter: writing into it writes into the model
    units: int | None  # axis of heads or neurons
    outputs: tuple[int, ...]  # axes of output channels; of an embedding its rows, one for each token


@dataclass(frozen=True)
class Term:
    """One term of an address, read but not yet looked for. Ranges hold both their ends."""

    tower: str | None
    role: str
    part: str | None
    layers: tuple[tuple[int, int], ...] | None
    heads: tuple[tuple[int, int], ...] | None
    text: str


def resolve(model: PreTrainedModel, site: str, *, biases: bool = False) -> list[View]:
    """Views of all that an address means, in the model's reading order, each part of a parameter once.

    `biases` adds the biases of the addressed parts. A bias of attention.output belongs to no head, so it is left out
    where heads are chosen. Raises ValueError for an address that is malformed or matches nothing, for layers and heads
    that do not exist, and for weights that cannot be damaged in place: quantised, parametrized or wrapped ones.
    """
    entries = contents(model)
    chosen: dict[int, set[int] | None] = {}  # line of the contents -> its heads, None for the whole
    for term in parse(site):
        for line, heads in _select(model, entries, term):
            earlier = chosen.get(line, set())
            chosen[line] = None if heads is None or earlier is None else earlier | heads
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[tuple[Any, ...]] = set()
    views = []
    for line in sorted(chosen):
        for parameter, view in _views(model, entries[line], chosen[line], biases, names):
            tensor = view.tensor
            region = (id(parameter), tensor.storage_offset(), tensor.shape, tensor.stride())
            if region not in seen:
                seen.add(region)
                views.append(view)
    return views


def matrices(model: PreTrainedModel, site: str) -> list[str]:
    """Paths of the modules whose whole matrices an address means, in the model's reading order. No tensor is looked at, so layers
    that are held as codes have a path too. Raises ValueError for an address that is malformed or matches nothing, for heads, and
    for a part of a matrix whose other parts are not meant."""
    entries, chosen = contents(model), set[int]()
    for term in parse(site):
        if term.heads is not None:
            raise ValueError(f"site {term.text!r} asks for heads, where whole matrices are meant")
        chosen |= {line for line, _ in _select(model, entries, term)}
    paths = list(dict.fromkeys(entries[line].place.path for line in sorted(chosen)))
    for line, entry in enumerate(entries):
        if line not in chosen and entry.place.path in paths:
            raise ValueError(
                f"site {site!r} means a part of {entry.place.path}, which is one matrix with {entry.part} in {type_of(model)}: "
                f"whole matrices are meant, such as {entry.role!r}"
            )
    for path in paths:
        if walk(model, path)[1]:
            raise ValueError(f"{path} is no module of its own, and site {site!r} must mean modules here")
    return paths


def parts(model: PreTrainedModel) -> list[str]:
    """All addresses that exist in this model, in reading order: the default ones, then those that need their tower."""
    entries, found = contents(model), []
    towers = list(dict.fromkeys(entry.tower for entry in entries))
    defaults = [tower for tower in towers if tower.default]
    groups = [("", defaults), *((f"{tower.name}/", [tower]) for tower in towers if [tower] != defaults)]
    for prefix, group in groups:
        here = [entry for entry in entries if entry.tower in group]
        for role in sorted(dict.fromkeys(entry.role for entry in here), key=_order):
            found.append(f"{prefix}{role}")
            found += dict.fromkeys(f"{prefix}{e.part}" for e in here if e.role == role and e.part != role)
        found.append(f"{prefix}all")
    return found


_FIRST = ("embedding", "projection", "position", "attention", "cross", "mlp")
_LAST = ("norm", "head")


def _order(role: str) -> int:
    """Rank of a role in reading order; those that a family has invented come between the mlp and the norms."""
    return _FIRST.index(role) - len(_FIRST) if role in _FIRST else 1 + _LAST.index(role) if role in _LAST else 0


_RANGES = r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*"
_TERM = re.compile(rf"(?:(\w+)/)?(\w+)(?:\.(\w+))?(?:@({_RANGES}))?(?::({_RANGES}))?", re.ASCII)


def parse(site: str) -> tuple[Term, ...]:
    """Reads an address without a model. Raises ValueError where it is malformed."""
    terms = []
    for text in site.split("+"):
        if (match := _TERM.fullmatch(text)) is None:
            raise ValueError(
                f"malformed site {site!r} at {text!r}: expected [tower/]role[.part][@layers][:heads], joined by '+' "
                "without spaces, as in 'attention.value', 'mlp.in@3-5', 'attention@0,2:1', 'vision/mlp+embedding'"
            )
        tower, role, part, layers, heads = match.groups()
        terms.append(Term(tower, role, part, _ranges(layers, site), _ranges(heads, site), text))
    return tuple(terms)


def _ranges(text: str | None, site: str) -> tuple[tuple[int, int], ...] | None:
    if text is None:
        return None
    ranges = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        ranges.append((int(first), int(last or first)))
        if ranges[-1][0] > ranges[-1][1]:
            raise ValueError(f"malformed site {site!r}: the range {item!r} runs backwards")
    return tuple(ranges)


def _members(ranges: tuple[tuple[int, int], ...], count: int, what: str, where: str, term: Term) -> set[int]:
    for _, last in ranges:  # before anything is counted out: a range may be absurd
        if last >= count:
            raise ValueError(f"no {what} {last} in {where}, as site {term.text!r} asks; there are: 0-{count - 1}")
    return {i for first, last in ranges for i in range(first, last + 1)}


def _select(model: PreTrainedModel, entries: list[Entry], term: Term) -> Iterator[tuple[int, set[int] | None]]:
    """Lines of the contents that a term means, each with its heads (None: the whole)."""

    def meant(entry: Entry) -> bool:
        here = entry.tower.default if term.tower is None else entry.tower.name == term.tower
        if term.part is not None:
            return here and entry.part == f"{term.role}.{term.part}"
        return here and (entry.role != "norm" if term.role == "all" else entry.role == term.role)

    hits = [line for line, entry in enumerate(entries) if meant(entry)]
    if not hits:
        asked = re.split("[@:]", term.text)[0]
        raise ValueError(f"no site {asked!r} in {type_of(model)}; there are: {', '.join(parts(model))}")
    if term.layers is not None:
        hits = [line for line in hits if entries[line].layer is not None]
        if not hits:
            raise ValueError(f"site {term.text!r} asks for layers, but in {type_of(model)} {term.role!r} is in none")
        layers = {
            tower: _members(term.layers, depth(model, tower), "layer", f"the {tower.name} tower", term)
            for tower in {entries[line].tower for line in hits}
        }
        hits = [line for line in hits if entries[line].layer in layers[entries[line].tower]]
    if term.heads is None:
        yield from ((line, None) for line in hits)
        return
    for line in hits:
        entry, count = entries[line], entries[line].heads
        if count is None:
            raise ValueError(f"site {term.text!r} asks for heads, which only 'attention' and 'cross' have")
        if term.part is None and entry.tower.heads != entry.tower.kv_heads:
            raise ValueError(
                f"site {term.text!r} is ambiguous: {type_of(model)} has {entry.tower.heads} query and "
                f"{entry.tower.kv_heads} key-value heads; name parts, as in '{term.role}.query:0+{term.role}.output:0'"
            )
        yield line, _members(term.heads, count, "head", entry.part, term)


def _own(owner: nn.Module, name: str, path: str) -> nn.Parameter:
    """A parameter that can be damaged where it lies: floating, unpacked, and what the module really computes with."""
    if parametrize.is_parametrized(owner, name):
        raise ValueError(f"{path}.{name} is parametrized: it is computed anew at each use, so a change would be lost")
    if isinstance(owner, Coded) and name == "weight":
        raise ValueError(
            f"{path}.weight is packed or quantised ({owner.kind} codes that `precision` made): codes, not weights; damage the "
            "model before it is coded"
        )
    if "base_layer" in owner._modules:
        raise ValueError(f"{path} is wrapped in a {type(owner).__name__}: merge or remove the adapter first")
    parameter = owner._parameters.get(name)
    if parameter is None:
        has = ", ".join((*owner._parameters, *owner._buffers)) or "nothing"
        raise ValueError(f"{path} is a {type(owner).__name__} without a parameter {name!r}; it has: {has}")
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.element_size() < 2:
        kind = f"{type(parameter).__name__}, {str(parameter.dtype).removeprefix('torch.')}"
        raise ValueError(f"{path}.{name} is packed or quantised ({kind}): codes, not weights; load the model in floats")
    return parameter


def _views(
    model: nn.Module, entry: Entry, heads: Set[int] | None, biases: bool, names: dict[int, str]
) -> Iterator[tuple[nn.Parameter, View]]:
    """One entry as views: of its weight and, if asked, of its bias; of runs of neighbours where heads are chosen."""
    path = entry.place.path
    owner, rest = walk(model, path)
    bare = is_bare(owner, rest)
    if rest and not bare:
        raise no_such(model, path)
    for kind in ("weight", "bias") if biases and not bare else ("weight",):
        if kind == "bias" and not (_has_bias(owner) and (heads is None or not entry.part.endswith(".output"))):
            continue
        parameter = _own(owner, rest[0] if bare else kind, path.rpartition(".")[0] if bare else path)
        tensor, units, outputs = _oriented(_matrix(owner, parameter, entry.place, bare), entry, kind == "bias")
        part = f"{entry.part}.bias" if kind == "bias" else entry.part
        for first, last in _runs(heads) if heads is not None else [(0, None)]:
            here = tensor if last is None else tensor.narrow(units or 0, first, last - first + 1)
            view = View(names[id(parameter)], part, entry.tower.name, entry.layer, here, units, outputs)
            yield parameter, view


def _has_bias(owner: nn.Module) -> bool:
    return owner._parameters.get("bias") is not None or parametrize.is_parametrized(owner, "bias")


def _runs(heads: Set[int]) -> list[tuple[int, int]]:
    """Runs of neighbours: {0, 1, 4} is [(0, 1), (4, 4)]."""
    firsts = sorted(h for h in heads if h - 1 not in heads)
    lasts = sorted(h for h in heads if h + 1 not in heads)
    return list(zip(firsts, lasts, strict=True))


def _matrix(owner: nn.Module, parameter: nn.Parameter, place: Place, bare: bool) -> torch.Tensor:
    """The parameter as [out, in] (an embedding as [rows, d]), without copying."""
    data = parameter.data
    if bare:
        return data.t() if place.transposed else data
    if data.dim() == 1 or isinstance(owner, (nn.Linear, nn.Embedding)):
        return data
    if isinstance(owner, Conv1D):
        return data.t()
    if isinstance(owner, nn.Conv2d):
        return data.view(data.shape[0], -1)
    raise ValueError(
        f"{place.path} is a {type(owner).__name__}, of which it is not known whether its weight is stored [out, in] or "
        f"[in, out]: describe the bare parameter, Place({place.path + '.weight'!r}, transposed=…)"
    )


def _oriented(tensor: torch.Tensor, entry: Entry, bias: bool) -> tuple[torch.Tensor, int | None, tuple[int, ...]]:
    """Cuts a part out of [out, in] and splits off its heads; returns it with its axis of units and its output axes.

    Only `view` and slices are used, which fail where a copy would be needed.
    """
    part, place, heads = entry.part, entry.place, entry.heads
    if place.stacked:  # the neurons of experts are no units yet: they would need two numbers
        return (tensor if place.rows is None else tensor[:, slice(*place.rows)]), None, (0, 1)
    rows, *tail = tensor.shape
    if place.rows is not None:
        (start, stop), (block, left) = place.rows, divmod(rows, place.groups)
        if left or not 0 <= start < stop <= block:
            raise ValueError(f"{place.path} has {rows} rows, not {place.groups} blocks with rows {start} to {stop}")
        tensor, rows = tensor.view(place.groups, block, *tail)[:, start:stop], place.groups * (stop - start)
    if heads is None or (bias and part.endswith(".output")):
        axes = {"mlp.in": 0, "mlp.gate": 0, "mlp.out": None if bias else 1}
        return tensor.view(rows, *tail), axes.get(part), (0,)
    axis = 1 if part.endswith(".output") else 0
    size = tail[0] if axis else rows
    if heads < 1 or size % heads:
        what = "columns" if axis else "rows"
        raise ValueError(f"{place.path} has {size} {what} for {part}, which cannot be split into {heads} heads")
    if axis:
        return tensor.view(rows, heads, size // heads), 1, (0,)
    return tensor.view(heads, size // heads, *tail), 0, (0, 1)
