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
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from oracles.test_fit import data, model
from lesion.fit import Training, fit
from lesion.trial import Unfinished
folder, how, more, stop = json.loads(sys.argv[1])
made = model(**more)

def tell(what, step, **told):
    if step == stop:
        import os, signal
        os.kill(os.getpid(), signal.SIGUSR1)

try:
    facts = fit(made, data(), Training(**how), folder=Path(folder), held_out=data(1), tell=tell)
    if int(__import__("os").environ["RANK"]) == 0:
        torch.save(dict(made.state_dict()), Path(folder) / "end.pt")
except Unfinished:
    sys.exit(75)
finally:
    import torch.distributed as dist
    dist.destroy_process_group()
"""


def together(folder, how, more=None, world=2, sharded=False, stop=None):
    """Runs a training on so many processes and returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    given = json.dumps([str(folder), how.model_dump(), more or {}, stop])
    running = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(port), "ACCELERATE_USE_FSDP": str(sharded).lower(), "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", script, given],
                env={**os.environ, **place},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [one.communicate(timeout=300)[1] for one in running]
    codes = [one.returncode for one in running]
    assert set(codes) <= {0, 75}, "\n".join(said)[-3000:]
    return codes


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], [row["norm"] for row in rows], rows[-1].get("held_out")


def alone(folder, how, **more):
    made = model(**more)
    fit(made, data(), how, folder=folder, held_out=data(1))
    return weights(made)


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shares"])
@pytest.mark.parametrize("how", [{}, {"split": 3, "eval_every": 4}, {"precision": "bfloat16"}, {"documents": "joined"}])
def test_two_processes_give_the_losses_of_one(tmp_path, sharded, how):
    chosen = HOW.model_copy(update={"lr": 3e-3, **how})
    expected = alone(tmp_path / "one", chosen)
    assert together(tmp_path / "two", chosen, sharded=sharded) == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    close = {"rel": 2e-2} if how.get("precision") else {"abs": 1e-5}
    for a, b in zip(one, two, strict=True):
        assert a is b is None or b == pytest.approx(a, **close)
    if not how.get("precision"):
        end = torch.load(tmp_path / "two" / "end.pt")
        for name, w in expected.items():
            assert torch.allclose(end[name], w, atol=2e-4), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_shares_its_state(tmp_path, name):
    chosen = HOW.model_copy(update={"optimizer": name, "steps": 4, "lr": 1e-3})
    alone(tmp_path / "one", chosen)
    if name == "adafactor":  # torch cannot: refused by name, and copies serve
        with pytest.raises(AssertionError, match="adafactor keeps sums over rows and columns"):
            together(tmp_path / "refused", chosen, sharded=True)
    assert together(tmp_path / "two", chosen, sharded=name != "adafactor") == [0, 0]
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], abs=1e-5)


@pytest.mark.parametrize(("before", "after"), [("shares", "one"), ("copies", "shares"), ("one", "copies")])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    alone(tmp_path / "whole", HOW)

    def go(way, stop):
        if way != "one":
            return together(tmp_path / "run", HOW, sharded=way == "shares", stop=stop)
        made, here = model(), []

        def tell(what, step, **told):
            here.append(step)
            if step == stop:
                os.kill(os.getpid(), 10)

        try:
            fit(made, data(), HOW, folder=tmp_path / "run", held_out=data(1), tell=tell)
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
