"""Tasks on SmolLM2: ranking against lm-eval's HF path, writing against `generate`, a LoRA step against peft on a plain loop.

All on the same weights, tokens and questions, interleaved in one run; peers with several batch sizes, of which the fastest
counts. Checks that log-likelihoods, texts and losses are the same, and prints the median of each and their ratio.

    python benchmarks/tasks.py [--what rank write lora] [--sample 48] [--shots 4] [--repeats 3] [--threads 2] [--dtype float32]
"""

import argparse
import copy
import statistics
import time

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lesion import asking, continuations
from lesion.fit import Training, _step
from lesion.loss import IGNORE, Objective
from lesion.measures import Task
from lesion.optimizers import groups, optimizer
from lesion.products import fast_products
from lesion.ranks import enter
from lesion.responses import pack_pairs
from lesion.steps import Lora
from lesion.subjects import SmolLM2
from lesion.task import before
from lesion.tasks import Gsm8k, Sst2


def timed(call, *given):
    started = time.perf_counter()
    found = call(*given)
    return time.perf_counter() - started, found


def compare(name, ours, peers, repeats, same):
    """Medians of interleaved runs; `same` checks what came out."""
    times, found = {"ours": [], **{p: [] for p in peers}}, {}
    for _ in range(repeats):
        for label, call in {"ours": ours, **peers}.items():
            spent, found[label] = timed(call)
            times[label].append(spent)
    medians = {label: statistics.median(spent) for label, spent in times.items()}
    for peer in peers:
        same(found["ours"], found[peer])
    best = min(peers, key=medians.__getitem__)
    told = ", ".join(f"{label} {spent:.2f} s" for label, spent in medians.items())
    print(f"{name}: {told}; {medians[best] / medians['ours']:.2f} × the fastest peer ({best})", flush=True)


def rank(specimen, options):
    """SST-2 with examples: the log-likelihood of both labels."""
    task = Sst2()
    measure = Task(task=task, sample=options.sample, shots=options.shots)
    text, asked = before(task, options.shots, 0), measure.questions().values()
    questions = [(text + task.prompt(e), f" {c}") for e in asked for c in e.choices]

    def ours():
        prompts = {e.id: asking.prompt(specimen, task, e, "plain", text) for e in asked}
        replies = {c: asking.reply(specimen, task, c, "plain") for c in ("negative", "positive")}
        pairs = [(prompts[e.id], replies[c]) for e in asked for c in e.choices]
        return [logprob for logprob, _ in continuations.score(specimen.model, pairs)]

    def theirs(batch):
        model = HFLM(pretrained=specimen.model, tokenizer=specimen.tokenizer, batch_size=batch)
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in questions]
        return [logprob for logprob, _ in model.loglikelihood(requests, disable_tqdm=True)]

    def same(a, b):
        limit = 2e-3 if options.dtype == "float32" else 0.5
        assert all(abs(x - y) < limit for x, y in zip(a, b, strict=True)), max(
            abs(x - y) for x, y in zip(a, b, strict=True)
        )

    peers = {f"lm-eval, batch {n}": lambda n=n: theirs(n) for n in (1, 8, 16)}
    compare(f"ranking {len(questions)} replies, {options.shots} shots", ours, peers, options.repeats, same)


def write(specimen, options):
    """GSM8K with examples: greedy solutions of one line."""
    task = Gsm8k()
    measure = Task(task=task, sample=options.sample, shots=options.shots, new_tokens=64, batch=32)
    items = list(measure.questions())
    line = asking.one_line(specimen.tokenizer)
    text, ends = before(task, options.shots, 0), asking.end_tokens(specimen) | line.breaks  # no reply here begins blank
    tokens = [asking.prompt(specimen, task, e, "plain", text) for e in measure.questions().values()]

    def ours():
        prompts = {item: t for item, t in zip(items, tokens, strict=True)}
        rows = measure._written(specimen, measure.questions(), prompts)
        return [rows[item]["text"] for item in items]

    def theirs(batch):
        found = []
        for start in range(0, len(tokens), batch):
            some = tokens[start : start + batch]
            width = max(map(len, some))
            ids = torch.tensor([[0] * (width - len(t)) + t for t in some])
            mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in some])
            with torch.inference_mode():
                made = specimen.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=64,
                    do_sample=False,
                    eos_token_id=sorted(ends),
                    pad_token_id=0,
                )
            for row in made[:, width:].tolist():
                cut = next((i for i, t in enumerate(row) if t in ends), len(row))
                found.append(specimen.tokenizer.decode(row[:cut], skip_special_tokens=True).strip())
        return found

    def same(a, b):
        equal = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
        assert equal >= (0.9 if options.dtype == "float32" else 0.3), f"only {equal:.0%} of the texts are the same"

    peers = {f"generate, batch {n}": lambda n=n: theirs(n) for n in (1, 8, 16)}
    compare(f"writing {len(items)} solutions, {options.shots} shots", ours, peers, options.repeats, same)


def lora(specimen, options):
    """Optimizer steps on GSM8K's solutions with rank 16 beside every matrix."""
    import peft

    how = Training(steps=10**6, batch=4, length=256, lr=2e-4, warmup=0, precision=options.precision, weight_decay=0.0)
    pairs = asking.pairs(specimen, Gsm8k(), Gsm8k().examples("train")[:200], "plain")
    data = pack_pairs([(p, r) for p, r in pairs if len(p) + len(r) <= 256], 256, 0)
    plain = copy.deepcopy(specimen.model)
    Lora(rank=16, alpha=32.0).apply(specimen)
    team = enter(specimen.model, Objective())
    made = optimizer("adamw", groups(team.model, 0.0), how.lr)
    team.model.train()
    named = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=named))
    theirs.train()
    adam = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=how.lr, weight_decay=0.0)

    def ours():
        with fast_products(team.model):
            return [_step(team, made, data, how, i, None)["loss"] for i in range(options.steps)]

    def peer():
        found = []
        for i in range(options.steps):
            ids, targets, mask, at = data.batch(i * 4, 4)
            with torch.autocast("cpu", torch.bfloat16, enabled=how.precision == "bfloat16"):
                logits = theirs(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            found.append(float(loss.detach()))
        return found

    def same(a, b):
        assert abs(a[0] - b[0]) < 0.2, (a[0], b[0])

    compare(f"{options.steps} LoRA steps of 4 × 256, {how.precision}", ours, {"peft": peer}, options.repeats, same)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=("rank", "write", "lora"), default=["rank", "write", "lora"])
    parser.add_argument("--sample", type=int, default=48)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for what in options.what:
        specimen = SmolLM2(dtype=options.dtype if what != "lora" else "float32").load()
        {"rank": rank, "write": write, "lora": lora}[what](specimen, options)


if __name__ == "__main__":
    main()
