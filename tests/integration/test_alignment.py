"""The studies of tasks and alignment, and those that cross them with lesions, from the command line to the page."""

import json
import math

import numpy as np
import polars as pl
import pytest

from lesion import Lab
from lesion.cli import run
from lesion.measures import Task
from lesion.steps import Lora
from lesion.studies import _align as align
from lesion.studies import _immunity as immunity
from lesion.studies import _resilience as say
from lesion.studies.immunity import Immunity
from lesion.studies.modern import Modern
from lesion.studies.modern_align import ModernAlign
from lesion.studies.modern_tasks import ModernTasks
from lesion.studies.resilience import Resilience
from lesion.subjects import Scratch
from lesion.sweep import Sweep
from lesion.tasks import Jsonl

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
    folder, frames, text = page(kept, "modern-align")
    assert (
        list(folder.glob("figures/right-answers-among-k-solutions.svg")) and "right answers among k solutions" in text
    )
    assert "task=instructions(" in text and "samples=task(task=arithmetic(" in text, "a task has its name in a sentence"
    assert frames["summary"]["after"].to_list() == ["base", "sft", "dpo", "more sft", "solver"]
    trained = {row["step"]: row for row in frames["trainings"].to_dicts()}
    assert trained["dpo"]["first loss"] == pytest.approx(0.693147, abs=1e-5)
    assert trained["verifier"]["first loss"] == pytest.approx(0.693147, abs=1e-4)
    curve = frames["best-of-k"]
    assert curve["k"].to_list() == [1, 2, 4] and curve["best"][0] == curve["majority"][0] == curve["first"][0]
    assert frames["verifiers"]["trained on"][0] > 0
    control = frames["summary"].filter(pl.col("after") == "more sft")
    assert control["margin"][0] is not None, "what training alone does stands beside dpo"


def test_a_verifier_is_asked_whether_it_orders_the_solutions_of_one_problem():
    """Against counting by hand, of every right and wrong solution of one problem, which is believed more."""
    study, random = ModernAlign(tier="smoke", repeats=2), np.random.default_rng(0)
    rows, within = {}, []
    for seed in study.seeds:
        verdicts = []
        for problem in ("all right", "all wrong", *map(str, range(8))):
            right = {"all right": [1, 1], "all wrong": [0, 0]}.get(problem) or random.permutation(
                [1, 1, 0, 0, 0]
            ).tolist()
            chances = random.integers(0, 4, len(right)) / 4 + 0.1 * np.array(right)
            judged = list(zip(chances, right, strict=True))
            pairs = [np.sign(a - b) / 2 for a, x in judged for b, y in judged if x > y]
            within += [np.mean(pairs)] if pairs else []
            verdicts += [{"example": problem, "chance": c, "correct": x} for c, x in judged]
            verdicts.append({"example": problem, "chance": None, "correct": 1})  # too long to be judged
        of = study.cells["verifier", seed]["verification"].key
        rows[of] = {str(i): {"item": str(i), "stated": None, **row} for i, row in enumerate(verdicts)}
    claim = (
        align.claims(align.Told(study, rows, {}))
        .filter(pl.col("claim").str.contains("solutions of a problem"))
        .to_dicts()[0]
    )
    assert (claim["items"], claim["seeds"]) == (8, 2) and claim["effect"] == pytest.approx(np.mean(within))


def test_resilience_breaks_arms_that_differ_in_one_thing(tmp_path):
    assert run(["run", "resilience", "--tier", "smoke", "--lab", str(tmp_path), *QUIET]) == 0
    _, frames, _ = page(tmp_path, "resilience")
    assert frames["summary"]["arm"].to_list() == ["GQA", "MHA", "MoE", "more text", "monotone"]
    assert len(frames["effects"]) == 15 and len(frames["claims"]) == 9
    moved = frames["change-of-the-weights"].filter(pl.col("σ") == 0.5)["relative change of what is damaged"]
    assert len(moved) == 10 and moved.is_between(0.45, 0.55).all()
    table = frames["summary"]
    assert table["lost at 0.5"].is_between(-0.5, 1).all() and (table["lost at 3"] <= 1).all()
    assert all((row["σ at half lost (ED50)"] is None) <= bool(row["why not"]) for row in table.to_dicts())


