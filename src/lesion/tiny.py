"""`tiny`: a small model that really speaks, trained once on this machine and kept.

    scratch decoder >> pretrain(corpus="novels")        five novels by Jane Austen; the sixth, `austen`, is never seen

It is made by the same loop as everything that trains, in about three minutes on two cores, and lies in the cache of models
from then on. Interrupted, it goes on where it was. Another processor rounds otherwise, so another machine's `tiny` is a model
of its own, with a digest and keys of its own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from lesion.packaged import cache
from lesion.trial import Specimen, Trial

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
TRAINING: dict[str, Any] = {
    "corpus": "novels",
    "steps": 1200,
    "batch": 8,
    "length": 256,
    "documents": "joined",
    "lr": 2e-3,
    "warmup": 50,
    "floor": 0.02,
    "weight_decay": 0.1,
    "precision": "bfloat16",
    "save_every": 250,
}
SAID_EVERY_S = 15.0


def recipe() -> Trial:
    """The sentence that `tiny` stands for."""
    from lesion.steps.pretrain import Pretrain
    from lesion.subjects import Scratch

    return (Scratch(architecture="lesion-decoder", config=SHAPE) >> Pretrain(**TRAINING)).pin()


def folder() -> Path:
    """Where it lies, as a transformers directory. Trained now if it is not there; a second process waits for the first."""
    from filelock import FileLock

    target = cache() / f"tiny-{recipe().key[:12]}"
    if not target.is_dir() or _workplace(target).is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():
                _make(target)
            shutil.rmtree(_workplace(target), ignore_errors=True)  # also that of a process killed after it was done
    return target


def _workplace(target: Path) -> Path:
    return target.with_name(f".{target.name}.work")


def _make(target: Path) -> None:
    """Trains it in its workplace, where an interrupted training goes on, and renames it once every byte is on the disk."""
    from lesion.bench import Bench
    from lesion.log import sync_folder

    log, spoke = logging.getLogger("lesion"), [time.monotonic()]

    def tell(what: str, **told: Any) -> None:
        if what == "train" and time.monotonic() - spoke[0] > SAID_EVERY_S:
            spoke[0] = time.monotonic()
            log.info(
                "tiny: step %d of %d, loss %.2f, %.0f s left", *(told[n] for n in ("step", "steps", "loss", "left"))
            )

    log.info("training tiny, once for this machine: about three minutes on two cores")
    trial, work = recipe(), _workplace(target)
    specimen: Specimen = trial.subject.load()
    specimen.place, specimen.tell = work / "run", tell
    bench = Bench(specimen)
    for step in trial.steps:
        bench.apply(step)
    aside = work / "whole"
    shutil.rmtree(aside, ignore_errors=True)
    specimen.model.save_pretrained(aside)
    assert specimen.tokenizer is not None
    specimen.tokenizer.save_pretrained(aside)
    (aside / "ledger.json").write_text(json.dumps(specimen.ledger, indent=1), encoding="utf-8")
    for path in aside.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(aside)
    aside.rename(target)
    sync_folder(target.parent)
