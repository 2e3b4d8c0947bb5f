"""Where each model family keeps its weights: the only file that knows the names of modules.

A family is a function from a model's config to its towers. A `Tower` names, in reading order, the module behind every
part: what comes before the layers, what is inside each of them, what comes after. A path leads to a module (then its
`weight` is meant, and its `bias`, if it has one) or to a bare parameter. `lesion.sites` turns these into views.

An architecture that is not listed here is described by the same few lines, and known from then on:

    from lesion.families import FAMILIES, Tower

    def made_up(config):
        return (
            Tower(
                layers="body.blocks",
                heads=config.num_heads,
                kv_heads=config.num_heads,
                before={"embedding": "body.words"},
                inside={"attention.query": "attn.q", ..., "mlp.in": "up", "mlp.out": "down", "norm": ("ln1", "ln2")},
                after={"norm": "body.last", "head": "words_out"},
            ),
        )

    FAMILIES["made_up"] = made_up          # the config's model_type

Roles are free words, but those with a meaning keep it: attention and cross have .query .key .value .output (split by
heads), mlp has .in .gate .out (with an axis of neurons; .gate is the half that goes through the activation), norm is
left out of "all", and a model may lack its head. Everything else that a description names must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where one part lies, when a path alone does not say it.

    The parameter, oriented [out, in], falls into `groups` equal blocks of rows, and the part is rows `rows[0]` to
    `rows[1]` (excluded) of every block. One group is a plain stack, as in GPT-2; a group for each head is the
    interleaved layout of GPT-NeoX. `transposed` says that a bare parameter is stored [in, out]; modules say so
    themselves by their class. `stacked`: a bare parameter holds the matrices of all experts, [experts, out, in], and the
    rows are those of each.
    """

    path: str
    rows: tuple[int, int] | None = None
    groups: int = 1
    transposed: bool = False
    stacked: bool = False


Places = str | Place | tuple[str | Place, ...]  # several where a part is made of several tensors: norms, experts


@dataclass(frozen=True, eq=False)
class Tower:
    """One stack of layers with what surrounds it. Paths of `inside` start at a layer, all others at the model."""

    name: str = "text"
    default: bool = True  # meant by an address that names no tower
    layers: str | None = None  # path of the list of layers
    heads: int = 0  # of queries and outputs
    kv_heads: int = 0  # of keys and values: fewer where queries are grouped
    before: Mapping[str, Places] = field(default_factory=dict)
    inside: Mapping[str, Places] = field(default_factory=dict)
    after: Mapping[str, Places] = field(default_factory=dict)


def projections(path: str, names: str, role: str = "attention") -> dict[str, Places]:
    """Four separate projections under one module: `names` of query, key, value and output, in this order."""
    parts = ("query", "key", "value", "output")
    return {f"{role}.{part}": f"{path}.{name}" for part, name in zip(parts, names.split(), strict=True)}


def fused(path: str, width: int, groups: int = 1) -> dict[str, Places]:
    """Query, key and value as consecutive runs of `width` rows in each of `groups` blocks of one parameter."""
    parts = ("query", "key", "value")
    return {f"attention.{part}": Place(path, (i * width, (i + 1) * width), groups) for i, part in enumerate(parts)}