def lost_share(loss, documents=8, seeds=3):
    """A study and a sweep of made-up losses: {arm: {dose: nats, None for what is not finite}}."""
    study = Resilience(tier="smoke", arms=tuple(loss), documents=documents, repeats=seeds)
    doses = [0.0, *study.doses]
    rows = {
        (arm, dose, seed): {
            "perplexity": {
                f"d{i}": {
                    "nll": None if (x := loss[arm][dose]) is None else 10 * (x + 0.01 * i + 0.02 * seed),
                    "tokens": 10,
                }
                for i in range(documents)
            }
        }
        for arm in loss
        for dose in doses
        for seed in study.seeds
    }
    return study, Sweep(study.arms, doses, study.seeds, rows)


def test_what_is_lost_is_a_share_and_what_is_no_number_has_lost_all():
    whole = math.log(512)
    study, sweep = lost_share(
        {"GQA": {0.0: 3.0, 0.5: 3.5, 1.0: 5.0, 3.0: 9.0}, "MHA": {0.0: 3.0, 0.5: 3.1, 1.0: 4.0, 3.0: None}}
    )
    share = say.lost(study, sweep, "GQA")
    assert share[0].max() == 0 and share[1].mean() == pytest.approx(0.5 / (whole - 3.055), rel=1e-2)
    assert share[-1].min() == 1 == say.lost(study, sweep, "MHA")[-1].min()
    table = {row["arm"]: row for row in say.summary(study, sweep).to_dicts()}
    assert (table["GQA"]["not finite"], table["MHA"]["not finite"]) == (0, 24)
    assert 0.5 < table["GQA"]["σ at half lost (ED50)"] < 1 < table["MHA"]["σ at half lost (ED50)"]
    verdicts = dict(say.claims(study, sweep).select("claim", "verdict").rows())
    assert [v for c, v in verdicts.items() if c.startswith("Noise of")] == ["supported"]
    assert [v for c, v in verdicts.items() if "harder to break" in c] == ["supported"]


def test_nothing_is_compared_where_the_control_has_not_lost_half():
    kinds = {0.0: 3.0, 0.5: 3.0, 1.0: 3.1, 3.0: 3.2}
    study, sweep = lost_share({"GQA": kinds, "MHA": kinds})
    found = say.claims(study, sweep)
    assert found["verdict"].to_list() == ["contradicted", "not tested", "not tested"]
    assert "has not lost half at any dose" in found["note"][1]


def test_immunity_reads_every_arm_before_and_after(tmp_path):
    arms = ["--arms", "plain", "trained on", "monotone", "int8", "--repeats", "2"]
    assert run(["run", "immunity", "--tier", "smoke", *arms, "--lab", str(tmp_path), *QUIET]) == 0
    _, frames, _ = page(tmp_path, "immunity")
    table = {row["arm"]: row for row in frames["summary"].to_dicts()}
    assert list(table) == ["plain", "trained on", "monotone", "int8"]
    assert table["int8"]["random poison into adapters"] is not None and table["int8"]["random poison"] is None
    assert table["monotone"]["random poison, constraint held"] is not None
    assert table["plain"]["random poison"] > 0, "poison does harm, or shields could not be seen"
    assert sum("shields against" in claim for claim in frames["claims"]["claim"]) == 12
    claims = {row["claim"]: row for row in frames["claims"].to_dicts()}
    assert sum(claim.startswith("Poison (") for claim in claims) == 6, (
        "a positive control for every control that is used"
    )


