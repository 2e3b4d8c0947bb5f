"""Keys and tokens: whatever refuses, echoes or breaks, no byte of them lands in a lab, a log, a report or on the terminal.

The hub and the judge are servers on this machine; what asks them runs in a child process, whose environment holds a canary in
every variable that is known to hold a secret.
"""

import base64
import http.server
import json
import threading
from contextlib import closing
from urllib.parse import quote

import pytest

from hubserver import FIRST, SECRET, Server, child
from lesion import log
from lesion.cli import run
from lesion.subjects import Scratch

CANARIES = {
    "HF_TOKEN": SECRET,
    "HUGGING_FACE_HUB_TOKEN": "hf_OlderCanaryOlderCanaryOlder",
    "OPENAI_API_KEY": "sk-proj-Canary/with+signs=AndMore0123",
    "ANTHROPIC_API_KEY": "sk-ant-CanaryCanaryCanary",
    "WANDB_API_KEY": "0123456789abcdefCANARY0123456789",
    "AWS_SECRET_ACCESS_KEY": "Canary+AWS/SecretSecretSecret",
    "GITHUB_TOKEN": "ghp_CanaryCanaryCanaryCanary",
}
IN_A_FILE = "hf_CanaryOfADotenvFile0123456789"  # in .env
EVERY = (*CANARIES.values(), IN_A_FILE)

ACT = """
import os
from lesion import judging, log
judging.LONGEST_WAIT = 0.0
log.COMPACT_AT = 2  # so that lines are found inside parquet too

def act(what, fields):
    if what == "forget":
        for name in fields:
            del os.environ[name]
        return None
    if what == "take":
        from lesion import Lab
        from lesion.measures import Perplexity
        from lesion.subjects import Hub
        from lesion.trial import Reading
        store = Lab("lab").take([Reading(trial=Hub(**fields), measure=Perplexity(documents=1, tokens=12).pin())])
        return int(bool(store.index.failures))
    from lesion.cli import run
    terminal, out, err = os.open("terminal", os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.dup(1), os.dup(2)
    os.dup2(terminal, 1), os.dup2(terminal, 2)
    try:
        return run(fields)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(out, 1), os.dup2(err, 2)
"""
STUDY = [
    "run",
    "degrade",
    "--doses",
    "0",
    "0.5",
    "--site",
    "mlp",
    "--repeats",
    "1",
    "--prompts",
    "2",
    "--new-tokens",
    "4",
]
STUDY += ["--documents", "1", "--tokens", "16", "--verbosity", "verbose", "--lab", "lab"]
ECHOES = ["500", "503", "400", "401", "403", "302", "cut", "prose", "model", "key"]  # what the judge does, by its name


REFUSING = ["gated", "refused", "missing", "anonymous", "expired", "broken", "half-gated"]  # what the hub does, by name


class Echo(http.server.BaseHTTPRequestHandler):
    """A judge that gives back all it was told, headers first, in the way its name asks for."""

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key, how = self.headers["Authorization"], told["model"]
        said = json.dumps({"headers": dict(self.headers), "authorization": key.replace("/", "\\/"), "asked": told})
        body = f"{key} {quote(key)} {said}"
        if how in ("prose", "model", "key"):
            content = {"prose": key, "key": json.dumps({key: key}), "model": '{"correct": 1}'}[how]
            body = json.dumps(
                {"model": key, "choices": [{"message": {"content": content}}], "headers": dict(self.headers)}
            )
        self.send_response(int(how) if how.isdecimal() else 200)
        self.send_header("Location", f"/elsewhere?key={key}")
        self.send_header("Content-Length", str(len(body.encode()) + 10 * (how == "cut")))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def judge():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def spellings(secret):
    """A secret as it may be written: plain, in JSON, in an address, in base64."""
    encoded = base64.b64encode(secret.encode()).rstrip(b"=")[:-1]
    found = {
        secret.encode(),
        json.dumps(secret)[1:-1].encode(),
        quote(secret).encode(),
        quote(secret, safe="").encode(),
    }
    return {*found, secret.replace("/", "\\/").encode(), encoded}


def leaks(folder):
    """Files under a folder that hold a canary, compacted segments by their lines."""
    wanted = [spelling for secret in EVERY for spelling in spellings(secret)]
    found, seen = [], set()
    for path in folder.rglob("*"):
        if not path.is_file() or path.name == ".env":
            continue
        seen.add(path.suffix)
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += b"".join(text for _, text in log.lines(path))
        found += [path for spelling in wanted if spelling in data]
    return found, seen


