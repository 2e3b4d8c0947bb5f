"""The plan: what a run would do and cost, without running any of it. The model is looked at without its weights."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence

from lesion.store import Store
from lesion.trial import Reading, Specimen, Step, Subject, Trial

ROW_BYTES = 700  # of a row in the log, from real labs
PROCESS_BYTES = 700 * 2**20  # Python, torch and transformers before any model
PROBE_SIDE = 768


def plan(readings: Sequence[Reading], store: Store, device: str = "cpu") -> dict[str, str]:
    """Counts, time, memory and disk, as lines to print. Raises ValueError for an address that does not exist."""
    missing = [r for r in readings if store.next_take(r.key) is not None]
    asked: Counter[str] = Counter(r.measure.name for r in readings)
    lacking: Counter[str] = Counter(r.measure.name for r in missing)
    lines = {
        "states": f"{len({r.trial.key for r in readings})}, of which {len({r.trial.key for r in missing})} must be visited",
        "readings": ", ".join(f"{n} {name} ({lacking[name]} missing)" for name, n in asked.items()),
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
    lines |= _memory(missing)
    kept = len({step.key for r in missing for step in r.trial.steps if step.keeps})
    lines["disk"] = f"{_bytes(rows * ROW_BYTES)} of readings" + (f", {kept} kept states" if kept else "")
    return lines


def _time(missing: Sequence[Reading], sizes: dict[str, tuple[int, int] | None], store: Store) -> str:
    """From the readings this lab has taken of the same measure and subject; else from a short matrix product."""
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)  # seconds an item
    for seal in store.index.seals.values():
        if (state := store.index.states.get(seal.state)) and seal.n:
            rates[seal.measure["is"], str(state["trial"]["subject"])].append(seal.duration / seal.n)
    seconds, guessed = 0.0, False
    for reading in missing:
        if (size := sizes[reading.measure.key]) is None:
            return "unknown"
        taken = rates.get((reading.measure.kind(), str(reading.trial.subject.to_json())))
        if taken:
            seconds += size[0] * sorted(taken)[len(taken) // 2]
        else:
            guessed = True
            seconds += 2.0 * _parameters(reading.trial.subject) * size[1] / _rate() * 1.5
    source = "guessed from a short matrix product on this machine" if guessed else "from readings taken in this lab"
    return f"about {seconds / 60:.0f} min ({source})" if seconds >= 90 else f"about {seconds:.0f} s ({source})"


_cache: dict[str, float] = {}


def _rate() -> float:
    """Floating-point operations a second of a small float32 product, taken in 50 ms."""
    if "rate" not in _cache:
        import torch

        a = torch.ones(64, PROBE_SIDE)
        b = torch.ones(PROBE_SIDE, PROBE_SIDE)
        started, n = time.perf_counter(), 0
        while (spent := time.perf_counter() - started) < 0.05:
            a @ b
            n += 1
        _cache["rate"] = 2 * a.numel() * PROBE_SIDE * n / spent
    return _cache["rate"]


def _parameters(subject: Subject) -> int:
    if subject.key not in _cache:
        _cache[subject.key] = sum(p.numel() for p in subject.outline().parameters())
    return int(_cache[subject.key])


def _memory(missing: Sequence[Reading]) -> dict[str, str]:
    """Weights, a packed copy for a processor, and the undo copies along the deepest sentence."""
    lines: dict[str, str] = {}
    for subject in {r.trial.subject.key: r.trial.subject for r in missing}.values():
        outline = subject.outline()
        weights = sum(p.numel() * p.element_size() for p in outline.parameters())
        specimen = Specimen(model=outline, tokenizer=None, trial=Trial(subject=subject))
        sizes = {name: p.numel() * p.element_size() for name, p in outline.named_parameters()}
        touched: dict[tuple[type[Step], str], int] = {}
        deepest = 0
        for reading in missing:
            undo = 0
            for step in reading.trial.steps:
                sign = type(step), str(getattr(step, "site", ""))
                if not step.keeps and sign not in touched:
                    touched[sign] = sum(sizes[name] for name in step.touches(specimen))
                undo += touched.get(sign, 0)
            deepest = max(deepest, undo)
        total = PROCESS_BYTES + 2 * weights + deepest
        lines["memory"] = (
            f"about {_bytes(total)}: weights {_bytes(weights)}, packed again {_bytes(weights)}, undo {_bytes(deepest)}"
        )
    return lines


def _bytes(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