def gpt_neox(config: Any) -> tuple[Tower, ...]:
    """GPT-NeoX, so Pythia: one projection whose rows are, head after head, that head's query, key and value."""
    heads = config.num_attention_heads
    return (
        Tower(
            layers="gpt_neox.layers",
            heads=heads,
            kv_heads=heads,
            before={"embedding": "gpt_neox.embed_in"},
            inside={
                **fused("attention.query_key_value", config.hidden_size // heads, groups=heads),
                "attention.output": "attention.dense",
                "mlp.in": "mlp.dense_h_to_4h",
                "mlp.out": "mlp.dense_4h_to_h",
                "norm": ("input_layernorm", "post_attention_layernorm"),
            },
            after={"norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
        ),
    )


def gpt2(config: Any) -> tuple[Tower, ...]:
    """GPT-2: query, key and value one after the other, in Conv1D modules, which store the transpose."""
    if config.add_cross_attention:
        raise ValueError("gpt2 with cross attention is not described in lesion.families, only the plain decoder is")
    return (
        Tower(
            layers="transformer.h",
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            before={"embedding": "transformer.wte", "position": "transformer.wpe"},
            inside={
                **fused("attn.c_attn", config.hidden_size),
                "attention.output": "attn.c_proj",
                "mlp.in": "mlp.c_fc",
                "mlp.out": "mlp.c_proj",
                "norm": ("ln_1", "ln_2"),
            },
            after={"norm": "transformer.ln_f", "head": "lm_head"},
        ),
    )


TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def llama_like(*norms: str, root: str = "model") -> Callable[[Any], tuple[Tower, ...]]:
    """Llama and its kin, which differ, as far as places go, in the norms of a layer."""

    def family(config: Any) -> tuple[Tower, ...]:
        return (
            Tower(
                layers=f"{root}.layers",
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                before={"embedding": f"{root}.embed_tokens"},
                inside={
                    **projections("self_attn", "q_proj k_proj v_proj o_proj"),
                    "mlp.in": "mlp.up_proj",
                    "mlp.gate": "mlp.gate_proj",
                    "mlp.out": "mlp.down_proj",
                    "norm": norms,
                },
                after={"norm": f"{root}.norm", "head": "lm_head"},
            ),
        )

    return family


def decoder(config: Any) -> tuple[Tower, ...]:
    """Our own decoder; the matrices of its experts lie in one parameter each, gate and up one after the other."""
    (tower,) = llama_like(*TWO_NORMS)(config)
    if not config.experts:
        return (tower,)
    inner, both = config.intermediate_size, "mlp.gate_up_proj"
    experts: dict[str, Places] = {
        "mlp.gate": Place(both, (0, inner), stacked=True),
        "mlp.in": Place(both, (inner, 2 * inner), stacked=True),
        "mlp.out": Place("mlp.down_proj", stacked=True),
        "mlp.router": "mlp.router",
    }
    return (replace(tower, inside={**tower.inside, **experts}),)


def siglip(eye: str, vision: Any) -> Tower:
    """The vision tower of an image-text model, and of its projections of patches."""
    return Tower(
        name="vision",
        default=False,
        layers=f"{eye}.encoder.layers",
        heads=vision.num_attention_heads,
        kv_heads=vision.num_attention_heads,
        before={"embedding": f"{eye}.embeddings.patch_embedding", "position": f"{eye}.embeddings.position_embedding"},
        inside={
            **projections("self_attn", "q_proj k_proj v_proj out_proj"),
            "mlp.in": "mlp.fc1",
            "mlp.out": "mlp.fc2",
            "norm": ("layer_norm1", "layer_norm2"),
        },
        after={"norm": f"{eye}.post_layernorm"},
    )


def smolvlm(config: Any) -> tuple[Tower, ...]:
    """SmolVLM and Idefics 3: a Llama, a SigLIP tower and one matrix that joins them."""
    return (
        *llama_like(*TWO_NORMS, root="model.text_model")(config.text_config),
        siglip("model.vision_model", config.vision_config),
        Tower(name="projector", default=False, before={"projection": "model.connector.modality_projection.proj"}),
    )


def gemma3(config: Any) -> tuple[Tower, ...]:
    """Gemma 3 with images: the text tower, a SigLIP tower and what projects one into the other.

    The pooling head that a SigLIP tower may carry is no site: Gemma reads the tower before it.
    """
    bridge = "model.multi_modal_projector"
    return (
        *llama_like(*FOUR_NORMS, *QK_NORMS, root="model.language_model")(config.text_config),
        siglip("model.vision_tower", config.vision_config),
        Tower(
            name="projector",
            default=False,
            before={
                "norm": f"{bridge}.mm_soft_emb_norm",
                "projection": Place(f"{bridge}.mm_input_projection_weight", transposed=True),
            },
        ),
    )


def opt(config: Any) -> tuple[Tower, ...]:
    """OPT: learned positions; the 350m has narrower embeddings, projected in and out, and no last norm."""
    narrow = config.word_embed_proj_dim != config.hidden_size
    last_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
    return (
        Tower(
            layers="model.decoder.layers",
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            before={
                "embedding": "model.decoder.embed_tokens",
                **({"projection.in": "model.decoder.project_in"} if narrow else {}),
                "position": "model.decoder.embed_positions",
            },
            inside={
                **projections("self_attn", "q_proj k_proj v_proj out_proj"),
                "mlp.in": "fc1",
                "mlp.out": "fc2",
                "norm": ("self_attn_layer_norm", "final_layer_norm"),
            },
            after={
                **({"norm": "model.decoder.final_layer_norm"} if last_norm else {}),
                **({"projection.out": "model.decoder.project_out"} if narrow else {}),
                "head": "lm_head",
            },
        ),
    )


def t5(config: Any) -> tuple[Tower, ...]:
    """T5, plain and gated (v1.1): two towers over one vocabulary. Its positions are a bias for each distance bucket and
    head, stored in the first layer and used by all, so they belong to no layer."""
    return _t5_tower("encoder", config), _t5_tower("decoder", config)


def _t5_tower(name: str, config: Any) -> Tower:
    decodes = name == "decoder"
    mlp = f"layer.{1 + decodes}.DenseReluDense"
    hidden: dict[str, Places] = {"mlp.in": f"{mlp}.wi"}
    if config.is_gated_act:
        hidden = {"mlp.in": f"{mlp}.wi_1", "mlp.gate": f"{mlp}.wi_0"}
    return Tower(
        name=name,
        layers=f"{name}.block",
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        before={
            "embedding": f"{name}.embed_tokens",
            "position": f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias",
        },
        inside={
            **projections("layer.0.SelfAttention", "q k v o"),
            **(projections("layer.1.EncDecAttention", "q k v o", role="cross") if decodes else {}),
            **hidden,
            "mlp.out": f"{mlp}.wo",
            "norm": tuple(f"layer.{i}.layer_norm" for i in range(2 + decodes)),
        },
        after={"norm": f"{name}.final_layer_norm", **({"head": "lm_head"} if decodes else {})},
    )


FAMILIES: dict[str, Callable[[Any], tuple[Tower, ...]]] = {
    "gpt_neox": gpt_neox,
    "gpt2": gpt2,
    "llama": llama_like(*TWO_NORMS),
    "mistral": llama_like(*TWO_NORMS),
    "qwen2": llama_like(*TWO_NORMS),
    "qwen3": llama_like(*TWO_NORMS, *QK_NORMS),
    "smollm3": llama_like(*TWO_NORMS),
    "gemma": llama_like(*TWO_NORMS),
    "gemma2": llama_like(*FOUR_NORMS),
    "gemma3_text": llama_like(*FOUR_NORMS, *QK_NORMS),
    "gemma3": gemma3,
    "smolvlm": smolvlm,
    "idefics3": smolvlm,
    "lesion-decoder": decoder,
    "opt": opt,
    "t5": t5,
}
