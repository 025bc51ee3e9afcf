"""What a training takes, said before it starts."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """What there is to do, and the memory and time for it.

    texts, said  to train on; tokens of theirs that the target said
    parameters   of the head that are trained
    steps, done  of the whole training; those that were made before it was stopped
    memory       bytes by what they hold; the batch's are what its backward keeps, counted in a forward
    seconds      of a step whose batches all hold the longest texts, roughly: see `seconds`
    """

    texts: int
    said: int
    parameters: int
    steps: int
    done: int
    memory: dict[str, int]
    seconds: float


def memory(
    target: nn.Module, head: nn.Module, running: nn.Module, features: list[Tensor], loss: Callable[[], Tensor]
) -> dict[str, int]:
    """Bytes by what they hold. There are gradients of both copies of the head, and AdamW's two moments."""
    trained = [p for p in head.parameters() if p.requires_grad]
    moments = 2 * _bytes(trained)
    gradients = _bytes(trained) + _bytes(p for p in running.parameters() if p.requires_grad)
    return {
        "target": _bytes(target.parameters()),
        "head": _bytes(_held(head)) + _bytes(_held(running)),
        "gradients and moments": gradients + moments,
        "features": _bytes(features),
        "a batch": kept_for_backward(loss, {t.data_ptr() for t in _held(running)}),
    }


def seconds(read: Callable[[], T], loss: Callable[[T], Tensor]) -> float:
    """Of a batch, read and trained on: its forward is timed, a backward takes about two of them.

    What runs for the first time is compiled for its shapes, so it should have run before.
    """
    began = time.monotonic()
    batch = read()
    forward = time.monotonic()
    loss(batch).item()  # waits for the device
    return forward - began + 3 * (time.monotonic() - forward)


def kept_for_backward(loss: Callable[[], Tensor], known: set[int]) -> int:
    """Bytes that a forward keeps for its backward; storages that begin at one of `known` aside."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        graph = loss()  # held until all is counted, or another storage could take an address
    total = sum(size for address, size in kept.items() if address not in known)
    graph.item()  # waits for the device, which would be busy with it when the next one is timed
    return total


def _held(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
