"""Processes that train together, started by torchrun; a process alone is the ordinary case."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # the others wait while the first process collects answers


def place() -> tuple[int, int]:
    """Rank of this process, and how many train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def together() -> Iterator[None]:
    """Inside, this process belongs to those that torchrun started with it; without torchrun to none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # What is no tensor, and barriers, go by gloo: NCCL's watchdog knows no such patience.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def lead(act: Callable[[], T]) -> T:
    """Have the first process act while the others wait; all get what it returned, which is pickled."""
    rank, world = place()
    if world == 1:
        return act()
    box = [act() if rank == 0 else None]
    distributed.broadcast_object_list(box)
    return box[0]


def summed(value: float, device: torch.device) -> float:
    """Over all processes."""
    if place()[1] == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item()


def sum_in_place(tensors: list[Tensor]) -> None:
    """Over all processes, in one message."""
    if place()[1] == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
