"""The studies of tasks and alignment, and those that cross them with lesions, from the command line to the page."""

import json

import polars as pl
import pytest

from lesion.cli import run
from lesion.studies.immunity import Immunity
from lesion.studies.modern import Modern
from lesion.studies.modern_align import ModernAlign
from lesion.studies.modern_tasks import ModernTasks
from lesion.studies.resilience import Resilience

QUIET = ["--verbosity", "quiet"]


def page(lab, name):
    (folder,) = (lab / "studies").glob(f"{name}-*")
    frames = {path.stem: pl.read_json(path) for path in (folder / "tables").glob("*.json")}
    return folder, frames, (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    lab = tmp_path_factory.mktemp("alignment") / "lab"
    parts = ["--parts", "modern-tasks", "modern-align"]
    assert run(["run", "modern", "--tier", "smoke", *parts, "--lab", str(lab), *QUIET]) == 0
    return lab


def test_modern_has_what_its_parts_say_and_they_find_all_read(kept, capsys):
    _, frames, text = page(kept, "modern")
    assert frames["summary"]["study"].to_list() == ["modern-tasks", "modern-align"]
    assert frames["summary"]["missing"].to_list() == [0, 0]
    assert {claim.split(": ")[0] for claim in frames["claims"]["claim"]} == {"modern-tasks", "modern-align"}
    for name in ("modern-tasks", "modern-align"):
        assert run(["run", name, "--tier", "smoke", "--lab", str(kept)]) == 0
        assert "readings are in the lab already" in capsys.readouterr().err
        assert name in text


def test_modern_tasks_compares_ways_on_the_same_questions(kept):
    assert run(["run", "modern-tasks", "--tier", "smoke", "--lab", str(kept), *QUIET]) == 0
    folder, frames, text = page(kept, "modern-tasks")
    table = frames["summary"]
    assert table["way"].to_list() == ["zero-shot", "few-shot", "LoRA", "full"] and set(table["questions"]) == {6}
    assert table["trainings"].to_list() == [None, None, 2, 2] and len(frames["claims"]) == 12
    loss = dict(zip(table["way"], table["loss of right replies"], strict=True))
    assert loss["full"] < loss["zero-shot"] and "worst replies" in text
    assert json.loads((folder / "arithmetic.json").read_text())[0]["way"] == "zero-shot"
    assert {"few-shot", "full"} <= set(frames["by-length-of-the-question"]["way"])


def test_modern_align_reads_every_stage(kept):
    assert run(["run", "modern-align", "--tier", "smoke", "--lab", str(kept), *QUIET]) == 0
    _, frames, _ = page(kept, "modern-align")
    assert frames["summary"]["after"].to_list() == ["base", "sft", "dpo", "more sft", "solver"]
    trained = {row["step"]: row for row in frames["trainings"].to_dicts()}
    assert trained["dpo"]["first loss"] == pytest.approx(0.693147, abs=1e-5)
    assert trained["verifier"]["first loss"] == pytest.approx(0.693147, abs=1e-4)
    curve = frames["best-of-k"]
    assert curve["k"].to_list() == [1, 2, 4] and curve["best"][0] == curve["majority"][0] == curve["first"][0]
    assert frames["verifiers"]["trained on"][0] > 0
    control = frames["summary"].filter(pl.col("after") == "more sft")
    assert control["margin"][0] is not None, "what training alone does stands beside dpo"


def test_resilience_breaks_arms_that_differ_in_one_thing(tmp_path):
    assert run(["run", "resilience", "--tier", "smoke", "--lab", str(tmp_path), *QUIET]) == 0
    _, frames, _ = page(tmp_path, "resilience")
    assert frames["summary"]["arm"].to_list() == ["GQA", "MHA", "MoE", "monotone"]
    assert len(frames["effects"]) == 12 and len(frames["claims"]) == 6
    moved = frames["matched-damage"].filter(pl.col("σ") == 0.5)["relative change of what is damaged"]
    assert len(moved) == 8 and moved.is_between(0.45, 0.55).all(), (
        "one dose is the same share of the weights in all arms"
    )


def test_immunity_reads_every_arm_before_and_after(tmp_path):
    arms = ["--arms", "plain", "trained on", "monotone", "int8", "--repeats", "2"]
    assert run(["run", "immunity", "--tier", "smoke", *arms, "--lab", str(tmp_path), *QUIET]) == 0
    _, frames, _ = page(tmp_path, "immunity")
    table = {row["arm"]: row for row in frames["summary"].to_dicts()}
    assert list(table) == ["plain", "trained on", "monotone", "int8"]
    assert table["int8"]["random poison into adapters"] is not None and table["int8"]["random poison"] is None
    assert table["monotone"]["random poison, constraint held"] is not None
    assert table["plain"]["random poison"] > 0, "poison does harm, or shields could not be seen"
    assert sum("shields against" in claim for claim in frames["claims"]["claim"]) == 9


@pytest.mark.parametrize(
    ("study", "how", "why"),
    [
        (ModernTasks, {"sample": (1, 2)}, "sample is one number of 0 or more, or one for each task"),
        (ModernTasks, {"tasks": ("sst2", "sst2")}, "a task or a way stands there twice"),
        (Resilience, {"arms": ("GQA", "LSTM")}, "no arm 'LSTM'; there are: GQA, MHA"),
        (Resilience, {"arms": ("MHA", "MoE")}, "'GQA' is one of them"),
        (Resilience, {"doses": (0.3, 0.1, 0.2)}, "doses rise"),
        (Immunity, {"arms": ("plain", "holy")}, "no arm 'holy'"),
        (Immunity, {"arms": ("int8", "nf4")}, "'plain' is one of them"),
        (Modern, {"parts": ()}, "at least 1 item"),
        (ModernAlign, {"solutions": 1}, "greater than or equal to 2"),
    ],
)
def test_what_makes_no_sense_is_refused(study, how, why):
    with pytest.raises(ValueError, match=why):
        study(**how)


def test_a_subject_without_the_adapters_site_is_refused_before_any_work(tmp_path, capsys):
    command = ["run", "modern-tasks", "--tier", "smoke", "--site", "expert", "--lab", str(tmp_path)]
    assert run(command) == 2
    assert "no site 'expert'" in capsys.readouterr().err and not (tmp_path / "states").exists()
