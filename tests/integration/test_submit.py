"""What is submitted to this machine (`--on local`), and what a profile or a plan refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from hubserver import Server, child
from lesion import pool
from lesion.cli import run
from lesion.store import Store
from lesion.subjects import Scratch
from lesion.submission import submissions

DEGRADE = "degrade --subject tiny-llama --doses 0 0.3 0.9 --site attention.value embedding --repeats 1 --prompts 4"
DEGRADE = f"{DEGRADE} --new-tokens 6 --documents 3 --tokens 48".split()
MODERN = ["modern-lm", "--tier", "smoke", "--repeats", "2", "--steps", "300"]
QUIET = ["--verbosity", "quiet"]


def until(true, what, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.1)


def states(lab):
    return json.loads((submissions(lab)[-1].folder / "pool.json").read_text())["states"]


def over(lab):
    return not {"PENDING", "RUNNING"} & set(states(lab).values())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name, study in (("degrade", DEGRADE), ("modern", MODERN)):
        assert run(["run", *study, "--lab", str(folder / name), *QUIET]) == 0
    return {name: b"".join(Store(folder / name).canonical()) for name in ("degrade", "modern")}


def test_two_workers_give_the_lab_of_one_process(tmp_path, alone, capfd, fault):
    for name, study in (("degrade", DEGRADE), ("modern", MODERN)):
        lab = tmp_path / name
        assert run(["submit", *study, "--lab", str(lab), "--on", "local", "--workers", "2"]) == 0
        assert "JOB1 × 2" in capfd.readouterr().out
        until(lambda lab=lab: over(lab), "all tasks are over")
        assert set(states(lab).values()) == {"COMPLETED"}
        assert b"".join(Store(lab).canonical()) == alone[name]
        assert run(["status", "--lab", str(lab)]) == 0
        assert "tasks are done" in capfd.readouterr().out
    fault("two processes on one lab", "a pool of two workers, two studies", "finished, byte-identical", 2)


@pytest.mark.parametrize("how", ["cancelled", "the keeper killed"])
def test_a_pool_that_ends_early_is_submitted_again(tmp_path, alone, capfd, fault, how):
    lab = tmp_path / "lab"
    assert run(["submit", *MODERN, "--lab", str(lab), "--on", "local", "--workers", "2"]) == 0
    until(lambda: list(lab.glob("states/.*.work/step-*")), "a checkpoint is saved")
    if how == "cancelled":
        assert run(["cancel", "--lab", str(lab)]) == 0
    else:
        keeper = json.loads((submissions(lab)[-1].folder / "pool.json").read_text())["keeper"]["process"][0]
        os.kill(keeper, signal.SIGKILL)  # its workers live on; whoever comes next waits for what they are at
    until(lambda: not {"PENDING", "RUNNING"} & set(pool.states(submissions(lab)[-1]).values()), "the pool has ended")
    capfd.readouterr()
    assert run(["status", "--lab", str(lab)]) == 0
    said = capfd.readouterr().out
    assert ("cancelled" if how == "cancelled" else "lost") in said and "lesion resubmit" in said
    assert run(["resubmit", "--lab", str(lab)]) == 0
    until(lambda: over(lab), "all tasks are over")
    assert b"".join(Store(lab).canonical()) == alone["modern"], run(["logs", "--lab", str(lab)])
    fault("a pool that ends early", how, "the rest submitted again, byte-identical")


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes_train_what_one_does(tmp_path, fault, sharded):
    lab, profile = tmp_path / "lab", tmp_path / "profile.toml"
    profile.write_text(f"time = 10\nmemory = 9\n[training]\nprocesses = 2\nsharded = {sharded}\n")
    study = ["modern-lm", "--tier", "smoke", "--steps", "20"]
    assert run(["submit", *study, "--lab", str(lab), "--profile", str(profile), "--on", "local"]) == 0
    until(lambda: over(lab), "all tasks are over")
    assert set(states(lab).values()) == {"COMPLETED"}, run(["logs", "--lab", str(lab), "--lines", "60"])
    assert run(["run", *study, "--lab", str(tmp_path / "one"), *QUIET]) == 0
    there = {(row["reading"], row["item"]): row["nll"] for row in Store(tmp_path / "one").rows() if "nll" in row}
    rows = [row for row in Store(lab).rows() if "nll" in row]
    assert len(rows) == len(there) > 0
    assert all(row["nll"] == pytest.approx(there[row["reading"], row["item"]], rel=1e-3) for row in rows)
    fault("training on two processes", f"sharded = {sharded}, through a pool", "the same readings, to 0.1 %")


def test_what_fails_takes_its_own_along_and_is_shown(tmp_path, capfd):
    lab = tmp_path / "lab"
    wrong = ["modern-lm", "--tier", "smoke", "--repeats", "2", "--steps", "20", "--lr", "1e30"]
    assert run(["submit", *wrong, "--lab", str(lab), "--on", "local", "--workers", "2"]) == 0
    until(lambda: over(lab), "all tasks are over")
    assert sorted(states(lab).values()) == ["CANCELLED", "CANCELLED", "FAILED", "FAILED"]
    assert run(["status", "--lab", str(lab)]) == 0 and run(["logs", "--lab", str(lab)]) == 0
    said = capfd.readouterr().out
    assert "2 failed" in said and "2 cancelled" in said and "Stopped: loss" in said
    (local,) = [run(["run", *wrong, "--lab", str(tmp_path / "alone"), *QUIET])]
    assert local == 1 and list(Store(lab).canonical()) == list(Store(tmp_path / "alone").canonical())


def test_a_job_of_another_version_of_the_study_is_refused(tmp_path, capfd, fault):
    lab = tmp_path / "lab"
    assert run(["submit", *DEGRADE, "--lab", str(lab), "--on", "local"]) == 0
    until(lambda: over(lab), "all tasks are over")
    (submission,) = submissions(lab)
    about = json.loads((submission.folder / "study.json").read_text())
    about["study"]["prompts"] = 3  # what the job was pickled with speaks of readings that are asked for no more
    (submission.folder / "study.json").write_text(json.dumps(about))
    before = b"".join(Store(lab).canonical())
    assert run(["work", str(submission.folder), "0"]) == 2
    assert "are not what the study asks for now" in capfd.readouterr().err
    assert b"".join(Store(lab).canonical()) == before
    fault("requeued job with stale arguments", "the study's options changed since", "refused by name")


def test_a_signal_just_after_the_work_has_ended_is_not_taken_for_its_success(monkeypatch):
    """The handler runs inside of the wait for the work: what it raised there would count as the exit code 0."""
    from lesion import slurm

    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(75)"])
    assert child.wait() == 75
    monkeypatch.setattr(slurm, "_child", [child])
    again = slurm.Supervised("folder", 0, False, 1, 20)
    assert again.checkpoint().function is again


WRONG = [
    ("time = 10\nmemory = 0.1", "needs about", DEGRADE),
    ("time = 10\nmemory = 2\n[training]\nmemory = 0.1", "the largest training needs about", MODERN),
    ("time = 1\nmemory = 9\nrequeues = 0", "takes about", [*MODERN, "--size", "125m", "--steps", "100000"]),
    ('time = "4 hours"\nmemory = 1', "H:MM:SS", DEGRADE),
    ("memory = 1", "time Field required", DEGRADE),
    ("time = 10\nmemory = 1\nprocesses = 2", "only training runs on several processes", DEGRADE),
    ("time = 10\nmemory = 1\n[training]\nprozesse = 2", "prozesse", DEGRADE),
    ("time = = 10", "is no TOML file", DEGRADE),
]


@pytest.mark.parametrize(("profile", "why", "study"), WRONG)
def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path, capfd, profile, why, study):
    (tmp_path / "profile.toml").write_text(profile)
    options = ["--lab", str(tmp_path / "lab"), "--profile", str(tmp_path / "profile.toml"), "--on", "local"]
    assert run(["submit", *study, *options]) == 2
    assert why in capfd.readouterr().err
    assert not (tmp_path / "lab").exists()


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch, capfd):
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert run(["submit", *DEGRADE, "--lab", str(tmp_path / "lab"), "--on", "local"]) == 2
    assert "of disk, and" in capfd.readouterr().err and not list(tmp_path.iterdir())


GREAT = {  # what their repositories' config.json say of their shape → parameters
    "EleutherAI/pythia-12b": (
        {"model_type": "gpt_neox", "hidden_size": 5120, "num_hidden_layers": 36, "num_attention_heads": 40,
         "intermediate_size": 20480, "vocab_size": 50688, "max_position_embeddings": 2048, "rotary_pct": 0.25},
        11_846_072_320,
    ),
    "meta-llama/Meta-Llama-3-70B": (
        {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "max_position_embeddings": 8192},
        70_553_706_496,
    ),
    "google/gemma-3-27b-it": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62,
         "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 21504,
         "vocab_size": 262208, "query_pre_attn_scalar": 168, "sliding_window": 1024},
         "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
         "num_hidden_layers": 27, "patch_size": 14, "image_size": 896}},
        27_432_406_640,
    ),
}  # fmt: skip
ACT = """
import io, contextlib
from lesion import pool
from lesion.cli import run
from lesion.subjects import Hub

