"""Training tokens a second: our loop and decoder against others' models in a plain loop, interleaved in one run.

    python benchmarks/train.py [--repeats 5] [--threads 2] [--peers transformers litgpt …]

The same network for all: 6 layers, d 256, 8 full heads, SwiGLU 704, RMSNorm, rotary positions, a tied head of 4096 words;
the number of parameters must agree. All read the same 16 random rows of 256 tokens again and again, begin with weights of
one distribution and use one AdamW (fused) without clipping, so that their losses fall alike. The others run as they come
and compiled (with their loss, by `torch.compile`, which needs a C++ compiler), with torch's fused attention and, where they
have it, with attention by its formula ("eager"), in float32 and under autocast to bfloat16. litgpt and x-transformers are
optional; what is not installed is named.

Prints for each way its median and range, its share of the matrix rate that is measured in the same run (6 operations a
parameter and token; attention's scores are not counted), how long its first step took (which compiles, and is not
counted), its first and last loss, and for each precision the ratio of ours to the best of the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch import nn

from lesion import fit as loop
from lesion.compiling import compiled
from lesion.decoder import DecoderConfig, DecoderForCausalLM
from lesion.fit import Training
from lesion.optimizers import groups, optimizer
from lesion.packing import Packed, pack
from lesion.products import fast_products
from lesion.ranks import Alone

BATCH, LENGTH, VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 16, 256, 4096, 256, 704, 6, 8
LR, DECAY, EPS = 1e-3, 0.1, 1e-5
PRECISIONS = ("float32", "bfloat16")
WARM = 2  # steps before the first that counts: compiling, then the optimizer's state
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": EPS,
    "tie_word_embeddings": True,
}
Logits = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--peers", nargs="*", choices=[*PEERS], default=[*PEERS])
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, BATCH * LENGTH).tolist()  # one batch, learned by heart
    data = pack([tokens], 0, LENGTH, 0, "joined")
    packages = dict.fromkeys(PEERS[name][0] for name in chosen.peers)
    missing = [package for package in packages if not importlib.util.find_spec(package.replace("-", "_"))]
    there = [name for name in chosen.peers if PEERS[name][0] not in missing]
    found = [
        f"{package} {importlib.metadata.version(package)}" for package in ("torch", *packages) if package not in missing
    ]
    found += [f"{package}: not installed" for package in missing]
    # to dynamo all compiled losses are one function, of which it would run the ninth as it comes
    torch._dynamo.config.recompile_limit = 100
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.force_disable_caches = True  # so that a first step tells what compiling costs

    made: dict[tuple[str, str], Ours | Peer] = {}
    for precision in PRECISIONS:
        made[precision, "ours"] = Ours(data, precision, False)
        made[precision, "ours compiled"] = Ours(data, precision, True)
        for name in there:
            made[precision, name] = Peer(name, data, precision, compiled=False)
            made[precision, f"{name} compiled"] = Peer(name, data, precision, compiled=True)
    sizes = {way[1]: sum(p.numel() for p in one.model.parameters()) for way, one in made.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected as many parameters in each; there are {sizes}")
    size = sizes["ours"]
    print(f"{size:,} parameters, {BATCH} × {LENGTH} tokens, {chosen.threads} threads; {', '.join(found)}", flush=True)

    times: dict[tuple[str, str], list[float]] = {way: [] for way in made}
    losses: dict[tuple[str, str], list[float]] = {way: [] for way in made}
    rates: dict[tuple[str, str], float] = {}
    for repeat in range(WARM + chosen.repeats):
        for precision in PRECISIONS:
            for path, rate in gemm_rates(precision).items():
                rates[precision, path] = max(rate, rates.get((precision, path), 0.0))
        for way, one in made.items():
            started = time.perf_counter()
            losses[way].append(one.step(repeat))
            times[way].append(time.perf_counter() - started)
    for precision in PRECISIONS:
        report(
            precision,
            {way: times[precision, way] for where, way in made if where == precision},
            {way: losses[precision, way] for where, way in made if where == precision},
            {path: rate for (where, path), rate in rates.items() if where == precision},
            size,
        )


def report(
    precision: str, times: dict[str, list[float]], losses: dict[str, list[float]], rates: dict[str, float], size: int
) -> None:
    best_rate = max(rates.values())
    paths = ", ".join(f"{path} {rate / 1e9:.0f}" for path, rate in rates.items())
    print(f"\n{precision}: matrices at {best_rate / 1e9:.0f} GFLOP/s ({paths})")
    print(f"  {'':30}{'tokens/s':>9}  {'range':>13}{'share':>7}{'first step':>12}  loss")
    speeds = {}
    for way, found in times.items():
        each = [BATCH * LENGTH / seconds for seconds in found[WARM:]]
        speeds[way] = statistics.median(each)
        share = 6 * size * speeds[way] / best_rate
        print(
            f"  {way:30}{speeds[way]:9.0f}  {min(each):6.0f}–{max(each):6.0f}{share:7.0%}{found[0]:10.1f} s"
            f"  {losses[way][0]:.3f} → {losses[way][-1]:.3f}"
        )
    others = {way: speed for way, speed in speeds.items() if not way.startswith("ours")}
    if others:
        best = max(others, key=lambda way: others[way])
        for way in ("ours", "ours compiled"):
            print(f"  {way}: {speeds[way] / others[best]:.2f} × the best of the others, {best} (bar: 1.25)")


class Ours:
    def __init__(self, data: Packed, precision: Any, compile: bool):
        self.model = DecoderForCausalLM(DecoderConfig(**SHAPE)).train()
        begin(self.model)
        self.how = Training(
            batch=BATCH,
            length=LENGTH,
            documents="joined",
            lr=LR,
            schedule="constant",
            warmup=0,
            clip=0,
            precision=precision,
        )
        self.optimizer, self.data = optimizer("adamw", groups(self.model, DECAY), LR), data
        self.compiled = compile

    def step(self, number: int) -> float:
        with fast_products(self.model), compiled(self.model) if self.compiled else nullcontext():
            return loop._step(Alone(self.model), self.optimizer, self.data, self.how, number)["loss"]


class Peer:
    """The plain loop: all logits, one cross-entropy, backward, step."""

    def __init__(self, name: str, data: Packed, precision: str, *, compiled: bool):
        self.model, logits = PEERS[name][1]()
        begin(self.model.train())

        def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits(ids).float().flatten(0, 1), targets.flatten())

        self.loss = torch.compile(loss, dynamic=False, fullgraph=True) if compiled else loss
        self.optimizer, self.data, self.precision = optimizer("adamw", groups(self.model, DECAY), LR), data, precision

    def step(self, number: int) -> float:
        ids, targets = self.data.batch(number * BATCH, BATCH)[:2]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.loss(ids, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def llama(attention: str) -> tuple[nn.Module, Logits]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.set_attn_implementation(attention)
    return model, lambda ids: model(ids, use_cache=False).logits


def litgpt() -> tuple[nn.Module, Logits]:
    from litgpt import GPT, Config

    shape = Config(
        block_size=LENGTH,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        n_query_groups=HEADS,
        intermediate_size=INNER,
        mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm",
        norm_eps=EPS,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    model = GPT(shape)
    model.lm_head.weight = model.transformer.wte.weight
    return model, model


def x_transformers(fused: bool) -> tuple[nn.Module, Logits]:
    from x_transformers import Decoder, TransformerWrapper
    from x_transformers.x_transformers import GLU

    stack = Decoder(
        dim=WIDTH,
        depth=LAYERS,
        heads=HEADS,
        attn_dim_head=WIDTH // HEADS,
        attn_flash=fused,
        use_rmsnorm=True,
        rotary_pos_emb=True,
        rotary_emb_dim=WIDTH // HEADS,
        ff_glu=True,
        ff_swish=True,
        ff_mult=INNER / WIDTH,
        ff_no_bias=True,
    )
    for module in stack.modules():
        if isinstance(module, GLU):
            module.proj.bias = None  # `ff_no_bias` leaves it there
    model = TransformerWrapper(
        num_tokens=VOCABULARY,
        max_seq_len=LENGTH,
        use_abs_pos_emb=False,
        tie_embedding=True,
        tie_embedding_scale=1.0,
        attn_layers=stack,
    )
    return model, model


PEERS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Logits]]]] = {
    "transformers": ("transformers", partial(llama, "sdpa")),
    "transformers-eager": ("transformers", partial(llama, "eager")),
    "litgpt": ("litgpt", litgpt),
    "x-transformers": ("x-transformers", partial(x_transformers, True)),
    "x-transformers-eager": ("x-transformers", partial(x_transformers, False)),
}


@torch.no_grad()
def begin(model: nn.Module) -> None:
    """One first distribution for all."""
    chance = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0, 0.02, generator=chance)


def gemm_rates(precision: str) -> dict[str, float]:
    """Floating-point operations a second of a large product: as torch's own path makes it, and as oneDNN does."""
    a, b = (torch.randn(2048, 2048).to(getattr(torch, precision)) for _ in range(2))
    paths: dict[str, Callable[[], torch.Tensor]] = {
        "torch": lambda: a @ b,
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
    }
    rates = {}
    for name, product in paths.items():
        started = time.perf_counter()
        for _ in range(3):
            product()
        rates[name] = 3 * 2 * 2048**3 / (time.perf_counter() - started)
    return rates


if __name__ == "__main__":
    main()
