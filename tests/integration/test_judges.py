"""Judges behind an endpoint: two of them, a study, and their agreement."""

import http.server
import json
import threading
from typing import ClassVar

import pytest

from lesion.judging import RUBRICS
from lesion.studies import Degrade
from lesion.study import write_report


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Scores by the length of the reply; the judge "strict" takes one off; every fifth answer is no JSON at first."""

    asked: ClassVar[list] = []

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        material = json.loads(told["messages"][-1]["content"])
        self.asked.append((told["model"], material["question"], self.headers.get("Authorization")))
        scores = {}
        for c in RUBRICS["narrative"].criteria:
            score = c.low + len(material["reply"]) % (c.high - c.low + 1)
            scores[c.name] = max(c.low, score - (told["model"] == "strict"))
        content = "sorry" if len(self.asked) % 5 == 0 else json.dumps(scores)
        body = json.dumps({"model": told["model"], "choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Endpoint.asked = []
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_two_judges_and_their_agreement(lab, endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    monkeypatch.setattr("time.sleep", lambda _: None)
    asked = Degrade(
        subject="tiny-llama", battery="dreams", prompts=6, new_tokens=8, repeats=1, site=("mlp",), doses=(0, 0.5),
        measures=("generation",), judges=("kind", "strict"), judge_endpoint=endpoint, judge_key="JUDGE_KEY", rubric="narrative",
    )  # fmt: skip
    store = lab.take(asked.readings())
    assert not store.index.failures
    answer, _ = write_report(store, asked)
    agreed = answer.extra["agreement of judges"]
    assert set(agreed["criterion"]) == {c.name.replace("_", " ") for c in RUBRICS["narrative"].criteria}
    assert set(agreed["judges"]) == {"kind and strict"} and set(agreed["n"]) == {12}
    assert all(-1 <= k <= 1 for k in agreed["kappa"])
    assert {"derailment (kind)", "derailment (strict)"} <= set(answer.curves["measure"])
    assert {key for *_, key in Endpoint.asked} == {"Bearer very-secret"}
    for path in lab.path.rglob("*"):
        assert not path.is_file() or b"very-secret" not in path.read_bytes()
    before = len(Endpoint.asked)
    lab.take(asked.readings())
    assert len(Endpoint.asked) == before, "what is judged is judged"


def test_a_judge_that_is_down_is_a_failure_and_the_rest_goes_on(lab, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    asked = Degrade(
        subject="tiny-llama", prompts=4, new_tokens=6, repeats=1, site=("mlp",), doses=(0, 0.5),
        measures=("generation", "prose"), judges=("j",), judge_endpoint="http://127.0.0.1:9/v1",
    )  # fmt: skip
    store = lab.take(asked.readings())
    assert len(store.index.failures) == 2 and len(store.index.seals) == 4
    answer, _ = write_report(store, asked)
    assert answer.missing == 2
