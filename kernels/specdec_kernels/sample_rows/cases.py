"""Calls of the sampling kernel: a batch's rows, from one to the nodes of many trees."""

from functools import partial
from typing import Any

import torch

from ..listing import Case
from ..philox import Purpose

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 50},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "top-k and top-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
}


def inputs(
    X: int, V: int, setting: str, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Logits as peaked as a language model's, with many equal ones in 16 bits."""
    g = torch.Generator(device).manual_seed(seed)
    row_X = torch.arange(X, device=device)
    return {
        "logits_XV": (3 * torch.randn(X, V, generator=g, device=device)).to(dtype),
        "seed": seed,
        "request_X": row_X,
        "step_X": 100 + 7 * row_X,
        "node_X": torch.zeros_like(row_X),
        "purpose": Purpose.TARGET,
        **SETTINGS[setting],
    }


def _case(X: int, V: int, setting: str, toy: bool) -> Case:
    name = f"{setting} X{X} V{V}"
    return Case(name, "sample_rows", partial(inputs, X, V, setting), bytes=2 * X * V, toy=toy)


CASES = [
    *(_case(X, V, setting, True) for X, V in ((1, 7), (6, 300), (3, 5000)) for setting in SETTINGS),
    *(
        _case(X, V, setting, False)
        for X in (1, 16, 64, 512)
        for V in (32_000, 128_256)
        for setting in SETTINGS
    ),
]
