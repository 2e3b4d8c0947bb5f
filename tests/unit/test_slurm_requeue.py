"""A job of an array puts itself back into the queue, and no other element of it."""

import subprocess
from types import SimpleNamespace

import pytest

from lesion import slurm
from lesion.cli import UNFINISHED

# The last element of an array has the number of the whole array as its own, and squeue lists all of that number.
SQUEUE = """#!/bin/sh
case "$*" in
  *"-j 11_1 "*) echo RUNNING ;;
  *"-j 12 "*) echo COMPLETING ;;
  *) printf 'RUNNING\\nPENDING\\n' ;;
esac
"""
SCONTROL = '#!/bin/sh\necho "$@" >> "$0.said"\n'


class Gone(Exception):
    """The scheduler has ended this process."""


class Work:
    def __init__(self, command, env):
        self.pid = 1

    def wait(self):
        return UNFINISHED


@pytest.fixture
def commands(tmp_path, monkeypatch):
    for name, text in (("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name, value in {"JOB_ID": "11", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    def sleep(seconds):
        raise Gone

    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(slurm, "subprocess", SimpleNamespace(Popen=Work, run=subprocess.run))
    return tmp_path


def test_an_element_of_an_array_requeues_itself_alone(commands, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with pytest.raises(Gone):
        slurm.Supervised("folder", 1, False, requeues=9, notice=60)()
    assert (commands / "scontrol.said").read_text() == "requeue 11_1\n"


def test_a_job_that_was_cancelled_is_not_put_back(commands, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(RuntimeError, match="asked to end"):
        slurm.Supervised("folder", 1, False, requeues=9, notice=60)()
    assert not (commands / "scontrol.said").exists()


@pytest.mark.parametrize("number", ["11_1", "12", "13"])
def test_a_script_that_is_asked_to_go_before_its_step_has_begun_puts_the_job_back_unless_it_was_cancelled(
    tmp_path, number
):
    """RUNNING is 11_1, the element of an array, and 13; 12 is COMPLETING."""
    for name, text in (("squeue", SQUEUE.replace('"-j 11_1 "', '"-j 11_1 "*|*"-j 13 "')), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "sleep").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "sleep").chmod(0o755)
    script = "\n".join(["#!/bin/bash", *slurm.GUARD, "kill -TERM $$", "echo went on"])
    job, _, element = number.partition("_")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": job}
    env |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": element} if element else {}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "went on\n" and not done.stderr
    said = tmp_path / "scontrol.said"
    assert (said.read_text() if said.exists() else "") == ("" if number == "12" else f"requeue {number}\n")


def test_a_scheduler_that_is_too_busy_to_answer_is_asked_again(commands, monkeypatch):
    """No answer is not 'cancelled': a job that took it for that would never go on."""
    waited = []
    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=waited.append))
    busy = '#!/bin/sh\nif [ -e "$0.asked" ]; then echo RUNNING; else touch "$0.asked"; echo "Socket timed out" >&2; exit 1; fi\n'
    (commands / "squeue").write_text(busy)
    assert slurm._is_running("11") and waited == [1]
    (commands / "squeue").write_text('#!/bin/sh\necho "Unable to contact slurm controller" >&2\nexit 1\n')
    assert slurm._is_running("11") and len(waited) == 1 + slurm.TRIES
    (commands / "squeue").write_text('#!/bin/sh\necho "slurm_load_jobs error: Invalid job id specified" >&2\nexit 1\n')
    assert not slurm._is_running("11")
