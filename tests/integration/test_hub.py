"""A hub on this machine: branches are pinned, the cache serves without it, and the token goes nowhere else.

Everything runs in child processes of `hubserver`.
"""

import json
import shutil
from collections import Counter
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubserver import FIRST, SECOND, SECRET, Server, child, nowhere
from lesion.digest import combined, digests
from lesion.subjects import Scratch

ACT = """
from lesion.subjects import Hub

def act(what, fields):
    hub = Hub(**fields)
    if what == "pin":
        pinned = hub.pin()
        return {"revision": pinned.revision, "key": pinned.key}
    if what == "outline":
        return {"parameters": sum(p.numel() for p in hub.outline().parameters())}
    if what == "load":
        from lesion.digest import combined, digests
        specimen = hub.load()
        subject = specimen.trial.subject
        return {"digest": combined(digests(specimen.model)), "revision": subject.revision, "key": subject.key}
    from lesion import Lab
    from lesion.measures import Perplexity
    from lesion.trial import Reading
    measure = Perplexity(documents=1, tokens=12).pin()
    if what == "read":
        return {"rows": len(Lab("lab").read([hub], [measure])), "key": hub.pin().key}
    store = Lab("lab").take([Reading(trial=hub, measure=measure).pin()])
    return {"failures": [failure["trace"] for failure in store.index.failures.values()]}
"""


@pytest.fixture
def hub():
    with closing(Server()) as server:
        yield server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A repository as they are: weights, texts, and much that nobody needs."""
    folder = tmp_path_factory.mktemp("repository")
    specimen = Scratch(seed=1).load()
    specimen.model.save_pretrained(folder)
    specimen.tokenizer.save_pretrained(folder)
    for name in (
        "README.md",
        "pytorch_model.bin",
        "tokenizer.pkl",
        "onnx/model.safetensors",
        "onnx/config.json",
        "model.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"nobody needs this")
    return folder


def varied(folder, to, factor):
    """The same repository with other weights."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({n: w * factor for n, w in weights.items()}, to / "model.safetensors", metadata={"format": "pt"})
    return to


def digest(folder):
    model = Scratch(seed=1).load().model
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return combined(digests(model))


