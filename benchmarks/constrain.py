"""What a constraint costs: training steps of the same model with and without it, interleaved, and what each start keeps.

    python benchmarks/constrain.py [--subject smollm2] [--steps 4] [--rounds 3]
    python benchmarks/constrain.py --mass          the share of mass that clamping and sign structures keep

Bar: a step with softplus weights takes at most 1.10 times as long as one without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from lesion.fit import fit
from lesion.steps import Constrain, Heal
from lesion.subjects import Scratch, SmolLM2, Tiny
from lesion.texts import corpus
from lesion.texttraining import packed

PYTHIA = {"model_type": "gpt_neox", "rotary_pct": 0.25, "vocab_size": 50304}
SHAPES = {
    "Pythia-70m-shaped, random": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    },
    "Pythia-1.4b-shaped, random, 2 layers": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
    },
}


def seconds(subject, step, how):
    """Seconds of each optimizer step but the first."""
    specimen = subject.load()
    if step is not None:
        step.apply(specimen)
    data = packed(specimen, corpus(how.corpus)[:4], how)
    with tempfile.TemporaryDirectory() as folder:
        fit(specimen.model, data, how, folder=Path(folder))
        rows = [json.loads(line)["seconds"] for line in (Path(folder) / "metrics.jsonl").open()]
    return [b - a for a, b in itertools.pairwise(rows)]


def speed(subject, steps, rounds, precision):
    how = Heal(steps=steps + 1, batch=4, length=256, lr=1e-4, warmup=1, precision=precision, documents="joined")
    arms = {
        "free": None,
        "softplus": Constrain(),
        "sign structure": Constrain(init="signature"),
        "projected": Constrain(form="projected"),
    }
    found = {name: [] for name in arms}
    for _ in range(rounds):
        for name, step in arms.items():
            found[name] += seconds(subject, step, how)
    base = statistics.median(found["free"])
    print(f"{subject.name}, {precision}, 4 rows of 256 tokens, median of {len(found['free'])} steps, interleaved")
    for name, times in found.items():
        print(f"  {name:15} {statistics.median(times):7.3f} s   {statistics.median(times) / base:5.3f} x")


def mass():
    subjects = {"SmolLM2-135M": SmolLM2(), "tiny": Tiny()}
    subjects |= {name: Scratch(architecture="gpt_neox", config=PYTHIA | shape) for name, shape in SHAPES.items()}
    print(
        f"{'share of squared mass that is kept':40} {'clamp':>7} {'signature':>10}   (and the distance to W, relative)"
    )
    for name, subject in subjects.items():
        said = []
        for init in ("clamp", "signature"):
            facts = Constrain(init=init).apply(subject.load())
            said.append(f"{facts['retained']:.4f} ({facts['relative']:.3f})")
        print(f"{name:40} {said[0]:>16} {said[1]:>16}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mass", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if asked.mass:
        mass()
    else:
        for precision in ("float32", "bfloat16"):
            speed({"smollm2": SmolLM2(), "tiny": Tiny()}[asked.subject], asked.steps, asked.rounds, precision)
