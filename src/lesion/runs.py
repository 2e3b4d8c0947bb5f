"""A training run on disk: checkpoints that are whole or not there, and `metrics.jsonl`, a line a step.

run.json                    which run this is: settings, data, first weights
step-00000100/              model.safetensors, optimizer.safetensors, digest; the last KEPT stay
metrics.jsonl               what came after the last checkpoint is computed again, to the same bits

Whatever is written is written aside and renamed, except for the metrics, which grow: a checkpoint's digest is of its tensors and
of the metrics up to it, so it counts only with every one of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lesion.log import sync_folder
from lesion.packing import Data
from lesion.ranks import Alone

logger = logging.getLogger("lesion")
KEPT = 2  # checkpoints that stay
CURVE = 40  # points of the loss that a ledger keeps


def run_key(settings: str, data: Data, start: dict[str, torch.Tensor]) -> str:
    """What makes two runs the same: settings, data and first weights."""
    from lesion.digest import tensor_digest

    parts = [settings, data.digest()]
    return hashlib.sha256(
        " ".join([*parts, *(f"{n} {tensor_digest(w)}" for n, w in start.items())]).encode()
    ).hexdigest()


def save(folder: Path, team: Alone, made: torch.optim.Optimizer, step: int) -> None:
    """Writes aside, then renames. The weights and the optimizer's state are whole, however many processes hold them."""
    weights, state = {}, {}
    for name, p in team.named():  # in one order, since every process must ask for each
        weights[name] = team.whole(p.detach()).contiguous()
        for key, value in made.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                state[f"{name}/{key}"] = team.whole(value.detach()).contiguous().clone()
    if team.rank == 0:
        target = folder / f"step-{step:08d}"
        aside = folder / f".{target.name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(weights, aside / "model.safetensors")
        save_file(state, aside / "optimizer.safetensors")
        (aside / "digest").write_text(_digest(b"".join(_lines(folder)), weights, state))
        for path in (*aside.iterdir(), *folder.glob("metrics.jsonl")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(aside)
        aside.rename(target)
        sync_folder(folder)
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)
    team.wait()


def resume(folder: Path, team: Alone, made: torch.optim.Optimizer, key: str) -> int:
    """The step to go on with; 0 where nothing is there. Raises ValueError where the folder holds another run."""
    folder.mkdir(parents=True, exist_ok=True)
    damaged: list[Path] = []
    if not _is_of(folder, key):
        damaged += folder.glob("step-*")  # nobody knows whose they are
    team.wait()
    first, weights, state = (0, {}, {}) if damaged else _newest(folder, damaged)
    team.wait()
    if team.rank == 0:
        for path in damaged:
            path.rename(_unused(path))
        _write(folder / "run.json", json.dumps({"run": key}).encode())
        if (folder / "metrics.jsonl").is_file():
            _write(folder / "metrics.jsonl", b"".join(_lines(folder)[:first]))
    team.wait()
    if first == 0:
        return 0
    parameters = dict(team.named())
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise ValueError(f"step {first} in {folder} does not hold this model: {odd[:3]}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(team.part(weights[name], p))
    for place, value in state.items():
        name, _, field = place.rpartition("/")
        made.state[parameters[name]][field] = team.part(value, parameters[name])
    return first


def _is_of(folder: Path, key: str) -> bool:
    """Whether this run has begun in this folder. Raises ValueError where another one has."""
    try:
        known = json.loads((folder / "run.json").read_text())["run"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%r): the run begins again", folder / "run.json", error)
        return False
    if known != key:
        raise ValueError(f"{folder} holds another run: other settings, data or first weights")
    return True


def _write(path: Path, content: bytes) -> None:
    """Writes aside, then renames: a process that is killed here leaves the old content or the new."""
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def _newest(folder: Path, damaged: list[Path]) -> tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Step, weights and optimizer's state of the newest checkpoint that is what it was when it was written; 0 where there is
    none. Those that are not are said aloud and added to `damaged`."""
    lines = _lines(folder)
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            weights, state = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
            step = int(path.name.removeprefix("step-"))
            if (path / "digest").read_text() == _digest(b"".join(lines[:step]), weights, state):
                return step, weights, state
            why = (
                "its digest is another"
                if len(lines) >= step
                else f"metrics.jsonl is whole up to step {len(lines)} only"
            )
        except (OSError, ValueError, SafetensorError) as error:
            why = str(error)
        damaged.append(path)
        logger.warning("checkpoint %s is damaged (%s): going on from the one before it, or from the start", path, why)
    return 0, {}, {}


def _digest(metrics: bytes, *parts: dict[str, torch.Tensor]) -> str:
    from lesion.digest import combined, tensor_digest

    tensors = {f"{i} {name}": tensor_digest(t) for i, part in enumerate(parts) for name, t in part.items()}
    return combined({**tensors, "metrics": hashlib.sha256(metrics).hexdigest()})


def _unused(path: Path) -> Path:
    """A name for a damaged checkpoint, which is kept for whoever wants to see what happened to it."""
    names = (path.with_name(f"damaged-{path.name}-{n}") for n in range(1, 10**6))
    return next(name for name in names if not name.exists())


def losses(folder: Path) -> list[float]:
    """Those of the steps before the one to go on with."""
    return [row["loss"] for row in _rows(folder)]


def curve(folder: Path, steps: int) -> list[dict[str, float]]:
    """The run in at most CURVE points: the last step of each, the mean loss over it, the held-out loss where there is one. The
    first is the first step alone: what a run begins with (ln 2 of a preference) is not to be averaged with what it becomes."""
    rows = _rows(folder)
    size, points = max(1, -(-(steps - 1) // (CURVE - 1))), []
    for some in (rows[:1], *(rows[start : start + size] for start in range(1, len(rows), size))):
        if not some:
            continue
        point = {"step": some[-1]["step"], "loss": math.fsum(row["loss"] for row in some) / len(some)}
        held = [row["held_out"] for row in some if "held_out" in row]
        points.append({**point, **({"held_out": held[-1]} if held else {})})
    return points


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(folder)]


def _lines(folder: Path) -> list[bytes]:
    """The lines of steps 1, 2, …, up to the first that is torn or damaged."""
    lines: list[bytes] = []
    with suppress(FileNotFoundError), (folder / "metrics.jsonl").open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(row, dict) or row.get("step") != len(lines) + 1:
                break
            lines.append(line)
    return lines
