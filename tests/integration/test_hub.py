"""A hub on this machine: branches are pinned, the cache serves without it, and the token goes nowhere else.

The hub's library reads its settings when it is imported, so everything runs in child processes with an environment of
their own. The server speaks just what `snapshot_download` and `list_repo_files` ask.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file

from lesion.digest import combined, digests
from lesion.subjects import Scratch

SECRET = "hf_" + "TopSecret" * 4
FIRST, SECOND = "1" * 40, "2" * 40
ERRORS = {  # repository → status, error code and message that the real hub sends
    "org/gated": (401, "GatedRepo", "Access to model org/gated is restricted."),
    "org/refused": (403, "GatedRepo", "Access to model org/refused is restricted and you are not in the list."),
    "org/missing": (404, "RepoNotFound", "Repository not found"),
    "org/anonymous": (401, "RepoNotFound", "Invalid username or password."),
    "org/expired": (401, None, "Invalid credentials in Authorization header"),
    "org/broken": (503, None, "Service Unavailable"),
}

CHILD = """
import json, sys, traceback
sys.path[:0] = json.loads(sys.argv[1])
from lesion.subjects import Hub

def act(what, hub):
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

for what, fields in json.load(sys.stdin):
    try:
        print(json.dumps({"does": act(what, Hub(**fields))}), flush=True)
    except Exception as error:
        chain = []
        link = error
        while link is not None:
            chain.append(f"{link!r} {vars(link)}")
            link = link.__cause__ or link.__context__
        kind = isinstance(error, ValueError)
        said = {"error": str(error), "value error": kind, "trace": traceback.format_exc(), "chain": chain}
        print(json.dumps(said), flush=True)
