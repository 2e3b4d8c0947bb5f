"""Training with compiled layers: an option, since it needs a C++ compiler and tens of seconds at the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lesion.loss import fused


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Layers and loss are compiled (torch.compile) for the length of a `with` block: what stands between the products becomes
    one loop each. The same machine and versions give the same bits again. Raises ValueError for a model whose layers have no
    name."""
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise ValueError(f"a {type(model).__name__} does not say what its layers are, so they cannot be compiled")
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        with fused():
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
