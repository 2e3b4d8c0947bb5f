"""What the commands do. Each takes the parsed options and returns an exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from lesion.cli import FAILED, OK, parse_study

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console

    from lesion.store import Store
    from lesion.study import Answer


def run(options: argparse.Namespace, rest: list[str]) -> int:
    from lesion.lab import Lab
    from lesion.progress import Progress
    from lesion.study import write_report

    asked = parse_study(options, rest)
    _threads(options)
    readings = asked.readings()
    lab = Lab(options.lab, device=options.device)
    with Progress(options.verbosity) as progress:
        store = lab.open()
        progress.start(store, readings, options.force)
        with _run_log(store):
            logging.getLogger("lesion").debug("lesion %s", json.dumps(asked.to_json(), ensure_ascii=False))
            lab.tell = progress.tell
            lab.take(readings, options.force, store)
    answer, page = write_report(store, asked)
    _print_answer(answer, page, options.verbosity)
    return FAILED if answer.missing else OK


def report(options: argparse.Namespace, rest: list[str]) -> int:
    from lesion.store import Store
    from lesion.study import write_report

    asked = parse_study(options, rest)
    store = Store(options.lab)
    if not store.index.seals:
        raise ValueError(f"no readings in the lab {options.lab}; `lesion run {options.study}` takes them")
    answer, page = write_report(store, asked)
    _print_answer(answer, page, options.verbosity)
    return FAILED if answer.missing else OK


def plan(options: argparse.Namespace, rest: list[str]) -> int:
    from lesion.plan import plan as make
    from lesion.store import Store

    asked = parse_study(options, rest)
    _threads(options)
    console = _console()
    for name, value in make(asked.readings(), Store(options.lab), options.device).items():
        console.print(f"[bold]{name:<22}[/] {value}", highlight=False)
    return OK


def status(options: argparse.Namespace, rest: list[str]) -> int:
    from lesion.trial import Trial

    store, console = _existing(options), _console()
    index = store.index
    rows = sum(seal.n for seal in index.seals.values())
    files = sum(len(names) for _, _, names in os.walk(options.lab))
    console.print(f"{options.lab}: {len(index.states)} states, {len(index.seals)} readings, {rows} rows, {files} files")
    by_measure: dict[str, list[float]] = {}
    for seal in index.seals.values():
        by_measure.setdefault(seal.measure["is"].removeprefix("measure/"), []).append(seal.duration)
    for name, durations in sorted(by_measure.items()):
        console.print(f"  {name}: {len(durations)} readings, {sum(durations):.1f} s of work")
    for reading, takes in index.begun.items():
        rows_there = max(len(items) for items in takes.values())
        console.print(f"  begun: reading {reading[:12]}, {rows_there} rows; the same command finishes it")
    for of, failure in index.failures.items():
        state = index.states.get(of)
        what = str(Trial.from_json(state["trial"])) if state else of[:12]
        console.print(f"  [red]failed[/]: {what}: {failure['error']}", highlight=False)
    return OK


def show(options: argparse.Namespace, rest: list[str]) -> int:
    store, console = _existing(options), _console()
    index = store.index
    known: dict[str, Any] = {**index.states, **index.seals, **index.failures}
    key = _match(options.key, known)
    if key in index.states:
        state = index.states[key]
        console.print_json(json.dumps({"trial": state["trial"], "ledger": state["ledger"]}))
        for seal in index.seals.values():
            if seal.state == key:
                console.print(
                    f"reading {seal.reading[:12]} {seal.measure['is']}: {json.dumps(seal.summary)}", highlight=False
                )
    if key in index.seals:
        seal = index.seals[key]
        console.print_json(json.dumps({"measure": seal.measure, "state": seal.state, "summary": seal.summary}))
        _print_frame(console, store.table([key]).drop("reading", "measure"), most=20)
    if key in index.failures:
        console.print(index.failures[key]["trace"], highlight=False, markup=False)
    return OK


def export(options: argparse.Namespace, rest: list[str]) -> int:
    store = _existing(options)
    if options.what == "rows":
        if str(options.to) == "-":
            sys.stdout.buffer.writelines(store.canonical())
            return OK
        with options.to.open("xb") if not options.to.exists() else _refuse(options.to) as file:
            file.writelines(store.canonical())
        return OK
    if options.to.exists():
        _refuse(options.to)
    from lesion.trial import Trial
    from lesion.walk import Walk

    key = _match(options.what, store.index.states)
    specimen = Walk(store).materialise(Trial.from_json(store.index.states[key]["trial"]))
    specimen.model.save_pretrained(options.to)
    saved = specimen.processor or specimen.tokenizer
    if saved is not None:
        saved.save_pretrained(options.to)
    (options.to / "ledger.json").write_text(json.dumps(specimen.ledger, indent=1), encoding="utf-8")
    _console().print(f"wrote {options.to}: {specimen.trial}", highlight=False)
    return OK


# ---------------------------------------------------------------------- small things


def _refuse(path: Any) -> Any:
    raise ValueError(f"{path} exists already; nothing was overwritten")


def _existing(options: argparse.Namespace) -> Store:
    from lesion.store import Store

    if not (options.lab / "log").is_dir():
        raise ValueError(f"{options.lab} is no lab: it has no log; name another with --lab")
    return Store(options.lab)


def _match(beginning: str, known: dict[str, Any]) -> str:
    found = [key for key in known if key.startswith(beginning)]
    if len(found) != 1:
        some = ", ".join(k[:12] for k in list(known)[:8])
        what = f"{len(found)} keys begin with {beginning!r}" if found else f"no key begins with {beginning!r}"
        raise ValueError(f"{what}; there are {len(known)}: {some}…")
    return found[0]


def _threads(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads or os.cpu_count() or 1)


def _run_log(store: Store) -> logging.FileHandler | Any:
    """A log file for this run, beside its segment."""
    from contextlib import contextmanager

    @contextmanager
    def handled() -> Any:
        store.log.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(store.log / f"{store.writer}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("lesion")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()

    return handled()


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def _print_answer(answer: Answer, page: Any, verbosity: str) -> None:
    console = _console()
    if verbosity != "quiet":
        console.print(f"\n[bold]{answer.question}[/]", highlight=False)
        for sentence in answer.sentences:
            console.print(f"  {sentence}", highlight=False, markup=False)
    _print_frame(console, answer.summary)
    if verbosity != "quiet":
        for note in answer.notes:
            console.print(f"  · {note}", highlight=False, markup=False)
    console.print(f"report: {page}", highlight=False)


def _print_frame(console: Console, frame: pl.DataFrame, most: int = 200) -> None:
    """A frame as a table; columns x, x_low, x_high stand together as "x [low, high]"."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    names = [name for name in frame.columns if not name.endswith(("_low", "_high"))]
    for name in names:
        table.add_column(name, justify="right" if frame.schema[name].is_numeric() else "left", overflow="fold")
    for row in frame.head(most).iter_rows(named=True):
        cells = []
        for name in names:
            text = _shown(row[name])
            if row.get(f"{name}_low") is not None:
                text += f" [{_shown(row[f'{name}_low'])}, {_shown(row[f'{name}_high'])}]"
            cells.append(text.replace("[", r"\["))
        table.add_row(*cells)
    console.print(table, highlight=False)
    if frame.height > most:
        console.print(f"… {frame.height - most} more")


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
