"""Cache compaction in one launch: a program moves the rows of one head of one slot, one after the other."""

import triton
import triton.language as tl
from torch import Tensor

from ..listing import Compiled


@triton.jit
def kv_keep_kernel(
    cache,
    slots,
    prefix,
    path,
    count,
    stride_x,
    stride_slot,
    stride_head,
    stride_row,
    heads,
    path_length,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (X * G, B). A thread owns the same columns in all rows and a path ascends, so that no row is
    overwritten before it is read, although nothing separates the loads and stores of different threads."""
    plane, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + b).to(tl.int64)
    place = plane // heads * stride_x + slot * stride_slot + plane % heads * stride_head
    column_D = tl.arange(0, BLOCK_D)
    inside_D = column_D < WIDTH
    root_D = cache + place + tl.load(prefix + b).to(tl.int64) * stride_row + column_D
    for r in range(1, tl.load(count + b).to(tl.int32) + 1):
        source = tl.load(path + b * path_length + r - 1).to(tl.int64)
        if source != r:
            row_D = tl.load(root_D + source * stride_row, mask=inside_D)
            tl.store(root_D + r * stride_row, row_D, mask=inside_D)


def kv_keep(cache_XBGLD: Tensor, slots_B: Tensor, prefix_B: Tensor, path_BA: Tensor, count_B: Tensor) -> None:
    """See the dispatcher."""
    if cache_XBGLD.stride(4) != 1:
        raise ValueError(f"the cache has strides {cache_XBGLD.stride()}, expected 1 in the last axis")
    X, _, G, _, D = cache_XBGLD.shape
    B, A = path_BA.shape
    kv_keep_kernel[(X * G, B)](
        cache_XBGLD,
        *(x.contiguous() for x in (slots_B, prefix_B, path_BA, count_B)),
        *cache_XBGLD.stride()[:4],
        G,
        A,
        WIDTH=D,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=1,
    )


def _compiled(dtype: str, width: int) -> Compiled:
    return Compiled(
        name=f"{dtype} D={width}",
        kernel=kv_keep_kernel,
        types={"cache": f"*{dtype}"} | dict.fromkeys(("slots", "prefix", "path", "count"), "*i64"),
        constants={"WIDTH": width, "BLOCK_D": triton.next_power_of_2(width)},
        aligned=("stride_x", "stride_slot", "stride_head", "stride_row"),
        warps=1,
    )


COMPILED = [_compiled("bf16", width) for width in (64, 96, 128, 256)] + [_compiled("fp32", 64)]
