"""NaN and infinities: in a file of weights they are refused by name; born of damage they are missing values that say why, and
no NaN ever stands in a row, a record or a report."""

import importlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from contracts.test_steps_and_measures import EXAMPLES, GENERATION
from lesion import Lab, steps
from lesion.cli import run
from lesion.measures import Perplexity
from lesion.subjects import Directory, Scratch
from lesion.trial import Measure, MeasureOfTexts, Reading, Trial
from words import TestNaN, TestNorms, TestShift

MISSING = "every row missing and saying why, no NaN in any line"


def strict(text):
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} in {text[:200]!r}")

    return json.loads(text, parse_constant=refuse)


# ---------------------------------------------------------------------- files


@pytest.fixture
def save(tmp_path):
    """Saves a tiny model whose first weights, of one tensor, are changed."""

    def save(value, tensor="model.layers.1.mlp.up_proj.weight", family="tiny-llama"):
        specimen = Scratch(architecture=family, seed=1).load()
        specimen.model.save_pretrained(tmp_path / "model")
        specimen.tokenizer.save_pretrained(tmp_path / "model")
        weights = load_file(tmp_path / "model" / "model.safetensors")
        if tensor in weights:
            weights[tensor].view(-1)[:2] = value
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / "model"

    return save


@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_by_its_name(save, tmp_path, value, tensor, fault):
    subject = Directory(path=str(save(value, tensor))).pin()
    said = rf"{subject.path} as torch.float32 holds 2 numbers in {re.escape(tensor)} that are not finite"
    with pytest.raises(ValueError, match=said):
        subject.load()
    store = Lab(tmp_path / "lab").take([Reading(trial=subject, measure=TestNorms())])
    assert not store.index.seals and [re.search(said, f["error"]) for f in store.index.failures.values()]
    fault("weights not finite in a file", f"{value} in {tensor}", "refused by the tensor's name, recorded")


def test_a_weight_too_large_for_its_type_is_refused(save, fault):
    folder = save(1e5)
    Directory(path=str(folder)).pin().load()
    Directory(path=str(folder), dtype="bfloat16").pin().load()
    with pytest.raises(ValueError, match="as torch.float16 holds 2 numbers in .*up_proj.* that are not finite"):
        Directory(path=str(folder), dtype="float16").pin().load()
    fault("weights not finite in a type", "10^5 in float16", "refused by the tensor's name")


@pytest.mark.parametrize("family", ["tiny-gemma3-text", "tiny-gemma3"])
def test_gemma3_in_float16_is_refused_by_name(save, tmp_path, family, capsys, fault):
    folder = save(0.0, family=family)
    for dtype in ("auto", "float32", "bfloat16"):
        Directory(path=str(folder), dtype=dtype).pin().load()
    said = "in float16, in which its hidden states overflow: expected dtype bfloat16 or float32"
    half = Directory(path=str(folder), dtype="float16").pin()
    for act in (half.load, half.outline):
        with pytest.raises(ValueError, match=said):
            act()
    command = ["--subject", str(folder), "--dtype", "float16", "--doses", "0", "--lab", str(tmp_path / "lab")]
    assert run(["run", "degrade", *command, "--verbosity", "quiet"]) == 2
    assert said in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))  # as stored
    with pytest.raises(ValueError, match=said):
        Directory(path=str(folder)).pin().load()
    fault("Gemma 3 in float16", family, "refused by name, exit code 2", 2)


def test_states_that_overflow_in_float16_are_missing_and_say_so(tmp_path, fault):
    """What Gemma 3 does, in a family that is not known for it: weights that fit, hidden states that do not."""
    specimen = Scratch(architecture="tiny-gpt-neox", seed=1).load()
    with torch.no_grad():
        for layer in specimen.model.gpt_neox.layers:
            layer.mlp.dense_h_to_4h.weight.mul_(100)
            layer.mlp.dense_4h_to_h.weight.mul_(5e5)
    specimen.model.save_pretrained(tmp_path / "model")
    specimen.tokenizer.save_pretrained(tmp_path / "model")
    measures = [Perplexity(documents=2, tokens=24).pin(), GENERATION]
    for dtype, outcome, stop in (("float32", "scored", "length"), ("float16", "not finite", "not finite")):
        subject = Directory(path=str(tmp_path / "model"), dtype=dtype).pin()
        store = Lab(tmp_path / dtype).take([Reading(trial=subject, measure=m) for m in measures])
        assert not store.index.failures
        rows = list(store.rows())
        assert {row["outcome"] for row in rows if "outcome" in row} == {outcome}
        assert stop in {row["stop"] for row in rows if "stop" in row}
    fault("hidden states beyond float16", "weights that fit, states that do not", MISSING)


# ---------------------------------------------------------------------- damage


@pytest.fixture
def a_judge(monkeypatch):
    def ask(endpoint, model, messages, *, schema, **how):
        scores = {name: scale["minimum"] for name, scale in schema["properties"].items()}
        return {"scores": scores, "reply": "", "model": model, "messages": "", "seconds": 0.0, "attempts": 1}

    monkeypatch.setattr(importlib.import_module("lesion.measures.judge"), "ask", ask)


def every_measure(trial):
    """All measures of the package, asked of this trial."""
    for examples in EXAMPLES.values():
        for measure in examples:
            if isinstance(measure, MeasureOfTexts):
                measure = measure.model_copy(update={"of": Reading(trial=trial, measure=GENERATION)})
            if getattr(measure, "reference", None) is not None:
                measure = measure.model_copy(update={"reference": Trial(subject=trial.subject)})
            if isinstance(measure, Measure):
                yield Reading(trial=trial, measure=measure)


