"""Streaming: a trained decoder gets a rolling window, with or without the first tokens kept beside it (Xiao et al. 2023,
"Efficient streaming language models with attention sinks", section 3.2).

No weight changes, only what a token may see: the last `window` tokens, and the first `sinks` tokens of the text, as if their
positions were those inside the cache. So memory does not grow with the text. With `sinks=0` the first tokens leave the cache
as all others do, which is what is said to break a model that was not trained so.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lesion.trial import Specimen, Step


class Streaming(Step):
    """Lets a decoder see only the last tokens, and the first ones beside them."""

    window: int = Field(ge=1, description="last tokens that are seen, the newest among them")
    sinks: int = Field(default=4, ge=0, description="first tokens that are seen beside them; 0: none")

    def attach(self, model: Any) -> None:
        """Raises ValueError for a model whose attention is not ours, or whose own sinks say otherwise."""
        config = model.config
        if config.model_type != "lesion-decoder":
            raise ValueError(f"a rolling window is built for a lesion-decoder, and this is a {config.model_type}")
        if config.sinks == "logit" and self.sinks:
            raise ValueError("this model has sink logits of its own: sinks=0 gives it a window beside them")
        if config.sinks == "tokens" and self.sinks != config.sink_tokens:
            raise ValueError(f"this model learned {config.sink_tokens} sink tokens, so sinks cannot be {self.sinks}")
        kinds = {"logit": "logit", "tokens": "tokens"}
        new = {"sinks": kinds.get(config.sinks, "cache" if self.sinks else "window"), "window": self.window}
        vars(config).update(new, **({"sink_tokens": self.sinks} if self.sinks else {}))
        config.validate_architecture()

    def touches(self, specimen: Specimen) -> list[str]:
        return []

    def apply(self, specimen: Specimen) -> dict[str, Any]:
        self.attach(specimen.model)
        return {"sinks": specimen.model.config.sinks}