def test_a_branch_is_pinned_and_read_again_without_the_hub(hub, tiny, tmp_path):
    hub.add("org/tiny", tiny)
    branch, pinned = {"id": "org/tiny"}, {"id": "org/tiny", "revision": FIRST}
    acts = [["pin", branch], ["load", branch], ["pin", pinned], ["read", branch]]
    first, loaded, commit, read = (a["does"] for a in child(ACT, tmp_path, hub.url, acts, HF_TOKEN=SECRET))
    assert first["revision"] == loaded["revision"] == FIRST, "the commit, not the branch, stands in the record"
    assert first["key"] == loaded["key"] == commit["key"] == read["key"] and read["rows"] == 1
    assert loaded["digest"] == digest(tiny)
    nowhere(tmp_path)

    fetched = {path.rsplit("/", 1)[1] for method, path, _ in hub.asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert fetched <= {p.name for p in tiny.glob("*.json")} | {"model.safetensors"}, "nothing that nobody needs"
    assert not any("/onnx/" in path for _, path, _ in hub.asked)
    counts = Counter(path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path)
    assert set(counts.values()) == {1}, "each file once"
    assert not [a for a in hub.asked if a[2] != f"Bearer {SECRET}"]

    asked = len(hub.asked)
    (again,) = child(ACT, tmp_path, hub.url, [["load", branch]], HF_HUB_OFFLINE="1")
    assert again["does"] == loaded and len(hub.asked) == asked
    other = varied(tiny, tmp_path / "other", 2)
    hub.add("org/tiny", other, SECOND)
    moved, old = child(ACT, tmp_path, hub.url, [["load", branch], ["load", pinned]])
    assert moved["does"]["revision"] == SECOND and moved["does"]["key"] != first["key"]
    assert moved["does"]["digest"] == digest(other) and old["does"] == loaded
    hub.close()
    down = child(ACT, tmp_path, hub.url, [["load", branch], ["load", pinned], ["outline", pinned]])
    assert [a["does"].get("digest") for a in down] == [digest(other), digest(tiny), None]
    assert down[2]["does"]["parameters"] == sum(p.numel() for p in Scratch().outline().parameters())


def test_what_the_hub_refuses_is_said_in_words_and_without_the_token(hub, tiny, tmp_path):
    hub.add("org/tiny", tiny)
    hub.add("org/half-gated", tiny)
    expected = {
        "org/gated": "is gated: accept its licence on the hub and set HF_TOKEN",
        "org/refused": "is gated: accept its licence on the hub and set HF_TOKEN",
        "org/half-gated": "is gated: accept its licence on the hub and set HF_TOKEN",
        "org/missing": "is not on the hub, or it is private and HF_TOKEN is not set (a folder is written ./folder)",
        "org/anonymous": "is not on the hub, or it is private and HF_TOKEN is not set (a folder is written ./folder)",
        "org/expired": "was refused by the hub with status 401; is HF_TOKEN right?",
        "org/broken": "is not in the hub's cache, or not all of it, and the hub answers 503",
        "org/tiny": "is not there: the repository has no such branch, tag or commit",
    }
    revision = {name: "main" if name != "org/tiny" else "no-such-branch" for name in expected}
    acts = [[what, {"id": name, "revision": revision[name]}] for name in expected for what in ("pin", "load")]
    answers = child(ACT, tmp_path, hub.url, acts, HF_TOKEN=SECRET, HF_DEBUG="1")
    for (_, fields), answer in zip(acts, answers, strict=True):
        name = fields["id"]
        assert answer["error"] == f"{name}@{revision[name]} {expected[name]}" and answer["value error"]
        assert SECRET not in json.dumps(answer)
        assert len(answer["chain"]) == 1, "the exception does not hold on to another, whose request has the token"
    assert not [a for a in hub.asked if a[2] != f"Bearer {SECRET}"]


def test_a_failed_loading_is_recorded_without_the_token(hub, tmp_path):
    (answer,) = child(ACT, tmp_path, hub.url, [["fail", {"id": "org/gated", "revision": FIRST}]], HF_TOKEN=SECRET)
    (trace,) = answer["does"]["failures"]
    assert "org/gated@" in trace and "is gated" in trace
    assert list((tmp_path / "lab" / "log").iterdir())
    nowhere(tmp_path)


@pytest.mark.parametrize("place", ["environment", "login", "dotenv"])
def test_the_token_is_found_where_it_may_lie(hub, tiny, tmp_path, place):
    hub.add("org/tiny", tiny)
    (tmp_path / "home").mkdir()
    if place == "login":
        (tmp_path / "home" / "token").write_text(f"{SECRET}\n")
    if place == "dotenv":
        (tmp_path / ".env").write_text(f"OTHER=1\nexport HF_TOKEN='{SECRET}'  # mine\n")
    environment = {"HF_TOKEN": SECRET} if place == "environment" else {}
    (answer,) = child(ACT, tmp_path, hub.url, [["pin", {"id": "org/tiny"}]], **environment)
    assert answer["does"]["revision"] == FIRST
    assert not [a for a in hub.asked if a[2] != f"Bearer {SECRET}"]
    nowhere(tmp_path)


def test_without_hub_and_cache_the_error_says_which_of_them_is_missing(hub, tiny, tmp_path):
    hub.add("org/tiny", tiny)
    hub.close()
    branch = {"id": "org/tiny"}
    (down,) = child(ACT, tmp_path, hub.url, [["pin", branch]], HF_TOKEN=SECRET)
    assert down["error"] == "org/tiny@main is not in the hub's cache, or not all of it, and no hub answers"
    (offline,) = child(ACT, tmp_path, hub.url, [["pin", branch]], HF_HUB_OFFLINE="1")
    assert offline["error"].endswith("and HF_HUB_OFFLINE is set")
    with closing(Server()) as other:
        other.add("org/tiny", tiny)
        (pinned,) = child(ACT, tmp_path, other.url, [["pin", branch]])
    assert pinned["does"]["revision"] == FIRST
    again, partial = child(ACT, tmp_path, hub.url, [["pin", branch], ["load", branch]], HF_HUB_OFFLINE="1")
    assert again == pinned
    assert partial["error"].startswith(f"org/tiny@{FIRST} is not in the hub's cache, or not all of it, and HF_HUB_OFF")


def test_pickles_and_code_are_neither_downloaded_nor_run(hub, tiny, tmp_path):
    pickled = shutil.copytree(tiny, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    mixed = shutil.copytree(pickled, tmp_path / "mixed")
    listed = dict.fromkeys(load_file(tiny / "model.safetensors"), "pytorch_model.bin")
    (mixed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    coded = shutil.copytree(tiny, tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "model.Model"}}))
    (coded / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name, folder in {"pickled": pickled, "mixed": mixed, "coded": coded}.items():
        hub.add(f"org/{name}", folder)
    acts = [["load", {"id": f"org/{name}"}] for name in ("pickled", "mixed", "coded")] + [
        ["outline", {"id": "org/coded"}]
    ]
    answers = child(ACT, tmp_path, hub.url, acts)
    assert all(answer["value error"] for answer in answers)
    said = [answer["error"] for answer in answers]
    assert said[0] == (
        "org/pickled has no safetensors; pytorch_model.bin, tokenizer.pkl are refused: loading pickled weights runs code"
    )
    assert "lists pytorch_model.bin: only *.safetensors beside it are read" in said[1]
    for text in said[2:]:
        assert "brings Python code of its own (model.Model), which is not run unless trust_remote_code=True" in text
    asked = {path for _, path, _ in hub.asked}
    assert not [path for path in asked if path.endswith((".bin", ".pkl", ".py", ".md"))]
    assert not [path for path in asked if "coded" in path and "model.safetensors" in path], "refused before the weights"
    assert not (tmp_path / "ran").exists()


def test_shards_under_any_name_are_fetched(hub, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"part-{i}.safetensors": dict(list(weights.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    listed = {weight: name for name, part in parts.items() for weight in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    hub.add("org/sharded", folder)
    (answer,) = child(ACT, tmp_path, hub.url, [["load", {"id": "org/sharded"}]])
    assert answer["does"]["digest"] == digest(tiny)
    cached = next((tmp_path / "home").rglob("part-1.safetensors")).resolve()
    cached.write_bytes(cached.read_bytes()[:-10])
    (answer,) = child(ACT, tmp_path, hub.url, [["load", {"id": "org/sharded"}]], HF_HUB_OFFLINE="1")
    assert "part-1.safetensors is not a whole safetensors file" in answer["error"] and answer["value error"]