STRONG = steps.Noise(site="all", sigma=1e6, seed=1)
HUGE = STRONG.model_copy(update={"law": "lognormal"})
DAMAGE = {
    "a tensor of NaN": (TestNaN(),),
    "noise of a million": (STRONG,),
    "lognormal noise of a million": (HUGE,),
    "noise upon noise": (STRONG, STRONG, STRONG, STRONG, STRONG, STRONG, STRONG),
    "quantising what is infinite": (HUGE, steps.Quantise(site="all", levels=8)),
    "clipping what is infinite": (HUGE, steps.Quantise(site="all", levels=8, scheme="percentile")),
    "ablating the largest of NaN": (TestNaN(), steps.Ablate(site="all", share=0.5, order="largest")),
    "ablating heads of what is infinite": (
        HUGE,
        steps.Ablate(site="attention", share=0.5, unit="head", order="smallest"),
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt-neox"])
def test_every_measure_of_a_model_that_is_not_finite(tmp_path, a_judge, family, how, fault):
    trial = Trial(subject=Scratch(architecture=family))
    for step in DAMAGE[how]:
        trial = trial >> step
    readings = list(every_measure(trial))
    store = Lab(tmp_path / "lab").take([*readings, Reading(trial=trial.subject >> TestShift(), measure=TestNorms())])
    assert not store.index.failures  # nor of what some of them quote
    assert all(reading.key in store.index.seals for reading in readings)
    for path in store.log.glob("*.jsonl"):
        for text in path.read_text(encoding="utf-8").splitlines():
            row = strict(text)
            if "nll" in row:
                assert (row["nll"] is None) == (row["outcome"] not in ("scored", "ranked", "written"))
            if row.get("stop") == "not finite":
                assert row["tokens"] or row.get("logprob") is None
            if row.get("outcome") == "not finite":
                assert all(
                    row.get(name) is None for name in ("nll", "kl", "relative", "entropy", "sink", "map", "change")
                )
    fault(f"every measure of what is not finite ({family})", how, MISSING, len(readings))


def test_a_study_of_damage_beyond_all_numbers_has_a_report_without_nan(tmp_path, fault):
    lab = tmp_path / "lab"
    study = ["run", "degrade", "--subject", "tiny-llama", "--doses", "0", "1000000", "--method", "lognormal", "--site"]
    study += [
        "mlp",
        "all",
        "--repeats",
        "2",
        "--prompts",
        "3",
        "--new-tokens",
        "4",
        "--documents",
        "2",
        "--tokens",
        "24",
    ]
    assert run([*study, "--lab", str(lab), "--verbosity", "quiet"]) == 0
    (folder,) = (lab / "studies").iterdir()
    pages = [path.read_text(encoding="utf-8") for path in folder.rglob("*.html")]
    tables = [path for path in folder.rglob("*.json")]
    assert pages and tables and not [page for page in pages if re.search(r"[\[:,]\s*-?(NaN|Infinity)\b", page)]
    for path in tables:
        strict(path.read_text(encoding="utf-8"))
    for path in folder.rglob("*.csv"):
        assert not re.search(r"(^|,)-?(nan|inf|NaN|Infinity)(,|$)", path.read_text(encoding="utf-8"), re.M), path
    fault("a study of what is not finite", "lognormal noise of a million", "a report without NaN", 1)


# ---------------------------------------------------------------------- words that bring a NaN


class TestBringsNaN(TestNorms):
    """A measure that forgets to say what is missing."""

    name = "test-brings-nan"
    summary: bool = False

    def read(self, specimen, items):
        rows = super().read(specimen, items)
        return rows if self.summary else [{**row, "norm": float("nan")} for row in rows]

    def summarise(self, rows):
        return {"total": [float("inf")]} if self.summary else {}


class TestNaNFacts(TestShift):
    """A step whose facts are no numbers."""

    name = "test-nan-facts"

    def apply(self, specimen):
        return super().apply(specimen) | {"error": float("nan")}


@pytest.mark.parametrize("summary", [False, True], ids=["rows", "summary"])
def test_a_measure_that_brings_a_nan_fails_and_nothing_of_it_is_written(tmp_path, summary, fault):
    a, bad = Scratch(), TestBringsNaN(summary=summary)
    store = Lab(tmp_path / "lab").take([Reading(trial=a, measure=m) for m in (bad, TestNorms())])
    assert len(store.index.seals) == 1
    assert [f["error"].startswith("ValueError: ") for f in store.index.failures.values()] == [True]
    for text in (store.log / f"{store.writer}.jsonl").read_text().splitlines():
        strict(text)
    fault(
        "a measure that brings a NaN", "rows" if not summary else "summary", "recorded failure, nothing of it written"
    )


def test_a_step_whose_facts_are_nan_does_not_take_its_siblings_along(tmp_path, fault):
    a, bad = Scratch(), TestNaNFacts()
    store = Lab(tmp_path / "lab").take(
        [Reading(trial=t, measure=TestNorms()) for t in (a >> bad, a >> TestShift(by=2))]
    )
    assert len(store.index.seals) == 1 and store.index.failures.keys() == {(a >> bad).key}
    fault("a step whose facts are NaN", "in its ledger", "recorded failure, its siblings taken")
