"""Numbers from the host to the device, without waiting for it."""

import torch
from torch import Tensor, nn


def to_device(numbers: list, device: torch.device | str) -> Tensor:
    """A tensor of nested lists; ints become int64."""
    host = torch.tensor(numbers)
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its weights in `dtype`, in place.

    Buffers keep theirs: rotary frequencies in 16 bits turn late positions by other angles.
    """
    precise = dict(module.named_buffers())
    module.to(dtype)
    for name, buffer in module.named_buffers():
        buffer.data = precise[name]
    return module
