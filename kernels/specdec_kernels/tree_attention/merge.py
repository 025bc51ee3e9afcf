"""How the splits of a row become one: in a kernel of its own, or in the last program that has written one.

Shapes: B batch, H query heads, G key-value heads, P of H a G, T tree rows, D width, R rows, S splits.
"""

import triton
import triton.language as tl

AHEAD = tl.constexpr(3)  # stages of loads from the L2


@triton.jit
def write_rows(OUT, base, row_R, mask_R, x_RD, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D at base + row; `base` is wide, so that `row` may be narrow."""
    d = tl.arange(0, BLOCK_D)
    at = OUT + base * D + row_R[:, None] * D + d[None, :]
    tl.store(at, x_RD.to(OUT.dtype.element_ty), mask=mask_R[:, None] & (d < D)[None, :])


@triton.jit
def write_result(OUT, LSE, base, row_R, live_R, out_RD, log_R, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of OUT [B, T, H, D] and of LSE [B, T, H] or None, the natural logarithm."""
    write_rows(OUT, base, row_R, live_R, out_RD, D, BLOCK_D)
    if LSE is not None:
        tl.store(LSE + base + row_R, log_R * 0.6931471805599453, mask=live_R)


@triton.jit
def weighted(PARTS, LOGS, part_RS, given_RS, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The highest of some splits' LOGS, or 0, and over 2 ** it: sums of 2 ** LOGS, alone and times PARTS."""
    d = tl.arange(0, BLOCK_D)
    log = tl.load(LOGS + part_RS, mask=given_RS, other=-float("inf"))
    top = tl.max(log, 1)
    # Infinity minus infinity is NaN.
    top = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(log - top[:, None])
    # Empty splits have written nothing.
    mask = (log > -float("inf"))[:, :, None] & (d < D)[None, None, :]
    parts = tl.load(PARTS + part_RS[:, :, None] * D + d[None, None, :], mask=mask, other=0.0)
    return top, tl.sum(weight, 1), tl.sum(parts * weight[:, :, None], 1)


@triton.jit
def arrives_last(count, SPLITS):
    """Whether the other splits are written, so that this program may read them. `count` begins anew then."""
    # One thread counts for all: what the others have written must come before.
    tl.debug_barrier()
    last = tl.atomic_add(count, 1, sem="acq_rel") == SPLITS - 1
    tl.store(count, 0, mask=last)
    return last


@triton.jit
def merge_tile(
    PARTS,
    LOGS,
    OUT,
    LSE,
    b,
    g,
    tile_m,
    G,
    T,
    SPLITS,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What merge_kernel does, for the rows of one tile, BLOCK_R of them and one split at a time."""
    first = (b * G + g) * T * P * SPLITS
    for start in tl.range(0, BLOCK_M, BLOCK_R, num_stages=1):
        row = tile_m * BLOCK_M + start + tl.arange(0, BLOCK_R)
        live = row < T * P
        top = tl.full([BLOCK_R], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for split in tl.range(0, SPLITS, num_stages=AHEAD):
            part, given = (row * SPLITS + split)[:, None], live[:, None]
            new_top, new_total, new_acc = weighted(PARTS + first * D, LOGS + first, part, given, D, BLOCK_D)
            new_top = tl.where(new_total > 0.0, new_top, -float("inf"))
            highest = tl.maximum(top, new_top)
            base = tl.where(highest == -float("inf"), 0.0, highest)
            old, new = tl.exp2(top - base), tl.exp2(new_top - base)
            top, total = highest, total * old + new_total * new
            acc = acc * old[:, None] + new_acc * new[:, None]
        total = tl.where(live, total, 1.0)
        out, log = acc / total[:, None], top + tl.log2(total)
        at = row + row // P * ((G - 1) * P)
        write_result(OUT, LSE, (b * T * G + g) * P, at, live, out, log, D, BLOCK_D)


@triton.jit(do_not_specialize=["ROWS", "G", "T", "SPLITS"])
def merge_kernel(
    PARTS,
    LOGS,
    OUT,
    LSE,
    ROWS,
    G,
    T,
    SPLITS,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """OUT and LSE from PARTS [B, G, T, P, S, D] and LOGS [B, G, T, P, S], which are ROWS x S."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live, s = r < ROWS, tl.arange(0, BLOCK_S)
    part = r.to(tl.int64)[:, None] * SPLITS + s[None, :]
    top, total, acc = weighted(PARTS, LOGS, part, live[:, None] & (s < SPLITS)[None, :], D, BLOCK_D)
    total = tl.where(live, total, 1.0)
    t, b = r // P % T, r // (G * T * P)
    row = ((b * T + t) * G + r // (T * P) % G).to(tl.int64) * P + r % P
    write_result(OUT, LSE, 0, row, live, acc / total[:, None], top + tl.log2(total), D, BLOCK_D)