def immune(loss, flips, diverged=()):
    """Claims of an `immunity` whose losses are made up: {(arm, what is done): nats of (seed, document)}, None for no number, and of
    attacks {arm: (nats before, nats after)}."""
    study = Immunity(tier="smoke", arms=("plain", "trained on", "monotone"), documents=12, attacked=12, repeats=5)
    rows, states = {}, {}
    for (arm, done, seed), readings in study.cells.items():
        made = loss.get((arm, done), loss[arm, "nothing"])
        values = [made(seed, i) for i in range(12)]
        nll = [None if value is None else 10 * (value + 0.01 * i) for i, value in enumerate(values)]
        rows[readings["loss"].key] = {f"d{i}": {"nll": n, "tokens": 10} for i, n in enumerate(nll)}
        if (arm, done) in diverged:
            states[readings["loss"].trial.key] = {"ledger": [{}, {"facts": {"ended": "diverged"}}]}
        for manner in ("iterative", "query", "random"):
            if manner in readings:
                ends = [[x + 0.01 * (i + seed) * (n + 1) for n, x in enumerate(flips[arm])] for i in range(12)]
                rows[readings[manner].key] = {f"d{i}": {"losses": list(pair)} for i, pair in enumerate(ends)}
    told = immunity.Told(study, rows, states)
    return {row["claim"]: row for row in immunity.claims(told).to_dicts()}, immunity.summary(told).to_dicts()


FLIPS = {"plain": (4.0, 4.4), "trained on": (4.0, 4.4), "monotone": (6.9, 6.9)}
WHOLE = {
    (arm, "nothing"): lambda seed, i, x=x: x for arm, x in (("plain", 4.0), ("trained on", 4.0), ("monotone", 4.0))
}


@pytest.mark.parametrize("how", ["fine", "not finite", "diverged"])
def test_an_arm_that_poison_destroys_does_not_drop_out_of_the_comparison(how):
    harmed = {
        (arm, kind): lambda seed, i: 4.5 + 0.01 * seed for arm in ("plain", "trained on") for kind in ("random", "text")
    }
    mine = {("monotone", "random"): lambda seed, i: None if how == "not finite" and seed < 4 else 4.2 + 0.01 * seed}
    found, table = immune({**WHOLE, **harmed, **mine}, FLIPS, [("monotone", "random")] if how == "diverged" else [])
    row = found["Having been monotone shields against random poison, beside trained on"]
    assert row["verdict"] == ("supported" if how == "fine" else "inconclusive"), row
    said = {
        "fine": "",
        "not finite": "48 of 60 pairs have no number",
        "diverged": "5 of 5 poisons (random) of monotone diverged",
    }
    assert said[how] in (row["note"] or "")
    numbers = table[2]["losses without a number"], table[2]["poisons that diverged"]
    assert numbers == {"fine": (0, 0), "not finite": (48, 0), "diverged": (0, 5)}[how]


def test_nothing_is_called_a_shield_where_the_control_is_not_surely_harmed():
    rises = {0: 0.35, 1: -0.05, 2: -0.04, 3: 0.02, 4: 0.0}
    harmed = {
        ("trained on", "random"): lambda seed, i: 4.0 + rises[seed],
        ("trained on", "text"): lambda seed, i: 4.5 + 0.01 * seed,
    }
    found, _ = immune({**WHOLE, **harmed}, {**FLIPS, "trained on": (4.0, 3.95)})
    for called, what in (("Having been monotone", "random poison"), ("A monotone mlp", "HotFlip")):
        row = found[f"{called} shields against {what}, beside trained on"]
        assert row["verdict"] == "not tested" and "no harm that is sure and above the margin of 0.05" in row["note"]
    assert found["Having been monotone shields against text poison, beside trained on"]["verdict"] == "supported"


def test_beside_a_shield_stands_whether_the_arm_is_the_better_one_afterwards():
    found, _ = immune(WHOLE, FLIPS)
    assert found["A monotone mlp shields against HotFlip, beside trained on"]["verdict"] == "supported"
    assert found["monotone predicts better than trained on after HotFlip"]["verdict"] == "contradicted"


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
        (
            Immunity,
            {"arms": ("plain", "healed")},
            "'healed' is compared with 'trained on', which must be among the arms too",
        ),
        (
            Resilience,
            {"arms": ("GQA", "more text", "SFT", "DPO")},
            "'DPO' is compared with 'more SFT', which must be among",
        ),
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


