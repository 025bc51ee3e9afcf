"""The acceptance kernels: one program a sequence, which loops over tiles of the vocabulary.

Divisions round as torch's do, so that coins fall as in `naive`.
"""

import triton
import triton.language as tl

from ..philox import Purpose
from ..sample_rows.keyed import clocks, coin, lead, winner

ACCEPT = tl.constexpr(Purpose.ACCEPT << 24)
RESIDUAL = tl.constexpr(Purpose.RESIDUAL << 24)


@triton.jit
def _store_path(PATH, COUNT, b, accepted, node, N):
    """Write the accepted nodes in order, then -1."""
    rank = tl.cumsum(accepted, 0) - 1
    count = tl.sum(accepted, 0)
    tl.store(PATH + b * N + rank, node.to(tl.int64), mask=accepted != 0)
    tl.store(PATH + b * N + node, (node * 0 - 1).to(tl.int64), mask=(node >= count) & (node < N))
    tl.store(COUNT + b, count.to(tl.int64))


@triton.jit
def walk(TOKENS, PARENTS, WORDS, NODES, CHOICE, PATH, COUNT, BONUS, N, W, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK)
    real = node < tl.load(NODES + b)
    parent = tl.load(PARENTS + b * N + node, mask=real, other=-1)
    below_root = parent >= 0
    token = tl.load(TOKENS + b * N + node, mask=real, other=0)
    chosen = token == tl.load(CHOICE + b * N + parent, mask=below_root, other=-1)
    missed = (below_root & ~chosen).to(tl.int32)
    misses = tl.zeros([BLOCK], tl.int32)
    depth = tl.zeros([BLOCK], tl.int32)
    for w in range(W):
        word = tl.load(WORDS + (b * N + node) * W + w, mask=real, other=0)
        off_path = tl.sum(
            tl.where(node // 32 == w, missed << (node % 32), 0), 0
        )  # distinct bits: a sum is an or
        misses = misses | (word & off_path)
        depth += _popcount(word)
    reached = below_root & (misses == 0)
    # the deepest, then the lowest; the root if none
    end = BLOCK - 1 - tl.max(tl.where(reached, depth * BLOCK, 0) + BLOCK - 1 - node, 0) % BLOCK
    words = tl.load(WORDS + (b * N + end) * W + node // 32, mask=real, other=0)
    _store_path(PATH, COUNT, b, ((words >> (node % 32)) & 1) * below_root.to(tl.int32), node, N)
    tl.store(BONUS + b, tl.load(CHOICE + b * N + end))


@triton.jit
def _popcount(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF


@triton.jit(do_not_specialize=["seed"])
def recursive(
    TOKENS,
    PARENTS,
    DRAWN,
    P,
    Q,
    REQUEST,
    STEP,
    SCRATCH,
    PATH,
    COUNT,
    BONUS,
    seed,
    N,
    V,
    HAS_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    request, step = tl.load(REQUEST + b).to(tl.int32), tl.load(STEP + b).to(tl.int32)
    node = tl.arange(0, BLOCK)
    parent = tl.load(PARENTS + b * N + node, mask=node < N, other=-1).to(tl.int32)
    accepted = tl.zeros([BLOCK], tl.int32)
    at = 0
    # what is left of p is left / left_sum; what is left of q is law / law_sum
    left, left_sum = P + b * N * V, 1.0
    law, law_sum = Q + b * N * V, 1.0
    spare = 0  # which of two scratch rows holds nothing
    n = tl.min(tl.where(parent == at, node, N), 0)
    while n < N:
        x = tl.load(TOKENS + b * N + n)
        drawn = tl.load(DRAWN + b * N + at).to(tl.int32)
        den = _law(law, law_sum, x, x, V, drawn, HAS_Q)
        num = tl.div_rn(tl.load(left + x), left_sum)
        if coin(seed, request, step, n | ACCEPT) * den.to(tl.float64) < num.to(tl.float64):
            accepted += (node == n).to(tl.int32)
            at = n
            left, left_sum = P + (b * N + n) * V, 1.0
            law, law_sum = Q + (b * N + n) * V, 1.0
        else:
            rest = SCRATCH + (b * 3 + spare) * V
            struck = SCRATCH + (b * 3 + 2) * V
            total, kept = _spend(left, left_sum, law, law_sum, rest, struck, x, drawn, V, HAS_Q, TILE)
            if total > 0:
                left, left_sum = rest, total
                spare = 1 - spare
            law, law_sum = struck, tl.where(kept > 0, kept, 1.0)
        n = tl.min(tl.where((parent == at) & (node > n), node, N), 0)
    _store_path(PATH, COUNT, b, accepted, node, N)
    time, token = tl.full([TILE], -1.0, tl.float32), tl.zeros([TILE], tl.int32)
    for first in range(0, V, TILE):
        v = first + tl.arange(0, TILE)
        clock = clocks(seed, request, step, at | RESIDUAL, first, TILE)
        weight = tl.load(left + v, mask=v < V, other=-1.0)
        time, token = lead(time, token, weight, clock, v)
    tl.store(BONUS + b, winner(time, token).to(tl.int64))


@triton.jit
def _law(Q, q_sum, v, x, V, drawn, HAS_Q: tl.constexpr):
    """The law that x was drafted from, at the tokens v: q / q_sum if drawn is 1, all on x if it is 0."""
    if HAS_Q:
        drafted = tl.div_rn(tl.load(Q + v, mask=v < V * drawn, other=0.0), q_sum)
    else:
        drafted = (v * 0).to(tl.float32)
    return tl.where(drawn == 1, drafted, (v == x).to(tl.float32))


@triton.jit
def _spend(P, p_sum, Q, q_sum, REST, STRUCK, x, drawn, V, HAS_Q: tl.constexpr, TILE: tl.constexpr):
    """Write (p - law)+ and the law without x, neither normalised; return their sums."""
    rest_sum = tl.zeros([TILE], tl.float32)
    struck_sum = tl.zeros([TILE], tl.float32)
    tl.debug_barrier()  # threads that are behind still read the coin's p and q from the rows written here
    for first in range(0, V, TILE):
        v = first + tl.arange(0, TILE)
        ok = v < V
        law = _law(Q, q_sum, v, x, V, drawn, HAS_Q)
        rest = tl.maximum(tl.div_rn(tl.load(P + v, mask=ok, other=0.0), p_sum) - law, 0.0)
        struck = tl.where(v == x, 0.0, law)
        tl.store(REST + v, rest, mask=ok)
        if HAS_Q:
            tl.store(STRUCK + v, struck, mask=v < V * drawn)
        rest_sum += rest
        struck_sum += struck
    tl.debug_barrier()  # other threads read these rows next
    return tl.sum(rest_sum, 0), tl.sum(struck_sum, 0)


@triton.jit
def gains(
    TOKENS,
    NODES,
    DRAWN,
    P,
    Q,
    WEIGHT,
    GAIN,
    N,
    V,
    HAS_Q: tl.constexpr,
    TILE: tl.constexpr,
):
    b, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if n >= tl.load(NODES + b):
        return
    weight = tl.full([], 1.0, tl.float64)
    for i in range(1, n + 1):
        x = tl.load(TOKENS + b * N + i)
        drawn = tl.load(DRAWN + b * N + i - 1).to(tl.int32)
        den = _law(Q + (b * N + i - 1) * V, 1.0, x, x, V, drawn, HAS_Q)
        num = tl.load(P + (b * N + i - 1) * V + x)
        weight = weight * (num.to(tl.float64) / den.to(tl.float64))
        weight = tl.where(weight > 1.0, 1.0, weight)
    gain = tl.zeros([TILE], tl.float32)
    for first in range(0, V, TILE):
        v = first + tl.arange(0, TILE)
        gain += _over(TOKENS, NODES, DRAWN, P, Q, weight, b, n, v, N, V, HAS_Q)[1]
    tl.store(WEIGHT + b * N + n, weight)
    tl.store(GAIN + b * N + n, tl.sum(gain, 0).to(tl.float64))


@triton.jit
def _over(TOKENS, NODES, DRAWN, P, Q, weight, b, n, v, N, V, HAS_Q: tl.constexpr):
    """weight * p at node n, and its part above the law of the next token, which is 0 at the chain's end."""
    ok = v < V
    inner = n + 1 < tl.load(NODES + b)
    drawn = tl.load(DRAWN + b * N + n, mask=inner, other=0).to(tl.int32)
    child = tl.load(TOKENS + b * N + n + 1, mask=inner, other=-1)
    weighted = weight.to(tl.float32) * tl.load(P + (b * N + n) * V + v, mask=ok, other=0.0)
    law = _law(Q + (b * N + n) * V, 1.0, v, child, V, drawn, HAS_Q)
    return weighted, tl.maximum(weighted - law, 0.0)


@triton.jit(do_not_specialize=["seed"])
def block(
    TOKENS,
    NODES,
    DRAWN,
    P,
    Q,
    REQUEST,
    STEP,
    WEIGHT,
    GAIN,
    PATH,
    COUNT,
    BONUS,
    seed,
    N,
    V,
    HAS_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    request, step = tl.load(REQUEST + b).to(tl.int32), tl.load(STEP + b).to(tl.int32)
    node = tl.arange(0, BLOCK)
    thrown = (node > 0) & (node < tl.load(NODES + b))
    weight = tl.load(WEIGHT + b * N + node, mask=thrown, other=1.0)
    gain = tl.load(GAIN + b * N + node, mask=thrown, other=0.0)
    success = thrown & (coin(seed, request, step, node | ACCEPT) * (gain + (1.0 - weight)) < gain)
    end = tl.max(tl.where(success, node, 0), 0)
    _store_path(PATH, COUNT, b, ((node > 0) & (node <= end)).to(tl.int32), node, N)
    weight = tl.load(WEIGHT + b * N + end)
    none = tl.full([TILE], -1.0, tl.float32)
    time, token = none, tl.zeros([TILE], tl.int32)  # over what is left
    whole_time, whole_token = time, token  # over all of weight * p, where nothing is left
    for first in range(0, V, TILE):
        v = first + tl.arange(0, TILE)
        weighted, over = _over(TOKENS, NODES, DRAWN, P, Q, weight, b, end, v, N, V, HAS_Q)
        clock = clocks(seed, request, step, end | RESIDUAL, first, TILE)
        time, token = lead(time, token, tl.where(v < V, over, none), clock, v)
        whole_time, whole_token = lead(whole_time, whole_token, tl.where(v < V, weighted, none), clock, v)
    bonus = tl.where(tl.max(time, 0) > 0, winner(time, token), winner(whole_time, whole_token))
    tl.store(BONUS + b, bonus.to(tl.int64))
