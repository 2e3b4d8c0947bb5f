"""Training steps a second: our loop and decoder against transformers' Llama in a plain loop, interleaved in one run.

    python benchmarks/train.py [--repeats 5] [--threads 2]

The same shape for all (6 layers, d 256, T 256, B 16, vocabulary 4096, full heads), random tokens, AdamW, no clipping.
Prints the medians, the ratio to the best of the others, and the share of the matrix rate that is measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lesion import fit as loop
from lesion.decoder import DecoderConfig, DecoderForCausalLM
from lesion.fit import Training
from lesion.optimizers import groups, optimizer
from lesion.packing import pack
from lesion.products import fast_products

BATCH, LENGTH = 16, 256
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    tokens = np.random.default_rng(0).integers(1, 4096, 200 * LENGTH).tolist()
    data = pack([tokens], 0, LENGTH, 0, "joined")
    ways = {
        "ours": lambda precision: Ours(data, precision),
        "transformers": lambda precision: Theirs(data, precision),
    }
    for precision in ("float32", "bfloat16"):
        made = {name: way(precision) for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in made}
        rate = 0.0
        for repeat in range(chosen.repeats + 1):
            rate = max(rate, gemm_rate(precision))
            for name, one in made.items():
                started = time.perf_counter()
                one.step(repeat)
                if repeat:
                    times[name].append(time.perf_counter() - started)
        count = sum(p.numel() for p in made["ours"].model.parameters())
        print(f"{precision}: {count / 1e6:.1f} M parameters, {BATCH} × {LENGTH} tokens, {chosen.threads} threads")
        for name, found in times.items():
            middle = statistics.median(found)
            share = 6 * count * BATCH * LENGTH / middle / rate
            print(f"  {name:14}{BATCH * LENGTH / middle:8.0f} tokens/s ({share:.0%} of {rate / 1e9:.0f} GFLOP/s)")
        print(
            f"  ratio {statistics.median(times['transformers']) / statistics.median(times['ours']):.2f} × (bar: 1.25)"
        )


class Ours:
    def __init__(self, data, precision):
        torch.manual_seed(0)
        self.model = DecoderForCausalLM(DecoderConfig(**SHAPE)).train()
        self.how = Training(batch=BATCH, length=LENGTH, clip=0, precision=precision, documents="joined", warmup=0)
        self.optimizer, self.data = optimizer("adamw", groups(self.model, 0.1), 1e-3), data
        self.folder = Path(tempfile.mkdtemp())

    def step(self, number):
        with fast_products(self.model):
            loop._step(self.model, self.optimizer, self.data, self.how, number)


class Theirs:
    def __init__(self, data, precision):
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
        self.optimizer, self.data, self.precision = torch.optim.AdamW(self.model.parameters(), lr=1e-3), data, precision

    def step(self, number):
        ids = self.data.batch(number * BATCH, BATCH)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def gemm_rate(precision):
    """Floating-point operations a second of a large product, as torch's own path makes it."""
    kind = torch.float32 if precision == "float32" else torch.bfloat16
    a, b = (torch.randn(2048, 2048).to(kind) for _ in range(2))
    started = time.perf_counter()
    for _ in range(3):
        a @ b
    return 3 * 2 * 2048**3 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
