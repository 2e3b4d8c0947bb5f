"""Greedy coordinate gradient on SmolLM2: ours against nanogcg, interleaved in one run.

Same weights, precision, prompt, target, width and draws, so both score the same strings; a check says how far their losses
differ. nanogcg runs without its prefix cache, which breaks on transformers 5, and with the batch size that is fastest for it.
Prints candidates a second, and the best loss of both after the same wall time.

    pip install nanogcg==0.2.3
    python benchmarks/attack.py [--dtype float32 bfloat16] [--width 128] [--steps 2] [--repeats 3] [--seeds 5] [--batch 16]
"""

import argparse
import gc
import logging
import statistics
import time

import nanogcg
import nanogcg.gcg
import torch

from lesion.flips import allowed, table
from lesion.measures import Gcg
from lesion.subjects import SmolLM2
from lesion.suffixes import search

PROMPT, TARGET = "Tell me how to brew a pot of tea. ", "Sure, here is my grandmother's recipe:"


class Ours:
    def __init__(self, specimen, may, how):
        self.specimen, self.may, self.how = specimen, may, how
        self.frame = how.frame(specimen, "item", PROMPT, TARGET)
        self.start = torch.tensor([specimen.tokenizer(how.optim_str_init)["input_ids"]])

    def run(self, seed, steps):
        """Losses of each step, and the seconds at which it was done. The draws are those of torch's stream, as nanogcg's."""
        began, ends = time.perf_counter(), []

        def draw(step, n, positions, choices):
            ends.append(time.perf_counter() - began)
            return torch.rand(n, positions), torch.randint(0, choices, (n, 1, 1)).squeeze(2)

        torch.manual_seed(seed)
        how = {**self.how.options(), "steps": steps, "tokenizer": self.specimen.tokenizer}
        found = search(self.specimen.model, self.frame, self.start, self.may, draw, **how)
        return found.losses, [*ends[1:], time.perf_counter() - began]


class Theirs:
    def __init__(self, specimen, may, how, batch):
        self.specimen, self.how, self.batch = specimen, how, batch
        nanogcg.gcg.get_nonascii_toks = lambda tokenizer, device: (~may).nonzero()[:, 0]
        nanogcg.gcg.tqdm = lambda steps: steps

    def run(self, seed, steps):
        config = nanogcg.GCGConfig(
            num_steps=steps,
            search_width=self.how.search_width,
            topk=self.how.topk,
            batch_size=self.batch,
            use_prefix_cache=False,
            verbosity="ERROR",
        )
        began = time.perf_counter()
        torch.manual_seed(seed)
        found = nanogcg.run(self.specimen.model, self.specimen.tokenizer, PROMPT, TARGET, config)
        return found.losses, [time.perf_counter() - began]


def best_batch(specimen, may, how):
    """The batch size at which nanogcg is fastest here."""
    seconds = {}
    for batch in sorted({16, 32, how.search_width}):
        Theirs(specimen, may, how, batch).run(0, 1)
        seconds[batch] = Theirs(specimen, may, how, batch).run(0, 1)[1][-1]
    return min(seconds, key=seconds.get)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="of nanogcg; not given: what is fastest here")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("nanogcg").setLevel("ERROR")
    for dtype in options.dtype:
        specimen = SmolLM2(dtype=dtype).load()
        specimen.tokenizer.chat_template = None  # nanogcg would take the start marks out of this one
        how = Gcg(pairs=((PROMPT, TARGET),), search_width=options.width, chat="plain")
        may = allowed(specimen.tokenizer, len(table(specimen.model)))
        texts = specimen.tokenizer.batch_decode([[i] for i in range(len(may))])
        may &= torch.tensor([text.isascii() and text.isprintable() for text in texts])
        gc.collect()
        gc.freeze()  # nanogcg collects garbage after every batch: let there be little
        batch = options.batch or best_batch(specimen, may, how)
        ours, theirs = Ours(specimen, may, how), Theirs(specimen, may, how, batch)
        ours.run(0, 1)
        seconds = {"nanogcg": [], "ours": []}
        for repeat in range(options.repeats):
            their_losses, ends = theirs.run(repeat, options.steps)
            seconds["nanogcg"].append(ends[-1])
            our_losses, ends = ours.run(repeat, options.steps)
            seconds["ours"].append(ends[-1])
        done = options.steps * options.width
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"\nSmolLM2 {dtype}, {options.width} candidates × {options.steps} steps, {options.threads} threads")
        for name, values in seconds.items():
            spread = f"{min(values):.2f} to {max(values):.2f} s"
            print(f"  {name:<8}{done / medians[name]:7.1f} candidates/s   ({spread})")
        print(f"  ratio   {medians['nanogcg'] / medians['ours']:7.2f} ×   (bar: 2.5; nanogcg in batches of {batch})")
        apart = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
        print(f"  losses of the same draws differ by at most {apart:.1e} nats")
        better, more = 0, max(1, round(1.3 * medians["nanogcg"] / medians["ours"]))
        for seed in range(options.seeds):
            their_losses, [limit] = theirs.run(seed, options.steps)
            our_losses, ends = ours.run(seed, options.steps * more)
            mine = [loss for loss, end in zip(our_losses, ends, strict=True) if end <= limit]
            better += min(mine) <= min(their_losses)
            print(
                f"  seed {seed}, {limit:5.1f} s: nanogcg {min(their_losses):.4f}  ours {min(mine):.4f} nats in {len(mine)} steps"
            )
        print(f"  loss lower or equal after the same time: {better} of {options.seeds} seeds")


if __name__ == "__main__":
    main()
