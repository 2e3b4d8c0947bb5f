"""What the commands do. Each takes the parsed options and returns an exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lesion.cli import FAILED, OK, parse_study
from lesion.terminal import print_claims, print_frame, say

if TYPE_CHECKING:
    from lesion.store import Store
    from lesion.study import Answer

KEY = 12  # digits of a key that are shown
LISTED = 20  # states that `status` lists before it is asked for all
LOGS = 32  # so many logs of runs that are over become one


def run(options: argparse.Namespace, rest: list[str]) -> int:
    asked = parse_study(options, rest)  # which may only print its help: what is imported comes after it
    from lesion.lab import Lab
    from lesion.plan import check
    from lesion.progress import Progress
    from lesion.study import write_report
    from lesion.trackers import Tracker, both

    _threads(options)
    _check_device(options.device)
    lab = Lab(options.lab, device=options.device)
    tracker = Tracker(options.track, lab.path / "trackers") if options.track else None
    with Progress(options.verbosity) as progress:
        readings = asked.readings()  # which may fetch or train what is not there yet
        store = lab.open()
        asked.check(store)
        if missing := progress.start(store, readings, options.force):
            check(missing)
            with _run_log(store):
                logging.getLogger("lesion").debug("%s %s", options.command, json.dumps(asked.to_json()))
                lab.tell = both(progress.tell, tracker.tell) if tracker else progress.tell
                try:
                    lab.take(readings, options.force, store)
                finally:
                    if tracker is not None:
                        tracker.close()
    answer, page = write_report(store, asked)
    _print_answer(answer, page, options.verbosity)
    return FAILED if answer.missing or progress.failures else OK


def plan(options: argparse.Namespace, rest: list[str]) -> int:
    asked = parse_study(options, rest)
    from lesion.plan import plan as make
    from lesion.progress import Progress
    from lesion.store import Store

    _threads(options)
    _check_device(options.device)
    with Progress(options.verbosity, "planning"):
        store = Store(options.lab)
        asked.check(store)
        lines = make(asked.readings(), store, options.force)
    for name, value in lines.items():
        say(f"{name:<10} {value}")
    return OK


def report(options: argparse.Namespace, rest: list[str]) -> int:
    asked = parse_study(options, rest)
    from lesion.store import Store
    from lesion.study import write_report

    store = Store(options.lab)
    readings = asked.readings()
    there = sum(reading.key in store.index.seals for reading in readings)
    if not there:
        raise ValueError(
            f"none of the {len(readings)} readings of this study is in the lab {options.lab}; "
            f"`lesion run {asked.name}` with the same options takes them"
        )
    answer, page = write_report(store, asked)
    _print_answer(answer, page, options.verbosity)
    return FAILED if answer.missing else OK


def calibrate(options: argparse.Namespace, rest: list[str]) -> int:
    """Simulated studies in which nothing differs, or the truth is known: exit code 1 where a procedure fails."""
    from lesion.calibration import calibrate as simulate

    table = simulate(options.simulations, options.seed)
    print_frame(table, most=len(table), fold=False)
    failed = table.filter(~table["ok"])
    say(f"{len(table)} lines, {len(failed)} not as expected")
    return FAILED if len(failed) else OK


def status(options: argparse.Namespace, rest: list[str]) -> int:
    from lesion.jobcommands import asked_of_schedulers, status_of_jobs

    store = _existing(options)
    scheduled = asked_of_schedulers(store, options.verbosity)
    store.refresh()
    index = store.index
    rows = sum(seal.n for seal in index.seals.values())
    files = sum(len(names) for _, _, names in os.walk(options.lab))
    say(f"{options.lab}: {len(index.states)} states, {len(index.seals)} readings, {rows} rows, {files} files")
    by_measure: dict[str, list[float]] = {}
    for seal in index.seals.values():
        by_measure.setdefault(seal.measure["is"].removeprefix("measure/"), []).append(seal.duration)
    for name, durations in sorted(by_measure.items()):
        say(f"  {name}: {len(durations)} readings, {sum(durations):.1f} s of work")
    if options.verbosity != "quiet":
        taken = Counter(seal.state for seal in index.seals.values())
        most = len(index.states) if options.verbosity == "verbose" else LISTED
        for key, state in list(index.states.items())[:most]:
            say(f"  {key[:KEY]}  {taken[key]} taken of {_sentence(state['trial'])}")
        if len(index.states) > most:
            say(f"  … {len(index.states) - most} states more: --verbosity verbose lists them")
    for reading, takes in index.begun.items():
        there = max(len(items) for items in takes.values())
        say(f"  begun: reading {reading[:KEY]}, {there} rows; the command that began it finishes it")
    for of, failure in index.failures.items():
        failed = index.states.get(of)
        what = f" ({_sentence(failed['trial'])})" if failed else ""
        say(f"  failed: {of[:KEY]}{what}: {failure['error']}", style="red")
    status_of_jobs(store, scheduled, options.verbosity)
    return OK


def show(options: argparse.Namespace, rest: list[str]) -> int:
    store = _existing(options)
    index = store.index
    key = _match(options.key, {*index.states, *index.seals, *index.begun, *index.failures})
    if key in index.states:
        state = index.states[key]
        say(json.dumps({"state": key, "trial": state["trial"], "ledger": state["ledger"]}, indent=2))
        for seal in index.seals.values():
            if seal.state == key:
                say(f"reading {seal.reading[:KEY]}  {seal.measure['is']}: {json.dumps(seal.summary)}")
    if key in index.seals:
        seal = index.seals[key]
        told = {"reading": key, "state": seal.state, "measure": seal.measure, "summary": seal.summary}
        say(json.dumps(told, indent=2, ensure_ascii=False))
        print_frame(store.table([key]).drop("reading", "measure"), most=LISTED, fold=False)
    if key in index.begun and key not in index.seals:
        say(f"reading {key} is begun: {max(map(len, index.begun[key].values()))} rows, no seal yet")
    if key in index.failures:
        say(index.failures[key]["trace"])
    return OK


def export(options: argparse.Namespace, rest: list[str]) -> int:
    store, target = _existing(options), Path(options.to).expanduser()
    if options.what == "rows" and options.to == "-":
        sys.stdout.buffer.writelines(store.canonical())
        sys.stdout.buffer.flush()
        return OK
    if os.path.lexists(target):
        _refuse(target)
    if not target.parent.is_dir():
        raise ValueError(f"no folder {target.parent} to write {target.name!r} into")
    aside = target.with_name(f".{target.name}-{secrets.token_hex(3)}")
    try:
        if options.what == "rows":
            with aside.open("xb") as file:
                file.writelines(store.canonical())
        else:
            _save_state(store, options.what, aside)
        if os.path.lexists(target):  # somebody else was faster
            _refuse(target)
        aside.rename(target)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        aside.unlink(missing_ok=True)
    say(f"wrote {target}")
    return OK


def _save_state(store: Store, beginning: str, folder: Path) -> None:
    """Makes a state again, proves it by the digest in its ledger, and writes it as a transformers directory."""
    from lesion.adapters import adapted, fold
    from lesion.coded import code_of
    from lesion.constraints import materialise
    from lesion.trial import Trial
    from lesion.walk import Walk

    key = _match(beginning, store.index.states)
    state = store.index.states[key]
    specimen = Walk(store).materialise(Trial.from_json(state["trial"]))
    now, then = specimen.ledger[-1]["after"], state["ledger"][-1]["after"]
    if now != then:
        raise ValueError(
            f"state {key[:KEY]} comes out with digest {now} here, but {then} was read: another machine or version?"
        )
    if (kind := code_of(specimen.model)) is not None:
        raise ValueError(
            f"state {key[:KEY]} holds linear weights as {kind} codes, and a plain model holds floats: export the state before "
            "`precision`"
        )
    if any(adapted(specimen.model)):
        fold(specimen.model)
    materialise(specimen.model)  # others know no constraint and no adapter, only weights
    specimen.model.save_pretrained(folder)
    saved = specimen.processor or specimen.tokenizer
    if saved is not None:
        saved.save_pretrained(folder)
    (folder / "ledger.json").write_text(json.dumps(specimen.ledger, indent=1), encoding="utf-8")


# ---------------------------------------------------------------------- small things


def _refuse(path: Path) -> NoReturn:
    raise ValueError(f"{path} exists already; nothing was overwritten")


def _existing(options: argparse.Namespace) -> Store:
    from lesion.store import Store

    store = Store(options.lab)
    if not store.log.is_dir() and not (store.root / "jobs").is_dir():
        raise ValueError(f"no lab at {options.lab}: `lesion run` and `lesion submit` make one; name another with --lab")
    return store


def _sentence(trial: dict[str, Any]) -> str:
    """A trial's JSON as a sentence. It need not be a trial that this version can take, and nothing heavy is imported."""
    said = []
    for part in (trial["subject"], *trial["steps"]):
        fields = {k: v for k, v in part.items() if k not in ("is", "version") and v not in (None, {}, [])}
        said.append(f"{part['is'].split('/')[1]}({', '.join(f'{k}={v}' for k, v in fields.items())})")
    return re.sub(r"(sha256=\w{8})\w+", r"\1…", " >> ".join(said))


