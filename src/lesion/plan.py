"""The plan: what a run would do and cost, without running any of it. The model is looked at without its weights."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import takewhile
from statistics import median
from typing import Any

from lesion.digest import named_tensors
from lesion.fit import Training
from lesion.loss import CHUNK_BYTES
from lesion.store import Store
from lesion.trial import Reading, Specimen, Step, Subject, Trial, state_key

ROW_BYTES = 700  # of a row in the log, from real labs
PROCESS_BYTES = 700 * 2**20  # Python, torch and transformers before any model
KEEPS = 26  # times its width that a layer keeps of a token for the backward pass, roughly
BFLOAT = 2.0  # times as fast as float32, roughly
FORWARD_TOKENS = 1024  # about as many as pass through the model at a time
PROBE_SIDE = 768


def plan(readings: Sequence[Reading], store: Store, force: bool = False) -> dict[str, str]:
    """Counts, time, memory and disk, as lines to print. Raises ValueError for an address that does not exist."""
    missing = [r for r in readings if store.next_take(r.key, force) is not None]
    asked: Counter[str] = Counter(r.measure.name for r in readings)
    lacking: Counter[str] = Counter(r.measure.name for r in missing)
    lines = {
        "states": f"{len({r.trial.key for r in readings})}, of which {len({r.trial.key for r in missing})} must be visited",
        "readings": ", ".join(f"{n} of {name} ({lacking[name]} to take)" for name, n in asked.items()),
    }
    if not missing:
        return {**lines, "time": "nothing to do"}
    sizes: dict[str, tuple[int, int] | None] = {}
    for reading in missing:
        if reading.measure.key not in sizes:
            sizes[reading.measure.key] = reading.measure.size()
    known = [size for r in missing if (size := sizes[r.measure.key])]
    rows = sum(size[0] for size in known)
    lines["items"] = f"{rows} rows, {sum(size[1] for size in known):,} tokens through the model, roughly"
    lines["time"] = _time(missing, sizes, store)
    lines["memory"] = _memory(missing)
    kept = _kept(missing, store)
    if runs := [made for made in kept.values() if isinstance(made[1], Training)]:
        lines["training"] = _training(runs)
    disk = sum(4 * _parameters(subject) for subject, _ in kept.values())
    states = f", {len(kept)} kept states of {_bytes(disk)} in all" if kept else ""
    lines["disk"] = f"{_bytes(rows * ROW_BYTES)} of readings{states}"
    return lines


def check(readings: Sequence[Reading]) -> None:
    """Reads every battery and corpus, and resolves every address on models without weights: what is wrong with them is
    said before any work. Raises ValueError."""
    for measure in {r.measure.key: r.measure for r in readings}.values():
        measure.size()
    for subject in _subjects(readings):
        _addresses(subject, readings)


def _kept(missing: Sequence[Reading], store: Store) -> dict[str, tuple[Subject, Step]]:
    """States that must be made and will be kept: key → what they are made of and by."""
    found: dict[str, tuple[Subject, Step]] = {}
    for trial in {r.trial.key: r.trial for r in missing}.values():
        key = Trial(subject=trial.subject).key
        for step in trial.steps:
            key = state_key(key, step)
            if step.keeps and store.state_folder(key) is None:
                found[key] = trial.subject, step
    return found


def _training(runs: Sequence[tuple[Subject, Any]]) -> str:
    """Time by 6 operations a parameter and token, and memory: weights, gradients and Adam's two states in float32, a chunk
    of logits, and what a layer keeps of a token."""
    tokens = sum(step.steps * step.batch * step.length for _, step in runs)
    seconds = sum(
        6.0 * _parameters(subject) * step.steps * step.batch * step.length / _rate()
        / (BFLOAT if step.precision == "bfloat16" else 1)
        for subject, step in runs
    )  # fmt: skip
    most = 0.0
    for subject, step in runs:
        config = subject.outline().config.get_text_config()
        width, layers = int(config.hidden_size), int(config.num_hidden_layers)
        row = step.batch // step.split * step.length * width * 4
        kept = layers + KEEPS if step.recompute else layers * KEEPS
        most = max(most, 16.0 * _parameters(subject) + 3 * CHUNK_BYTES + row * kept)
    named = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return (
        f"{named}, {tokens:,} tokens, about {_span(seconds)} (guessed from a short matrix product on this "
        f"machine), at the peak about {_bytes(most)}"
    )


def _time(missing: Sequence[Reading], sizes: dict[str, tuple[int, int] | None], store: Store) -> str:
    """From the readings this lab has taken of the same measure and subject; else from a short matrix product."""
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
            return "unknown"
        taken = rates.get((reading.measure.kind(), str(reading.trial.subject.to_json())))
        if taken:
            seconds += asked[key] * size[0] * median(taken)
        else:
            guessed = True
            seconds += asked[key] * 2.0 * _parameters(reading.trial.subject) * size[1] / _rate() * 1.5
    source = "guessed from a short matrix product on this machine" if guessed else "from readings taken in this lab"
    return f"about {_span(seconds)} ({source})"


_cache: dict[str, float] = {}


def _rate() -> float:
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


def _parameters(subject: Subject) -> int:
    if subject.key not in _cache:
        _cache[subject.key] = sum(p.numel() for p in subject.outline().parameters())
    return int(_cache[subject.key])


def _memory(missing: Sequence[Reading]) -> str:
    """Weights, a packed copy for a processor, the undo copies along the deepest sentence, and what a forward works in
    (its logits, and about as much again in caches); of the subject that needs most."""
    found = []
    for subject in _subjects(missing):
        outline = subject.outline()
        weights = sum(p.numel() * p.element_size() for p in outline.parameters())
        addresses = _addresses(subject, missing)
        undo = max(
            sum(addresses.get(_sign(step), 0) for step in r.trial.steps)
            for r in missing
            if r.trial.subject.key == subject.key
        )
        work = 2 * FORWARD_TOKENS * int(outline.config.get_text_config().vocab_size) * 4
        here = [r for r in missing if r.trial.subject.key == subject.key]
        second = any(isinstance(quote, Trial) for r in here for quote in r.measure.quotes())
        beside = weights + 2 * work if second else 0  # the healthy model, and what is remembered of its outputs
        found.append((PROCESS_BYTES + 2 * weights + undo + work + beside, weights, undo, work, beside))
    total, weights, undo, work, beside = max(found)
    return (
        f"about {_bytes(total)}: weights {_bytes(weights)}, packed again {_bytes(weights)}, undo {_bytes(undo)}, "
        f"at work {_bytes(work)}" + (f", a healthy model to compare with {_bytes(beside)}" if beside else "")
    )


def _subjects(readings: Sequence[Reading]) -> list[Subject]:
    return list({r.trial.subject.key: r.trial.subject for r in readings}.values())


def _sign(step: Step) -> tuple[str, str]:
    """Steps of one sign touch the same tensors."""
    return step.kind(), str(getattr(step, "site", ""))


def _addresses(subject: Subject, readings: Sequence[Reading]) -> dict[tuple[str, str], int]:
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


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _bytes(n: float) -> str:
    if n < 2**20:
        return f"{n / 2**10:.0f} KiB"
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
