"""Kept states: what expensive steps have made, so that whatever follows them starts from there.

lab/states/<key>/      trial.json  model.safetensors  ledger.json     written aside, synced, renamed: there whole or not at all
lab/states/.<key>.work the workplace of the step that makes it: checkpoints, metrics
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lesion import log
from lesion.log import Record

if TYPE_CHECKING:
    from lesion.trial import Specimen


class States:
    """The kept states of a lab."""

    root: Path

    def state_folder(self, state: str) -> Path | None:
        folder = self.root / "states" / state
        return folder if folder.is_dir() else None

    def keep(self, state: str, specimen: Specimen) -> Path:
        """Keeps a state on disk: written aside, synced, renamed, so that it is there whole or not at all."""
        from safetensors.torch import save_file

        from lesion.digest import named_tensors

        target = self.root / "states" / state
        aside = target.with_name(f".{state}-{secrets.token_hex(8)}")
        aside.mkdir(parents=True)
        try:
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in named_tensors(specimen.model)},
                aside / "model.safetensors",
            )
            (aside / "trial.json").write_text(json.dumps(specimen.trial.to_json(), indent=1), encoding="utf-8")
            (aside / "ledger.json").write_text(json.dumps(specimen.ledger, indent=1), encoding="utf-8")
            if _tokenizer_of(specimen.ledger):
                assert specimen.tokenizer is not None
                specimen.tokenizer.save_pretrained(aside / "tokenizer")
            if (metrics := self.workplace(state) / "metrics.jsonl").is_file():
                shutil.copyfile(metrics, aside / "metrics.jsonl")
            for path in (*aside.rglob("*"), aside):
                if path.is_dir():
                    log.sync_folder(path)
                else:
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            if target.exists():
                shutil.rmtree(aside)  # another process kept the same state first
            else:
                aside.rename(target)
                log.sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return target

    def workplace(self, state: str) -> Path:
        """Where the step that makes a state may save what it has. Gone once the state is kept."""
        return self.root / "states" / f".{state}.work"

    def clear_workplace(self, state: str) -> None:
        shutil.rmtree(self.workplace(state), ignore_errors=True)

    def sweep(self) -> None:
        """Removes what killed processes have left and nobody will ask for: half a state, a workplace whose state is kept."""
        for path in (self.root / "states").glob(".*"):
            state = path.name.lstrip(".").split(".")[0]
            with suppress(FileNotFoundError):
                old = time.time() - path.stat().st_mtime > log.ABANDONED_S
                if old and (not path.name.endswith(".work") or self.state_folder(state) is not None):
                    shutil.rmtree(path, ignore_errors=True)

    def restore(self, state: str, specimen: Specimen) -> None:
        """Fills a specimen of the right structure with a kept state. Raises ValueError where anything does not fit."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

        from lesion.digest import combined, digests, named_tensors
        from lesion.vocabularies import tokenizer_digest

        folder = self.root / "states" / state
        try:
            saved = load_file(folder / "model.safetensors")
            ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise ValueError(f"the kept state {folder} cannot be read ({error}); nothing was changed") from None
        entries = ledger if isinstance(ledger, list) else []
        if not entries or not all(isinstance(entry, dict) for entry in entries) or "after" not in entries[-1]:
            raise ValueError(f"the kept state {folder} has a ledger.json that is no ledger; nothing was changed")
        here = dict(named_tensors(specimen.model))
        if saved.keys() != here.keys():
            odd = sorted(saved.keys() ^ here.keys())
            raise ValueError(
                f"the kept state {folder} does not fit its model: {len(odd)} names differ, such as {odd[:3]}"
            )
        with torch.no_grad():
            for name, tensor in here.items():
                if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
                    raise ValueError(f"the kept state {folder} has {name} as {saved[name].shape}, not {tensor.shape}")
                tensor.copy_(saved[name])
        if (known := _tokenizer_of(ledger)) is not None:
            specimen.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            if tokenizer_digest(specimen.tokenizer) != known:
                raise ValueError(f"the tokenizer of the kept state {folder} is not the one its ledger describes")
        specimen.digests, specimen.ledger = digests(specimen.model), ledger
        if combined(specimen.digests) != ledger[-1]["after"]:
            raise ValueError(f"the kept state {folder} is not the one its ledger describes: its digest differs")


def _tokenizer_of(ledger: list[Record]) -> str | None:
    """Digest of the tokenizer that a step has made, or None where it is the subject's own."""
    return next((entry["tokenizer"] for entry in reversed(ledger) if "tokenizer" in entry), None)
