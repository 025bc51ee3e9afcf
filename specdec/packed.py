"""A CPU model's linear layers with their weights packed once, for the handful of rows that a tree has.

The stock products are made for one row or for hundreds (experiments/LOG.md). Costs one more copy of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .hardware import memory_gib

ROWS = 8  # MKL packs for one number of rows; with another it takes the stock product
FEWEST = 4  # fewer rows than this are fast as they are
SHARE = 8  # the copy may take one part in so many of the machine's memory

Forwards = dict[nn.Module, Callable[[Tensor], Tensor]]


def packed_head(head: nn.Module | None) -> Forwards:
    """The LM head through oneDNN, for any number of rows; nothing where packing is not to be had."""
    if not isinstance(head, nn.Linear) or head.weight.device.type != "cpu":
        return {}
    if not torch.backends.mkldnn.is_available() or head.weight.dtype not in (torch.float32, torch.bfloat16):
        return {}
    packed = torch.ops.mkldnn._reorder_linear_weight(head.weight.detach(), ROWS)
    return {head: lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, head.bias, "none", [], "")}


def packed_layers(decoder: nn.Module) -> Forwards:
    """A decoder's linear layers through MKL, for ROWS rows; nothing where packing is not to be had."""
    layers = [m for m in decoder.modules() if type(m) is nn.Linear]
    weights = [m.weight for m in layers]
    if not torch.backends.mkl.is_available() or any(
        w.device.type != "cpu" or w.dtype != torch.float32 for w in weights
    ):
        return {}
    if sum(w.nbytes for w in weights) > (memory_gib() or 0.0) * 2**30 / SHARE:
        return {}
    return {layer: _through_mkl(layer) for layer in layers}


def _through_mkl(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.detach()
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, layer.bias, ROWS)


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """Run modules through other forwards inside; the modules stay as they were for everybody else."""
    for module, forward in forwards.items():
        vars(module)["forward"] = forward  # nn.Module's own setter costs a millisecond over a model's layers
    try:
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]
