"""Estimates: time, memory and disk of readings and trainings, from what this lab has seen or from arithmetic. The model is
looked at without its weights."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any

from lesion.digest import named_tensors
from lesion.loss import CHUNK_BYTES
from lesion.steepness import OfCurvature
from lesion.store import Store
from lesion.trial import Reading, Specimen, Step, Subject, Trial

PROCESS_BYTES = 700 * 2**20  # Python, torch and transformers before any model
KEEPS = 26  # times its width that a layer keeps of a token for the backward pass, roughly
STATES = {
    "adamw": 8.0,
    "adam": 8.0,
    "sgd-momentum": 4.0,
    "adafactor": 0.0,
    "sgd": 0.0,
    "signsgd": 0.0,
}  # bytes a parameter
BFLOAT = 2.0  # times as fast as float32, roughly
FORWARD_TOKENS = 1024  # about as many as pass through the model at a time
PROBE_SIDE = 768

Sizes = dict[str, tuple[int, int] | None]  # items and tokens, by measure


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of reading one subject."""

    weights: int
    packed: int  # again, as a processor multiplies them
    undo: int
    work: int
    beside: int  # a second model, to compare with
    curved: int = 0  # basis vectors and graphs of second derivatives

    @property
    def total(self) -> int:
        return PROCESS_BYTES + self.weights + self.packed + self.undo + self.work + self.beside + self.curved


def sizes_of(readings: Sequence[Reading]) -> Sizes:
    measures = {r.measure.key: r.measure for r in readings}
    return {key: measure.size() for key, measure in measures.items()}


def training(subject: Subject, step: Any, processes: int = 1, sharded: bool = False) -> tuple[int, float, float]:
    """Tokens, seconds on a processor of this machine by 6 operations a parameter and token, and bytes at the peak of one
    process: a chunk of logits, what a layer keeps of a token, and in float32 weights, gradients, the optimizer's states and
    the first weights (which tell how many have moved). Copies (DDP) hold the gradients twice; shares (FSDP2) hold a part of all
    but the first weights and the model they came from."""
    tokens = step.steps * step.batch * step.length
    seconds = 6.0 * parameters(subject) * tokens / rate() / (BFLOAT if step.precision == "bfloat16" else 1)
    config = subject.outline().config.get_text_config()
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    row = step.batch / processes / step.split * step.length * width * 4
    kept = layers + KEEPS if step.recompute else layers * KEEPS
    states = STATES[step.optimizer]
    each = (8.0 + states) / processes + 8 if sharded else 16.0 + states if processes > 1 else 12.0 + states
    held = each * parameters(subject)
    return tokens, seconds, PROCESS_BYTES + held + 3 * CHUNK_BYTES + row * kept


def duration(missing: Sequence[Reading], sizes: Sizes, store: Store) -> tuple[float | None, bool]:
    """Seconds, and whether they are guessed from a short matrix product: where this lab has no readings of the same measure and
    subject. None: not known."""
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)  # seconds an item
    subjects: dict[str, str] = {}  # of each state, as text
    for seal in store.index.seals.values():
        if seal.n and (seal.state in subjects or seal.state in store.index.states):
            if seal.state not in subjects:
                subjects[seal.state] = str(store.index.states[seal.state]["trial"]["subject"])
            rates[seal.measure["is"], subjects[seal.state]].append(seal.duration / seal.n)
    asked = Counter((r.measure.key, r.trial.subject.key) for r in missing)
    each = {(r.measure.key, r.trial.subject.key): r for r in missing}
    seconds, guessed = 0.0, False
    for key, reading in each.items():
        if (size := sizes[reading.measure.key]) is None:
            return None, False
        taken = rates.get((reading.measure.kind(), str(reading.trial.subject.to_json())))
        if taken:
            seconds += asked[key] * size[0] * median(taken)
        else:
            guessed = True
            seconds += asked[key] * 2.0 * parameters(reading.trial.subject) * size[1] / rate() * 1.5
    return seconds, guessed


