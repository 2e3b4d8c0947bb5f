"""Training on several processes: each computes its share of the rows of every step, and all hold the same weights after it.

    lesion submit …, with `processes` in its profile; whatever sets RANK and WORLD_SIZE starts them

The loss of a step is a sum over tokens divided by their number in the whole step, so shares of rows add up to the gradient of
one process, whatever their number. Weights are copied to all (DDP), or shared out among them (FSDP2, Zhao et al. 2023), where
the launcher sets ACCELERATE_USE_FSDP. Devices and the group of processes come from accelerate; its own `prepare` knows FSDP2
only on accelerators, so torch's wrappers are called here as it calls them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lesion.loss import Objective, routers


class _Loss(nn.Module):
    """The objective's sum, and what experts add to a mean loss, as a module: what hooks of the wrappers hang on."""

    def __init__(self, model: Any, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        total = self.objective.total(self.model, *batch)
        return total, 0.0 if (model := routers(self.model)) is None else model.router_loss()


class Alone:
    """One process: the model as it is."""

    rank, world = 0, 1

    def __init__(self, model: Any, objective: Objective | None = None):
        self.model, self.vessel, self.objective = model, model, objective or Objective()
        self.device = next(model.parameters()).device
        self.loss: Any = _Loss(model, self.objective)

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained. The rest does not change, and is part of no checkpoint."""
        yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def share(self, parts: list[Any], split: int) -> list[list[Any]]:
        """This process's rows of a batch, in `split` pieces."""
        count = self.world * split
        pieces: list[Any] = [[None] * count if x is None else torch.tensor_split(x, count) for x in parts]
        mine = range(self.rank * split, (self.rank + 1) * split)
        return [[None if p[i] is None else p[i].to(self.device) for p in pieces] for i in mine]

    def total(self, value: float) -> float:
        """The sum over all processes."""
        return value

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a tensor that may be shared out. Every process must ask."""
        return tensor

    def part(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor, held as `like` is."""
        return tensor.to(like.device) if tensor.dim() else tensor

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """A piece of a step: gradients are exchanged after the last."""
        return nullcontext()

    def wait(self) -> None:
        """For all processes."""

    def leave(self) -> None:
        """Puts the weights back where they came from."""


class Copies(Alone):
    """Several processes, each with all weights (DDP)."""

    def __init__(self, model: Any, objective: Objective):
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        super().__init__(model, objective)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.loss = DistributedDataParallel(_Loss(model, objective))  # which gives all the weights of the first

    def total(self, value: float) -> float:
        import torch.distributed as dist

        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return float(found)

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        found: AbstractContextManager[Any] = nullcontext() if last else self.loss.no_sync()
        return found

    def wait(self) -> None:
        import torch.distributed as dist

        dist.barrier()


class Shards(Copies):
    """Several processes that share out the weights, their gradients and the optimizer's state (FSDP2)."""

    def __init__(self, model: Any, objective: Objective):
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        Alone.__init__(self, model, objective)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = copy.deepcopy(model)  # the vessel keeps its structure, and gets the weights back
        self.loss = _Loss(self.model, objective)
        kinds = set(getattr(model, "_no_split_modules", None) or ())
        for module in self.model.modules():
            if type(module).__name__ in kinds:
                fully_shard(module)
        fully_shard(self.loss)

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The shares, which the optimizer knows: after an evaluation what was gathered for it is still there."""
        self.loss.reshard()
        yield from super().named()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def part(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        held: Any = like
        if tensor.dim() == 0 or tensor.shape != like.shape or not hasattr(held, "device_mesh"):
            return tensor
        return distribute_tensor(tensor.to(like.device), held.device_mesh, held.placements)

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        self.loss.set_requires_gradient_sync(last)
        return nullcontext()

    @torch.no_grad()
    def leave(self) -> None:
        there = dict(self.vessel.named_parameters())
        for name, p in self.named():
            there[name].copy_(self.whole(p.detach()))


def part() -> None:
    """Waits for the other processes, where there are any: none may leave while another still listens to it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def environment(
    rank: int, world: int, local: tuple[int, int], address: str, port: int, sharded: bool
) -> dict[str, str]:
    """What tells a process its place among those that train together. `local`: its rank and their number on its machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local[0]),
        "LOCAL_WORLD_SIZE": str(local[1]),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_FSDP": "true" if sharded else "false",
    }


def enter(model: Any, objective: Objective) -> Alone:
    """The way this process was started says how it trains."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone(model, objective)
    from accelerate import PartialState

    PartialState(cpu=next(model.parameters()).device.type == "cpu")  # starts the group of processes
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    return Shards(model, objective) if sharded else Copies(model, objective)
