"""Training on two processes is training on one: copies (DDP) and shares (FSDP2), over gloo on this processor."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lesion.fit import Training, fit
from lesion.trial import Unfinished
from oracles.test_fit import HOW, OPTIMIZERS, data, model, weights

SCRIPT = """
import json, os, signal, sys, traceback
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from oracles.test_fit import data, model
from lesion.fit import Training, fit
from lesion.trial import Unfinished
jobs, stop = json.loads(sys.argv[1])

def tell(what, step, **told):
    if step == stop:
        os.kill(os.getpid(), signal.SIGUSR1)

code = 0
for folder, how in jobs:
    made = model()
    try:
        fit(made, data(), Training(**how), folder=Path(folder), held_out=data(1), tell=tell)
        if int(os.environ["RANK"]) == 0:
            torch.save(dict(made.state_dict()), Path(folder) / "end.pt")
    except Unfinished:
        code = 75
    except ValueError as error:
        Path(folder, "refused-" + os.environ["RANK"]).write_text(str(error))
    except Exception:
        traceback.print_exc()
        code = 1
        break
if code == 0:
    dist.barrier()
sys.stderr.flush()
os._exit(code)  # gloo's own threads abort now and then while an interpreter takes itself apart
"""


def together(jobs, world=2, sharded=False, stop=None):
    """Trains {folder: how} on so many processes, one after the other, and returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    for folder in jobs:
        folder.mkdir(parents=True, exist_ok=True)
    given = json.dumps([[(str(folder), how.model_dump()) for folder, how in jobs.items()], stop])
    running = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(port), "ACCELERATE_USE_FSDP": str(sharded).lower(), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", script, given]
        running.append(subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True))
    said = [one.communicate(timeout=300)[1] for one in running]
    codes = [one.returncode for one in running]
    assert set(codes) <= {0, 75}, "\n".join(text[-1500:] for text in said)
    return codes


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], [row["norm"] for row in rows], rows[-1].get("held_out")


def alone(folder, how):
    made = model()
    fit(made, data(), how, folder=folder, held_out=data(1))
    return weights(made)


WAYS = [{}, {"split": 3, "eval_every": 4}, {"precision": "bfloat16"}, {"documents": "joined"}]
WAYS += [{"optimizer": name, "steps": 4, "lr": 1e-3} for name in OPTIMIZERS]


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shares"])
def test_two_processes_train_as_one(tmp_path, sharded):
    """Settings and optimizers, each alone and together; losses, norms, held-out losses and weights."""
    jobs = {tmp_path / f"two-{i}": HOW.model_copy(update={"lr": 3e-3, **way}) for i, way in enumerate(WAYS)}
    assert together(jobs, sharded=sharded) == [0, 0]
    for i, (folder, how) in enumerate(jobs.items()):
        if sharded and how.optimizer == "adafactor":  # torch cannot: refused by name, by every process
            for rank in (0, 1):
                assert "adafactor keeps sums over rows and columns" in (folder / f"refused-{rank}").read_text()
            continue
        expected = alone(tmp_path / f"one-{i}", how)
        close = {"rel": 2e-2} if how.precision == "bfloat16" else {"abs": 1e-5}
        for a, b in zip(losses(tmp_path / f"one-{i}"), losses(folder), strict=True):
            assert a is b is None or b == pytest.approx(a, **close), how
        if how.precision == "float32" and how.optimizer == "adamw":
            end = torch.load(folder / "end.pt")
            assert all(torch.allclose(end[name], w, atol=2e-4) for name, w in expected.items()), how


EVALUATED = HOW.model_copy(update={"eval_every": 5})  # a checkpoint right after it has the optimizer's state too


@pytest.mark.parametrize(("before", "after"), [("shares", "one"), ("copies", "shares"), ("one", "copies")])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    alone(tmp_path / "whole", EVALUATED)

    def go(way, stop):
        if way != "one":
            return together({tmp_path / "run": EVALUATED}, sharded=way == "shares", stop=stop)
        made, here = model(), []

        def tell(what, step, **told):
            here.append(step)
            if step == stop:
                os.kill(os.getpid(), 10)

        try:
            fit(made, data(), EVALUATED, folder=tmp_path / "run", held_out=data(1), tell=tell)
        except Unfinished:
            return [75]
        return [0]

    assert set(go(before, 5)) == {75}
    assert (tmp_path / "run" / "step-00000005").is_dir()
    assert set(go(after, None)) == {0}
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(tmp_path / "whole")[0], abs=1e-5)


def test_fewer_rows_than_processes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="6 rows cannot be split among 1 processes in 7 parts"):
        fit(model(), data(), HOW.model_copy(update={"split": 7}), folder=tmp_path)
    assert Training().split == 1
