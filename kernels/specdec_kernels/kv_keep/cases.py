"""The calls of kv_keep that are tested and measured."""

from functools import partial
from typing import Any

import torch

from ..listing import Case


def make_inputs(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    shape: tuple[int, int, int, int, int],
    nodes: int,
    counts_B: list[int],
) -> dict[str, Any]:
    """Trees of `nodes` rows behind ragged prefixes. Every accepted row moves; all behind trees is NaN."""
    gen = torch.Generator(device).manual_seed(seed)
    rand = partial(torch.rand, generator=gen, device=device)
    _, slots, _, rows, _ = shape
    B, A = len(counts_B), max(1, *counts_B)
    slots_B = rand(slots).argsort()[:B]
    prefix_B = (rand(B) * (rows - nodes + 1)).long()
    cache_XBGLD = torch.randn(shape, generator=gen, device=device, dtype=dtype)
    ends_S = torch.full((slots,), rows, device=device).index_copy(0, slots_B, prefix_B + nodes)
    behind_SL = torch.arange(rows, device=device) >= ends_S[:, None]
    cache_XBGLD.masked_fill_(behind_SL[:, None, :, None], torch.nan)
    return {
        "cache_XBGLD": cache_XBGLD,
        "slots_B": slots_B,
        "prefix_B": prefix_B,
        "path_BA": (rand(B, nodes - 2).argsort(1)[:, :A] + 2).sort(1).values,
        "count_B": torch.tensor(counts_B, device=device),
    }


def _case(
    name: str, shape: tuple[int, int, int, int, int], nodes: int, counts_B: list[int], toy: bool
) -> Case:
    X, _, G, _, D = shape
    moved = 2 * 2 * X * G * D * sum(counts_B)  # 16 bits, read and written
    inputs = partial(make_inputs, shape=shape, nodes=nodes, counts_B=counts_B)
    return Case(name, "kv_keep", inputs, bytes=moved, toy=toy)


CASES = [
    _case("one slot", (4, 1, 2, 40, 16), 12, [3], toy=True),
    _case("ragged", (4, 5, 3, 40, 24), 12, [0, 10, 4], toy=True),
    _case("nothing accepted", (2, 2, 1, 20, 16), 8, [0, 0], toy=True),
    _case("8B, 5 of 32 rows, 8k", (64, 1, 8, 8192, 128), 32, [5], toy=False),
    _case("8B, 5 of 64 rows each, 8 slots, 2k", (64, 8, 8, 2048, 128), 64, [5] * 8, toy=False),
]
