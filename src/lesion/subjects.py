"""Subjects: what can lie on the bench.

    SmolLM2()                             SmolLM2-135M-Instruct, from a pinned package; no hub needed
    Hub(id="EleutherAI/pythia-70m")       a model hub's repository at a pinned commit
    Directory(path="runs/mine")           a transformers directory, known by the digest of its files
    Scratch(architecture="tiny-llama")    any transformers configuration with random weights from a seed

Weights are read from safetensors only: a pickle can run code while it loads, and is refused by name. A checkpoint that
lacks a weight of its model is refused too; nothing is ever filled with random numbers in silence.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lesion import packaged
from lesion.trial import Specimen, Subject, Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")  # and other weights that are not read
TEXTS = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # all of a repository but weights and code
REPOSITORY = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_.-]+)?"


class SmolLM2(Subject):
    """SmolLM2-135M-Instruct (Allal et al. 2025), Apache-2.0: 30 layers, d 576, 9 query and 3 key/value heads, tied
    embeddings, 134,515,008 parameters. The package holds it in 4 bits (Q4_1, embeddings Q8_0), so its weights lie on a
    16-level grid for each block of 32: quantising it again understates what quantising does."""

    name = "smollm2"
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type in which weights are held")

    def outline(self) -> PreTrainedModel:
        folder = packaged.folder(packaged.SMOLLM2)
        with packaged.blaming(folder):
            return _outline(folder, self.dtype)

    def load(self, device: str = "cpu") -> Specimen:
        folder = packaged.folder(packaged.SMOLLM2)
        with packaged.blaming(folder):
            specimen = _load(folder, self, device, self.dtype)
            packaged.check(packaged.SMOLLM2, specimen.model, self.dtype)
        return specimen


class Directory(Subject):
    """A directory as `save_pretrained` writes it. It is known by the digest of its files, not by where it lies."""

    path: str = Field(description="folder with config.json, *.safetensors and a tokenizer")
    dtype: Dtype = Field(default="auto", description="auto: as stored")
    trust_remote_code: bool = Field(default=False, description="run Python code that lies beside the weights")
    sha256: str | None = Field(default=None, description="digest of the files; filled in when the trial is pinned")

    def pin(self) -> Self:
        found = _folder_digest(self._folder())
        if self.sha256 not in (None, found):
            raise ValueError(f"{self.path} was to have sha256 {self.sha256} but has {found}: its files have changed")
        return self if self.sha256 else self.model_copy(update={"sha256": found})

    def identity(self) -> Any:
        if self.sha256 is None:
            raise ValueError(f"{self.path} has no identity before it is pinned")
        return {k: v for k, v in self.to_json().items() if k != "path"}

    def _folder(self) -> Path:
        folder = Path(os.path.expanduser(self.path))  # noqa: PTH111  a name that is no user's is no error here
        _weights(_checked(folder, self.trust_remote_code))
        return folder

    def outline(self) -> PreTrainedModel:
        return _outline(self._folder(), self.dtype, self.trust_remote_code)

    def load(self, device: str = "cpu") -> Specimen:
        pinned = self.pin()  # what is loaded is what was pinned, or an error
        return _load(self._folder(), pinned, device, self.dtype, self.trust_remote_code)


class Hub(Subject):
    """A repository of a model hub. A branch or tag is pinned to its commit before anything is read.

    The token comes from HF_TOKEN, the hub login or a `.env` file here; it is never printed or stored.
    """

    id: str = Field(description='repository, as in "EleutherAI/pythia-70m"', pattern=f"^{REPOSITORY}$")
    revision: str = Field(default="main", description="branch, tag or commit", min_length=1)
    dtype: Dtype = Field(default="auto", description="auto: as stored")
    trust_remote_code: bool = Field(default=False, description="run Python code from the repository")

    def pin(self) -> Self:
        if re.fullmatch("[0-9a-f]{40}", self.revision):
            return self
        return self.model_copy(update={"revision": self._folder(["config.json"]).name})

    def outline(self) -> PreTrainedModel:
        code = ["*.py"] if self.trust_remote_code else []
        folder = _checked(self._folder(["config.json", *code]), self.trust_remote_code)
        return _outline(folder, self.dtype, self.trust_remote_code)

    def load(self, device: str = "cpu") -> Specimen:
        pinned = self.pin()
        wanted = [*TEXTS, *(["*.py"] if self.trust_remote_code else [])]
        names = _weight_names(_checked(pinned._folder(wanted), self.trust_remote_code))
        folder = pinned._folder([*wanted, "model.safetensors", *names])
        if not any((folder / name).is_file() for name in names):
            there = ", ".join(pinned._pickles()) or "pickles, if it has any,"
            raise ValueError(f"{self.id} has no safetensors; {there} are refused: loading pickled weights runs code")
        return _load(folder, pinned, device, self.dtype, self.trust_remote_code)

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
        """Asks the hub. What goes wrong becomes a ValueError that does not hold on to the request: that has the token."""
        from huggingface_hub import errors

        token = hub_token()
        try:
            return call(self.id, revision=self.revision, token=token, **options)
        except errors.GatedRepoError:
            said = "is gated: accept its licence on the hub and set HF_TOKEN"
        except errors.RevisionNotFoundError:
            said = "is not there: the repository has no such branch, tag or commit"
        except errors.RepositoryNotFoundError:
            said = "is not on the hub, or it is private and HF_TOKEN is not set (a folder is written ./folder)"
        except errors.LocalEntryNotFoundError as error:
            status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
            offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
            why = "HF_HUB_OFFLINE is set" if offline else f"the hub answers {status}" if status else "no hub answers"
            said = f"is not in the hub's cache, or not all of it, and {why}"
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            said = f"was refused by the hub with status {status}" + ("; is HF_TOKEN right?" if status == 401 else "")
        except (errors.HTTPError, OSError, RuntimeError) as error:
            said = f"could not be fetched: {getattr(error, 'strerror', None) or type(error).__name__}"
        raise ValueError(f"{self.id}@{self.revision} {said}")


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
        try:
            with packaged.quietly():
                config = AutoConfig.for_model(kind, **given)
        except (StrictDataclassError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(f"transformers refuses this configuration of a {kind}: {error}") from error
        if strange := list(_strangers(config, asked)):
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


def parse(text: str, dtype: str = "auto") -> Subject:
    """A subject as it is written on a command line: smollm2, tiny-llama, org/name, org/name@revision, ./folder.

    A folder that is there is meant before a repository of its name, which can be written hub:org/name.
    """
    chosen: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
    if text == SmolLM2.name:
        return SmolLM2(**chosen)
    if text in packaged.TINY:
        return Scratch(architecture=text, **chosen)
    if text.startswith((".", "/", "~")) or os.path.isdir(text):  # noqa: PTH112  Path's raises for some names
        return Directory(path=text, **chosen)
    if (match := re.fullmatch(rf"(hub:)?({REPOSITORY})(?:@(\S+))?", text)) and (match[1] or "/" in match[2]):
        return Hub(id=match[2], revision=match[3] or "main", **chosen)
    raise ValueError(
        f"no subject {text!r}; there are: smollm2, {', '.join(packaged.TINY)}, a folder (./path), "
        "or a hub repository (org/name, org/name@revision)"
    )


def hub_token() -> str | None:
    """The token of the environment (HF_TOKEN), else of the hub login, else HF_TOKEN in a `.env` file here."""
    from huggingface_hub import get_token

    token, env = get_token(), Path(".env")
    if token is None and env.is_file():
        pattern = r"\s*(?:export\s+)?HF_TOKEN\s*=\s*([\"']?)([^\"'\s#]+)\1\s*(?:#.*)?"
        lines = env.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        token = next((match[2] for line in lines if (match := re.fullmatch(pattern, line))), None)
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise ValueError("the hub token (HF_TOKEN) holds a character that no token has")  # and it is not shown
    return token


def model_class(config: Any) -> Any:
    """The auto class of a configuration: image-text, seq2seq or causal. Raises ValueError where none of them fits."""
    import transformers as t

    seq2seq, own = config.is_encoder_decoder, getattr(config, "auto_map", None) or {}
    fits = [
        (hasattr(config, "vision_config"), t.AutoModelForImageTextToText, t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (seq2seq, t.AutoModelForSeq2SeqLM, t.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        (not seq2seq, t.AutoModelForCausalLM, t.MODEL_FOR_CAUSAL_LM_MAPPING),
    ]
    found = next((auto for fit, auto, known in fits if fit and (type(config) in known or auto.__name__ in own)), None)
    encoder = type(config) in t.MODEL_FOR_MASKED_LM_MAPPING and not seq2seq and not getattr(config, "is_decoder", False)
    if found is None or encoder:
        raise ValueError(
            f"a {config.model_type} continues no text; there are causal, seq2seq and image-text language models"
        )
    return found


# ---------------------------------------------------------------------- transformers directories


def _load(folder: Path, subject: Subject, device: str, dtype: str, trust: bool = False) -> Specimen:
    _weights(_checked(folder, trust))
    with packaged.quietly():
        config = _config(folder, trust)
        try:
            model, info = model_class(config).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                trust_remote_code=trust,
                local_files_only=True,
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder} cannot be loaded as a {config.model_type}: {error}") from error
        _refuse_misfits(folder, config.model_type, info)
        if dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
            raise ValueError(f"{folder} came as {model.dtype}, not as {dtype}")
        tokenizer, processor, facts = _tokenizer(folder, trust)
    if info["unexpected_keys"]:
        facts["not used"] = sorted(info["unexpected_keys"])
    if kept := [name for name, p in model.named_parameters() if p.is_floating_point() and p.dtype != model.dtype]:
        facts["held in another type"] = kept  # some families keep a few weights in float32
    specimen = Specimen(
        model=model.to(device).eval(), tokenizer=tokenizer, trial=Trial(subject=subject), processor=processor
    )
    if facts:
        specimen.ledger.append(facts)
    return specimen


def _refuse_misfits(folder: Path, kind: str, info: dict[str, Any]) -> None:
    missing = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    misshapen = [
        f"{name} is {list(came)} and not {list(expected)}" for name, came, expected in sorted(info["mismatched_keys"])
    ]
    if wrong := [*misshapen, *missing]:
        unknown = f" (it holds an unknown {min(info['unexpected_keys'])})" if info["unexpected_keys"] else ""
        said = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
        raise ValueError(f"{folder} does not fit a {kind}; wrong weights: {len(wrong)}, such as {said}{unknown}")


def _tokenizer(folder: Path, trust: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Tokenizer, processor where there is one, and what the ledger should know. Raises ValueError without a tokenizer."""
    from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin

    options: dict[str, Any] = {"trust_remote_code": trust, "local_files_only": True}
    facts: dict[str, Any] = {}
    processor = None
    try:
        if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            try:
                processor = AutoProcessor.from_pretrained(folder, **options)
            except ImportError as error:  # some processors want a library for video; text needs none of it
                facts["processor"] = f"not loaded: {str(error).strip().splitlines()[0]}"
        if not isinstance(processor, ProcessorMixin) or getattr(processor, "tokenizer", None) is None:
            processor = None
        tokenizer = AutoTokenizer.from_pretrained(folder, **options) if processor is None else processor.tokenizer
    except Exception as error:  # the tokenizers library raises nothing more specific
        why = " ".join(str(error).split())
        raise ValueError(f"{folder} has no tokenizer, or none that can be loaded: {why}") from error
    named = tokenizer.vocab_files_names.values()  # none for a tokenizer of bytes, which needs no vocabulary
    files = ["tokenizer.json", "tekken.json", *named] if named else []
    if files and not any((folder / file).is_file() for file in files):  # transformers makes an empty vocabulary
        raise ValueError(f"{folder} has no tokenizer: expected one of {', '.join(dict.fromkeys(files))}")
    return tokenizer, processor, facts


