"""Numbers from the host to the device, without waiting for it."""

import torch
from torch import Tensor, nn


def to_device(numbers: list, device: torch.device | str) -> Tensor:
    """A tensor of nested lists; ints become int64."""
    host = torch.tensor(numbers)
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in `dtype`, in place, but for rotary frequencies: in 16 bits they are other angles."""
    precise = {name: buffer for name, buffer in module.named_buffers() if "inv_freq" in name}
    module.to(dtype)
    for name, buffer in module.named_buffers():
        buffer.data = precise.get(name, buffer)
    return module
