"""Subjects: what can lie on the bench.

    SmolLM2()                             SmolLM2-135M-Instruct, from a pinned package; no hub needed
    Hub(id="EleutherAI/pythia-70m")       a model hub's repository at a pinned commit
    Directory(path="runs/mine")           a transformers directory, known by the digest of its files
    Scratch(architecture="tiny-llama")    any transformers configuration with random weights from a seed

Weights are read from safetensors only: a pickle can run code while it loads, and is refused by name. A checkpoint that
lacks a weight of its model is refused too; nothing is ever filled with random numbers in silence.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion import packaged
from lesion.trial import Specimen, Subject, Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]


class SmolLM2(Subject):
    """SmolLM2-135M-Instruct (Allal et al. 2025), Apache-2.0: 30 layers, d 576, 9 query and 3 key/value heads, tied
    embeddings, 134,515,008 parameters. The package holds it in 4 bits (Q4_1, embeddings Q8_0), so its weights lie on a
    16-level grid for each block of 32: quantising it again understates what quantising does."""

    name = "smollm2"
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type in which weights are held")

    def outline(self) -> PreTrainedModel:
        return _outline(packaged.folder(packaged.SMOLLM2, self.dtype))

    def load(self, device: str = "cpu") -> Specimen:
        specimen = _load(packaged.folder(packaged.SMOLLM2, "float32"), self, device, self.dtype)
        if self.dtype == "float32":
            packaged.check(packaged.SMOLLM2, specimen.model)
        return specimen


class Directory(Subject):
    """A directory as `save_pretrained` writes it. It is known by the digest of its files, not by where it lies."""

    path: str = Field(description="folder with config.json, *.safetensors and a tokenizer")
    dtype: Dtype = Field(default="auto", description="auto: as stored")
    trust_remote_code: bool = Field(default=False, description="run Python code that lies beside the weights")
    sha256: str | None = Field(default=None, description="digest of the files; filled in when the trial is pinned")

    def pin(self) -> Self:
        found = _folder_digest(_checked(Path(self.path)))
        if self.sha256 not in (None, found):
            raise ValueError(f"{self.path} was to have sha256 {self.sha256} but has {found}: its files have changed")
        return self if self.sha256 else self.model_copy(update={"sha256": found})

    def identity(self) -> Any:
        if self.sha256 is None:
            raise ValueError(f"{self.path} has no identity before it is pinned")
        return {k: v for k, v in self.to_json().items() if k != "path"}

    def outline(self) -> PreTrainedModel:
        return _outline(Path(self.path), self.trust_remote_code)

    def load(self, device: str = "cpu") -> Specimen:
        return _load(_checked(Path(self.path)), self, device, self.dtype, self.trust_remote_code)


class Hub(Subject):
    """A repository of a model hub. A branch or tag is pinned to its commit before anything is read.

    The token comes from HF_TOKEN, the hub login or a `.env` file here; it is never printed or stored.
    """

    id: str = Field(description='repository, as in "EleutherAI/pythia-70m"')
    revision: str = Field(default="main", description="branch, tag or commit")
    dtype: Dtype = Field(default="auto", description="auto: as stored")
    trust_remote_code: bool = Field(default=False, description="run Python code from the repository")

    def pin(self) -> Self:
        if re.fullmatch("[0-9a-f]{40}", self.revision):
            return self
        return self.model_copy(update={"revision": self._folder(["config.json"]).name})

    def _folder(self, patterns: list[str]) -> Path:
        """Snapshot of the repository in the hub's cache, fetched where it is missing."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            return Path(snapshot_download(self.id, revision=self.revision, allow_patterns=patterns, token=hub_token()))
        except GatedRepoError:
            raise ValueError(f"{self.id} is gated: accept its licence on the hub and set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise ValueError(f"the hub has no {self.id!r}, or it is private and HF_TOKEN is not set") from None
        except LocalEntryNotFoundError:
            raise ValueError(
                f"{self.id}@{self.revision} is not in the hub's cache and the hub cannot be reached"
            ) from None
        except HfHubHTTPError as error:
            raise ValueError(f"the hub refused {self.id}@{self.revision}: {error.response.status_code}") from None

    def outline(self) -> PreTrainedModel:
        return _outline(self._folder(["*.json"]), self.trust_remote_code)

    def load(self, device: str = "cpu") -> Specimen:
        folder = self._folder([*WANTED, "*.py"] if self.trust_remote_code else WANTED)
        if not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"{self.id} has no safetensors; its pickled weights are refused, because loading them runs code"
            )
        return _load(folder, self, device, self.dtype, self.trust_remote_code)


