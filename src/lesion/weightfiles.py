"""Files of weights beside a configuration: which there are, what they say that they hold, and what no model is made of.

Only safetensors are read. The library that reads them checks offsets and sizes; what it lets pass and what would still make
another model than the one that was meant is refused here, by name.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")  # and other weights that are not read
PLAIN = {"F64", "F32", "F16", "BF16"}  # types of weights in safetensors
LONGEST_NAME = 255  # bytes of a file's name


def weight_names(folder: Path) -> list[str]:
    """Files that hold the weights: one, or what the index lists. Raises ValueError for anything but safetensors."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index} has no weight_map that says which file holds which weight")
        names = sorted({str(name) for name in places.values()})
    if long := [name for name in names if len(name.encode()) > LONGEST_NAME]:
        raise ValueError(f"{index} lists a file with a name of {len(long[0])} letters: {long[0][:40]}…")
    if odd := [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]:
        raise ValueError(f"{index} lists {odd[0]}: only *.safetensors beside it are read, since pickles run code")
    if (named := read_json(folder / "config.json").get("transformers_weights")) not in (None, *names, index.name):
        raise ValueError(f"{folder} has its weights in {named}; expected model.safetensors or {index.name}")
    return names


def check_weights(folder: Path) -> None:
    """Raises ValueError unless every file of weights is there, is safetensors, and is whole."""
    names = weight_names(folder)
    if not names or not any((folder / name).is_file() for name in names):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights ({', '.join(pickles)}), which are refused: loading them runs code"
            )
        raise ValueError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, which its index lists")
    stored(folder)


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor that the files of weights hold. Raises ValueError for a file that is not whole, and
    where a tensor is named twice, in one file or in two: readers differ in which of them they take."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, list[int]]] = {}
    for path in (folder / name for name in weight_names(folder)):
        try:
            with safe_open(path, framework="pt") as file:  # reads the header and compares it with the size of the file
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
                here = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
        if twice := sorted({*_named_twice(path), *(here.keys() & found.keys())}):
            raise ValueError(
                f"{path} holds {twice[0]}, which has been named before: it is not clear which one is meant"
            )
        found |= here
    return found


def _named_twice(path: Path) -> list[str]:
    """Names that come more than once in the header of a safetensors file, of which the size is known to be right."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = file.read(length)
    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        return dict(pairs)

    json.loads(text, object_pairs_hook=note)
    return twice


def refuse_giants(folder: Path, outline: PreTrainedModel) -> None:
    """Weights that a configuration asks for and no file holds would be made up in memory before anybody could refuse them."""
    held = sum(math.prod(shape) for _, shape in stored(folder).values())
    if (asked := sum(p.numel() for p in outline.parameters())) > 4 * held + 10**7:
        raise ValueError(f"{folder}/config.json asks for a model of {asked:,} weights, but its files hold {held:,}")


def refuse_codes(folder: Path, model: PreTrainedModel) -> None:
    """Whole numbers, truth values and 8-bit floats are codes of weights: transformers would take them for the weights."""
    weights = {_tail(name) for name, p in model.named_parameters()}
    for name, (kind, _) in stored(folder).items():
        if kind not in PLAIN and _tail(name) in weights:
            raise ValueError(f"{folder} holds {name} as {kind}; expected weights of type {', '.join(sorted(PLAIN))}")


def refuse_holes(folder: Path, model: PreTrainedModel) -> None:
    """A NaN in one weight is a NaN in all that comes behind it, and a float16 beyond 65,504 is infinite."""
    import torch

    for name, p in model.named_parameters():
        if p.is_floating_point() and (bad := p.numel() - int(torch.isfinite(p).sum())):
            raise ValueError(
                f"{folder} as {p.dtype} holds {bad} numbers in {name} that are not finite (NaN or infinite)"
            )


def _tail(name: str) -> tuple[str, ...]:
    """The end of a tensor's name, which is the same however the rest is called."""
    return tuple(name.split(".")[-2:])


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without an end
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
