"""The table of contents of a model: which module holds what, layer by layer, as its family describes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from lesion.families import FAMILIES, Place, Tower

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Entry:
    """One parameter's worth of a part: a line of the model's table of contents."""

    tower: Tower
    part: str
    layer: int | None
    place: Place

    @property
    def role(self) -> str:
        return self.part.partition(".")[0]

    @property
    def heads(self) -> int | None:
        if self.part in ("attention.query", "attention.output", "cross.query", "cross.output"):
            return self.tower.heads
        if self.part in ("attention.key", "attention.value", "cross.key", "cross.value"):
            return self.tower.kv_heads
        return None


def contents(model: PreTrainedModel) -> list[Entry]:
    """All weights of a model in reading order, as its family describes them."""
    entries = []
    for tower in towers_of(model):
        inside = [(layer, f"{tower.layers}.{layer}.", tower.inside) for layer in range(depth(model, tower))]
        for layer, prefix, shelf in [(None, "", tower.before), *inside, (None, "", tower.after)]:
            for part, places in shelf.items():
                for place in places if isinstance(places, tuple) else (places,):
                    place = Place(place) if isinstance(place, str) else place
                    place = replace(place, path=prefix + place.path)
                    if not _absent(model, part, place.path):
                        entries.append(Entry(tower, part, layer, place))
    return entries


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the text model, first to last. Raises ValueError where there are several towers of them."""
    towers = [tower for tower in towers_of(model) if tower.default and tower.layers]
    if len(towers) != 1:
        raise ValueError(f"{type_of(model)} has no one stack of layers: {', '.join(t.name for t in towers) or 'none'}")
    assert towers[0].layers is not None
    return list(model.get_submodule(towers[0].layers).children())


def layer_count(model: PreTrainedModel, tower: str | None = None) -> int:
    """Number of layers of a tower; where none is named, of the text model, or of an encoder and decoder that agree."""
    towers = towers_of(model)
    if tower is not None and tower not in (known := [t.name for t in towers]):
        raise ValueError(f"no tower {tower!r} in {type_of(model)}; there are: {', '.join(known)}")
    counts = {t.name: depth(model, t) for t in towers if (t.default if tower is None else t.name == tower)}
    if len(set(counts.values())) != 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"the towers of {type_of(model)} differ in layers ({said}): name one")
    return next(iter(counts.values()))


def _absent(model: nn.Module, part: str, path: str) -> bool:
    """A model may lack its head, and a norm its weight; any other gap is an error when it is addressed."""
    owner, rest = walk(model, path)
    if part == "head":
        return bool(rest) and not is_bare(owner, rest)
    return part == "norm" and not rest and owner._parameters.get("weight", owner) is None


def towers_of(model: PreTrainedModel) -> tuple[Tower, ...]:
    if (family := FAMILIES.get(type_of(model))) is None:
        raise ValueError(
            f"no family {type_of(model)!r}; there are: {', '.join(FAMILIES)}. "
            "A new one is described in a few lines: see the head of lesion/families.py"
        )
    return family(model.config)


def type_of(model: PreTrainedModel) -> str:
    return str(model.config.model_type)


def depth(model: nn.Module, tower: Tower) -> int:
    if tower.layers is None:
        return 0
    module, rest = walk(model, tower.layers)
    if rest:
        raise no_such(model, tower.layers)
    if not isinstance(module, nn.ModuleList):
        raise ValueError(f"{tower.layers!r} should be the ModuleList of the layers, it is a {type(module).__name__}")
    return len(module)


def walk(model: nn.Module, path: str) -> tuple[nn.Module, list[str]]:
    """The deepest module on a path, and what is left of it: nothing if all of it exists."""
    module, steps = model, path.split(".")
    while steps and (child := module._modules.get(steps[0])) is not None:
        module, steps = child, steps[1:]
    return module, steps


def is_bare(owner: nn.Module, rest: list[str]) -> bool:
    """Whether what is left of a path is the name of a parameter of its own."""
    return len(rest) == 1 and rest[0] in owner._parameters


def no_such(model: nn.Module, path: str) -> ValueError:
    owner, rest = walk(model, path)
    here = path[: -len(".".join(rest)) - 1] or type(model).__name__
    has = ", ".join((*owner._modules, *owner._parameters)) or "nothing"
    return ValueError(
        f"lesion.families describes this family with {path!r}, but {here!r} ({type(owner).__name__}) has no "
        f"{rest[0]!r}; it has: {has}. Give the whole language model, with its head and without wrappers (adapters)"
    )
