"""Several processes that train one model together, started by ``torchrun``.

Each batch is split between the processes by atoms.  Loss terms are sums over a process's structures divided
by the numbers of the whole batch, so that the sum of the gradients is the gradient that one process would
find; then every process takes the same step.  What is decided by time is decided by the time of the first
process, which alone writes files.

This is torch.distributed as it is, not DistributedDataParallel or Lightning Fabric: these take the mean of
the processes' own means, which is another loss when batches are split unevenly, and want a forward pass
through a wrapper, which forces and Hessian products, derivatives by themselves, do not have.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

Value = TypeVar("Value")


class Ranks:
    """The processes of a training.

    Attributes
    ----------
    rank, size
        Number of this process, and of all.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Positions of the items that are this process's own; the sums of sizes are about equal."""
        filled = [0] * self.size
        own: list[int] = []
        for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
            lightest = filled.index(min(filled))
            filled[lightest] += sizes[k]
            if lightest == self.rank:
                own.append(k)
        return sorted(own)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], more: Tensor) -> Tensor:
        """Replace gradients by their sums over all processes, and return the sum of ``more``.

        A parameter that no process has a gradient of keeps none.
        """
        if self.size == 1:
            return more
        known = more.new_tensor([p.grad is not None for p in parameters], dtype=more.dtype)
        flat = torch.cat([_gradient(p).reshape(-1).to(more.dtype) for p in parameters])
        message = torch.cat([flat, known, more])
        distributed.all_reduce(message)
        lengths = [p.numel() for p in parameters]
        *gradients, known, total = message.split([*lengths, len(parameters), len(more)])
        for parameter, gradient, count in zip(parameters, gradients, known.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count else None
        return total

    def collect(self, parts: Mapping[int, Value]) -> dict[int, Value]:
        """Join what the processes have, in order of the keys."""
        found = dict(parts)
        if self.size > 1:
            everything: list[Mapping[int, Value]] = [{} for _ in range(self.size)]
            distributed.all_gather_object(everything, found)
            found = {k: value for part in everything for k, value in part.items()}
        return dict(sorted(found.items()))

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Value that the first process makes."""
        if self.size == 1:
            return make()
        box: list[Value | None] = [make() if self.first else None]
        distributed.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def agreed(self, clock: Callable[[], float]) -> Callable[[], float]:
        """A clock that shows every process the time of the first; all must look at it equally often."""
        if self.size == 1:
            return clock

        def now() -> float:
            time = torch.tensor([clock()], dtype=torch.float64)
            distributed.broadcast(time, src=0)
            return float(time)

        return now


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def current_ranks() -> Ranks:
    """The processes that ``torchrun`` started, or this one alone; joins them when it is first called."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        return Ranks()
    if not distributed.is_initialized():
        cuda = torch.cuda.is_available() and distributed.is_nccl_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(_leave)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def own_device(device: str) -> str:
    """Device of this process: of several GPUs, the one with its local number."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and several else device
