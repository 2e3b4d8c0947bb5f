"""A real SLURM, started here: small studies through `lesion submit`, with a node that dies, a time-out and a cancelled job. Every
lab must come out byte for byte as the same study leaves it on this machine alone."""

import io
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import slurm
from lesion.cli import run
from lesion.store import Store
from sameness import assert_same, canonical

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
DEGRADE = "degrade --subject tiny-llama --doses 0 0.3 0.9 --site attention.value embedding --repeats 2 --prompts 6"
DEGRADE += " --new-tokens 8 --documents 4 --tokens 48"
MODERN = "modern-lm --tier smoke --repeats 2 --steps 200"
SECRET = "hf_NobodyMayReadThis"
LONG = "modern-lm --tier smoke --steps 4000"  # longer than its jobs are given
PROFILE = 'time = 10\nmemory = 1\ncpus = 1\narray = 3\nparallel = 2\npartition = "small"\nnotice = 50\n'


def lesion(*command, code=0):
    """A command in this process, which is quicker than a new one."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        found = run(list(command))
    assert found == code, out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "profile.toml").write_text(PROFILE)
    (folder / "short.toml").write_text(PROFILE + "[training]\ntime = 1\n")
    return folder


@pytest.fixture(scope="module")
def cluster(place):
    with pytest.MonkeyPatch.context() as patch, slurm.Cluster(place / "cluster", cpus=4) as cluster:
        patch.setenv("HF_TOKEN", SECRET)  # which reaches the jobs, and nothing that stays
        yield cluster


@pytest.fixture(scope="module")
def alone(place):
    """The same studies on this machine, started now and read when they are needed."""
    studies = {"degrade": DEGRADE, "modern": MODERN, "long": LONG}
    going = {}
    for name, study in studies.items():
        command = [
            "run",
            *study.split(),
            "--lab",
            str(place / f"alone-{name}"),
            "--threads",
            "1",
            "--verbosity",
            "quiet",
        ]
        with (place / f"alone-{name}.out").open("w") as out:
            going[name] = subprocess.Popen([sys.executable, "-m", "lesion.cli", *command], stdout=out, stderr=out)

    def read(name):
        assert going[name].wait(timeout=480) == 0, (place / f"alone-{name}.out").read_text()
        return canonical(place / f"alone-{name}")

    yield read
    for process in going.values():
        process.kill()
        process.wait()


def submit(place, name, study, profile="profile.toml"):
    return lesion("submit", *study.split(), "--lab", str(place / name), "--profile", str(place / profile))


def explanation(lab):
    """What explains a lab that is not as it should be."""
    return "\n".join([logs(lab)[-3000:], lesion("status", "--lab", str(lab))[-2000:]])


def logs(lab):
    return "".join(path.read_text(errors="replace") for path in sorted(lab.glob("jobs/*/*/*_log.out")))


@pytest.fixture(scope="module")
def submitted(place, cluster, alone):
    """Three studies at once. When all are at work the node loses its power, and comes back; then somebody more important
    takes the whole machine for a second."""
    said = {
        "long": submit(place, "long", LONG, "short.toml"),
        "degrade": submit(place, "degrade", DEGRADE),
        "modern": submit(place, "modern", MODERN),
    }
    cluster.until(lambda: list((place / "long").glob("states/.*.work/step-*")), "a checkpoint is saved")
    begun = logs(place / "long").count("\ntask 0: make")
    lost = {job for job, state in cluster.queue().items() if state == "RUNNING"}
    assert lost
    cluster.lose_node()
    cluster.until(lambda: logs(place / "long").count("\ntask 0: make") > begun, "it goes on after the power cut")
    cluster.ask("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    return said, lost


def test_arrays_and_dependencies_give_the_lab_of_one_machine(place, cluster, submitted, alone, fault):
    said, lost = submitted
    assert "JOB1 × 3" in said["degrade"] and "JOB2, after JOB1" in said["degrade"]  # quoted readings come first
    assert (
        "JOB1 × 2" in said["modern"] and "each after its own of JOB1" in said["modern"]
    )  # trainings, then what reads them
    going = lesion("status", "--lab", str(place / "degrade"))
    assert "tasks are done" in going or "waiting" in going or "running" in going
    cluster.until_idle()
    for name in ("degrade", "modern", "long"):
        assert_same(place / name, alone(name), explanation(place / name))
        assert "tasks are done" in lesion("status", "--lab", str(place / name))
    assert not list((place / "long").glob("states/.*")), "no workplace is left"
    fault(
        "node daemon and jobs killed (SLURM)",
        "kill -9 of slurmd and of all jobs on it",
        "requeued, byte-identical",
        len(lost),
    )


def test_a_job_whose_time_is_over_saves_and_goes_on(place, submitted, fault):
    told = logs(place / "long")
    assert "Job has timed out" in told and "unfinished, saved after step" in told and "Requeued job" in told, told[
        -3000:
    ]
    fault(
        "time-out of a job (SLURM)",
        "a limit of one minute",
        "saved, requeued, byte-identical",
        told.count("Requeued job"),
    )


def test_a_preempted_job_saves_and_goes_on(place, cluster, submitted, fault):
    # who is asked to go says so in its log; the controller says so only of those that are still there after their grace
    asked = "".join(logs(place / name) for name in ("long", "degrade", "modern"))
    told = (cluster.folder / "slurmctld.log").read_text()
    assert re.search(r"STEP \S+ ON \S+ CANCELLED AT \S+ \*\*\*", asked) or "preempted JobId=" in told, asked[-3000:]
    assert logs(place / "long").count("unfinished, saved after step") >= 2, "by then, and when its time was over"
    fault("preempted jobs (SLURM)", "a partition of higher priority takes the node", "saved, requeued, byte-identical")


def test_no_secret_stays_in_job_scripts_pickles_logs_or_labs(place, submitted, fault):
    files = [path for name in ("long", "degrade", "modern") for path in (place / name).rglob("*") if path.is_file()]
    assert any(path.name.endswith("_submission.sh") for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    fault(
        "secrets (SLURM)",
        "HF_TOKEN in the environment of whoever submits",
        "in no script, pickle, log or row",
        len(files),
    )


def test_a_cancelled_study_is_submitted_again_and_finished(place, cluster, alone, fault):
    lab = place / "cancelled"
    assert "submitted degrade-" in submit(place, "cancelled", DEGRADE)
    cluster.until(lambda: "RUNNING" in cluster.queue().values(), "a job runs")
    again = ["submit", *DEGRADE.split(), "--lab", str(lab), "--profile", str(place / "profile.toml")]
    assert "still at work or waiting" in lesion(*again, code=2)
    assert "cancelled degrade-" in lesion("cancel", "--lab", str(lab))
    cluster.until_idle()
    said = lesion("status", "--lab", str(lab))
    assert "cancelled" in said and "lesion resubmit" in said
    assert "submitted degrade-" in lesion("resubmit", "--lab", str(lab))
    cluster.until_idle()
    assert_same(lab, alone("degrade"), explanation(lab))
    assert "nothing to do" in lesion("resubmit", "--lab", str(lab))
    fault("cancelled job (SLURM)", "scancel while it reads", "the rest submitted again, byte-identical")


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes_of_a_job_train_together(place, cluster, fault, sharded):
    lab = place / f"together-{sharded}"
    (place / "together.toml").write_text(
        PROFILE.replace("memory = 1", "memory = 2") + f"[training]\nprocesses = 2\nsharded = {sharded}\n"
    )
    study = "modern-lm --tier smoke --steps 20"
    submit(place, lab.name, study, "together.toml")
    lesion("run", *study.split(), "--lab", str(place / "one"), "--threads", "1", "--verbosity", "quiet")
    cluster.until_idle()
    assert "tasks are done" in lesion("status", "--lab", str(lab)), logs(lab)[-3000:]
    there = {(row["reading"], row["item"]): row["nll"] for row in Store(place / "one").rows() if "nll" in row}
    rows = [row for row in Store(lab).rows() if "nll" in row]
    assert len(rows) == len(there) > 0
    assert all(row["nll"] == pytest.approx(there[row["reading"], row["item"]], rel=1e-3) for row in rows)
    fault(
        "training on two processes", f"sharded = {sharded}, as two tasks of a SLURM job", "the same readings, to 0.1 %"
    )


def test_what_fails_takes_its_own_along_and_nothing_else(place, cluster):
    lab = place / "failing"  # the learning rate is one that no training survives
    submit(place, "failing", "modern-lm --tier smoke --repeats 2 --steps 20 --lr 1e30")
    cluster.until_idle()
    said = lesion("status", "--lab", str(lab))
    assert ("2 failed" in said and "2 cancelled" in said) or "2 lost" in said, said
    assert "Stopped: loss" in said


def test_what_the_scheduler_would_not_take_is_refused_before_anything_is_written(place, cluster):
    lab = place / "refused"
    for change, why in (
        ('partition = "nowhere"', "invalid partition"),
        ("time = 600", "partition small gives a job"),
        ("memory = 100000", "SLURM refuses a job that reads"),
        ("gpus = 2", "SLURM refuses a job that reads"),
        ('setup = ["export HF_TOKEN=abc"]', "job scripts can be read"),
        ("cores = 4", "cores Extra inputs are not permitted"),
        ('setup = "module load x"', "expected a list of shell commands"),
    ):
        key = change.split(" = ")[0]
        kept = [line for line in PROFILE.splitlines() if not line.startswith(f"{key} ")]
        (place / "odd.toml").write_text("\n".join([*kept, change]))
        told = lesion("submit", *DEGRADE.split(), "--lab", str(lab), "--profile", str(place / "odd.toml"), code=2)
        assert why in told, told
    assert not lab.exists()


def test_a_dry_run_prints_the_tree_and_the_scripts_and_submits_nothing(place, cluster):
    lab: Path = place / "dry"
    told = lesion("submit", *MODERN.split(), "--lab", str(lab), "--profile", str(place / "short.toml"), "--dry-run")
    assert "#SBATCH --array=0-1%2" in told and "#SBATCH --time=1\n" in told and "--dependency=aftercorr:JOB1" in told
    assert not lab.exists()


def test_a_setup_line_that_fails_ends_the_job(place, cluster):
    lab = place / "unset"
    (place / "unset.toml").write_text(PROFILE + 'setup = ["source /nowhere/activate"]\n')
    submit(place, lab.name, DEGRADE, "unset.toml")
    cluster.until_idle()
    assert not Store(lab).index.seals, "nothing runs in an environment that is another than was asked for"
    assert "failed" in lesion("status", "--lab", str(lab)) and "/nowhere/activate" in lesion("logs", "--lab", str(lab))
