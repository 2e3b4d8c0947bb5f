"""Spectra of all layers of SmolLM2: ours, from moments in float64, against torch's decomposition of the same activations.

The activations behind every layer are read once, and lie there as [tokens, d] in float32. Each side then centres them and
makes their effective ranks anew, layer by layer and interleaved, so that what else runs on the machine hits all sides alike.
Prints the seconds for all layers, medians over repeats, and the largest relative disagreement with the float64 side.

    python benchmarks/spectrum.py [--documents 16] [--tokens 257] [--repeats 3] [--threads 2] [--device cpu] [--layers 0]

Bar: 3 times faster than the full decomposition (`svd`, with its vectors), and not further than 1e-4 from the float64 side.
`svdvals`, which makes no vectors, stands beside it; against that the gain is smaller, since our products are float64's.
"""

import argparse
import statistics
import sys
import time

import torch

from lesion.likelihood import Window, batches, padded
from lesion.measures.spectrum import listen
from lesion.spectra import Moments, effective_rank
from lesion.subjects import SmolLM2
from lesion.texts import corpus


def ours(x):
    """As the measure does: rows come in batches of a forward and are not kept."""
    moments = Moments(x.shape[1], x.device)
    for rows in x.split(1024):
        moments.add(rows)
    return effective_rank(moments.centred())


def float32(x):
    return effective_rank(torch.linalg.svdvals(x - x.mean(0)).double())


def full(x):
    return effective_rank(torch.linalg.svd(x - x.mean(0), full_matrices=False).S.double())


def float64(x):
    x = x.double()
    return effective_rank(torch.linalg.svdvals(x - x.mean(0)))


SIDES = {"ours": ours, "svd, float32": full, "svdvals, float32": float32, "svdvals, float64": float64}


def activations(specimen, documents, tokens):
    """[layers] of [n, d]: what comes out of each layer, without first positions."""
    texts = {
        d.id: specimen.tokenizer(d.text, verbose=False)["input_ids"][:tokens] for d in corpus("austen")[:documents]
    }
    found = {}

    def keep(i, out, lengths):
        found.setdefault(i, []).extend(x[1:n].float() for x, n in zip(out, lengths, strict=True))

    for batch in batches([Window(name, 0, 1, len(ids)) for name, ids in texts.items()]):
        some = [texts[window.item] for window in batch]
        listen(specimen.model, padded(some), list(map(len, some)), keep)
    return [torch.cat(each) for _, each in sorted(found.items())]


def timed(call, x):
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=0, help="first so many; 0: all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    every = activations(SmolLM2().load(args.device), args.documents, args.tokens)[: args.layers or None]
    took = {name: [] for name in SIDES}
    apart = dict.fromkeys(SIDES, 0.0)
    for call in SIDES.values():
        call(every[0])  # for warming up
    for _ in range(args.repeats):
        seconds = dict.fromkeys(SIDES, 0.0)
        for x in every:
            said = {}
            for name, call in SIDES.items():
                here, said[name] = timed(call, x)
                seconds[name] += here
            for name, rank in said.items():
                apart[name] = max(apart[name], abs(rank / said["svdvals, float64"] - 1))
        for name in SIDES:
            took[name].append(seconds[name])
        print("  ".join(f"{name} {seconds[name]:.2f} s" for name in SIDES), flush=True)
    middle = {name: statistics.median(seconds) for name, seconds in took.items()}
    n, d = every[0].shape
    print(f"{len(every)} layers of [{n}, {d}], {args.device}, {args.threads} threads, {args.repeats} repeats")
    for name in SIDES:
        print(f"{name:17} {middle[name]:7.2f} s   at most {apart[name]:.1e} from float64")
    for peer in list(SIDES)[1:]:
        print(f"ratio to {peer}: {middle[peer] / middle['ours']:.2f}" + "   (bar: 3)" * (peer == "svd, float32"))
    assert apart["ours"] < 1e-4, f"effective ranks are {apart['ours']:.1e} apart"


if __name__ == "__main__":
    sys.exit(main())
