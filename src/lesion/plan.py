"""The plan: what a run would do and cost, in words, without running any of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lesion.estimates import addresses, duration, memory, sizes_of, subjects_of, training, weight_bytes
from lesion.fit import Training
from lesion.jobs import arrays, kept_states, tasks, trials_of
from lesion.store import Store
from lesion.trial import Reading, Step, Subject

ROW_BYTES = 700  # of a row in the log, from real labs


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
    sizes = sizes_of(missing)
    known = [size for r in missing if (size := sizes[r.measure.key])]
    rows = sum(size[0] for size in known)
    lines["items"] = f"{rows} rows, {sum(size[1] for size in known):,} tokens through the model, roughly"
    seconds, guessed = duration(missing, sizes, store)
    source = "guessed from a short matrix product on this machine" if guessed else "from readings taken in this lab"
    lines["time"] = "unknown" if seconds is None else f"about {span(seconds)} ({source})"
    needed = memory(missing)
    lines["memory"] = (
        f"about {size_of(needed.total)}: weights {size_of(needed.weights)}, packed again {size_of(needed.packed)}, "
        f"undo {size_of(needed.undo)}, at work {size_of(needed.work)}"
        + (f", a healthy model to compare with {size_of(needed.beside)}" if needed.beside else "")
        + (f", steep directions {size_of(needed.curved)}" if needed.curved else "")
    )
    kept = kept_of(missing, store)
    if runs := [made for made in kept.values() if isinstance(made[1], Training)]:
        lines["training"] = _training(runs)
    states = f", {len(kept)} kept states of {size_of(state_bytes(kept))} in all" if kept else ""
    lines["disk"] = f"{size_of(rows * ROW_BYTES)} of readings{states}"
    made = tasks(missing, store, 16)
    lines["jobs"] = (
        f"{len(made)} in {len(arrays(made))} arrays, where a profile cuts the readings of a model into 16 (`array`)"
    )
    return lines


def check(readings: Sequence[Reading]) -> None:
    """Reads every battery and corpus, and resolves every address on models without weights: what is wrong with them is
    said before any work. Raises ValueError."""
    for measure in {r.measure.key: r.measure for r in readings}.values():
        measure.size()
    for subject in subjects_of(readings):
        addresses(subject, readings)


def kept_of(missing: Sequence[Reading], store: Store) -> dict[str, tuple[Subject, Step]]:
    """States that must be made and will be kept: key → what they are made of and by."""
    found: dict[str, tuple[Subject, Step]] = {}
    for trial in {t.key: t for r in missing for t in trials_of(r)}.values():
        for kept in kept_states(trial):
            if store.state_folder(kept.key) is None:
                found[kept.key] = kept.subject, kept.steps[-1]
    return found


def state_bytes(kept: dict[str, tuple[Subject, Step]]) -> int:
    """What these states take on disk."""
    return sum(weight_bytes(subject) for subject, _ in kept.values())


def _training(runs: Sequence[tuple[Subject, Any]]) -> str:
    costs = [training(subject, step) for subject, step in runs]
    named = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return (
        f"{named}, {sum(tokens for tokens, _, _ in costs):,} tokens, about {span(sum(s for _, s, _ in costs))} (guessed from a "
        f"short matrix product on this machine), at the peak about {size_of(max(most for _, _, most in costs))}"
    )


def span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def size_of(n: float) -> str:
    if n < 2**20:
        return f"{n / 2**10:.0f} KiB"
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
