"""Transformers directories: what may be read from one, and how it becomes a specimen.

Everything that could make a model other than the one that was meant is refused by name: pickled weights, weights that are
missing, unknown or of another shape, code of the repository that nobody asked for, a tokenizer that is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesion import digests, packaged
from lesion.trial import Specimen, Subject, Trial
from lesion.weightfiles import PICKLES, check_weights, read_json, refuse_codes, refuse_giants, refuse_holes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MOST_LAYERS = 10_000  # a configuration with more is no model's, and transformers would build them all before it looks
OVERFLOWING = ("gemma3",)  # hidden states reach 10⁵ and more, float16 ends at 65,504 (transformers, issue 36822)
UNFIT = (OSError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, ValueError)
"""What transformers raises where a configuration makes no sense to it."""


def know_our_own() -> None:
    """Makes transformers know `lesion.decoder`, which registers itself when it is imported."""
    import lesion.decoder  # noqa: F401


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


def load_folder(folder: Path, subject: Subject, device: str, dtype: str, trust: bool = False) -> Specimen:
    import torch

    check_weights(checked(folder, trust))
    with packaged.quietly():
        config = read_config(folder, trust)
        refuse_giants(folder, outline_folder(folder, dtype, trust))
        try:
            model, info = model_class(config).from_pretrained(
                folder,
                **({"dtype": dtype} if dtype != "nf4" else _four_bits(config, device)),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                trust_remote_code=trust,
                local_files_only=True,
            )
        except UNFIT as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder} cannot be loaded as a {config.model_type}: {why}") from error
        _refuse_misfits(folder, config.model_type, info)
        if dtype != "nf4":
            _take_out(model)
        refuse_codes(folder, model)
        refuse_holes(folder, model)
        if dtype not in ("auto", "nf4", str(model.dtype).removeprefix("torch.")):
            raise ValueError(f"{folder} came as {model.dtype}, not as {dtype}")
        tokenizer, processor, facts = _tokenizer(folder, trust)
    if dtype == "nf4":
        with (
            torch.inference_mode()
        ):  # bitsandbytes rearranges its codes at the first use on some processors: let it be now
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    if info["unexpected_keys"]:
        facts["not used"] = sorted(info["unexpected_keys"])
    if kept := [name for name, p in model.named_parameters() if p.is_floating_point() and p.dtype != model.dtype]:
        facts["held in another type"] = kept  # some families keep a few weights in float32
    specimen = Specimen(
        model=(model if dtype == "nf4" else model.to(device)).eval(),
        tokenizer=tokenizer,
        trial=Trial(subject=subject),
        processor=processor,
    )
    if facts:
        specimen.ledger.append(facts)
    return specimen


def _four_bits(config: Any, device: str) -> dict[str, Any]:
    """What makes transformers load linear layers in 4 bits: NormalFloat of Dettmers et al. (2023), by bitsandbytes."""
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("dtype nf4 needs the package bitsandbytes: pip install 'lesion[nf4]'")
    held = config.dtype or torch.float32
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=held)
    return {"quantization_config": four, "dtype": held, "device_map": {"": device}}


def _of_stills(folder: Path, options: dict[str, Any]) -> Any:
    """SmolVLM's processor without its half for video, which wants torchvision: for still pictures it writes what Idefics
    3's writes. None for other models."""
    from transformers import AutoTokenizer, Idefics3Processor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    known: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            known |= read_json(folder / name)
    if known.get("processor_class") != "SmolVLMProcessor":
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    eye = SmolVLMImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return Idefics3Processor(eye, tokenizer, known.get("image_seq_len", 169), chat_template=tokenizer.chat_template)


def _refuse_misfits(folder: Path, kind: str, info: dict[str, Any]) -> None:
    missing = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    misshapen = [
        f"{name} is {list(came)} and not {list(expected)}" for name, came, expected in sorted(info["mismatched_keys"])
    ]
    if wrong := [*misshapen, *missing]:
        unknown = f" (it holds an unknown {min(info['unexpected_keys'])})" if info["unexpected_keys"] else ""
        said = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
        raise ValueError(f"{folder} does not fit a {kind}; wrong weights: {len(wrong)}, such as {said}{unknown}")


