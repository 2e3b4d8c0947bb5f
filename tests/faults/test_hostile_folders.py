"""Folders whose index or configuration leads astray: refused by name, before memory or another folder is touched."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from lesion.subjects import Directory

# ---------------------------------------------------------------------- shards

DEEP = "[" * 200_000 + "]" * 200_000


def sharded(folder, places):
    """The folder with an index instead of model.safetensors, whose weights lie in weights.safetensors."""
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    text = places if isinstance(places, str) else json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


INDEXES = {
    "a file outside of the folder": {"a": "../weights.safetensors"},
    "an absolute path": {"a": "/etc/weights.safetensors"},
    "a file in a folder below": {"a": "sub/weights.safetensors"},
    "a file that is not there": {"a": "weights.safetensors", "b": "more.safetensors"},
    "a pickle": {"a": "weights.bin"},
    "a name with a NUL": {"a": "weights\0.safetensors"},
    "a name of 300 letters": {"a": "w" * 300 + ".safetensors"},
    "a number for a file": {"a": 1},
    "a list for a map": ["weights.safetensors"],
    "nothing": {},
    "no weight_map": '{"metadata": {}}',
    "an array nested 200,000 deep": f'{{"weight_map": {DEEP}}}',
    "half a JSON": '{"weight_map": {"a"',
}


@pytest.mark.parametrize("how", INDEXES)
def test_an_index_that_leads_astray_is_refused(folder, how, fault):
    shutil.copy(folder / "model.safetensors", folder.parent / "weights.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub" / "weights.safetensors")
    sharded(folder, INDEXES[how])
    with pytest.raises(ValueError, match=r"index\.json|its index lists") as caught:
        Directory(path=str(folder)).pin()
    assert str(folder) in str(caught.value)
    fault("hostile index of shards", how, "ValueError naming the index")


def test_a_weight_in_two_shards_is_refused(folder, fault):
    names = list(load_file(folder / "model.safetensors"))
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    sharded(folder, {**dict.fromkeys(names, "weights.safetensors"), names[0]: "more.safetensors"})
    with pytest.raises(ValueError, match=rf"weights\.safetensors holds {names[0]}, which has been named before"):
        Directory(path=str(folder)).pin()
    fault("hostile index of shards", "a weight in two of them", "ValueError naming file and weight")


# ---------------------------------------------------------------------- texts beside the weights


def set_to(**fields):
    return lambda config: json.dumps({**config, **fields})


CONFIGS = {
    "an array nested 200,000 deep": lambda config: f'{{"a": {DEEP}}}',
    "a list": lambda config: "[]",
    "no model_type": lambda config: "{}",
    "a model_type of another kind": set_to(model_type=5),
    "10^9 layers": set_to(num_hidden_layers=10**9),
    "a vocabulary of 10^9": set_to(vocab_size=10**9),
    "a vocabulary of 10^15": set_to(vocab_size=10**15),
    "no heads": set_to(num_attention_heads=0),
    "a negative width": set_to(hidden_size=-64),
    "a type that does not exist": set_to(dtype="float99"),
    "an activation that does not exist": set_to(hidden_act="os.system"),
    "positions of an unknown kind": set_to(rope_parameters={"rope_type": "x"}),
    "a word for a token": set_to(eos_token_id="x"),
    "a word for a part": set_to(text_config="x"),
}


@pytest.mark.parametrize("how", CONFIGS)
def test_a_configuration_that_makes_no_sense_is_refused(folder, how, fault):
    path = folder / "config.json"
    path.write_text(CONFIGS[how](json.loads(path.read_text())))
    with pytest.raises(ValueError, match="config.json"):
        Directory(path=str(folder)).pin().load()
    fault("hostile config.json", how, "ValueError naming the file, memory spared")
