"""A sweep of five doses over the mlp weights of a model the size of SmolLM2-135M: damage, undo, damage, undo, …

    python benchmarks/sweep.py [--lives 3] [--repeats 3] [--threads 2]

Ours is what the walk does: the weights are copied once; then, for each dose, the step is applied, the changed tensors are
digested, the copy is written back, and the digests are taken again. The plain way is what one writes by hand: for each
dose and parameter new noise of the parameter's shape (`randn_like`, `rand_like`) or a table of levels looked up by an
int64 index (found by rounding, or by `bucketize`), and `copy_` from a clone to restore; it proves nothing.

What a process has freed before decides whether its next allocation is quick, and by a lot: the plain way's time can halve
or double with it. So each way of each step has a process of its own, lives three times, and the medians of all are
compared; the processes take turns, with a new seed in every repeat. A life's first round is left out: in it, memory is
committed.

The limit is what the machine allows for our work: every number drawn once, at the best rate of any generator measured in
this run, and every byte that must move (28 a weight and dose: 12 to damage, 8 to undo, 4 for each of two digests) at the
best bandwidth of `copy_` on the same tensors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from lesion.bench import Undo
from lesion.digest import digests
from lesion.steps.ablate import Ablate
from lesion.steps.noise import Noise
from lesion.steps.quantise import Quantise
from lesion.streams import BLOCK, normals, uniforms
from lesion.subjects import Scratch
from lesion.trial import Specimen, Step

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 260,
}
LAWS = {"noise": "normal", "ablate": "uniform"}
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
DOSES = {"noise": SHARES, "ablate": SHARES, "quantise": (256, 64, 32, 16, 8)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lives", type=int, default=3)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    context = multiprocessing.get_context("spawn")
    times: dict[tuple[str, str], list[float]] = {}
    best: dict[str, float] = {}
    for _ in range(chosen.lives):
        tasks = [("ours", name) for name in STEPS] + [("plain", name) for name in DAMAGE] + [("rates", "")]
        pools = {task: context.Pool(1, torch.set_num_threads, (chosen.threads,)) for task in tasks}
        count = pools["rates", ""].apply(weight_count)
        for repeat in range(chosen.repeats + 1):
            for (way, name), pool in pools.items():
                if way == "rates":
                    for what, rate in pool.apply(rates, (chosen.threads,)).items():
                        best[what] = max(rate, best.get(what, 0.0))
                    continue
                seconds = pool.apply(sweep if way == "ours" else sweep_plainly, (name, repeat))
                if repeat:
                    times.setdefault((way, name), []).append(seconds)
        for pool in pools.values():
            pool.terminate()

    print(f"{count / 1e6:.1f} M weights in 90 tensors, {chosen.threads} threads, torch {torch.__version__}")
    said = f"{best['normal'] / 1e6:.0f} M normals, {best['uniform'] / 1e6:.0f} M uniforms, {best['bytes'] / 1e9:.1f} GB"
    print(f"in a second at best: {said}")
    print(f"{'5 doses':22}{'ours s':>22}{'plain s':>22}{'ratio':>7}{'limit s':>9}{'of limit':>10}")
    for name in DAMAGE:
        step = name.partition(",")[0]
        ours, plain = times["ours", step], times["plain", name]
        drawn = count / best[LAWS[step]] if step in LAWS else 0.0
        limit = drawn + count * (8 + (4 if step in LAWS else 0) + 5 * 28) / best["bytes"]
        ratio, share = statistics.median(plain) / statistics.median(ours), limit / statistics.median(ours)
        print(f"{name:22}{spread(ours):>22}{spread(plain):>22}{ratio:6.1f}x{limit:9.3f}{share:9.0%}")


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.2f} … {max(seconds):.2f})"


@cache
def bench() -> tuple[Specimen, dict[str, torch.Tensor]]:
    """This process's model, and its mlp weights by name."""
    torch.set_grad_enabled(False)
    specimen = Scratch(architecture="llama", config=SHAPE).load()
    names = Noise(site="mlp", sigma=0.1).touches(specimen)
    return specimen, {name: specimen.model.get_parameter(name).data for name in names}


def weight_count() -> int:
    return sum(w.numel() for w in bench()[1].values())


def sweep(name: str, seed: int) -> float:
    """As the walk does it."""
    specimen, weights = bench()
    started, healthy = time.perf_counter(), None
    undo = Undo()
    for dose in DOSES[name]:
        undo.save(weights)
        STEPS[name](dose, seed).apply(specimen)
        digests(specimen.model, weights)
        found = undo.restore(weights)
        healthy = healthy or found
        assert found == healthy
    return time.perf_counter() - started


def sweep_plainly(name: str, seed: int) -> float:
    _, weights = bench()
    torch.manual_seed(seed)
    started = time.perf_counter()
    saved = {key: w.clone() for key, w in weights.items()}
    for dose in DOSES[name.partition(",")[0]]:
        for w in weights.values():
            DAMAGE[name](w, dose)
        for key, w in weights.items():
            w.copy_(saved[key])
    return time.perf_counter() - started


def look_up(w: torch.Tensor, levels: float) -> None:
    low, high = w.min(), w.max()
    table = torch.linspace(float(low), float(high), int(levels))
    index = ((w - low) / ((high - low) / (levels - 1))).round().clamp(0, levels - 1).long()
    w.copy_(table[index])


def search(w: torch.Tensor, levels: float) -> None:
    table = torch.linspace(float(w.min()), float(w.max()), int(levels))
    w.copy_(table[torch.bucketize(w, (table[1:] + table[:-1]) / 2)])


STEPS: dict[str, Callable[[float, int], Step]] = {
    "noise": lambda dose, seed: Noise(site="mlp", sigma=dose, seed=seed),
    "ablate": lambda dose, seed: Ablate(site="mlp", share=dose, seed=seed),
    "quantise": lambda dose, seed: Quantise(site="mlp", levels=int(dose)),
}
DAMAGE: dict[str, Callable[[torch.Tensor, float], object]] = {
    "noise": lambda w, dose: w.mul_(1 + dose * torch.randn_like(w)),
    "ablate": lambda w, dose: w.mul_(torch.rand_like(w) > dose),
    "quantise, by rounding": look_up,
    "quantise, bucketize": search,
}


def rates(threads: int) -> dict[str, float]:
    """Numbers drawn, and bytes read and written, in a second."""
    weights = list(bench()[1].values())
    saved = [w.clone() for w in weights]

    def copy() -> None:
        for w, was in zip(weights, saved, strict=True):
            w.copy_(was)

    moved = 2 * 4 * weight_count() / min(timed(copy) for _ in range(5))
    return {"normal": draw_rate("normal", threads), "uniform": draw_rate("uniform", threads), "bytes": moved}


def draw_rate(law: str, threads: int) -> float:
    """By the faster of torch's generator and ours, each on all threads, into memory in the cache."""
    rounds = 16

    def torch_draws(number: int) -> None:
        out, generator = torch.empty(BLOCK), torch.Generator().manual_seed(number)
        fill = out.normal_ if law == "normal" else out.uniform_
        for _ in range(rounds):
            fill(generator=generator)

    def our_draws(number: int) -> None:
        out = np.empty(BLOCK, np.float32)
        for i in range(rounds):
            (normals if law == "normal" else uniforms)(number, "benchmark", law, i * BLOCK, out)

    def together(work: Callable[[int], None]) -> None:
        crew = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for one in crew:
            one.start()
        for one in crew:
            one.join()

    best = min(timed(lambda work=work: together(work)) for work in (torch_draws, our_draws) for _ in range(3))
    return threads * rounds * BLOCK / best


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
