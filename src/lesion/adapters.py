"""Low-rank adapters beside frozen matrices: y = x·Wᵀ + (α/r)·x·Aᵀ·Bᵀ (Hu et al. 2021, "LoRA", section 4.1), as peft builds
them.

A [r, in] and B [out, r] are float32 whatever W [out, in] is held in, codes included (`lesion.coded`; Dettmers et al. 2023,
"QLoRA"). peft's module takes the place of the linear one and keeps it inside, so W is called `….base_layer.weight` meanwhile; the
model stays the object of transformers that it was. B is zero at first, so nothing has changed before something is learned; A is
drawn as peft draws it, uniformly from ±1/√in (Kaiming's law with a = √5), but from a stream of its own (`lesion.streams`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lesion.coded import Coded, code_of, hush
from lesion.constraints import class_of, signed
from lesion.ffn import is_turned
from lesion.streams import uniforms

NAME = "default"  # of an adapter, as peft calls one that nobody has named


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module that has an adapter, with its name. peft need not be imported for it."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners.") and "base_layer" in module._modules:
            yield name, module


def parts(module: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A [r, in], B [out, r] and α/r."""
    return module.lora_A[NAME].weight, module.lora_B[NAME].weight, float(module.scaling[NAME])


def wrap(model: Any, paths: Sequence[str], rank: int, alpha: float, dropout: float) -> dict[str, Any]:
    """Puts an adapter beside the matrix of each module that is named, and freezes everything else. A and B are whatever peft puts
    there. Raises ValueError where a module is no linear one, cannot have an adapter or has one, or is held as codes by whoever
    loaded it."""
    for path in paths:
        _check(model, path)
    peft = _peft()
    turned = {path: is_turned(model.get_submodule(path)) for path in paths}
    with torch.random.fork_rng(devices=[]):  # peft draws, and what it draws is not used
        for fan_in_fan_out in sorted(set(turned.values())):
            names = [path for path in paths if turned[path] == fan_in_fan_out]
            how = peft.LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, fan_in_fan_out=fan_in_fan_out
            )
            peft.inject_adapter_in_model(how, model, NAME)
            del model.peft_config  # what a module needs of it stands in the module
    found = dict(adapted(model))
    assert found.keys() == set(paths), f"peft has wrapped {sorted(found.keys() ^ set(paths))[:3]} otherwise than asked"
    model.requires_grad_(False)
    for module in found.values():
        module.train(model.training)
        for weight in parts(module)[:2]:
            weight.data = weight.data.float()
            weight.requires_grad_(True)
    return found


@torch.no_grad()
def begin(modules: dict[str, Any], seed: int) -> None:
    """A ~ U(−1/√in, 1/√in), each from the stream of (seed, name of its matrix), and B = 0."""
    for path, module in modules.items():
        a, b, _ = parts(module)
        drawn = np.empty(a.numel(), np.float32)
        uniforms(seed, path, "lora.A", 0, drawn)
        a.copy_(((2 * torch.from_numpy(drawn) - 1) / a.shape[1] ** 0.5).view_as(a))
        b.zero_()


def unwrap(model: Any) -> None:
    """Takes the adapters away: the matrices are what they are, and every weight can be trained again."""
    for path, module in list(adapted(model)):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, module.base_layer)
    model.requires_grad_(True)


@torch.no_grad()
def fold(model: Any) -> tuple[int, int, float, float]:
    """W ← W + (α/r)·B·A, computed in float32, and takes the adapters away. Returns matrices, weights, ΣW² and Σ(W' − W)².

    Raises ValueError where there is no adapter, and where W is held as codes, which the sum would be rounded to."""
    found = dict(adapted(model))
    if not found:
        raise ValueError("this model has no adapter to merge; `lora` adds some")
    if (kind := code_of(model)) is not None:
        raise ValueError(
            f"the matrices are {kind} codes, to which a merge would round off what the adapters have learned: keep them, or "
            "add `lora` to the model in floats (precision dtype=bfloat16) and merge it there"
        )
    weights, square, moved = 0, 0.0, 0.0
    for module in found.values():
        (a, b, scale), base = parts(module), module.base_layer
        update = scale * (b @ a)
        before = base.weight.double()
        base.weight.copy_(base.weight.float() + (update.t() if is_turned(base) else update))
        weights, square = weights + before.numel(), square + float(before.square().sum())
        moved += float((base.weight.double() - before).square().sum())
    unwrap(model)
    return len(found), weights, square, moved


def _check(model: Any, path: str) -> None:
    module: Any = model.get_submodule(path)
    if "base_layer" in module._modules:
        raise ValueError(f"{path} has an adapter already: `merge` it first")
    if isinstance(module, Coded):
        return
    if signed(module) is not None:
        raise ValueError(
            f"{path} is held to a sign, and W + (α/r)·BA would not be: train what it is held by, without adapters"
        )
    if class_of(module) not in (nn.Linear, Conv1D):
        raise ValueError(
            f"{path} is a {type(module).__name__}, and an adapter stands beside a plain Linear or Conv1D, or beside one that "
            "`precision` has coded"
        )


def _peft() -> Any:
    """peft, which imports bitsandbytes where that is installed."""
    hush()
    import peft

    return peft