def _outline(folder: Path, dtype: str, trust: bool = False) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    import torch

    with packaged.quietly(), torch.device("meta"):
        config = _config(folder, trust)
        held = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return model_class(config).from_config(config, dtype=held, trust_remote_code=trust)


def _config(folder: Path, trust: bool) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    except (StrictDataclassError, OSError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder}/config.json is refused by transformers: {error}") from error


def _checked(folder: Path, trust: bool) -> Path:
    """The folder, unless it is none of transformers or its JSON files ask for what is not done here."""
    if not folder.is_dir():
        near = [p.name for p in sorted(folder.parent.iterdir()) if p.is_dir()] if folder.parent.is_dir() else []
        raise ValueError(f"no folder {folder}" + (f"; {folder.parent} has: {', '.join(near[:12])}" if near else ""))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a transformers directory")
    config = _read(folder / "config.json")
    code = sorted({ref for path in folder.glob("*config.json") for ref in _own_code(_read(path))})
    if code and not trust:
        raise ValueError(
            f"{folder} brings Python code of its own ({', '.join(code)}), which is not run unless "
            "trust_remote_code=True allows it"
        )
    if foreign := [ref for ref in code if "--" in ref]:
        raise ValueError(f"{folder} takes code from another repository ({foreign[0]}), which nothing here pins")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json): merge it into its model first")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (packed := part.get("quantization_config")):
            method = packed.get("quant_method") if isinstance(packed, dict) else packed
            raise ValueError(f"{folder} holds weights packed by {method}; expected plain floating-point ones")
    return folder