class Scratch(Subject):
    """Random weights from a seed: a named tiny architecture, or any configuration transformers knows."""

    architecture: str = Field(default="tiny-llama", description="a tiny name, or a model_type when `config` is given")
    config: dict[str, Any] = Field(default={}, description="fields of the transformers configuration")
    seed: int = Field(default=0, ge=0, description="of the random weights")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if not self.config and self.architecture not in packaged.TINY:
            raise ValueError(f"no architecture {self.architecture!r}; there are: {', '.join(packaged.TINY)}")
        return self

    def _config(self) -> Any:
        from transformers import AutoConfig

        fields = dict(self.config) or dict(packaged.TINY[self.architecture])
        return AutoConfig.for_model(fields.pop("model_type", self.architecture), **fields)

    def outline(self) -> PreTrainedModel:
        import torch

        with torch.device("meta"):
            return model_class(self._config()).from_config(self._config())

    def load(self, device: str = "cpu") -> Specimen:
        import torch

        config = self._config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = model_class(config).from_config(config, dtype=getattr(torch, self.dtype))
        tokenizer = packaged.byte_tokenizer(config)
        return Specimen(model=model.to(device).eval(), tokenizer=tokenizer, trial=Trial(subject=self))


def parse(text: str, dtype: str = "auto") -> Subject:
    """A subject as it is written on a command line: smollm2, tiny-llama, org/name, org/name@revision, ./folder."""
    chosen: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
    if text == SmolLM2.name:
        return SmolLM2(**chosen)
    if text in packaged.TINY:
        return Scratch(architecture=text, **chosen)
    if Path(text).is_dir() or text.startswith((".", "/", "~")):
        return Directory(path=str(Path(text).expanduser()), **chosen)
    if match := re.fullmatch(r"(?:hub:)?([\w.-]+/[\w.-]+|(?<=hub:)[\w.-]+)(?:@([\w./-]+))?", text):
        return Hub(id=match[1], revision=match[2] or "main", **chosen)
    raise ValueError(
        f"no subject {text!r}; there are: smollm2, {', '.join(packaged.TINY)}, a folder (./path), "
        "or a hub repository (org/name, org/name@revision)"
    )


def hub_token() -> str | None:
    """HF_TOKEN from the environment or from `.env` here; None leaves the hub login to huggingface_hub."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    env = Path(".env")
    if env.is_file():
        for text in env.read_text(encoding="utf-8").splitlines():
            if match := re.fullmatch(r"\s*(?:export\s+)?HF_TOKEN\s*=\s*[\"']?([^\"'\s]+)[\"']?\s*", text):
                return match[1]
    return None


def model_class(config: Any) -> Any:
    """The auto class of a configuration: seq2seq, image-text or causal."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def _load(folder: Path, subject: Subject, device: str, dtype: str, trust: bool = False) -> Specimen:
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    model, info = model_class(config).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust, output_loading_info=True
    )
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"{folder} lacks {len(wrong)} weights of a {config.model_type}, such as {sorted(map(str, wrong))[0]}"
        )
    if model.config.dtype is not None and dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise ValueError(f"{folder} came as {model.dtype}, not as {dtype}")
    has_image = (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust) if has_image else None
    tokenizer = getattr(processor, "tokenizer", None) or AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    specimen = Specimen(
        model=model.to(device).eval(), tokenizer=tokenizer, trial=Trial(subject=subject), processor=processor
    )
    if info["unexpected_keys"]:
        specimen.ledger.append({"not used": sorted(info["unexpected_keys"])})
    return specimen


def _outline(folder: Path, trust: bool = False) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with torch.device("meta"):
        return model_class(config).from_config(config, trust_remote_code=trust)


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a transformers directory")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights ({', '.join(pickles)}), which are refused: loading them runs code"
            )
        raise ValueError(f"{folder} has no *.safetensors")
    return folder


def _folder_digest(folder: Path) -> str:
    """sha256 over the names and sha256s of all files that say what the model is."""
    names = sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix not in PICKLES and not p.name.startswith(".")
    )
    total = hashlib.sha256()
    for path in names:
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
