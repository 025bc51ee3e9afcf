"""The kernel of tree attention that walks the cache, in splits.

The heads that share a key-value head are rows of one matrix product: row r is token r // P, head r % P.
A program walks its tiles of the cache: first those that every row sees whole, without a mask, then in smaller
steps those at the edges: where the cache or a window begins, and where the tree lies.

Shapes: B batch, H query heads, G key-value heads, P of H a G, T tree rows, C rows of the tree, D width.
"""

import triton
import triton.language as tl

from .merge import arrives_last, merge_tile, write_result, write_rows


@triton.jit
def tanh(x):
    """By exp2, as the interpreter has no libdevice."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))


@triton.jit
def read(keys, n0, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows [n0, n0 + BLOCK_N) of one head of the cache; `inside` masks some, or is None."""
    d = tl.arange(0, BLOCK_D)
    at = keys + tl.cast(n0, tl.int64) * stride + tl.arange(0, BLOCK_N)[:, None] * stride + d[None, :]
    if inside is None:
        if BLOCK_D == D:
            return tl.load(at)
        else:
            return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def decoded(x, dtype: tl.constexpr):
    """Rows of the cache in the dtype of q. float8_e4m3fn comes as int8, which every GPU has, and leaves
    divided by 256: its bits are those of a float16 with another bias."""
    if x.dtype == tl.int8:
        return ((x.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def attend(q, k, v, seen, top, total, acc, factor, inner):
    """One tile of the running softmax, in powers of two. `seen` hides scores [rows, columns], or is None."""
    scores = tl.dot(q, tl.trans(decoded(k, q.dtype)), input_precision="ieee")
    if inner is not None:
        scores = tanh(scores * inner)
    if seen is not None:
        scores = tl.where(seen, scores, -float("inf"))
    highest = tl.maximum(top, tl.max(scores, 1) * factor)
    # Rows that have seen nothing yet: infinity minus infinity is NaN.
    base = highest if seen is None else tl.where(highest == -float("inf"), 0.0, highest)
    p = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(top - base)
    acc = tl.dot(p.to(q.dtype), decoded(v, q.dtype), acc * shrink[:, None], input_precision="ieee")
    return highest, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["T", "C", "SPLITS", "sp_b", "sd_b", "sw_b", "sw_t"])
def split_kernel(  # noqa: C901, features that are off are compiled away
    Q,
    K,
    V,
    PREFIX,
    DEPTH,
    WORDS,
    K_SCALE,
    V_SCALE,
    SINKS,
    PARTS,
    LOGS,
    OUT,
    LSE,
    COUNTS,
    sq_b,
    sq_h,
    sq_t,
    sk_b,
    sk_g,
    sk_l,
    sp_b,
    sd_b,
    sw_b,
    sw_t,
    G,
    T,
    C,
    SPLITS,
    window,
    factor,
    inner,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Tile of rows x split of the columns x head. Scores are factor * tanh(inner * q k), or factor * q k.

    PARTS [B, G, T, P, SPLITS, D] and LOGS [B, G, T, P, SPLITS], in powers of two and -inf where a split is
    empty (its PARTS are not written). Without them OUT [B, T, H, D] and LSE [B, T, H]; with COUNTS
    [B, G, tiles], which are 0 before and after, these too, by the last program of each tile.
    """
    tile_m, split = tl.program_id(0), tl.program_id(1)
    b, g = (tl.program_id(2) // G).to(tl.int64), (tl.program_id(2) % G).to(tl.int64)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = rows // P, g * P + rows % P
    live = t < T
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, EDGE)
    q = tl.load(
        Q + b * sq_b + (h * sq_h + t * sq_t)[:, None] + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    keys, values = K + b * sk_b + g * sk_g, V + b * sk_b + g * sk_g
    k_scale = 256.0 if K.dtype.element_ty == tl.int8 else 1.0
    if K_SCALE is not None:
        k_scale *= tl.load(K_SCALE + g)
    if inner is None:
        factor *= k_scale
    else:
        inner *= k_scale

    # Tiles are counted so that one begins where the tree does: then no word of the tree spans two of them.
    # No row sees below itself, so the columns end at the last row of this program.
    prefix = tl.load(PREFIX + b * sp_b).to(tl.int32)
    nodes = C - T + tl.minimum(T - 1, (tile_m * BLOCK_M + BLOCK_M - 1) // P) + 1
    full = tl.cdiv(prefix, BLOCK_N)
    tiles = full + tl.cdiv(nodes, BLOCK_N)
    origin = prefix - full * BLOCK_N
    oldest, newest = 0, 0  # the first column that any row sees, and the first from which on all do
    horizon = prefix
    if window is not None:  # keys at `horizon` and before are out of a row's sight
        horizon = prefix + tl.load(DEPTH + b * sd_b + C - T + t, mask=live, other=0).to(tl.int32) - window
        oldest = tl.maximum(tl.min(tl.where(live, horizon, 2147483646), 0) + 1, 0)
        newest = tl.maximum(tl.max(tl.where(live, horizon, -1), 0) + 1, 0)
    first = (oldest - origin) // BLOCK_N
    whole = tl.minimum(tl.cdiv(newest - origin, BLOCK_N), full)
    per = tl.cdiv(tiles - first, SPLITS)
    begin = first + split * per
    stop = tl.minimum(begin + per, tiles)

    words, tree_from = WORDS + b * sw_b + t * sw_t, tl.where(live, prefix, 2147483647)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SINKS is not None and split == 0:
        top = tl.load(SINKS + h, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    for tile in tl.range(tl.maximum(begin, whole), tl.minimum(stop, full)):
        n0 = origin + tile * BLOCK_N
        k = read(keys, n0, sk_l, None, D, BLOCK_D, BLOCK_N)
        v = read(values, n0, sk_l, None, D, BLOCK_D, BLOCK_N)
        top, total, acc = attend(q, k, v, None, top, total, acc, factor, inner)
    steps: tl.constexpr = BLOCK_N // EDGE
    front, front_end = tl.maximum(begin * steps, (oldest - origin) // EDGE), tl.minimum(stop, whole) * steps
    back = tl.maximum(begin, full) * steps
    back_end = tl.minimum(stop * steps, full * steps + tl.cdiv(nodes, EDGE))
    n_front = tl.maximum(front_end - front, 0)
    for i in tl.range(0, n_front + tl.maximum(back_end - back, 0)):
        n0 = origin + tl.where(i < n_front, front + i, back + i - n_front) * EDGE
        columns = n0 + n
        node = columns - prefix
        inside = (columns >= 0) & (node < nodes)
        k = read(keys, n0, sk_l, inside, D, BLOCK_D, EDGE)
        v = read(values, n0, sk_l, inside, D, BLOCK_D, EDGE)
        word = tl.load(words + (n0 - prefix) // 32, mask=n0 >= tree_from, other=-1)
        seen = inside[None, :] & (((word[:, None] >> (node & 31)[None, :]) & 1) != 0)
        if window is not None:
            below = tl.load(DEPTH + b * sd_b + node, mask=inside & (node >= 0), other=0).to(tl.int32)
            key_position = tl.where(node < 0, columns, prefix + below)
            seen = seen & (key_position[None, :] > horizon[:, None])
        top, total, acc = attend(q, k, v, seen, top, total, acc, factor, inner)

    filled = total > 0.0
    scale = tl.where(filled, 1.0 / tl.where(filled, total, 1.0), 0.0)
    if V.dtype.element_ty == tl.int8:
        scale *= 256.0
    if V_SCALE is not None:
        scale *= tl.load(V_SCALE + g)
    log = tl.where(filled, top + tl.log2(tl.where(filled, total, 1.0)), -float("inf"))
    out = acc * scale[:, None]
    if PARTS is None:
        write_result(OUT, LSE, (b * T * G + g) * P, rows + t * ((G - 1) * P), live, out, log, D, BLOCK_D)
    else:  # as rows are: their tokens and heads needn't be kept in registers until here
        base, part = (b * G + g) * T * P * SPLITS + split, rows * SPLITS
        write_rows(PARTS, base, part, live & filled, out, D, BLOCK_D)
        tl.store(LOGS + base + part, log, mask=live)
    if COUNTS is not None:
        count = COUNTS + tl.program_id(2) * tl.num_programs(0) + tile_m
        if arrives_last(count, SPLITS):
            merge_tile(PARTS, LOGS, OUT, LSE, b, g, tile_m, G, T, SPLITS, P, D, BLOCK_D, BLOCK_M, BLOCK_R)
