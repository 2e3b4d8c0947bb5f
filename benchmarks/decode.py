"""Sampling 38 prompts × 60 tokens: ours against transformers' `generate`, interleaved in one run.

Same weights, dtype, prompts and sampling settings; both are kept from stopping early, so that both make the same number
of tokens. Prints the median of each, their ratio, where our time goes, and a check that both sample from the same model.

    python benchmarks/decode.py [--repeats 5] [--threads 2] [--subject smollm2 | 6m | 30m | 125m]

With a size the model is our own decoder, and `generate` runs on a Llama of transformers that has its weights.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lesion import decode, inference
from lesion.batteries import battery
from lesion.decoder import SIZES, DecoderConfig, DecoderForCausalLM
from lesion.measures import Generation
from lesion.sampling import Sampling
from lesion.subjects import SmolLM2
from lesion.trial import Specimen

PROMPTS, NEW = 38, 60
HOW = Sampling(temperature=1.0, top_k=64, top_p=0.95)


def own(size, dtype):
    """Our decoder of this size with random weights, and transformers' Llama with the same."""
    shape = {**SIZES[size], "vocab_size": 16384, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mine = DecoderForCausalLM(DecoderConfig(**shape)).to(getattr(torch, dtype)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=mine.config.rms_norm_eps)).to(mine.dtype).eval()
    assert not llama.load_state_dict(mine.state_dict()).missing_keys
    return SimpleNamespace(model=mine, theirs=llama)


def asked(specimen):
    if not isinstance(specimen, Specimen):
        lengths = [len(prompt.text) // 4 + 24 for prompt in battery("small")[:PROMPTS]]
        draw = torch.Generator().manual_seed(0)
        return [
            decode.Prompt(str(i), tuple(torch.randint(1, 16384, (n,), generator=draw).tolist()))
            for i, n in enumerate(lengths)
        ]
    measure = Generation(new_tokens=NEW)
    return [decode.Prompt(p.id, measure.tokenise(specimen, p.text)) for p in battery("small")[:PROMPTS]]


def ours(specimen, prompts):
    return decode.continue_texts(specimen.model, prompts, HOW, new_tokens=NEW, ends=frozenset(), seed=0, batch=PROMPTS)


def theirs(specimen, prompts):
    width = max(len(p.tokens) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p.tokens)) + list(p.tokens) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in prompts])
    return getattr(specimen, "theirs", specimen.model).generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=HOW.temperature,
        top_k=HOW.top_k,
        top_p=HOW.top_p,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        pad_token_id=0,
    )


def timed(call, *args):
    started = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - started, result


class Stopwatch:
    """Adds up the time inside some of our functions, for one run."""

    PARTS = (
        ("packing the matrices", inference, "_arrange"),
        ("prompts: shared prefix", decode.Slots, "__init__"),
        ("prompts: the rest", decode.Slots, "start"),
        ("forward of new tokens", decode.Slots, "step"),
        ("sampling", decode, "choose"),
    )

    def __enter__(self):
        self.spent = {name: 0.0 for name, _, _ in self.PARTS}
        self.originals = [getattr(home, function) for _, home, function in self.PARTS]
        for (name, home, function), original in zip(self.PARTS, self.originals, strict=True):
            setattr(home, function, self._wrapped(name, original))
        return self

    def _wrapped(self, name, original):
        def call(*args, **kwargs):
            seconds, result = timed(lambda: original(*args, **kwargs))
            self.spent[name] += seconds
            return result

        return call

    def __exit__(self, *_):
        for (_, home, function), original in zip(self.PARTS, self.originals, strict=True):
            setattr(home, function, original)


def agreement(specimen, prompts, found):
    """Largest difference between our log-probabilities and those of transformers' plain forward on the same texts."""
    worst = 0.0
    with torch.inference_mode():
        for prompt, c in list(zip(prompts, found, strict=True))[::5]:
            ids = torch.tensor([[*prompt.tokens, *c.tokens]])
            plain = specimen.model(input_ids=ids).logits[0].float().log_softmax(-1)
            at = torch.arange(len(prompt.tokens) - 1, ids.shape[1] - 1)
            drawn = plain[at, torch.tensor(c.tokens)].double()
            worst = max(worst, (drawn - torch.tensor(c.logprobs, dtype=torch.double)).abs().max().item())
    return worst


def operations(specimen, prompts, most=8):
    """Share of each operator in one run of ours."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours(specimen, prompts)
    table = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in table)
    return [(e.key, e.self_cpu_time_total / total) for e in table[:most]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--subject", default="smollm2", choices=["smollm2", *SIZES])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in options.dtype:
        specimen = SmolLM2(dtype=dtype).load() if options.subject == "smollm2" else own(options.subject, dtype)
        prompts = asked(specimen)
        ours(specimen, prompts), theirs(specimen, prompts)  # warm
        times = {"ours": [], "transformers": []}
        for _ in range(options.repeats):
            times["transformers"].append(timed(theirs, specimen, prompts)[0])
            seconds, found = timed(ours, specimen, prompts)
            times["ours"].append(seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(
            f"\n{options.subject} {dtype}, {PROMPTS} prompts × {NEW} tokens, {options.threads} threads, {options.repeats} repeats"
        )
        for name, seconds in medians.items():
            spread = f"{min(times[name]):.2f} to {max(times[name]):.2f}"
            print(f"  {name:<13}{seconds:7.2f} s ({spread})  {PROMPTS * NEW / seconds:7.0f} tokens/s")
        print(f"  ratio        {medians['transformers'] / medians['ours']:7.2f} ×   (bar: 4)")
        print(
            f"  log-probabilities differ from a plain forward by at most {agreement(specimen, prompts, found):.1e} nats"
        )
        with Stopwatch() as watch:
            whole, _ = timed(ours, specimen, prompts)
        print("  where our time goes:")
        for name, seconds in {**watch.spent, "the rest": whole - sum(watch.spent.values())}.items():
            print(f"    {name:<24}{seconds:6.2f} s  {seconds / whole:5.0%}")
        print("  by operator: " + ", ".join(f"{name} {share:.0%}" for name, share in operations(specimen, prompts)))


if __name__ == "__main__":
    main()
