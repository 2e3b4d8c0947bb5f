"""Shapes of our own decoder: its configuration, strictly validated, and sizes by name."""

# annotations are not put off here: `@strict` checks every option against its type

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SIZES: dict[str, dict[str, int]] = {
    name: dict(zip(_SHAPE, shape, strict=True))
    for name, shape in {
        "1m": (128, 4, 4, 2, 352),
        "6m": (256, 6, 8, 4, 704),
        "30m": (512, 8, 8, 4, 1408),
        "125m": (768, 12, 12, 4, 2048),
        "250m": (1024, 16, 16, 8, 2816),
        "350m": (1024, 24, 16, 8, 2816),
        "1b": (2048, 20, 16, 8, 5504),
    }.items()
}  # a name says about how many parameters there are, with the vocabulary that such a size usually has


@strict
class DecoderConfig(PreTrainedConfig):
    """Shape of a decoder. Unknown options and impossible shapes are refused (ValueError).

    sinks          "none"; "logit", also with a window; "window": a rolling window alone; "cache" and "tokens": beside the first
                   `sink_tokens` tokens (of "tokens" the training data must begin with as many of a kind of their own)
    experts        0: a dense mlp; else as many, of which each token goes through `experts_per_token`
    """

    model_type = "lesion-decoder"
    keys_to_ignore_at_inference = ("cache",)

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    sinks: Literal["none", "window", "cache", "tokens", "logit"] = "none"
    sink_tokens: int = 4
    window: int | None = None
    experts: int = 0
    experts_per_token: int = 2
    capacity_factor: float | None = None
    balance_weight: float = 0.01
    z_weight: float = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and isinstance(self.hidden_size, int) and isinstance(self.num_attention_heads, int):
            self.head_dim = self.hidden_size // self.num_attention_heads
        known = {"architectures", "dtype", "transformers_version", "model_type", "attn_implementation", "name_or_path"}
        if unknown := sorted(set(kwargs) - known - set(PreTrainedConfig.__dataclass_fields__)):
            there = ", ".join(type(self).__annotations__)
            raise ValueError(f"no option {unknown[0]!r} of a decoder; there are: {there}")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the validation that `@strict` runs."""
        assert self.num_key_value_heads is not None and self.head_dim is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        windowed = self.sinks in ("window", "cache", "tokens")
        allowed = windowed or self.sinks == "logit"
        if (windowed and self.window is None) or (self.window is not None and (not allowed or self.window < 1)):
            raise ValueError(f"sinks={self.sinks!r} {'needs' if windowed else 'has no'} window; got {self.window}")
        if self.sinks in ("cache", "tokens") and self.sink_tokens < 1:
            raise ValueError(f"sinks={self.sinks!r} needs one sink token or more, not {self.sink_tokens}")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"a token goes through 1 to {self.experts} experts, not {self.experts_per_token}")


def config_of_llama(llama: Any) -> DecoderConfig:
    """The shape of a Llama as ours. Raises ValueError for what our decoder does not compute: other families, biases, scaled
    rotations, another activation."""
    rope = getattr(llama, "rope_parameters", None) or {"rope_theta": getattr(llama, "rope_theta", 10000.0)}
    odd = [name for name in ("attention_bias", "mlp_bias") if getattr(llama, name, False)]
    odd += [f"rope of type {kind}"] if (kind := rope.get("rope_type", "default")) != "default" else []
    odd += [f"activation {llama.hidden_act}"] if getattr(llama, "hidden_act", "silu") != "silu" else []
    if llama.model_type != "llama" or odd:
        raise ValueError(
            f"our decoder computes what a plain llama does, and this is a {', '.join([llama.model_type, *odd])}"
        )
    names: tuple[str, ...] = (
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "head_dim",
    )
    names += ("bos_token_id", "eos_token_id", "pad_token_id", *_SHAPE)
    return DecoderConfig(**{name: getattr(llama, name) for name in names}, rope_theta=float(rope["rope_theta"]))