"""


class Server:
    """Repositories as folders, one for each commit, and a record of what was asked for."""

    def __init__(self):
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[tuple[str, str], Path] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, authorization
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def add(self, repository, folder, commit=FIRST):
        self.branches.setdefault(repository, {})["main"] = commit
        self.commits[repository, commit] = folder

    def close(self):
        if self.thread.is_alive():
            self.http.shutdown()
            self.thread.join()
            self.http.server_close()

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        if not path.startswith("/api/models/") and "/resolve/" not in path:  # the library asks for more than models
            return self.refuse(request, 404, None, "Not Found")
        self.asked.append((request.command, path, request.headers.get("Authorization")))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        if repository in ERRORS:
            return self.refuse(request, *ERRORS[repository])
        if repository not in self.branches:
            return self.refuse(request, 404, "RepoNotFound", "Repository not found")
        commit = self.branches[repository].get("/".join(rest[1:]), rest[1] if len(rest) > 1 else "")
        if (repository, commit) not in self.commits:
            return self.refuse(request, 404, "RevisionNotFound", "Invalid rev id")
        folder = self.commits[repository, commit]
        if rest[0] == "resolve":
            if repository == "org/half-gated":  # the real hub lets one list the files of a gated repository
                return self.refuse(request, *ERRORS["org/gated"])
            return self.send(request, (folder / "/".join(rest[2:])).read_bytes(), commit)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = {p: str(p.relative_to(folder)) for p in files}
        if rest[0] == "revision":
            found = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in names.values()]}
        else:
            assert rest[0] == "tree", path
            found = [{"type": "file", "path": names[p], "oid": oid(p), "size": p.stat().st_size} for p in files]
        return self.send(request, json.dumps(found).encode(), commit, "application/json")

    def send(self, request, data, commit, kind="application/octet-stream"):
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data)))
        request.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        request.send_header("X-Repo-Commit", commit)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)

    def refuse(self, request, status, code, message):
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", message)
        request.send_header("Content-Length", "0")
        request.end_headers()


def oid(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


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


def child(tmp_path, url, acts, **environment):
    """Runs acts in a process of its own; returns its answers and all that it said."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    fresh = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", CHILD, json.dumps([here])],
        input=json.dumps(acts),
        env={**keep, **fresh, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(acts), done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    return answers


def nowhere(folder):
    """Asserts that no byte under a folder is of the token."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".env", "token")]
    assert files and not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_branch_is_pinned_and_read_again_without_the_hub(hub, tiny, tmp_path):
    hub.add("org/tiny", tiny)
    branch, pinned = {"id": "org/tiny"}, {"id": "org/tiny", "revision": FIRST}
    acts = [["pin", branch], ["load", branch], ["pin", pinned], ["read", branch]]
    first, loaded, commit, read = (a["does"] for a in child(tmp_path, hub.url, acts, HF_TOKEN=SECRET))
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
    (again,) = child(tmp_path, hub.url, [["load", branch]], HF_HUB_OFFLINE="1")
    assert again["does"] == loaded and len(hub.asked) == asked
    other = varied(tiny, tmp_path / "other", 2)
    hub.add("org/tiny", other, SECOND)
    moved, old = child(tmp_path, hub.url, [["load", branch], ["load", pinned]])
    assert moved["does"]["revision"] == SECOND and moved["does"]["key"] != first["key"]
    assert moved["does"]["digest"] == digest(other) and old["does"] == loaded
    hub.close()
    down = child(tmp_path, hub.url, [["load", branch], ["load", pinned], ["outline", pinned]])
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
    answers = child(tmp_path, hub.url, acts, HF_TOKEN=SECRET, HF_DEBUG="1")
    for (_, fields), answer in zip(acts, answers, strict=True):
        name = fields["id"]
        assert answer["error"] == f"{name}@{revision[name]} {expected[name]}" and answer["value error"]
        assert SECRET not in json.dumps(answer)
        assert len(answer["chain"]) == 1, "the exception does not hold on to another, whose request has the token"
    assert not [a for a in hub.asked if a[2] != f"Bearer {SECRET}"]


def test_a_failed_loading_is_recorded_without_the_token(hub, tmp_path):
    (answer,) = child(tmp_path, hub.url, [["fail", {"id": "org/gated", "revision": FIRST}]], HF_TOKEN=SECRET)
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
    (answer,) = child(tmp_path, hub.url, [["pin", {"id": "org/tiny"}]], **environment)
    assert answer["does"]["revision"] == FIRST
    assert not [a for a in hub.asked if a[2] != f"Bearer {SECRET}"]
    nowhere(tmp_path)


def test_without_hub_and_cache_the_error_says_which_of_them_is_missing(hub, tiny, tmp_path):
    hub.add("org/tiny", tiny)
    hub.close()
    branch = {"id": "org/tiny"}
    (down,) = child(tmp_path, hub.url, [["pin", branch]], HF_TOKEN=SECRET)
    assert down["error"] == "org/tiny@main is not in the hub's cache, or not all of it, and no hub answers"
    (offline,) = child(tmp_path, hub.url, [["pin", branch]], HF_HUB_OFFLINE="1")
    assert offline["error"].endswith("and HF_HUB_OFFLINE is set")
    with closing(Server()) as other:
        other.add("org/tiny", tiny)
        (pinned,) = child(tmp_path, other.url, [["pin", branch]])
    assert pinned["does"]["revision"] == FIRST
    again, partial = child(tmp_path, hub.url, [["pin", branch], ["load", branch]], HF_HUB_OFFLINE="1")
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
    answers = child(tmp_path, hub.url, acts)
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
    (answer,) = child(tmp_path, hub.url, [["load", {"id": "org/sharded"}]])
    assert answer["does"]["digest"] == digest(tiny)
    cached = next((tmp_path / "home").rglob("part-1.safetensors")).resolve()
    cached.write_bytes(cached.read_bytes()[:-10])
    (answer,) = child(tmp_path, hub.url, [["load", {"id": "org/sharded"}]], HF_HUB_OFFLINE="1")
    assert "part-1.safetensors is not a whole safetensors file" in answer["error"] and answer["value error"]
