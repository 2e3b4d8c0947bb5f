"""A sweep of five doses over the mlp weights of a model the size of SmolLM2-135M: damage, undo, damage, undo, …

    python benchmarks/sweep.py [--repeats 7] [--threads 2]

Ours is what the walk does: the weights are copied once; then, for each dose, the step is applied, the changed tensors are
digested, the copy is written back, and the digests are taken again. The plain way is what one writes by hand: for each
dose and parameter new noise of the parameter's shape (`randn_like`, `rand_like`) or a table of levels looked up by an
int64 index, and `copy_` from a clone to restore; it proves nothing. Both run in turn in the same process, with a
new seed in every repeat, and their medians are compared.

The limit is what the machine allows for our work: every number drawn once, at the best rate of any generator measured in
this run, and every byte that must move (28 a weight and dose: 12 to damage, 8 to undo, 4 for each digest) at the measured
bandwidth of `copy_`. One warm-up round is left out, in which memory is committed.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

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
SIGMAS = SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
LEVELS = (256, 64, 32, 16, 8)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.set_grad_enabled(False)

    specimen = Scratch(architecture="llama", config=SHAPE).load()
    touched = set(Noise(site="mlp", sigma=0.1).touches(specimen))
    weights = {n: p.data for n, p in specimen.model.named_parameters() if n in touched}
    count = sum(w.numel() for w in weights.values())
    print(f"{len(weights)} tensors, {count / 1e6:.1f} M weights, {chosen.threads} threads, torch {torch.__version__}")

    def steps(name: str, seed: int) -> list[Step]:
        if name == "noise":
            return [Noise(site="mlp", sigma=sigma, seed=seed) for sigma in SIGMAS]
        if name == "ablate":
            return [Ablate(site="mlp", share=share, seed=seed) for share in SHARES]
        return [Quantise(site="mlp", levels=levels) for levels in LEVELS]

    plain = {
        "noise": lambda: sweep_plainly(weights, SIGMAS, lambda w, dose: w.mul_(1 + dose * torch.randn_like(w))),
        "ablate": lambda: sweep_plainly(weights, SHARES, lambda w, dose: w.mul_(torch.rand_like(w) > dose)),
        "quantise": lambda: sweep_plainly(weights, LEVELS, look_up),
    }
    law = {"noise": "normal", "ablate": "uniform"}
    times: dict[str, list[float]] = {}
    limits: dict[str, list[float]] = {}
    for repeat in range(chosen.repeats + 1):
        bandwidth = copy_bandwidth()
        for name, by_hand in plain.items():
            row = {
                "ours": timed(lambda name=name, seed=repeat: sweep(specimen, steps(name, seed))),
                "plain": timed(by_hand),
            }
            drawn = count / draw_rate(law[name], chosen.threads) if name in law else 0.0
            moved = count * (8 + (4 if name in law else 0) + 5 * 28) / bandwidth
            if repeat:
                limits.setdefault(name, []).append(drawn + moved)
                for way, seconds in row.items():
                    times.setdefault(f"{name} {way}", []).append(seconds)

    print(f"{'5 doses':10}{'ours s':>9}{'plain s':>9}{'ratio':>7}{'limit s':>9}{'of limit':>10}{'spread of ours':>18}")
    for name in plain:
        ours, other = (statistics.median(times[f"{name} {way}"]) for way in ("ours", "plain"))
        limit, all_ours = statistics.median(limits[name]), times[f"{name} ours"]
        spread = f"{min(all_ours):.3f} … {max(all_ours):.3f}"
        print(f"{name:10}{ours:9.3f}{other:9.3f}{other / ours:6.1f}x{limit:9.3f}{limit / ours:9.0%}{spread:>18}")


def sweep(specimen: Specimen, doses: list[Step]) -> None:
    """As the walk does it."""
    touched = doses[0].touches(specimen)
    parameters = {name: specimen.model.get_parameter(name).data for name in touched}
    saved = {name: tensor.clone() for name, tensor in parameters.items()}
    healthy = None
    for step in doses:
        step.apply(specimen)
        digests(specimen.model, touched)
        for name, tensor in parameters.items():
            tensor.copy_(saved[name])
        found = digests(specimen.model, touched)
        healthy = healthy or found
        assert found == healthy


def sweep_plainly(
    weights: dict[str, torch.Tensor], doses: tuple[float, ...], damage: Callable[[torch.Tensor, float], object]
) -> None:
    saved = {name: w.clone() for name, w in weights.items()}
    for dose in doses:
        for w in weights.values():
            damage(w, dose)
        for name, w in weights.items():
            w.copy_(saved[name])


def look_up(w: torch.Tensor, levels: float) -> None:
    low, high = w.min(), w.max()
    table = torch.linspace(float(low), float(high), int(levels))
    index = ((w - low) / ((high - low) / (levels - 1))).round().clamp(0, levels - 1).long()
    w.copy_(table[index])


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def copy_bandwidth() -> float:
    """Bytes read and written in a second by `copy_` of 320 MB, the best of five."""
    source = torch.ones(80_000_000)
    target = source.clone()
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(5))


def draw_rate(law: str, threads: int) -> float:
    """Numbers in a second, by the faster of torch's generator and ours, each on all threads into memory in the cache."""
    rounds = 64

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


if __name__ == "__main__":
    main()