def test_results_of_tasks_that_are_files_lie_in_the_study_and_beside_nothing_of_the_users(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows = [
            {"prompt": f"{i} in {folder}?", "answer": str(i), "part": "test" if i % 2 else "train"} for i in range(8)
        ]
        (tmp_path / folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = [str(tmp_path / folder / "mine.jsonl") for folder in ("a", "b")]
    words = ["--tasks", *tasks, "--shots", "1", "1", "--ways", "zero-shot", "few-shot", "--sample", "0"]
    assert run(["run", "modern-tasks", "--tier", "smoke", *words, "--lab", str(tmp_path / "lab"), *QUIET]) == 0
    folder, _, _ = page(tmp_path / "lab", "modern-tasks")
    assert [json.loads((folder / name).read_text())[0]["task"] for name in ("mine.json", "mine-2.json")] == tasks
    assert {path.name for path in tmp_path.rglob("*.json*") if "lab" not in path.parts} == {"mine.jsonl"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["immunity", "--site", "bogus"], "no site 'bogus'"),
        (
            ["immunity", "--prompt", "5000"],
            "a prompt of 5000 tokens with a target of 6, a poison of 12 or a row of 24 is longer",
        ),
        (["immunity", "--subject", "tiny-t5"], "this study is of causal models, and tiny-t5 is encoder-decoder"),
        (["modern-align", "--subject", "tiny-t5"], "this study is of causal models, and tiny-t5 is encoder-decoder"),
        (["modern-align", "--split", "9"], "4 rows of a step cannot be computed in 9 parts"),
        (["modern-tasks", "--split", "9"], "2 rows of a step cannot be computed in 9 parts"),
        (["modern-align", "--problems", "60000"], "there are 72"),
        (["resilience", "--margin", "5"], "a margin is a share of what there is to lose, below 1, not 5"),
        (["modern-tasks", "--tasks", "{}/mine.jsonl", "{}/./mine.jsonl", "--sample", "0"], "two of these are one task"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(tmp_path, capsys, command, said):
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [command[0], "--tier", "smoke", *(word.format(tmp_path) for word in command[1:])]
    assert run(["run", *words, "--lab", str(tmp_path / "lab"), *QUIET]) == 2
    assert said in capsys.readouterr().err and not list((tmp_path / "lab").glob("log/*"))


def test_what_failed_is_said_to_have_failed_and_what_else_failed_is_not_blamed(tmp_path):
    lab, tiny = Lab(tmp_path / "lab"), Scratch()
    rows = [{"prompt": str(i), "answer": "b", "part": "test" if i < 3 else "train"} for i in range(9)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = Jsonl(path=str(tmp_path / "mine.jsonl"))
    with pytest.raises(RuntimeError, match="cannot be ranked"):
        lab.read([tiny], [Task(task=asked, method="rank")])
    with pytest.raises(
        RuntimeError, match="1 of 1 readings failed: ValueError: this model has adapters already"
    ) as caught:
        lab.read([tiny >> Lora(rank=2) >> Lora(rank=2, seed=1)], [Task(task=asked)])
    assert "cannot be ranked" not in str(caught.value)
    words = ["--ways", "zero-shot", "full", "--lr-full", "1e30", "--repeats", "1", "--sample", "0"]
    command = ["run", "modern-tasks", "--tier", "smoke", *words, "--tasks", asked.path]
    assert run([*command, "--lab", str(lab.path), *QUIET]) != 0
    _, _, text = page(lab.path, "modern-tasks")
    assert (
        "1 of 2 readings failed (the same command tries them again): " in text
        and "run the same command again" not in text
    )


def test_what_was_not_taught_is_said(tmp_path):
    rows = [
        {"prompt": "long " * (200 if i < 9 else 1), "answer": str(i), "part": "train", "id": str(i)} for i in range(12)
    ]
    rows += [{"prompt": f"{i}?", "answer": "1", "part": "test"} for i in range(2)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--ways", "zero-shot", "full", "--sample", "0", "--repeats", "1", "--tasks", str(tmp_path / "mine.jsonl")]
    assert run(["run", "modern-tasks", "--tier", "smoke", *words, "--lab", str(tmp_path / "lab"), *QUIET]) == 0
    _, frames, text = page(tmp_path / "lab", "modern-tasks")
    assert frames["summary"].select("taught with", "left out").rows() == [(None, None), (3, 9)]
    assert "9 of 12 examples of" in text and "were not taught" in text
