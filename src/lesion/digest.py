"""Digests of weights: the proof that a step changed what it reports and that an undo restored every bit.

xxh3-128 (Collet 2023) runs at memory speed, so every step and every measure can be checked. It guards against accidents,
not against an adversary; files that travel are checked by sha256.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import nn

from lesion.threads import each


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer once, under its first name: tied weights are one tensor."""
    yield from model.named_parameters(remove_duplicate=True)
    yield from model.named_buffers(remove_duplicate=True)


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Other names of each tied parameter: {"model.embed_tokens.weight": ["lm_head.weight"]}."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if (home := first.setdefault(id(tensor), name)) != name:
            found.setdefault(home, []).append(name)
    return found


def memory(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor on the CPU, of any type."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest of dtype, shape and bytes; of the bits, so that NaN equals itself and -0.0 differs from 0.0."""
    near = tensor.detach().to("cpu").contiguous()
    state = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if near.numel():
        state.update(memory(near).data)
    return state.hexdigest()


def digests(model: nn.Module, only: Iterable[str] | None = None) -> dict[str, str]:
    """Digest of every tensor of a model, or of those named in `only`."""
    wanted = None if only is None else set(only)
    tensors = {name: t for name, t in named_tensors(model) if wanted is None or name in wanted}
    return dict(zip(tensors, each(tensor_digest, list(tensors.values())), strict=True))


def combined(parts: dict[str, str]) -> str:
    """One digest for a whole model, from those of its tensors; independent of their order."""
    text = "\n".join(f"{name} {parts[name]}" for name in sorted(parts))
    return xxhash.xxh3_128_hexdigest(text.encode())
