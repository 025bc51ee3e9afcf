"""A CPU model's linear layers with their weights packed once, for the handful of rows that a tree has.

The stock products are made for one row or for hundreds, and in bfloat16 they pack anew at every call
(experiments/LOG.md). Costs one more copy of the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hardware import memory_gib, native_bf16
from .lm_head import LMHead

ROWS = 8  # MKL packs for one number of rows; with another it takes the stock product
FEWEST = 4  # fewer rows than this are fast as they are
SHARE = 8  # the copy may take one part in so many of the machine's memory

Forwards = dict[nn.Module, Callable[[Tensor], Tensor]]


def packed_head(head: nn.Module | None) -> Forwards:
    """The LM head through oneDNN, for any number of rows; nothing where packing is not to be had."""
    if not isinstance(head, nn.Linear | LMHead) or not _onednn_packs(head.weight):
        return {}
    return {head: _through_onednn(head.weight, head.bias)}


def packed_product(weight_UD: Tensor, bias_U: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x @ weight.T + bias for any number of rows, through oneDNN where packing is to be had."""
    if not _onednn_packs(weight_UD):
        return lambda x: F.linear(x, weight_UD, bias_U)
    return _through_onednn(weight_UD, bias_U)


def packed_layers(decoder: nn.Module) -> Forwards:
    """A decoder's linear layers: in float32 through MKL, for ROWS rows; in bfloat16 through oneDNN, for any.

    Nothing where packing is not to be had, or where the copy would take too much memory.
    """
    layers = [m for m in decoder.modules() if type(m) is nn.Linear]
    weights = [m.weight for m in layers]
    if sum(w.nbytes for w in weights) > (memory_gib() or 0.0) * 2**30 / SHARE:
        return {}
    if torch.backends.mkl.is_available() and all(_is_on_cpu(w, torch.float32) for w in weights):
        return {layer: _through_mkl(layer) for layer in layers}
    if native_bf16() and all(_is_on_cpu(w, torch.bfloat16) and _onednn_packs(w) for w in weights):
        return {layer: _through_onednn(layer.weight, layer.bias) for layer in layers}
    return {}


def _is_on_cpu(weight: Tensor, *dtypes: torch.dtype) -> bool:
    return weight.device.type == "cpu" and weight.dtype in dtypes


def _onednn_packs(weight: Tensor) -> bool:
    return torch.backends.mkldnn.is_available() and _is_on_cpu(weight, torch.float32, torch.bfloat16)


def _through_mkl(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.detach()
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, layer.bias, ROWS)


def _through_onednn(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


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
