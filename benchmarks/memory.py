"""Peak memory of a training step at 2048 tokens and a vocabulary of 50,000: our loss against transformers' own.

    python benchmarks/memory.py [--rows 2] [--threads 2]

Each way runs in a process of its own, three steps with AdamW, so that one's peak is not the other's. What is printed is the
largest resident size of the process less that before the first step: gradients, optimizer state and all that a step works in.
"""

import argparse
import resource
import subprocess
import sys

LENGTH, VOCABULARY = 2048, 50_000
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": LENGTH,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=("ours", "recompute", "transformers"))
    options = parser.parse_args()
    if options.way:
        print(measured(options.way, options.rows, options.threads))
        return
    whole = options.rows * LENGTH * VOCABULARY * 4 / 2**20
    print(f"{options.rows} × {LENGTH} tokens, vocabulary {VOCABULARY}: all logits in float32 would be {whole:.0f} MiB")
    for way in ("ours", "recompute", "transformers"):
        command = [
            sys.executable,
            __file__,
            "--way",
            way,
            "--rows",
            str(options.rows),
            "--threads",
            str(options.threads),
        ]
        peak, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"  {way:14}{float(peak):8.0f} MiB at the peak, {float(seconds):6.2f} s a step")


def measured(way, rows, threads):
    """MiB of the peak above the beginning, and seconds of the last step."""
    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lesion.decoder import DecoderConfig, DecoderForCausalLM
    from lesion.loss import sum_of_losses
    from lesion.products import fast_products

    torch.set_num_threads(threads)
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    theirs = way == "transformers"
    model = (LlamaForCausalLM(LlamaConfig(**SHAPE)) if theirs else DecoderForCausalLM(DecoderConfig(**SHAPE))).train()
    made, at = torch.optim.AdamW(model.parameters(), fused=True), torch.arange(LENGTH).expand(rows, -1)
    if way == "recompute":
        model.activation_checkpointing_enable({"use_reentrant": False})
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for _ in range(3):
        started = time.perf_counter()
        if theirs:
            model(ids, labels=ids, use_cache=False).loss.backward()
        else:
            with fast_products(model):
                (sum_of_losses(model, ids, ids.roll(-1, 1), None, at) / ids.numel()).backward()
        made.step()
        made.zero_grad()
        seconds = time.perf_counter() - started
    return f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10} {seconds}"


if __name__ == "__main__":
    main()