_cache: dict[str, float] = {}


def rate() -> float:
    """Floating-point operations a second of a small float32 product: the best of ten, since others may be at work."""
    if "rate" not in _cache:
        import torch

        from lesion.products import times_transposed

        a, b = torch.ones(512, PROBE_SIDE), torch.ones(PROBE_SIDE, PROBE_SIDE)

        def timed() -> float:
            started = time.perf_counter()
            for _ in range(5):
                times_transposed(a, b)
            return time.perf_counter() - started

        _cache["rate"] = 5 * 2 * a.numel() * PROBE_SIDE / min(timed() for _ in range(10))
    return _cache["rate"]


def parameters(subject: Subject) -> int:
    if subject.key not in _cache:
        _cache[subject.key] = sum(p.numel() for p in subject.outline().parameters())
    return int(_cache[subject.key])


def weight_bytes(subject: Subject) -> int:
    """In the type in which they are held."""
    return sum(p.numel() * p.element_size() for p in subject.outline().parameters())


def memory(readings: Sequence[Reading], device: str = "cpu") -> Memory:
    """Weights, a packed copy where a processor computes, the undo copies along the deepest sentence, and what a forward works
    in (its logits, and about as much again in caches); of the subject that needs most."""
    found = []
    for subject in subjects_of(readings):
        outline = subject.outline()
        weights = weight_bytes(subject)
        touched = addresses(subject, readings)
        here = [r for r in readings if r.trial.subject.key == subject.key]
        undo = max(sum(touched.get(_sign(step), 0) for step in r.trial.steps) for r in here)
        work = 2 * FORWARD_TOKENS * int(outline.config.get_text_config().vocab_size) * 4
        second = any(isinstance(quote, Trial) for r in here for quote in r.measure.quotes())
        curved = max((curvature(outline, r.measure) for r in here if isinstance(r.measure, OfCurvature)), default=0)
        found.append(
            Memory(weights, weights if device == "cpu" else 0, undo, work, weights + 2 * work if second else 0, curved)
        )
    return max(found, key=lambda memory: memory.total)


def curvature(outline: Any, measure: OfCurvature) -> int:
    """Bytes of finding steep directions: the basis of Lanczos and the vectors that stay, and where graphs are kept, those of
    the gradient: about three times what a forward keeps, and the logits four times."""
    from lesion.curvature import chosen
    from lesion.lanczos import width_of

    size = sum(p.numel() for p in chosen(outline, measure.site).values())
    vectors = width_of(measure.directions, size) + 1 + measure.directions
    config, rows = outline.config.get_text_config(), measure.rows or measure.documents
    tokens = (measure.documents if measure.keep else rows) * measure.tokens
    layer = int(config.num_hidden_layers) * KEEPS * int(config.hidden_size)
    return 4 * (vectors * size + tokens * (3 * layer + 4 * int(config.vocab_size)))


def subjects_of(readings: Sequence[Reading]) -> list[Subject]:
    return list({r.trial.subject.key: r.trial.subject for r in readings}.values())


def _sign(step: Step) -> tuple[str, str]:
    """Steps of one sign touch the same tensors."""
    return step.kind(), str(getattr(step, "site", ""))


def addresses(subject: Subject, readings: Sequence[Reading]) -> dict[tuple[str, str], int]:
    """Bytes that the in-place steps of a subject touch. What stands after a kept step is left to the walk: such a step may
    have built a structure that the bare model lacks."""
    outline = subject.outline()
    specimen = Specimen(model=outline, tokenizer=None, trial=Trial(subject=subject))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in named_tensors(outline)}
    found: dict[tuple[str, str], int] = {}
    for reading in readings:
        if reading.trial.subject.key != subject.key:
            continue
        for step in takewhile(lambda step: not step.keeps, reading.trial.steps):
            if _sign(step) not in found:
                found[_sign(step)] = sum(sizes[name] for name in step.touches(specimen))
    return found