def _own_code(value: Any) -> Iterator[str]:
    """References to Python code in a JSON file of a repository: what stands under any "auto_map"."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key == "auto_map":
            for refs in inner.values() if isinstance(inner, dict) else [inner]:
                yield from (str(ref) for ref in (refs if isinstance(refs, list) else [refs]) if ref)
        else:
            yield from _own_code(inner)


def _weight_names(folder: Path) -> list[str]:
    """Files that hold the weights: one, or what the index lists. Raises ValueError for anything but safetensors."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        names = sorted({str(name) for name in (_read(index).get("weight_map") or {}).values()})
    if odd := [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]:
        raise ValueError(f"{index} lists {odd[0]}: only *.safetensors beside it are read, since pickles run code")
    if (named := _read(folder / "config.json").get("transformers_weights")) not in (None, *names, index.name):
        raise ValueError(f"{folder} has its weights in {named}; expected model.safetensors or {index.name}")
    return names


def _weights(folder: Path) -> None:
    """Raises ValueError unless every file of weights is there, is safetensors, and is whole."""
    from safetensors import SafetensorError, safe_open

    names = _weight_names(folder)
    if not names or not any((folder / name).is_file() for name in names):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights ({', '.join(pickles)}), which are refused: loading them runs code"
            )
        raise ValueError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, which its index lists")
        try:
            with safe_open(folder / name, framework="pt"):
                pass  # reads the header and compares the size of the file with it
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not a whole safetensors file ({error})") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


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


def _strangers(config: Any, given: dict[str, Any], at: str = "") -> Iterator[str]:
    """Fields that were given but that the configuration's class neither declares nor consumes: misspelt ones."""
    from transformers import GenerationConfig, PreTrainedConfig

    known = {field.name for field in fields(config)} | vars(GenerationConfig()).keys()
    for name, value in given.items():
        inner = getattr(config, name, None)
        if isinstance(value, dict) and isinstance(inner, PreTrainedConfig):
            yield from _strangers(inner, {k: v for k, v in value.items() if k != "model_type"}, f"{at}{name}.")
        elif name in vars(config) and name not in known:
            yield at + name
