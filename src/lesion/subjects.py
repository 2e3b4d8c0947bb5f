"""Subjects: what can lie on the bench.

    SmolLM2()                             SmolLM2-135M-Instruct, from a pinned package; no hub needed
    Tiny()                                a small model trained here, once, on public-domain text
    Hub(id="EleutherAI/pythia-70m")       a model hub's repository at a pinned commit
    Directory(path="runs/mine")           a transformers directory, known by the digest of its files
    Scratch(architecture="tiny-llama")    any transformers configuration with random weights from a seed

Weights are read from safetensors only: a pickle can run code while it loads, and is refused by name. A checkpoint that
lacks a weight of its model is refused too; nothing is ever filled with random numbers in silence.
"""

from __future__ import annotations

import copy
import json
import os
import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lesion import packaged
from lesion.checkpoints import (
    checked,
    folder_digest,
    know_our_own,
    load_folder,
    model_class,
    outline_folder,
    strangers,
)
from lesion.hub import REPOSITORY, ask
from lesion.hub import hub_token as hub_token
from lesion.trial import Specimen, Subject, Trial
from lesion.weightfiles import PICKLES, check_weights, weight_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["auto", "float32", "bfloat16", "float16", "nf4"]
HELD = "auto: as stored; nf4: linear layers in 4 bits by bitsandbytes, which makes them codes that no step can damage"
TEXTS = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # all of a repository but weights and code


class SmolLM2(Subject):
    """SmolLM2-135M-Instruct (Allal et al. 2025), Apache-2.0: 30 layers, d 576, 9 query and 3 key/value heads, tied
    embeddings, 134,515,008 parameters. The package holds it in 4 bits (Q4_1, embeddings Q8_0), so its weights lie on a
    16-level grid for each block of 32: quantising it again understates what quantising does."""

    name = "smollm2"
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type in which weights are held")

    def fetch(self) -> Path:
        return packaged.folder(packaged.SMOLLM2)

    def outline(self) -> PreTrainedModel:
        folder = packaged.folder(packaged.SMOLLM2)
        with packaged.blaming(folder):
            return outline_folder(folder, self.dtype)

    def load(self, device: str = "cpu") -> Specimen:
        folder = packaged.folder(packaged.SMOLLM2)
        with packaged.blaming(folder):
            specimen = load_folder(folder, self, device, self.dtype)
            packaged.check(packaged.SMOLLM2, specimen.model, self.dtype)
        return specimen


