"""Prompt lookup in one launch: a program walks through a sequence and remembers the best end per lane.

It walks once for each of the M occurrences wanted, which are few.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..listing import Compiled

BLOCK_L = 1024
WARPS = 8


@triton.jit
def ngram_match_kernel(
    tokens,
    length,
    start,
    matched,
    stride,
    M,
    MIN_N: tl.constexpr,
    MAX_N: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Grid (B,). An end is kept as run << 32 | preference, so that the larger one is the better one."""
    b = tl.program_id(0).to(tl.int64)
    row = tokens + b * stride
    last = tl.load(length + b).to(tl.int32) - 1
    best = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    longest = tl.full([], MIN_N, tl.int64)
    for m in range(M):
        best_L = tl.full([BLOCK_L], 0, tl.int64)
        for tile in range(0, last, BLOCK_L):
            l_L = tile + tl.arange(0, BLOCK_L)
            agrees_L = l_L < last
            run_L = tl.full([BLOCK_L], 0, tl.int32)
            for n in tl.static_range(MAX_N):
                agrees_L = agrees_L & (l_L >= n)
                suffix = tl.load(row + tl.maximum(last - n, 0))
                agrees_L = agrees_L & (tl.load(row + l_L - n, mask=agrees_L, other=0) == suffix)
                run_L += agrees_L.to(tl.int32)
            order_L = 0x7FFFFFFF - l_L if FIRST else l_L
            end_L = (run_L.to(tl.int64) << 32) | order_L.to(tl.int64)
            best_L = tl.maximum(best_L, tl.where(end_L < best, end_L, 0))  # those before are taken
        best = tl.max(best_L, 0)
        run, order = best >> 32, best & 0x7FFFFFFF
        longest = tl.maximum(longest, run)
        end = 0x7FFFFFFF - order if FIRST else order
        tl.store(start + b * M + m, tl.where(run == longest, end + 1, -1))
        if m == 0:
            tl.store(matched + b, tl.where(run == longest, run, 0))


def ngram_match(
    tokens_BL: Tensor, length_B: Tensor, *, max_n: int, min_n: int, prefer: str, matches: int
) -> tuple[Tensor, Tensor]:
    """See the dispatcher."""
    tokens_BL = tokens_BL if tokens_BL.stride(1) == 1 else tokens_BL.contiguous()
    start_BM, n_B = tokens_BL.new_empty(len(tokens_BL), matches), tokens_BL.new_empty(len(tokens_BL))
    ngram_match_kernel[(len(tokens_BL),)](
        tokens_BL,
        length_B.contiguous(),
        start_BM,
        n_B,
        tokens_BL.stride(0),
        matches,
        MIN_N=min_n,
        MAX_N=max_n,
        FIRST=prefer == "first",
        BLOCK_L=BLOCK_L,
        num_warps=WARPS,
    )
    return start_BM, n_B


def _compiled(max_n: int, first: bool) -> Compiled:
    return Compiled(
        name=f"max_n={max_n} {'first' if first else 'recent'}",
        kernel=ngram_match_kernel,
        types=dict.fromkeys(("tokens", "length", "start", "matched"), "*i64"),
        constants={"MIN_N": 1, "MAX_N": max_n, "FIRST": first, "BLOCK_L": BLOCK_L},
        aligned=("stride",),
        warps=WARPS,
    )


COMPILED = [_compiled(3, first=False), _compiled(3, first=True), _compiled(8, first=False)]
