"""The one training loop: everything that ever trains goes through here.

A step is a pure function of the weights, the optimizer's state and its number: which rows it reads, its learning rate and its
random numbers follow from (seed, step). So a run that is killed anywhere and started again ends with the same bits on the
same machine. The loss of a step is Σ −ln p over all its scored tokens divided by their number, however it is split.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file, save_file
from torch import nn

from lesion.loss import IGNORE, sum_of_losses
from lesion.optimizers import OptimizerName, groups, optimizer
from lesion.packing import Documents, Packed
from lesion.products import fast_products
from lesion.trial import Unfinished

KEPT = 2  # checkpoints that stay
CURVE = 40  # points of the loss that the ledger keeps
RECENT = 50  # losses among which a spike stands out
Tell = Callable[..., None]


class Training(BaseModel):
    """How a model is trained: the options that every training step has."""

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    batch: int = Field(default=16, ge=1, description="rows of an optimizer step")
    split: int = Field(
        default=1, ge=1, description="parts that a step's rows are computed in, to save memory; same gradient"
    )
    length: int = Field(default=256, ge=2, description="tokens of a row")
    documents: Documents = Field(
        default="apart", description="apart: no token sees another document; joined: one stream"
    )
    lr: float = Field(default=1e-3, gt=0, description="largest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="of the learning rate, after warm-up"
    )
    warmup: int = Field(default=20, ge=0, description="steps over which the learning rate rises from 0")
    floor: float = Field(default=0.1, ge=0, le=1, description="share of lr at the last step of cosine and linear")
    optimizer: OptimizerName = Field(default="adamw", description="adamw, adam, adafactor, sgd, sgd-momentum, signsgd")
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices; norms, biases and embeddings have none")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0: any")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast over float32 weights"
    )
    recompute: bool = Field(
        default=False,
        description="compute each layer's activations again in the backward pass: slower, much less memory",
    )
    spike: float = Field(
        default=0.0, ge=0, description="stop where the loss is so many nats above the recent median; 0: never"
    )
    eval_every: int = Field(default=0, ge=0, description="steps between held-out losses; 0: none")
    save_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    seed: int = Field(default=0, ge=0, description="of the order of rows and of dropout")


class Stopped(RuntimeError):
    """The loss or the gradient is not finite, or has jumped."""


def learning_rate(how: Training, step: int) -> float:
    """Of step 0, 1, …: linear warm-up, then lr·(floor + (1 − floor)·shape), shape from 1 to 0 over what is left."""
    if step < how.warmup:
        return how.lr * (step + 1) / how.warmup
    if how.schedule == "constant":
        return how.lr
    done = (step - how.warmup) / max(1, how.steps - how.warmup - 1)
    shape = (1 + math.cos(math.pi * done)) / 2 if how.schedule == "cosine" else 1 - done
    return how.lr * (how.floor + (1 - how.floor) * shape)


def fit(
    model: Any,
    data: Packed,
    how: Training,
    *,
    folder: Path,
    held_out: Packed | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Trains in place and returns facts for the ledger. Checkpoints and `metrics.jsonl` lie in `folder`; where it holds a
    checkpoint of the same run, the run goes on from there.

    Weights are held in float32 meanwhile and returned in the type they came in. Raises `Stopped` with the step, its rows and
    the last good state, `Unfinished` after SIGTERM or SIGUSR1, ValueError where the folder holds another run.
    """
    types = {name: p.dtype for name, p in model.named_parameters()}
    model.float()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    made = optimizer(how.optimizer, groups(model, how.weight_decay), how.lr)
    first = _resume(folder, model, made, _run_key(how, data, start))
    losses = deque(_losses(folder), maxlen=RECENT)
    training, began = model.training, time.perf_counter()
    if how.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    last: dict[str, Any] = {"loss": losses[-1] if losses else None}
    model.train()
    with fast_products(model), _signals() as asked, (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        for step in range(first, how.steps):
            loss, norm, tokens = _step(model, made, data, how, step)
            _check(loss, norm, losses, how, step, folder)
            losses.append(loss)
            spent = time.perf_counter() - began
            last = {"step": step + 1, "loss": loss, "lr": learning_rate(how, step), "norm": norm, "tokens": tokens}
            if how.eval_every and held_out is not None and ((step + 1) % how.eval_every == 0 or step + 1 == how.steps):
                last["held_out"] = evaluate(model, held_out, how)
            metrics.write(json.dumps({**last, "seconds": spent}) + "\n")
            metrics.flush()
            if tell is not None:
                tell("train", steps=how.steps, rate=tokens * (step + 1 - first) / spent, **last)
            if step + 1 < how.steps and (asked.is_set() or (step + 1) % how.save_every == 0):
                _save(folder, model, made, step + 1)
            if step + 1 < how.steps and asked.is_set():
                raise Unfinished(f"saved after step {step + 1} of {how.steps}")
    model.train(training)
    if how.recompute:
        model.gradient_checkpointing_disable()
    for name, p in model.named_parameters():
        p.data = p.data.to(types[name])
    moved = [(p.detach() != start[n].to(p.dtype)).float().mean().item() * p.numel() for n, p in _trained(model, start)]
    size = sum(w.numel() for w in start.values())
    facts = {"steps": how.steps, "loss": last["loss"], "trained": size, "moved": sum(moved) / size}
    facts["curve"] = _curve(folder, how.steps)
    return {**facts, "rows": how.steps * how.batch, **({"held_out": last["held_out"]} if "held_out" in last else {})}


def _curve(folder: Path, steps: int) -> list[dict[str, float]]:
    """The run in at most CURVE points: the last step of each, the mean loss over it, the held-out loss where there is one."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    size, points = -(-steps // CURVE), []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        point = {"step": some[-1]["step"], "loss": math.fsum(row["loss"] for row in some) / len(some)}
        held = [row["held_out"] for row in some if "held_out" in row]
        points.append({**point, **({"held_out": held[-1]} if held else {})})
    return points


def _step(
    model: nn.Module, made: torch.optim.Optimizer, data: Packed, how: Training, step: int
) -> tuple[float, float, int]:
    """One optimizer step: its loss a token, the norm of its gradient before clipping, its scored tokens."""
    device = next(model.parameters()).device
    for group in made.param_groups:
        group["lr"] = learning_rate(how, step)
    ids, targets, mask, at = data.batch(step * how.batch, how.batch)
    tokens, total = int((targets != IGNORE).sum()), 0.0
    parts = [None if x is None else x.to(device).chunk(how.split) for x in (ids, targets, mask, at)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(
            int.from_bytes(hashlib.sha256(f"dropout {how.seed} {step}".encode()).digest()[:8], "little") >> 1
        )
        for i in range(len(parts[0] or ())):
            some = [None if part is None else part[i] for part in parts]
            with torch.autocast(device.type, torch.bfloat16, enabled=how.precision == "bfloat16"):
                loss = sum_of_losses(model, *some) / tokens  # type: ignore[arg-type]
            loss.backward()
            total += float(loss.detach())
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), how.clip or math.inf))
    if math.isfinite(total) and math.isfinite(norm):
        made.step()
    made.zero_grad(set_to_none=True)
    return total, norm, tokens


@torch.no_grad()
def evaluate(model: nn.Module, data: Packed, how: Training) -> float:
    """Mean −ln p a token over all rows, in their order."""
    was, total, tokens = model.training, 0.0, 0
    model.eval()
    device = next(model.parameters()).device
    for first in range(0, len(data), how.batch):
        batch = data.batch(first, min(how.batch, len(data) - first))
        ids, targets, mask, at = (None if x is None else x.to(device) for x in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=how.precision == "bfloat16"):
            total += float(sum_of_losses(model, ids, targets, mask, at))  # type: ignore[arg-type]
        tokens += int((batch[1] != IGNORE).sum())
    model.train(was)
    return total / tokens


def _check(loss: float, norm: float, losses: deque[float], how: Training, step: int, folder: Path) -> None:
    jumped = how.spike and len(losses) == RECENT and loss > statistics.median(losses) + how.spike
    if not (math.isfinite(loss) and math.isfinite(norm)) or jumped:
        rows = f"rows {step * how.batch} to {(step + 1) * how.batch - 1}"
        good = max((path.name for path in folder.glob("step-*")), default="the start")
        raise Stopped(
            f"loss {loss:.4g} and gradient norm {norm:.4g} at step {step + 1} ({rows}); the last good state is {good}"
        )


def _trained(model: nn.Module, start: dict[str, torch.Tensor]) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if name in start)


# ---------------------------------------------------------------------- checkpoints


def _run_key(how: Training, data: Packed, start: dict[str, torch.Tensor]) -> str:
    """What makes two runs the same: settings, data and first weights."""
    from lesion.digest import tensor_digest

    parts = [
        how.model_dump_json(),
        f"{data.length} {data.documents} {data.seed} {data.begin}",
        hashlib.sha256(data.stream.tobytes() + data.number.tobytes()).hexdigest(),
    ]
    return hashlib.sha256(
        " ".join([*parts, *(f"{n} {tensor_digest(w)}" for n, w in start.items())]).encode()
    ).hexdigest()


def _tensors(model: nn.Module, made: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    state = {
        f"{names[id(p)]}/{key}": value.detach().contiguous().clone()
        for p, held in made.state.items()
        for key, value in held.items()
        if isinstance(value, torch.Tensor)
    }
    return weights, state


def _save(folder: Path, model: nn.Module, made: torch.optim.Optimizer, step: int) -> None:
    """Writes aside, then renames: a checkpoint is whole or not there."""
    target = folder / f"step-{step:08d}"
    aside = folder / f".{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    weights, state = _tensors(model, made)
    save_file(weights, aside / "model.safetensors")
    save_file(state, aside / "optimizer.safetensors")
    for path in aside.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    aside.rename(target)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def _resume(folder: Path, model: nn.Module, made: torch.optim.Optimizer, key: str) -> int:
    """The step to go on with; 0 where nothing is there."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "run.json"
    if known.is_file() and json.loads(known.read_text())["run"] != key:
        raise ValueError(f"{folder} holds another run: other settings, data or first weights")
    known.write_text(json.dumps({"run": key}))
    saved = max(folder.glob("step-*"), default=None)
    first = int(saved.name.removeprefix("step-")) if saved else 0
    if (metrics := folder / "metrics.jsonl").is_file():  # what came after the checkpoint is computed again
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
        metrics.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= first))
    if saved is None:
        return 0
    weights, state = load_file(saved / "model.safetensors"), load_file(saved / "optimizer.safetensors")
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise ValueError(f"{saved} does not hold this model: {sorted(weights.keys() ^ parameters.keys())[:3]}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    for place, value in state.items():
        name, _, field = place.rpartition("/")
        here = parameters[name]
        made.state[here][field] = value if value.dim() == 0 else value.to(here.device)
    return first


def _losses(folder: Path) -> list[float]:
    """Those of the steps before the one to go on with."""
    metrics = folder / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()] if metrics.is_file() else []


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set once SIGTERM or SIGUSR1 comes: what a scheduler sends before it takes the machine away."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
