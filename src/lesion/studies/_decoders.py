"""What the studies of our own decoder share: how an arm is trained, and the shapes and presets by name."""

from __future__ import annotations

from typing import Any

from lesion.subjects import Scratch
from lesion.trial import Trial

SMALL: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3}
SMALL |= {"intermediate_size": 512}
SMOKE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMOKE |= {"intermediate_size": 64}


def shape(size: str) -> dict[str, Any]:
    """A shape by its name. Raises ValueError that lists what exists."""
    from lesion.shapes import SIZES
    from lesion.tiny import SHAPE

    tiny = {name: value for name, value in SHAPE.items() if name in SMALL}
    known = {"smoke": SMOKE, "small": SMALL, "tiny": tiny, **SIZES}
    if size not in known:
        raise ValueError(f"no size {size!r}; there are: {', '.join(known)}")
    return dict(known[size])


def trained(size: str, config: dict[str, Any], training: dict[str, Any], seed: int) -> Trial:
    """A decoder of this size from random weights, pretrained; one seed for its weights, its order of rows, its dropout."""
    from lesion.steps import Pretrain

    subject = Scratch(architecture="lesion-decoder", config={**shape(size), **config}, seed=seed)
    return (subject >> Pretrain(**training, seed=seed)).pin()