def _match(beginning: str, known: Iterable[str]) -> str:
    found = [key for key in known if key.startswith(beginning)]
    if len(found) != 1:
        known = found or list(known)
        some = ", ".join(key[:KEY] for key in known[:8])
        what = f"{len(found)} keys begin with {beginning!r}" if found else f"no key begins with {beginning!r}"
        raise ValueError(f"{what}; there are: {some or 'none at all'}{', …' if len(known) > 8 else ''}")
    return found[0]


def _threads(options: argparse.Namespace) -> None:
    import torch

    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    torch.set_num_threads(options.threads or len(allowed))


def _check_device(name: str) -> None:
    import torch

    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name not in there:
        raise ValueError(f"no device {name!r} on this machine; there are: {', '.join(there)}")


@contextmanager
def _run_log(store: Store) -> Iterator[None]:
    """A log file for this run, beside its segment. Those of runs that are over become one once they are many."""
    store.log.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(store.log / f"{store.writer}.log", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # the disk is full, and the run says so itself
    logger = logging.getLogger("lesion")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        _gather_logs(store.log, store.writer)


def _gather_logs(folder: Path, writer: str) -> None:
    """Appends the logs of runs that are over, and whose segments are compacted already, to runs.log."""
    over = [path for path in sorted(folder.glob("*-*-*-*.log")) if _is_over(path, writer)]
    if len(over) < LOGS:
        return
    with (folder / "runs.log").open("ab") as file:
        for path in over:
            aside = path.with_suffix(f".{secrets.token_hex(3)}")
            try:
                path.rename(aside)  # of two processes only one can
            except FileNotFoundError:
                continue
            file.write(f"== {path.stem}\n".encode() + aside.read_bytes())
            aside.unlink()


def _is_over(path: Path, writer: str) -> bool:
    import psutil

    if path.with_suffix(".jsonl").exists():
        return False
    _, host, process, _ = path.stem.split("-")
    if host == writer.split("-")[1]:
        return not psutil.pid_exists(int(process))
    return time.time() - path.stat().st_mtime > 24 * 3600


def _print_answer(answer: Answer, page: Path, verbosity: str) -> None:
    if verbosity != "quiet":
        say(f"\n{answer.question}", style="bold")
        for sentence in answer.sentences:
            say(f"  {sentence}")
    print_frame(answer.summary)
    if answer.claims is not None:
        print_claims(answer.claims)
    if verbosity != "quiet":
        for note in answer.notes:
            say(f"  · {note}")
    say(f"report: {page}")
