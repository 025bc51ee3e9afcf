"""Numbers from the host to the device, without waiting for it."""

import torch
from torch import Tensor


def to_device(numbers: list, device: torch.device | str) -> Tensor:
    """A tensor of nested lists; ints become int64."""
    host = torch.tensor(numbers)
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host