def _take_out(model: PreTrainedModel) -> None:
    """Copies the weights out of their files. What needs no conversion is a view of a file's own pages: whoever writes to the
    file then changes the model on the bench, and whoever shortens it kills the process."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.detach().clone()


def _refuse_overflow(folder: Path, config: Any, dtype: torch.dtype) -> None:
    if str(config.model_type).startswith(OVERFLOWING) and str(dtype) == "torch.float16":
        raise ValueError(
            f"{folder} is a {config.model_type} in float16, in which its hidden states overflow: expected dtype bfloat16 or "
            "float32"
        )


def _tokenizer(folder: Path, trust: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Tokenizer, processor where there is one, and what the ledger should know. Raises ValueError without a tokenizer."""
    from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin

    options: dict[str, Any] = {"trust_remote_code": trust, "local_files_only": True}
    facts: dict[str, Any] = {}
    processor = None
    try:
        if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            try:  # of pixels by Pillow, whatever else is installed: libraries differ in how they resize
                processor = _of_stills(folder, options) or AutoProcessor.from_pretrained(
                    folder, backend="pil", **options
                )
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


def outline_folder(folder: Path, dtype: str, trust: bool = False) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    import torch

    with packaged.quietly(), torch.device("meta"):
        config = read_config(folder, trust)
        held = config.dtype or torch.float32 if dtype in ("auto", "nf4") else getattr(torch, dtype)
        auto = model_class(config)
        _refuse_overflow(folder, config, held)
        try:
            return auto.from_config(config, dtype=held, trust_remote_code=trust)
        except UNFIT as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder}/config.json makes no {config.model_type}: {why}") from error


def read_config(folder: Path, trust: bool) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    know_our_own()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    except (StrictDataclassError, *UNFIT) as error:
        raise ValueError(f"{folder}/config.json is refused by transformers: {error}") from error


def checked(folder: Path, trust: bool) -> Path:
    """The folder, unless it is none of transformers or its JSON files ask for what is not done here."""
    if not folder.is_dir():
        near = [p.name for p in sorted(folder.parent.iterdir()) if p.is_dir()] if folder.parent.is_dir() else []
        raise ValueError(f"no folder {folder}" + (f"; {folder.parent} has: {', '.join(near[:12])}" if near else ""))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a transformers directory")
    config = read_json(folder / "config.json")
    code = sorted({ref for path in folder.glob("*config.json") for ref in _own_code(read_json(path))})
    if code and not trust:
        raise ValueError(
            f"{folder} brings Python code of its own ({', '.join(code)}), which is not run unless "
            "trust_remote_code=True allows it"
        )
    if foreign := [ref for ref in code if "--" in ref]:
        raise ValueError(f"{folder} takes code from another repository ({foreign[0]}), which nothing here pins")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json): merge it into its model first")
    for told in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in told.items():
            if "layer" in name and isinstance(value, int) and value > MOST_LAYERS:
                raise ValueError(f"{folder}/config.json has {name} {value}; expected at most {MOST_LAYERS}")
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


def folder_digest(folder: Path) -> str:
    """sha256 over the names and sha256s of all files that say what the model is."""
    names = sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix not in PICKLES and not p.name.startswith(".")
    )
    total = hashlib.sha256()
    for path in names:
        total.update(f"{path.name}\0{digests.of_file(path)}\n".encode())
    return total.hexdigest()


def strangers(config: Any, given: dict[str, Any], at: str = "") -> Iterator[str]:
    """Fields that were given but that the configuration's class neither declares nor consumes: misspelt ones."""
    from transformers import GenerationConfig, PreTrainedConfig

    known = {field.name for field in fields(config)} | vars(GenerationConfig()).keys()
    for name, value in given.items():
        inner = getattr(config, name, None)
        if isinstance(value, dict) and isinstance(inner, PreTrainedConfig):
            yield from strangers(inner, {k: v for k, v in value.items() if k != "model_type"}, f"{at}{name}.")
        elif name in vars(config) and name not in known:
            yield at + name
