"""The LM head on a CPU, with its weight packed once for oneDNN.

For a handful of rows, as a tree has, the stock product of a large vocabulary is slow: 18 ms for 8 rows of
49,152 x 576 where the packed one takes 7 (experiments/LOG.md). Costs one more copy of the weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def packed_forward(head: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """A drop-in `forward` for a linear layer on a CPU; None where packing is not to be had."""
    if not isinstance(head, nn.Linear) or head.weight.device.type != "cpu":
        return None
    if not torch.backends.mkldnn.is_available() or head.weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    with torch.inference_mode():
        packed = torch.ops.mkldnn._reorder_linear_weight(head.weight.detach(), 8)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, head.bias, "none", [], "")

    return forward


@contextmanager
def replaced(module: nn.Module | None, forward: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Run `module` through `forward` inside; the module itself stays as it was for everybody else."""
    if module is None or forward is None:
        yield
        return
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
