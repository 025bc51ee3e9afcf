"""Numbers from the host to the device, without waiting for it."""

from functools import cache

import torch
from torch import Tensor, nn


def to_device(numbers: list, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of nested lists; ints become int64 where no dtype is given."""
    host = torch.tensor(numbers, dtype=dtype)
    on_cuda = torch.device(device).type == "cuda"
    return host.pin_memory().to(device, non_blocking=True) if on_cuda else host.to(device)


@cache  # for good: graphs hold their addresses
def constant(numbers: tuple, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The same, made once: a captured step can't fetch numbers from the host. Never write to it."""
    return to_device(list(numbers), device, dtype)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in `dtype`, in place, but for rotary frequencies: in 16 bits they are other angles."""
    precise = {name: buffer for name, buffer in module.named_buffers() if "inv_freq" in name}
    module.to(dtype)
    for name, buffer in module.named_buffers():
        buffer.data = precise.get(name, buffer)
    return module
