"""Which implementation of an operation runs. This is the one place where it is chosen."""

from collections.abc import Callable
from importlib import import_module

import torch

IMPLEMENTATIONS = ("auto", "naive", "triton")


def choose(package: str, name: str, impl: str, device: torch.device) -> Callable:
    """The function `name` of `package`.naive or `package`.triton; auto takes Triton on a GPU.

    On a CPU, triton runs in its interpreter and needs TRITON_INTERPRET=1 in the environment.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        impl = "triton" if device.type == "cuda" else "naive"
    return getattr(import_module(f"{package}.{impl}"), name)
