"""Healing as a step of a sentence: kept, gone on with after a signal, measured, and paired with its damage."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lesion import Lab
from lesion.lab import product
from lesion.measures import Perplexity
from lesion.steps import Heal, Noise
from lesion.subjects import Scratch
from lesion.trial import Trial

INTACT = Trial(subject=Scratch(architecture="tiny-llama"))
HEAL = Heal(steps=30, batch=4, length=64, warmup=3, lr=3e-3, skip=2, save_every=7, eval_every=10)
READ = Perplexity(documents=2, tokens=80)


def test_a_damaged_model_is_healed_once_and_damaged_again(lab):
    trials = [INTACT, INTACT >> HEAL, INTACT >> HEAL >> Noise(site="mlp", sigma=0.3)]
    table = lab.read(trials, [READ])
    nll = {str(t): table.filter(table["trial"] == str(t.pin()))["nll"].sum() for t in trials}
    raw, healed, _ = nll.values()
    assert healed < 0.8 * raw, "it has learnt from text"
    store = lab.open()
    key = product(trials[1:2], [READ])[0].trial.key
    folder = store.state_folder(key)
    assert (folder / "metrics.jsonl").read_text().count("\n") == 30 and not store.workplace(key).exists()
    facts = store.index.states[key]["ledger"][-1]["facts"]
    assert facts["steps"] == 30 and 0.9 < facts["moved"] <= 1 and facts["held_out"] < 5.6
    before = (folder / "model.safetensors").stat().st_mtime_ns
    lab.read([*trials, INTACT >> HEAL >> Noise(site="mlp", sigma=0.4)], [READ])
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "one training, whatever is asked after it"


SCRIPT = """
    import sys, torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from lesion import cli, Lab
    from lesion.trial import Unfinished
    from integration.test_heal import HEAL, INTACT, READ
    from lesion.lab import product

    def tell(what, **told):
        if what == "train":
            print(told["step"], flush=True)

    try:
        Lab({lab!r}, tell=tell).take(product([INTACT >> HEAL], [READ]))
    except Unfinished as error:
        print(error, flush=True)
        sys.exit(cli.UNFINISHED)
"""


def run(lab, until=None):
    """A process that trains; sent SIGTERM (or killed) once it has told of so many steps."""
    tests = str(Path(__file__).parents[1])
    code = textwrap.dedent(SCRIPT.format(lab=str(lab), tests=tests))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    told = []
    for line in process.stdout:
        told.append(line.strip())
        if until and told[-1] == str(until[0]):
            process.send_signal(until[1])
    process.stdout.close()
    return process.wait(timeout=120), told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_training_goes_on_to_the_same_bits(tmp_path, number):
    whole = Lab(tmp_path / "whole")
    with_one = torch.get_num_threads()
    torch.set_num_threads(1)
    store = whole.take(product([INTACT >> HEAL], [READ]))
    torch.set_num_threads(with_one)
    key = product([INTACT >> HEAL], [READ])[0].trial.key
    code, told = run(tmp_path / "torn", (17, number))
    if number == signal.SIGTERM:
        assert code == 75 and told[-1].startswith("saved after step 1")
    else:
        assert code == -signal.SIGKILL
    code, told = run(tmp_path / "torn")
    assert code == 0 and int(told[0]) in ((15,) if number == signal.SIGKILL else range(15, 21)), "not from the start"
    torn = Lab(tmp_path / "torn").open()
    for name in ("model.safetensors",):
        one, other = (s.state_folder(key) / name for s in (store, torn))
        assert one.read_bytes() == other.read_bytes()
