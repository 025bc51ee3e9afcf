"""Tree attention in Triton: chooses tiles and splits, and launches the kernels.

Shapes: B batch, H query heads, G key-value heads, P of H a G, T rows that ask of C tree rows, L cache rows,
D width.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..listing import Compiled
from .config import MERGE, Tile, merge_block, merge_rows, plan, registers, tile, width
from .counts import counts
from .kernels import split_kernel
from .mask import TreeMask
from .merge import merge_kernel

LOG2E = 1.4426950408889634
EDGE = 32  # columns at a time where a mask is needed: those of one word
STRIDES = ("sq_b", "sq_h", "sq_t", "sk_b", "sk_g", "sk_l")


def tree_attention(
    q_BHTD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    tree: TreeMask,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    k_scale_G: Tensor | None = None,
    v_scale_G: Tensor | None = None,
    return_lse: bool = False,
    merge: str = MERGE,
) -> Tensor | tuple[Tensor, Tensor]:
    """See the dispatcher, and for `merge` the plan. Rows behind the tree are never read, and may hold NaN."""
    _refuse(q_BHTD, k_BGLD, v_BGLD)
    if k_BGLD.dtype == torch.float8_e4m3fn:
        k_BGLD, v_BGLD = k_BGLD.view(torch.int8), v_BGLD.view(torch.int8)
    (B, H, T, D), (G, L), device = q_BHTD.shape, k_BGLD.shape[1:3], q_BHTD.device
    C = tree.depth_BC.shape[1]
    length = L if window is None else min(L, window + C)
    chosen, splits = plan(q_BHTD, k_BGLD, length, merge)
    tiles = triton.cdiv(T * (H // G), chosen.rows)
    # Token before head, as models want it next, so that their transpose needs no copy.
    out_BTHD = torch.empty(B, T, H, D, dtype=q_BHTD.dtype, device=device)
    lse_BTH = torch.empty(B, T, H, dtype=torch.float32, device=device) if return_lse else None
    parts, logs = _partials(B * T * H, splits, D, device)
    arrived = counts(B * G * tiles, device) if splits > 1 and merge == "last" else None
    unfinished = splits > 1 and arrived is None
    results = (None, None) if unfinished else (out_BTHD, lse_BTH)
    split_kernel[(tiles, splits, B * G)](
        *(q_BHTD, k_BGLD, v_BGLD, tree.prefix_B, tree.depth_BC, tree.words_BTW),
        *(k_scale_G, v_scale_G, sinks_H, parts, logs, *results, arrived),
        *_strides(q_BHTD, k_BGLD, tree),
        *(G, T, C, splits, window),
        *_factors(scale, softcap),
        **_constants(chosen, H // G, D),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        maxnreg=_limit(chosen, arrived is not None),
    )
    if unfinished:
        _merge(parts, logs, out_BTHD, lse_BTH, G)
    out_BHTD = out_BTHD.transpose(1, 2)
    return out_BHTD if lse_BTH is None else (out_BHTD, lse_BTH.transpose(1, 2))


def _refuse(q_BHTD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor) -> None:
    for name, x in (("q_BHTD", q_BHTD), ("k_BGLD", k_BGLD)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} along D, expected 1: make it contiguous")
    apart = any(k_BGLD.stride(i) != v_BGLD.stride(i) for i in range(4) if k_BGLD.shape[i] > 1)
    if apart or k_BGLD.dtype != v_BGLD.dtype:
        raise ValueError(
            f"k_BGLD is {k_BGLD.dtype} with strides {k_BGLD.stride()}, v_BGLD is {v_BGLD.dtype} with strides "
            f"{v_BGLD.stride()}; expected the same: keep both in one cache"
        )


def _strides(q_BHTD: Tensor, k_BGLD: Tensor, tree: TreeMask) -> tuple[int, ...]:
    nodes = (tree.prefix_B.stride(0), tree.depth_BC.stride(0), *tree.words_BTW.stride()[:2])
    return (*q_BHTD.stride()[:3], *k_BGLD.stride()[:3], *nodes)


def _factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Of the scores, for exponentials of two, and inside the softcap."""
    if softcap is None:
        return scale * LOG2E, None
    return softcap * LOG2E, scale / softcap