def test_no_canary_is_found_wherever_things_fail(tmp_path, judge, fault):
    folder = tmp_path / "repository"
    specimen = Scratch(seed=1).load()
    specimen.model.save_pretrained(folder)
    specimen.tokenizer.save_pretrained(folder)
    (tmp_path / ".env").write_text(f"HF_TOKEN={IN_A_FILE}\nOPENAI_API_KEY={IN_A_FILE}\n")
    judged = [
        *STUDY,
        "--measures",
        "generation",
        "--judge-endpoint",
        judge,
        "--judge-key",
        "OPENAI_API_KEY",
        "--judges",
    ]
    with closing(Server()) as hub:
        hub.add("org/tiny", folder)
        hub.add("org/half-gated", folder)
        asked = [["run", [*STUDY, "--subject", f"org/{name}"]] for name in REFUSING]
        asked += [["take", {"id": f"org/{name}", "revision": FIRST}] for name in REFUSING]  # recorded as failures
        answers = child(
            ACT,
            tmp_path,
            hub.url,
            [
                *asked,
                *(["run", [*judged, name, "--subject", "tiny-llama"]] for name in ECHOES),
                ["run", [*STUDY, "--subject", "org/tiny", "--measures", "perplexity"]],
                ["forget", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]],
                *asked,
                ["run", ["status", "--lab", "lab", "--verbosity", "verbose"]],
            ],
            **CANARIES,
        )
        sent = {authorization for _, _, authorization in hub.asked}
    assert {f"Bearer {SECRET}", f"Bearer {IN_A_FILE}"} <= sent, "the tokens were used"
    refused = [2] * len(REFUSING) + [1] * len(REFUSING)
    assert [answer["does"] for answer in answers] == [*refused, *[1] * len(ECHOES), 0, None, *refused, 0]
    terminal = (tmp_path / "terminal").read_text()
    assert "refused the key" in terminal and "is HF_TOKEN right?" in terminal
    found, seen = leaks(tmp_path)
    assert not found and {".parquet", ".log", ".html", ".json"} <= seen, (found, seen)
    everywhere = "no byte of them in the lab or on the terminal"
    fault("hub refusing (401, 403, 404, 503)", "tokens in the environment and in .env", everywhere, 2 * len(asked))
    fault("judge echoing its headers", ", ".join(ECHOES), everywhere, len(ECHOES))


SECRETS = {
    "a key for its variable's name": {"key_variable": "sk-proj-Canary0123456789"},
    "a token for its variable's name": {"key_variable": "hf_CanaryCanaryCanary"},
    "a key of lower-case letters": {"key_variable": "canary0123456789abcdef"},
    "a key of a hundred capitals": {"key_variable": "CANARY" * 17},
    "a password in the endpoint": {"endpoint": "https://me:canary-password@host/v1"},
    "a key in the endpoint": {"endpoint": "https://host/v1?key=canary-key"},
}


@pytest.mark.parametrize("how", SECRETS)
def test_a_secret_in_the_wrong_place_is_refused_before_it_is_stored_and_not_shown(tmp_path, how, capsys, fault):
    given = {"endpoint": "https://host/v1", "key_variable": "OPENAI_API_KEY", **SECRETS[how]}
    (secret,) = SECRETS[how].values()
    options = ["--judge-endpoint", given["endpoint"], "--judge-key", given["key_variable"], "--judges", "a"]
    study = [*STUDY[:-1], str(tmp_path / "lab"), "--subject", "tiny-llama", *options]
    for command in ("run", "plan", "report"):
        assert run([command, *study[1:]]) == 2
    out = "".join(capsys.readouterr())
    assert "expected" in out and secret not in out
    assert not (tmp_path / "lab").exists()
    fault("secret in the wrong place", how, "refused, not shown, not stored", 3)


def test_a_canary_that_had_been_written_would_be_found(tmp_path):
    for number, spelling in enumerate(sorted({s for secret in EVERY for s in spellings(secret)})):
        (tmp_path / f"{number}").write_bytes(b"\0..." + spelling + b"\xff")
    assert set(leaks(tmp_path)[0]) == set(tmp_path.iterdir())
    segment = log.Segment(tmp_path / "log", {})
    segment.append([{"is": "row", "reading": "0" * 32, "take": 0, "item": "a", "text": SECRET}])
    segment.close()
    log._merge(tmp_path / "log", log.segments(tmp_path / "log"))
    segment.path.unlink()
    (packed,) = (tmp_path / "log").iterdir()
    assert packed.suffix == ".parquet" and packed in leaks(tmp_path)[0]
