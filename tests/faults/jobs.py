"""What children do while faults are put in: the smallest labs that go through everything, under their names."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import Field

from lesion import Lab, cli, environment, log, tiny
from lesion.cli import UNFINISHED
from lesion.lab import product
from lesion.measures import Perplexity
from lesion.steps import Noise, Pretrain
from lesion.subjects import Scratch, Tiny
from lesion.trial import Measure, Reading, Unfinished

WORDS = ["Straße", "実験", "🙂", "čtvrť"]
TEXTS = [f"{word} is what document {n} is about: {' '.join(WORDS)}. " * 4 for n, word in enumerate(WORDS)]
SMALL = {"num_hidden_layers": 1, "vocab_size": 272}
HOW = {"steps": 4, "batch": 2, "length": 16, "warmup": 0, "save_every": 2, "skip": 1, "eval_every": 2}


class TestWords(Measure):
    """One row a word, in several chunks: texts of more than one byte a character, and a number of the model's."""

    name = "test-words"
    chunk = 2
    seed: int = Field(default=0)

    def items(self, specimen):
        return [f"{word}/{n}" for n, word in enumerate(WORDS)]

    def read(self, specimen, items):
        weight = float(next(specimen.model.parameters()).detach().double().abs().sum())
        return [{"item": item, "text": item * 3, "weight": weight} for item in items]

    def summarise(self, rows):
        return {"texts": len(rows)}


def write_corpus(path: Path) -> Path:
    lines = [json.dumps({"id": f"{n}/{WORDS[n]}", "text": text}, ensure_ascii=False) for n, text in enumerate(TEXTS)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def parts(corpus: str) -> list[list[Reading]]:
    """Readings of a small lab, in the portions in which they are taken."""
    intact = Scratch(architecture="tiny-llama", config=SMALL)
    damaged = intact >> Noise(site="mlp", sigma=0.4, seed=1)
    trained = damaged >> Pretrain(corpus=corpus, **HOW)
    again = trained >> Noise(site="attention.value", sigma=0.2, seed=2)
    read = [Perplexity(corpus=corpus, documents=2, tokens=12), TestWords()]
    return [product(trials, read) for trials in ([intact], [damaged], [trained, again], [intact, again])]


def small_lab(lab: Path, corpus: str) -> int:
    """In-place steps, a kept one, compaction again and again. Returns 1 where a reading failed, if only for a while."""
    log.COMPACT_AT = 2
    missing = 0
    for readings in parts(corpus):
        index = Lab(lab).take(readings).index
        if some := [reading for reading in readings if reading.key not in index.seals]:
            missing += len(some)
            print(*(failure["error"] for failure in index.failures.values()), sep="\n")
    return 1 if missing else 0


def signalled(lab: Path, corpus: str, number: int, place: str, nth: tuple[int, ...], words: Sequence[str] = ()) -> int:
    """The small lab, or a command, whose process sends itself a signal within certain backward passes, or readings of a
    chunk of words."""
    count = itertools.count(1)

    def send(*_: Any) -> None:
        os.kill(os.getpid(), number)

    if place == "backward":
        backward = torch.Tensor.backward

        def heard(loss: torch.Tensor) -> None:
            if next(count) in nth:
                loss.register_hook(send)  # the pass has begun, and the gradients are not there yet
            backward(loss)

        torch.Tensor.backward = heard
    else:
        read = TestWords.read
        TestWords.read = lambda *given: (send() if next(count) in nth else None, read(*given))[1]
    try:
        return command(lab, *words) if words else small_lab(lab, corpus)
    except Unfinished as error:
        print(error)
        return UNFINISHED


def command(lab: Path, *words: str) -> int:
    """One command of the command line."""
    return cli.run([*words, "--lab", str(lab)])


def to_a_full_device(lab: Path, *words: str) -> int:
    """The same, and what it prints goes to a device that is full."""
    return _printing_to(os.open("/dev/full", os.O_WRONLY), lab, *words)


def to_a_closed_pipe(lab: Path, *words: str) -> int:
    """The same, and whoever read what it prints has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return _printing_to(writer, lab, *words)


def _printing_to(file: int, lab: Path, *words: str) -> int:
    os.dup2(file, 1)
    sys.stdout = os.fdopen(1, "w", buffering=8192, closefd=False)  # as it is without PYTHONUNBUFFERED: errors come late
    try:
        cli.main([*words, "--lab", str(lab)])
    except SystemExit as end:
        sys.stdout.flush()
        return end.code


def on_a_small_disk(lab: Path, corpus: str, kilobytes: int) -> int:
    """The small lab on a disk of its own, which is too small and then grows. Says how both runs ended, and copies the lab
    to where it is looked at."""
    own_mounts()
    mount("tmpfs", lab, "tmpfs", 0, f"size={kilobytes}k")
    ends = [in_a_child(lambda: small_lab(lab / "lab", corpus))]
    mount("tmpfs", lab, "tmpfs", MS_REMOUNT, "size=64m")
    ends.append(in_a_child(lambda: small_lab(lab / "lab", corpus)))
    shutil.copytree(lab / "lab", lab.with_name("copy"))
    print("ends:", *ends)
    return 0


def read_only(lab: Path, *words: str) -> int:
    """One command on a lab that is mounted for reading only."""
    own_mounts()
    mount(str(lab), lab, "", MS_BIND, "")
    mount("", lab, "", MS_BIND | MS_REMOUNT | MS_RDONLY, "")
    return command(lab, *words)


MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
NO_MOUNTS = 77  # exit code where this machine gives a process no mounts of its own


def own_mounts() -> None:
    """Mounts that this process makes from now on are its own and end with it (user_namespaces(7))."""
    users = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNS):
        os._exit(NO_MOUNTS)
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {users[0]} 1"), ("gid_map", f"0 {users[1]} 1")):
        Path("/proc/self", file).write_text(text)


def mount(what: str, where: Path, kind: str, flags: int, options: str) -> None:
    words = [os.fsencode(word) for word in (what, where, kind)]
    if ctypes.CDLL(None, use_errno=True).mount(*words, ctypes.c_ulong(flags), os.fsencode(options)):
        print(f"mount: {os.strerror(ctypes.get_errno())}")
        os._exit(NO_MOUNTS)


def in_a_child(work: Callable[[], int]) -> int:
    """The exit code of some work, done in a process of its own."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make_tiny(cache: Path, corpus: str) -> int:
    """`tiny` by its own recipe, only smaller. Says its digest."""
    os.environ["LESION_CACHE"] = str(cache)
    tiny.SHAPE = {**tiny.SHAPE, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 272}
    tiny.SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    tiny.TRAINING = {**tiny.TRAINING, **HOW, "corpus": corpus, "precision": "float32"}
    print("sha256", Tiny().pin().sha256)
    return 0


IMPORTED = ("polars", "scipy.stats", "lesion.commands", "lesion.report.page", "lesion.studies.degrade", "rich.progress")
IMPORTED += ("matplotlib.figure", "matplotlib.style", "matplotlib.textpath", "matplotlib.lines", "matplotlib.patches")
IMPORTED += ("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg")


def prepare(folder: Path) -> None:
    """Does everything once, so that a child need not import or look up anything."""
    environment.environment = lru_cache(environment.environment)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_num_threads = lambda _: None  # a command would take the cores of its neighbours
    for module in IMPORTED:
        importlib.import_module(module)  # but nothing is done with polars, whose threads would be gone in a child
    fonts = importlib.import_module("matplotlib.font_manager")
    fonts.fontManager.findfont("sans")
    small_lab(folder / "warm", str(write_corpus(folder / "warm.jsonl")))
