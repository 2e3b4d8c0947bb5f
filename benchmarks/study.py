"""The small tier of the iq study on SmolLM2 against a plain script of the kind it replaces.

    python benchmarks/study.py [--prompts 0] [--repeats 2] [--tokens 60] [--threads 2]

The plain script does what is described of such pipelines: for every component, dose and repeat the damaged tensors are
restored from clones, noise is drawn tensor by tensor, the battery goes through `generate` in batches of at most 40 with left
padding, and after every 20 records the whole JSON file is written again. It measures nothing else. Ours takes the same
generations (each with its damage proved and undone); then, on a clock of its own, the rest of the study: perplexity,
displacement, surprisal, prose, statistics and the report. The two take turns, component by component, in one process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lesion import Lab
from lesion.asking import end_tokens
from lesion.batteries import battery
from lesion.packaged import SMOLLM2, folder
from lesion.sites import resolve
from lesion.studies import Degrade
from lesion.study import write_report

BATCH, REWRITE = 40, 20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--prompts", type=int, default=0)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--tokens", type=int, default=60)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    sizes: dict[str, Any] = {"prompts": chosen.prompts, "repeats": chosen.repeats, "new_tokens": chosen.tokens}
    study = Degrade(preset="iq", tier="small", **sizes)
    where = Path(tempfile.mkdtemp(prefix="lesion-benchmark-"))
    lab, script = Lab(where / "lab"), Plain(where / "outputs.json", study)
    print(
        f"SmolLM2 float32, {len(script.prompts)} prompts × {study.new_tokens} tokens, {len(study.site)} components × ",
        end="",
    )
    print(f"{len(study.doses)} doses × {study.repeats} repeats, {chosen.threads} threads, torch {torch.__version__}")

    ours = plain = 0.0
    for site in study.site:
        part = study.model_copy(update={"site": (site,), "measures": ("generation",)})
        started = time.perf_counter()
        store = lab.take(part.readings())
        assert not store.index.failures, store.index.failures
        ours += (here := time.perf_counter() - started)
        started = time.perf_counter()
        script.run(site)
        plain += (there := time.perf_counter() - started)
        print(f"  {site:18} ours {here:7.1f} s   plain {there:7.1f} s   ratio {there / here:4.2f} ×", flush=True)

    cells = study.model_copy(update={"measures": ("generation",)})._cells.values()
    tokens = sum(store.index.seals[cell["generation"].key].summary["tokens"] for cell in cells)
    theirs = sum(record["tokens"] for record in script.records)
    print(f"generations: ours {ours:.1f} s for {tokens} tokens, plain {plain:.1f} s for {theirs} tokens")
    print(f"ratio {plain / ours:.2f} × (bar: 4)")
    started = time.perf_counter()
    store = lab.take(study.readings())
    took = time.perf_counter() - started
    started = time.perf_counter()
    write_report(store, study)
    report = time.perf_counter() - started
    whole = ours + took + report
    print(f"the rest of the study: {took:.1f} s of other measures, {report:.1f} s of statistics and report;")
    print(f"the whole study: {whole:.1f} s, which is {plain / whole:.2f} × faster than the plain generations alone")


class Plain:
    """The script."""

    def __init__(self, path: Path, study: Degrade):
        self.path, self.study = path, study
        self.prompts = battery(study.battery)[: study.prompts or None]
        self.tokenizer = AutoTokenizer.from_pretrained(folder(SMOLLM2), padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder(SMOLLM2), dtype=torch.float32).eval()
        self.records: list[dict[str, Any]] = []

    @torch.no_grad()
    def run(self, site: str) -> None:
        views = resolve(self.model, site)
        weights = [self.model.get_parameter(name) for name in dict.fromkeys(view.name for view in views)]
        clones = [weight.clone() for weight in weights]
        for dose in self.study.doses:
            for repeat in range(self.study.repeats):
                for weight, clone in zip(weights, clones, strict=True):
                    weight.copy_(clone)
                torch.manual_seed(self.study.seed + repeat)
                if dose:
                    for weight in weights:
                        weight.mul_(1 + dose * torch.randn_like(weight))
                for start in range(0, len(self.prompts), BATCH):
                    self.generate(site, dose, repeat, self.prompts[start : start + BATCH])
        for weight, clone in zip(weights, clones, strict=True):
            weight.copy_(clone)

    def generate(self, site: str, dose: float, repeat: int, prompts: list[Any]) -> None:
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": p.text}], tokenize=False, add_generation_prompt=True
            )
            for p in prompts
        ]
        given = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        study = self.study
        out = self.model.generate(
            **given,
            max_new_tokens=study.new_tokens,
            do_sample=True,
            temperature=study.temperature,
            top_k=study.top_k,
            top_p=study.top_p,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        ends = end_tokens(self)  # type: ignore[arg-type]
        for prompt, row in zip(prompts, out[:, given["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            said = {"prompt_text": prompt.text, "output": text, "tokens": end}
            self.records.append({**said, "param_group_name": site, "level_value": dose, "repeat_index": repeat})
            if len(self.records) % REWRITE == 0:
                self.path.write_text(json.dumps(self.records, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
