"""The one training loop: everything that ever trains goes through here.

A step is a pure function of the weights, the optimizer's state and its number: which rows it reads, its learning rate and its
random numbers follow from (seed, step). So a run that is killed anywhere and started again ends with the same bits on the
same machine. The loss of a step is Σ −ln p over all its scored tokens divided by their number, however it is split.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lesion import runs
from lesion.adapters import adapted
from lesion.coded import code_of
from lesion.compiling import compiled
from lesion.constraints import project
from lesion.digest import named_tensors
from lesion.loss import IGNORE, Objective, routers
from lesion.optimizers import OptimizerName, groups, optimizer
from lesion.packing import Data, Documents
from lesion.products import fast_products
from lesion.ranks import Alone, Shards, enter
from lesion.stopping import asked, listening
from lesion.trial import Unfinished

RECENT = 50  # losses among which a spike stands out
Tell = Callable[..., None]
Perturb = Callable[
    [Alone, int, list[Any]], list[Any]
]  # what a step's batch, as `Packed.batch` gives it, is turned into
Ends = Callable[[Any, int, dict[str, Any]], str | None]  # model, number of the step, its loss and gradient norm


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
    compile: bool = Field(
        default=False, description="compile layers and loss (torch.compile): faster, but for the first half a minute"
    )
    recompute: bool = Field(
        default=False,
        description="compute each layer's activations again in the backward pass: slower, much less memory",
    )
    spike: float = Field(
        default=0.0, ge=0, description="stop where the loss is so many nats above the recent median; 0: never"
    )
    moved: float = Field(
        default=1e-3, ge=0, le=1, description="a run in which a smaller share of the weights has moved is a failed run"
    )
    eval_every: int = Field(default=0, ge=0, description="steps between held-out losses; 0: none")
    save_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    seed: int = Field(default=0, ge=0, description="of the order of rows and of dropout")

    @model_validator(mode="after")
    def _can_be_split(self) -> Self:
        if self.split > self.batch:
            raise ValueError(f"{self.batch} rows of a step cannot be computed in {self.split} parts")
        return self

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …: linear warm-up, then lr·(floor + (1 − floor)·shape), shape from 1 to 0 over what is
        left."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup - 1)
        shape = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.lr * (self.floor + (1 - self.floor) * shape)


class Stopped(RuntimeError):
    """The loss or the gradient is not finite, or has jumped."""


def fit(
    model: Any,
    data: Data,
    how: Training,
    *,
    folder: Path,
    held_out: Data | None = None,
    tell: Tell | None = None,
    objective: Objective | None = None,
    before: Callable[[Any, int], None] | None = None,
    perturb: Perturb | None = None,
    ends: Ends | None = None,
) -> dict[str, Any]:
    """Trains in place and returns facts for the ledger. Checkpoints and `metrics.jsonl` lie in `folder`; where it holds one
    of the same run, the run goes on from there. `perturb` may change the batch of a step; what it does must follow from the
    weights and the step's number, and its options must be among those of `how`.

    Weights are held in float32 meanwhile and returned in the type they came in; those that are held to a sign by projection
    are projected after each step. `objective`: what is lowered, where it is not the loss of language modelling. `before`:
    called with the model and the number of each step. `ends`: asked after each step, with the model and what the step found,
    whether that was the last; its word for why enters the facts, and a step whose loss it so accepts may be not finite.
    Raises `Stopped` with the step, its rows and the last good state, or where fewer weights than `how.moved` have moved;
    `Unfinished` after SIGTERM or SIGUSR1; ValueError where the folder holds another run.
    """
    if (kind := code_of(model)) is not None and not any(adapted(model)):
        raise ValueError(
            f"linear weights are {kind} codes and cannot be trained: add `lora`, whose adapters are trained beside them"
        )
    types = {name: t.dtype for name, t in named_tensors(model)}
    model.float()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    whole = start if len(start) == sum(1 for _ in model.parameters()) else dict(named_tensors(model))
    key = runs.run_key(how.model_dump_json(), data, whole)
    team = enter(model, objective or Objective())
    if how.batch < team.world * how.split:
        raise ValueError(f"{how.batch} rows cannot be split among {team.world} processes in {how.split} parts each")
    if how.optimizer == "adafactor" and isinstance(team, Shards):
        raise ValueError(
            "adafactor keeps sums over rows and columns, which cannot be shared out; train on copies (DDP)"
        )
    made = optimizer(how.optimizer, groups(team.model, how.weight_decay), how.lr)
    first = runs.resume(folder, team, made, key)
    losses = deque(runs.losses(folder), maxlen=RECENT)
    training, began = model.training, time.perf_counter()
    if how.recompute:
        team.model.activation_checkpointing_enable({"use_reentrant": False})
    last: dict[str, Any] = {"step": first, "loss": losses[-1] if losses else None}
    ended: str | None = None
    team.model.train(team.objective.dropout)
    twice = _computed_twice(team.model) if how.recompute and not team.objective.dropout else []
    arranged = compiled(team.model) if how.compile else nullcontext()
    with fast_products(team.model), arranged, listening(), _metrics(folder, team.rank) as write:
        for step in range(first, how.steps):
            if before is not None:
                before(team.model, step)
            for layer in twice:
                layer.training = True
            found = _step(team, made, data, how, step, perturb)
            ended = ends(team.model, step, found) if ends is not None else None
            if ended is not None and not (math.isfinite(found["loss"]) and math.isfinite(found["norm"])):
                break  # this step has changed nothing
            _check(found["loss"], found["norm"], losses, how, step, folder)
            losses.append(found["loss"])
            spent, done = time.perf_counter() - began, step + 1
            last = {"step": done, "lr": how.rate(step), **found}
            if how.eval_every and held_out is not None and (done % how.eval_every == 0 or done == how.steps):
                last["held_out"] = evaluate(team.model, held_out, how, team.loss, team.objective)
            rate = found["tokens"] * (done - first) / spent
            write({**last, "seconds": spent})
            if tell is not None and team.rank == 0:
                tell("train", steps=how.steps, rate=rate, left=(how.steps - done) * spent / (done - first), **last)
            if ended is not None:
                break
            stop = team.total(asked()) > 0
            if done < how.steps and (stop or done % how.save_every == 0):
                runs.save(folder, team, made, done)
            if done < how.steps and stop:
                raise Unfinished(f"saved after step {done} of {how.steps}")
    team.leave()
    model.train(training)
    if how.recompute:
        model.activation_checkpointing_disable()
    for name, tensor in named_tensors(model):
        tensor.data = tensor.data.to(types[name])
    trained = [(p, start[name].to(p.dtype)) for name, p in model.named_parameters() if name in start]
    moved, size = sum(int((p != was).sum()) for p, was in trained), sum(p.numel() for p, _ in trained)
    if moved / size < how.moved and ended is None:
        kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p, _ in trained}))
        raise Stopped(
            f"{moved / size:.3g} of the weights have moved after {how.steps} steps, and at least {how.moved:g} were to: updates "
            f"that are smaller than the spacing of the numbers round away (held in {kinds}, largest learning rate {how.lr:g})"
        )
    done = last["step"]
    facts = {"steps": done, "loss": last["loss"], "trained": size, "moved": moved / size}
    facts["displacement"] = displacement(trained)
    facts |= {"rows": done * how.batch, "curve": runs.curve(folder, max(done, 1))}
    facts |= {"ended": ended} if ends is not None else {}
    return facts | ({"held_out": last["held_out"]} if "held_out" in last else {})


def displacement(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float | None:
    """√(Σ(w − w₀)² / Σw₀²) over pairs of w and w₀; None where it is not finite, or where all w₀ are zero."""
    moved = size = 0.0
    for now, was in pairs:
        moved += float((now.detach().double() - was.detach().double()).square().sum())
        size += float(was.detach().double().square().sum())
    return math.sqrt(moved / size) if size and math.isfinite(moved) and math.isfinite(size) else None


def _step(
    team: Alone, made: torch.optim.Optimizer, data: Data, how: Training, step: int, perturb: Perturb | None = None
) -> dict[str, Any]:
    """One optimizer step: its loss a unit of the objective (a token), the norm of its gradient before clipping, its scored
    tokens; of experts also the share of pairs that were dropped, and the largest load by the mean one."""
    for group in made.param_groups:
        group["lr"] = how.rate(step)
    batch: list[Any] = list(data.batch(step * how.batch, how.batch))
    batch = perturb(team, step, batch) if perturb is not None else batch
    units, total = team.objective.count(batch), 0.0
    pieces, kind = team.share(batch, how.split), team.device.type
    expert, routed = routers(team.model), [0, 0, 0.0]
    with torch.random.fork_rng([team.device] if kind == "cuda" else []):
        torch.manual_seed(_dropout_seed(how.seed, step, team.rank))
        for i, piece in enumerate(pieces):
            with team.piece(i + 1 == len(pieces)):
                with torch.autocast(kind, torch.bfloat16, enabled=how.precision == "bfloat16"):
                    loss, of_routers = team.loss(*piece)
                share = team.objective.count(piece) / units
                # gradients of several processes are averaged, and the loss is a sum
                ((loss / units + of_routers * share) * team.world).backward()
            total += float(loss.detach()) / units
            if expert is not None:
                pairs, dropped, busiest = expert.routed()
                routed = [routed[0] + pairs, routed[1] + dropped, max(routed[2], busiest)]
    norm = nn.utils.clip_grad_norm_(team.model.parameters(), how.clip or math.inf)
    total, size = team.total(total), float(team.whole(norm))
    if math.isfinite(total) and math.isfinite(size):
        made.step()
        project(team.model)
    made.zero_grad(set_to_none=True)
    more = {} if expert is None else {"dropped": team.total(routed[1]) / team.total(routed[0]), "busiest": routed[2]}
    return {"loss": total, "norm": size, "tokens": int((batch[1] != IGNORE).sum()), **more}


def _computed_twice(model: Any) -> list[nn.Module]:
    """Layers that must each be told that they are in training, where their model is not for want of dropout: else transformers
    would keep their activations all the same. Raises ValueError where that would bring back dropout of their own."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        if any("dropout" in name and isinstance(p, float) and p > 0 for name, p in vars(layer).items()):
            raise ValueError(f"a {type(layer).__name__} drops out by itself, and here nothing may: recompute=False")
    return layers


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    place = f"dropout {seed} {step}" + (f" {rank}" if rank else "")
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def evaluate(model: Any, data: Data, how: Training, loss: Any = None, objective: Objective | None = None) -> float:
    """The objective (without one: mean −ln p a token) over all rows, in their order. Several processes all read all of them."""
    objective = objective or Objective()
    was, total, units = model.training, 0.0, 0
    model.eval()
    device = next(model.parameters()).device
    for first in range(0, len(data), how.batch):
        batch = data.batch(first, min(how.batch, len(data) - first))
        given = [None if x is None else x.to(device) for x in batch]
        with torch.autocast(device.type, torch.bfloat16, enabled=how.precision == "bfloat16"):
            total += float(loss(*given)[0] if loss is not None else objective.total(model, *given))
        units += objective.count(batch)
    model.train(was)
    return total / units


def _check(loss: float, norm: float, losses: deque[float], how: Training, step: int, folder: Path) -> None:
    jumped = how.spike and len(losses) == RECENT and loss > statistics.median(losses) + how.spike
    if not (math.isfinite(loss) and math.isfinite(norm)) or jumped:
        rows = f"rows {step * how.batch} to {(step + 1) * how.batch - 1}"
        good = max((path.name for path in folder.glob("step-*")), default="the start")
        raise Stopped(
            f"loss {loss:.4g} and gradient norm {norm:.4g} at step {step + 1} ({rows}); the last good state is {good}"
        )


@contextmanager
def _metrics(folder: Path, rank: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A line a step, there at once; of several processes the first one writes."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") if rank == 0 else nullcontext() as file:

        def write(row: dict[str, Any]) -> None:
            if file is not None:
                file.write(json.dumps(row) + "\n")
                file.flush()

        yield write
