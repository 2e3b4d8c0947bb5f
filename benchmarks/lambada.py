"""LAMBADA on SmolLM2: our `benchmark` against lm-eval's own path, on the same documents, interleaved in one run.

lm-eval is given the same model in memory, its `evaluate` with its `HFLM`, and several batch sizes; the fastest of
them counts. Both sides make their requests, tokens, likelihoods and scores anew each time (documents are read before). Checks
that every log-likelihood and every score is the same, and prints the median of each, and their ratio.

    python benchmarks/lambada.py [--task lambada_openai] [--sample 24] [--repeats 3] [--batches 1 4 8] [--threads 2]
                                 [--dtype float32]
"""

import argparse
import contextlib
import io
import logging
import statistics
import sys
import time

import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM

from lesion import harness
from lesion.measures import Benchmark
from lesion.subjects import SmolLM2

TOLERANCE = {
    "float32": 2e-3,
    "bfloat16": 1.0,
}  # nats a document; in bfloat16 lm-eval rounds its log-softmax to bfloat16


def ours(specimen, measure):
    harness.exam.cache_clear()  # requests are made anew, as on the other side
    rows = [row for chunk in measure.chunks(measure.items(specimen)) for row in measure.read(specimen, chunk)]
    return rows, measure.summarise(rows)


def theirs(specimen, task, documents, batch):
    model = HFLM(pretrained=specimen.model, tokenizer=specimen.tokenizer, batch_size=batch)
    name = task.config.task
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        found = evaluate(model, {name: task}, samples={name: documents}, bootstrap_iters=0, log_samples=True)
    return found["samples"][name], found["results"][name]


def timed(call, *args):
    started = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - started, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="lambada_openai")
    parser.add_argument("--sample", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    specimen = SmolLM2(dtype=args.dtype).load()
    measure = Benchmark(task=args.task, sample=args.sample).pin()
    documents = [question.number for question in measure._exam().questions.values()]
    task = harness.build(args.task, "packaged", None)
    took = {name: [] for name in ("ours", *args.batches)}
    apart = 0.0
    with harness.quietly():
        logging.disable(logging.WARNING)
        for repeat in range(args.repeats + 1):  # the first is for warming up
            seconds, (rows, mine) = timed(ours, specimen, measure)
            took["ours"] += [seconds] * (repeat > 0)
            for batch in args.batches:
                seconds, (samples, said) = timed(theirs, specimen, task, documents, batch)
                took[batch] += [seconds] * (repeat > 0)
                for row, sample in zip(rows, samples, strict=True):
                    for logprob, (answer,) in zip(row["loglikelihoods"], sample["resps"], strict=True):
                        apart = max(apart, abs(logprob - float(answer[0])))
                    same = [str(answer[1]) == "True" for (answer,) in sample["resps"]] == row["greedy"]
                    assert args.dtype != "float32" or same, (row, sample["resps"])
            if repeat:
                print("  ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in took.items()), flush=True)
    assert apart < TOLERANCE[args.dtype], f"log-likelihoods are {apart} nats apart"
    middle = {name: statistics.median(seconds) for name, seconds in took.items()}
    best = min(args.batches, key=middle.__getitem__)
    print(f"{args.task}, {len(rows)} documents, {args.dtype}, {args.threads} threads, {args.repeats} repeats")
    for metric in (name for name in task.aggregation()):
        low, high = mine[f"{metric}_low"], mine[f"{metric}_high"]
        print(f"{metric:12} ours {mine[metric]:.4f} [{low:.4f}, {high:.4f}]   lm-eval {said[f'{metric},none']:.4f}")
    print(f"largest difference of a log-likelihood: {apart:.1e} nats")
    print(f"ours                {middle['ours']:8.2f} s   {len(rows) / middle['ours']:6.2f} documents/s")
    for batch in args.batches:
        print(f"lm-eval, batch {batch:4} {middle[batch]:8.2f} s   {len(rows) / middle[batch]:6.2f} documents/s")
    print(f"ratio to lm-eval's best (batch {best}): {middle[best] / middle['ours']:.2f}")


if __name__ == "__main__":
    sys.exit(main())
