"""A hub on this machine, for models and datasets, and child processes that ask it.

The hub's library reads its settings when it is imported, so what asks runs in child processes with an environment of
their own. The server speaks just what `snapshot_download` and `list_repo_files` ask.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

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

START = """
import json, sys, traceback
sys.path[:0] = json.loads(sys.argv[1])
"""
LOOP = """
for what, fields in json.load(sys.stdin):
    try:
        print(json.dumps({"does": act(what, fields)}), flush=True)
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
    """Repositories as folders, one for each commit, and a record of what was asked for.

    A repository is called "org/name", one of a dataset "datasets/org/name".
    """

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
        if not path.startswith(("/api/models/", "/api/datasets/")) and "/resolve/" not in path:
            return self.refuse(request, 404, None, "Not Found")  # the library asks for more than repositories
        self.asked.append((request.command, path, request.headers.get("Authorization")))
        parts = path.removeprefix("/api").removeprefix("/models").strip("/").split("/")
        depth = 3 if parts[0] == "datasets" else 2
        repository, rest = "/".join(parts[:depth]), parts[depth:]
        if refusal := ERRORS.get(repository.removeprefix("datasets/")):
            return self.refuse(request, *refusal)
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


def child(act, tmp_path, url, acts, **environment):
    """Runs acts in a process of its own, which defines `act(what, fields)`; returns what it answers to each of them."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    fresh = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", START + act + LOOP, json.dumps([here])],
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