def act(what, fields):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(fields["command"])
    made = sum(p.numel() for p in Hub(id=fields["id"]).outline().parameters())
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "parameters": made}
"""


def test_a_plan_of_the_greatest_needs_their_configuration_only(tmp_path):
    (tmp_path / "profile.toml").write_text("time = 600\nmemory = 64\ngpus = 1\ngpu_memory = 80\n")
    with closing(Server()) as server:
        for name, (config, _) in GREAT.items():
            folder = tmp_path / name.split("/")[1]
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
            server.add(name, folder)
        for name, (_, parameters) in GREAT.items():
            command = ["plan", "degrade", "--subject", name, "--site", "mlp", "--lab", str(tmp_path / "lab"), *QUIET]
            (found,) = child(ACT, tmp_path, server.url, [("plan", {"command": command, "id": name})])
            assert found["does"]["code"] == 0, found
            said = found["does"]["out"]
            assert found["does"]["parameters"] == pytest.approx(parameters, rel=0.002)
            assert all(word in said for word in ("memory ", "time ", "disk ", "jobs ")), said
    assert not (tmp_path / "lab").exists()


OFFLINE = """
import io, contextlib
from lesion.cli import run

def act(what, fields):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(fields["command"])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}
"""


def test_what_was_fetched_is_enough_for_a_node_without_internet(tmp_path):
    specimen = Scratch(seed=1).load()
    specimen.model.save_pretrained(tmp_path / "model")
    specimen.tokenizer.save_pretrained(tmp_path / "model")
    study = [
        "degrade",
        "--subject",
        "org/tiny",
        "--doses",
        "0",
        "0.5",
        "--site",
        "mlp",
        "--repeats",
        "1",
        "--documents",
        "2",
    ]
    study += ["--tokens", "32", "--measures", "perplexity", "--lab", str(tmp_path / "lab")]
    with closing(Server()) as server:
        server.add("org/tiny", tmp_path / "model")
        refused, *_ = child(
            OFFLINE, tmp_path, server.url, [("run", {"command": ["run", *study, *QUIET]})], HF_HUB_OFFLINE="1"
        )
        assert refused["does"]["code"] == 2 and "HF_HUB_OFFLINE is set" in refused["does"]["err"], refused
        (found,) = child(OFFLINE, tmp_path, server.url, [("fetch", {"command": ["fetch", *study]})])
        assert found["does"]["code"] == 0 and "hub: " in found["does"]["out"], found
    (found,) = child(OFFLINE, tmp_path, server.url, [("run", {"command": ["run", *study, *QUIET]})], HF_HUB_OFFLINE="1")
    assert found["does"]["code"] == 0, found
    assert len(Store(tmp_path / "lab").index.seals) == 2