def _partials(
    rows: int, splits: int, D: int, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What the splits of each row write: their outputs and logarithms. One split writes the result itself."""
    if splits == 1:
        return None, None
    parts = torch.empty(rows, splits, D, dtype=torch.float32, device=device)
    return parts, torch.empty(rows, splits, dtype=torch.float32, device=device)


def _constants(chosen: Tile, P: int, D: int) -> dict[str, int]:
    blocks = dict(BLOCK_M=chosen.rows, BLOCK_N=chosen.columns, BLOCK_R=merge_block(chosen, D))
    return dict(P=P, D=D, BLOCK_D=width(D), EDGE=min(chosen.columns, EDGE)) | blocks


def _limit(chosen: Tile, last: bool) -> int | None:
    """Where the last program merges, ptxas would otherwise spill, for the sake of more resident programs
    than shared memory has room for."""
    return registers(chosen) if last else None


def _merge(parts: Tensor, logs: Tensor, out_BTHD: Tensor, lse_BTH: Tensor | None, G: int) -> None:
    (_, T, H, D), (rows, splits) = out_BTHD.shape, logs.shape
    block_r, block_s = merge_rows(rows, splits, width(D), logs.device), triton.next_power_of_2(splits)
    blocks = dict(P=H // G, D=D, BLOCK_D=width(D), BLOCK_R=block_r, BLOCK_S=block_s)
    merge_kernel[(triton.cdiv(rows, block_r),)](parts, logs, out_BTHD, lse_BTH, rows, G, T, splits, **blocks)


def _split(
    name: str, D: int, rows: int, P: int, q: str = "bf16", cache: str = "", **features: Any
) -> Compiled:
    """The split kernel for `rows` rows; features: window, inner, SINKS, and SINGLE or LAST, where on."""
    chosen = tile(rows, D, torch.float32 if q == "fp32" else torch.bfloat16, 1 if cache else 2)
    types = {"Q": f"*{q}", "K": f"*{cache or q}", "V": f"*{cache or q}", "PREFIX": "*i64", "DEPTH": "*i64"}
    types |= {"WORDS": "*i32", "factor": "fp32"}
    partial, result = {"PARTS": "*fp32", "LOGS": "*fp32"}, {"OUT": f"*{q}"}
    last = partial | result | {"LSE": "*fp32", "COUNTS": "*i32"}
    types |= result if "SINGLE" in features else last if "LAST" in features else partial
    optional = {"inner": "fp32", "SINKS": f"*{q}", "window": "i32"}
    types |= {n: kind for n, kind in optional.items() if n in features}
    types |= dict.fromkeys(("K_SCALE", "V_SCALE") if cache else (), "*fp32")
    off = {*optional, *last, "K_SCALE", "V_SCALE"} - types.keys()
    constants = _constants(chosen, P, D) | dict.fromkeys(sorted(off))
    return Compiled(
        name,
        split_kernel,
        types,
        constants,
        aligned=STRIDES,
        warps=chosen.warps,
        stages=chosen.stages,
        wgmma=chosen.rows >= 64,
        pipelined=True,
        options={"maxnreg": _limit(chosen, "LAST" in features)},
    )


def _merged(D: int, splits: int, rows: int) -> Compiled:
    types = {"PARTS": "*fp32", "LOGS": "*fp32", "OUT": "*bf16"}
    constants = {"LSE": None, "P": 4, "D": D, "BLOCK_D": width(D), "BLOCK_R": rows, "BLOCK_S": splits}
    return Compiled(f"merge-D{D}-S{splits}", merge_kernel, types, constants)


COMPILED = [
    *(_split(f"D{D}-M{M}", D, M, 4) for D in (128, 64, 80, 96) for M in (16, 32, 64, 128)),
    *(_split(f"D256-M{M}", 256, M, 2) for M in (16, 32, 64)),
    *(_split(f"P7-window-D128-M{M}", 128, M, 7, window=True) for M in (16, 32, 64, 128)),
    *(_split(f"gemma-D256-M{M}", 256, M, 2, window=True, inner=True) for M in (16, 64)),
    *(_split(f"gpt-oss-D64-M{M}", 64, M, 8, window=True, SINKS=True) for M in (16, 64, 128)),
    *(_split(f"fp8-D128-M{M}", 128, M, 4, cache="i8") for M in (16, 32, 64, 128)),
    *(_split(f"fp32-D{D}", D, 16, 4, q="fp32") for D in (64, 128, 256)),
    *(_split(f"single-D128-M{M}", 128, M, 4, SINGLE=True) for M in (16, 128)),
    *(_split(f"last-D{D}-M{M}", D, M, 4, LAST=True) for D in (128, 64) for M in (16, 32, 64, 128)),
    *(_split(f"last-gemma-D256-M{M}", 256, M, 2, window=True, inner=True, LAST=True) for M in (16, 32, 64)),
    *(_split(f"last-P7-window-D128-M{M}", 128, M, 7, window=True, LAST=True) for M in (16, 32, 64, 128)),
    *(_split(f"last-fp8-D128-M{M}", 128, M, 4, cache="i8", LAST=True) for M in (16, 32, 64, 128)),
    *(_split(f"last-fp32-D{D}", D, 16, 4, q="fp32", LAST=True) for D in (128, 256)),
    *(
        _merged(D, splits, rows)
        for D, splits, rows in ((64, 16, 4), (128, 16, 2), (128, 64, 1), (256, 64, 1))
    ),
]