class Directory(Subject):
    """A directory as `save_pretrained` writes it. It is known by the digest of its files, not by where it lies."""

    path: str = Field(description="folder with config.json, *.safetensors and a tokenizer")
    dtype: Dtype = Field(default="auto", description=HELD)
    trust_remote_code: bool = Field(default=False, description="run Python code that lies beside the weights")
    sha256: str | None = Field(default=None, description="digest of the files; filled in when the trial is pinned")

    def pin(self) -> Self:
        found = folder_digest(self._folder())
        if self.sha256 not in (None, found):
            raise ValueError(f"{self.path} was to have sha256 {self.sha256} but has {found}: its files have changed")
        return self if self.sha256 else self.model_copy(update={"sha256": found})

    def identity(self) -> Any:
        if self.sha256 is None:
            raise ValueError(f"{self.path} has no identity before it is pinned")
        return {k: v for k, v in self.to_json().items() if k != "path"}

    def _folder(self) -> Path:
        folder = Path(os.path.expanduser(self.path))  # noqa: PTH111  a name that is no user's is no error here
        check_weights(checked(folder, self.trust_remote_code))
        return folder

    def outline(self) -> PreTrainedModel:
        return outline_folder(self._folder(), self.dtype, self.trust_remote_code)

    def load(self, device: str = "cpu") -> Specimen:
        before = _stamps(self._folder())
        pinned = self.pin()  # what is loaded is what was pinned, or an error
        specimen = load_folder(self._folder(), pinned, device, self.dtype, self.trust_remote_code)
        if _stamps(self._folder()) != before:
            raise ValueError(f"{self.path} was written to while it was read: its files have changed")
        return specimen


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when somebody writes to a file, and is asked for at no cost."""
    found = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


class Hub(Subject):
    """A repository of a model hub. A branch or tag is pinned to its commit before anything is read.

    The token comes from HF_TOKEN, the hub login or a `.env` file here; it is never printed or stored.
    """

    id: str = Field(description='repository, as in "EleutherAI/pythia-70m"', pattern=f"^{REPOSITORY}$")
    revision: str = Field(default="main", description="branch, tag or commit", min_length=1)
    dtype: Dtype = Field(default="auto", description=HELD)
    trust_remote_code: bool = Field(default=False, description="run Python code from the repository")

    def pin(self) -> Self:
        if re.fullmatch("[0-9a-f]{40}", self.revision):
            return self
        return self.model_copy(update={"revision": self._folder(["config.json"]).name})

    def outline(self) -> PreTrainedModel:
        code = ["*.py"] if self.trust_remote_code else []
        folder = checked(self._folder(["config.json", *code]), self.trust_remote_code)
        return outline_folder(folder, self.dtype, self.trust_remote_code)

    def fetch(self) -> Path:
        pinned = self.pin()
        wanted = [*TEXTS, *(["*.py"] if self.trust_remote_code else [])]
        names = weight_names(checked(pinned._folder(wanted), self.trust_remote_code))
        folder = pinned._folder([*wanted, "model.safetensors", *names])
        if not any((folder / name).is_file() for name in names):
            there = ", ".join(pinned._pickles()) or "pickles, if it has any,"
            raise ValueError(f"{self.id} has no safetensors; {there} are refused: loading pickled weights runs code")
        return folder

    def load(self, device: str = "cpu") -> Specimen:
        pinned = self.pin()
        return load_folder(pinned.fetch(), pinned, device, self.dtype, self.trust_remote_code)

    def _folder(self, patterns: list[str]) -> Path:
        """Snapshot of the repository in the hub's cache, with these files of its top level; fetched where missing."""
        from huggingface_hub import snapshot_download

        options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*"]}
        return Path(self._ask(snapshot_download, **options))

    def _pickles(self) -> list[str]:
        from huggingface_hub import list_repo_files

        with suppress(ValueError):  # offline: the names only serve an error message
            return sorted(name for name in self._ask(list_repo_files) if name.endswith(PICKLES) and "/" not in name)
        return []

    def _ask(self, call: Any, **options: Any) -> Any:
        return ask(call, self.id, self.revision, hint=" (a folder is written ./folder)", **options)


class Scratch(Subject):
    """Random weights from a seed: a named tiny architecture, or any configuration transformers knows.

    It reads and writes bytes, so the vocabulary has at least 260 tokens; start, end and padding are 256, 257 and 258
    unless `config` says otherwise.
    """

    architecture: str = Field(default="tiny-llama", description="a tiny name, or a model_type when `config` is given")
    config: dict[str, Any] = Field(
        default={}, description="fields of the transformers configuration; with a tiny name, those that differ"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the random weights")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("config", mode="before")
    @classmethod
    def _own_copy(cls, value: Any) -> Any:
        try:
            return json.loads(json.dumps(value, allow_nan=False))  # a JSON value, and nobody else's
        except (TypeError, ValueError) as error:
            raise ValueError(f"a configuration must be writable as JSON: {error}") from None

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if not self.config and self.architecture not in packaged.TINY:
            raise ValueError(f"no architecture {self.architecture!r}; there are: {', '.join(packaged.TINY)}")
        return self

    def pin(self) -> Self:
        if self.config:
            self._config()  # a wrong field is the user's to mend before any work
        return self

    def _config(self) -> Any:
        """The transformers configuration. Raises ValueError for a field that its class does not have."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        base = packaged.TINY.get(self.architecture, {"model_type": self.architecture})
        if self.config.get("model_type", base["model_type"]) != base["model_type"]:
            base = {}
        given = copy.deepcopy({**base, **self.config})  # transformers writes into what it is given
        kind = given.pop("model_type")
        text = given["text_config"] if isinstance(given.get("text_config"), dict) else given
        for name, token in packaged.SPECIAL.items():
            text.setdefault(name, token)
        asked = copy.deepcopy(given)
        know_our_own()
        try:
            with packaged.quietly():
                config = AutoConfig.for_model(kind, **given)
        except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(f"transformers refuses this configuration of a {kind}: {error}") from error
        if strange := list(strangers(config, asked)):
            known = ", ".join(sorted(field.name for field in fields(config)))
            raise ValueError(f"the configuration of a {kind} has no {strange[0]!r}; there are: {known}")
        model_class(config)
        if (rows := config.get_text_config().vocab_size) < packaged.VOCABULARY:
            raise ValueError(
                f"a vocabulary of {rows} is too small: bytes and 4 special tokens are {packaged.VOCABULARY}"
            )
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id
        return config

    def _model(self) -> PreTrainedModel:
        import torch

        config = self._config()
        with packaged.quietly():
            return model_class(config).from_config(config, dtype=getattr(torch, self.dtype))

    def outline(self) -> PreTrainedModel:
        import torch

        with torch.device("meta"):
            return self._model()

    def load(self, device: str = "cpu") -> Specimen:
        import torch

        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would touch the accelerators' too
            model = self._model()
        tokenizer = packaged.byte_tokenizer()
        return Specimen(model=model.to(device).eval(), tokenizer=tokenizer, trial=Trial(subject=self))


class Tiny(Subject):
    """A decoder of 4 layers and 3.4 million parameters, trained on five novels of Jane Austen the first time it is asked for
    (about three minutes on two cores) and kept. See `lesion.tiny`."""

    sha256: str | None = Field(default=None, description="digest of its files here; filled in when the trial is pinned")

    def pin(self) -> Self:
        from lesion.tiny import folder

        return self.with_digest("tiny", folder_digest(folder()))

    def fetch(self) -> Path:
        from lesion.tiny import folder

        return folder()

    def outline(self) -> PreTrainedModel:
        from lesion.tiny import recipe

        return recipe().subject.outline()

    def load(self, device: str = "cpu") -> Specimen:
        from lesion.tiny import folder

        with packaged.blaming(folder()):
            return load_folder(folder(), self.pin(), device, "float32")


class AsDecoder(Subject):
    """A Llama as our own decoder: the same weights under the same names, every one of them, and so the same logits. What can
    be done to our decoder's attention (`streaming`) can then be done to it."""

    of: Subject = Field(description="a model of the Llama family, such as smollm2")

    def fetch(self) -> Path | None:
        return self.of.fetch()

    def outline(self) -> PreTrainedModel:
        import torch

        from lesion.decoder import DecoderForCausalLM
        from lesion.shapes import config_of_llama

        model = self.of.outline()
        with torch.device("meta"):
            return DecoderForCausalLM(config_of_llama(model.config)).to(model.dtype)

    def load(self, device: str = "cpu") -> Specimen:
        from lesion.decoder import DecoderForCausalLM
        from lesion.shapes import config_of_llama

        specimen = self.of.load(device)
        model = DecoderForCausalLM(config_of_llama(specimen.model.config)).to(specimen.model.dtype)
        model.load_state_dict(specimen.model.state_dict(), strict=True)
        model.generation_config = specimen.model.generation_config
        specimen.model, specimen.trial = model.to(device).eval(), Trial(subject=self)
        return specimen


def precise(text: str) -> Subject:
    """A subject as it is written on a command line, held in float32: many are stored in sixteen bits, to which the small
    updates of a training would be rounded away once it is over."""
    found = parse(text)
    return found.model_copy(update={"dtype": "float32"}) if getattr(found, "dtype", None) == "auto" else found


def parse(text: str, dtype: str = "auto") -> Subject:
    """A subject as it is written on a command line: smollm2, tiny, tiny-llama, org/name, org/name@revision, ./folder.

    A folder that is there is meant before a repository of its name, which can be written hub:org/name.
    """
    chosen: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
    if text == SmolLM2.name:
        return SmolLM2(**chosen)
    if text.startswith("decoder:"):
        return AsDecoder(of=parse(text.removeprefix("decoder:"), dtype))
    if text == Tiny.name:
        if chosen:
            raise ValueError("tiny is held in float32; it has no other dtype")
        return Tiny()
    if text in packaged.TINY:
        return Scratch(architecture=text, **chosen)
    if text.startswith((".", "/", "~")) or os.path.isdir(text):  # noqa: PTH112  Path's raises for some names
        return Directory(path=text, **chosen)
    if (match := re.fullmatch(rf"(hub:)?({REPOSITORY})(?:@(\S+))?", text)) and (match[1] or "/" in match[2]):
        return Hub(id=match[2], revision=match[3] or "main", **chosen)
    raise ValueError(
        f"no subject {text!r}; there are: smollm2, tiny, {', '.join(packaged.TINY)}, a folder (./path), "
        "or a hub repository (org/name, org/name@revision); decoder: before one of them makes a Llama our own decoder"
    )
