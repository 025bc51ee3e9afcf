"""Tree building in one launch, top tokens in two, without a sort."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..listing import Compiled
from . import BuiltTree

LOW = tl.constexpr(0xFFFFFFFF)
NOTHING = tl.constexpr(-(2**63))  # below the key of every logit
TILE_V = 2048


@triton.jit
def ordered(x):
    """int64 in the order of the float32, both zeros alike, above -2^32."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def largest(key_M, k):
    """Whether each 32-bit unsigned key is one of the k largest, the first ones among ties.

    The k-th largest is found bit by bit from the top.
    """
    kth = tl.full([], 0, tl.int64)
    for i in range(32):
        trial = kth | (tl.full([], 1, tl.int64) << (31 - i))
        kth = tl.where(tl.sum((key_M >= trial).to(tl.int32), 0) >= k, trial, kth)
    larger_M, tied_M = key_M > kth, key_M == kth
    left = k - tl.sum(larger_M.to(tl.int32), 0)
    return larger_M | (tied_M & (tl.cumsum(tied_M.to(tl.int32), 0) <= left))


@triton.jit
def tree_build_kernel(
    tokens,
    parents,
    scores,
    root,
    out_tokens,
    out_parents,
    out_depth,
    out_words,
    out_n,
    candidates,
    nodes,
    words,
    ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid (B,): one program chooses and numbers a sequence's nodes, then looks up from each of them."""
    b = tl.program_id(0).to(tl.int64)
    m_M = tl.arange(0, BLOCK_M)
    at_M = b * candidates + m_M
    inside_M = m_M < candidates
    score_M = tl.load(scores + at_M, mask=inside_M, other=float("-inf")).to(tl.float32)
    alive_M = score_M > float("-inf")
    count = tl.minimum(tl.sum(alive_M.to(tl.int32), 0), nodes - 1)
    chosen_M = largest(tl.where(alive_M, ordered(score_M) + 0x80000000, 0), count)
    place_M = tl.cumsum(chosen_M.to(tl.int32), 0)
    above_M = tl.load(parents + at_M, mask=inside_M, other=-1).to(tl.int32)
    parent_M = tl.where(above_M < 0, 0, tl.gather(place_M, tl.maximum(above_M, 0), 0))
    token_M = tl.load(tokens + at_M, mask=chosen_M, other=0)
    tl.store(out_tokens + b * nodes + place_M, token_M, mask=chosen_M)
    tl.store(out_parents + b * nodes + place_M, parent_M.to(tl.int64), mask=chosen_M)

    n_N = tl.arange(0, BLOCK_N)
    at_N = b * nodes + n_N
    unset_N = ((n_N == 0) | (n_N > count)) & (n_N < nodes)
    tl.store(out_tokens + at_N, tl.where(n_N == 0, tl.load(root + b), 0), mask=unset_N)
    tl.store(out_parents + at_N, tl.full([BLOCK_N], -1, tl.int64), mask=unset_N)
    tl.store(out_n + b, (count + 1).to(tl.int64))
    tl.debug_barrier()  # other threads of this program have written what is read now
    up_N = tl.load(out_parents + at_N, mask=n_N < nodes, other=-1).to(tl.int32)
    depth_N = (up_N >= 0).to(tl.int32)
    up_N = tl.where(up_N < 0, n_N, up_N)
    w_W = tl.arange(0, BLOCK_W)[None, :]
    one_NW = tl.full([BLOCK_N, BLOCK_W], 1, tl.int32)
    word_NW = tl.where(w_W == (n_N >> 5)[:, None], one_NW << (n_N & 31)[:, None], 0)
    for _ in tl.static_range(ROUNDS):
        word_NW |= tl.gather(word_NW, tl.broadcast_to(up_N[:, None], [BLOCK_N, BLOCK_W]), 0)
        depth_N += tl.gather(depth_N, up_N, 0)
        up_N = tl.gather(up_N, up_N, 0)
    tl.store(out_depth + at_N, depth_N.to(tl.int64), mask=n_N < nodes)
    at_NW = at_N[:, None] * words + w_W
    tl.store(out_words + at_NW, word_NW, mask=(n_N[:, None] < nodes) & (w_W < words))


def tree_build(
    tokens_BM: Tensor, parents_BM: Tensor, scores_BM: Tensor, root_B: Tensor, nodes: int
) -> BuiltTree:
    """See the dispatcher."""
    B, M = tokens_BM.shape
    words = triton.cdiv(nodes, 32)
    rows_BN = [tokens_BM.new_empty(B, nodes) for _ in range(3)]
    built = BuiltTree(
        *rows_BN, tokens_BM.new_empty(B, nodes, words, dtype=torch.int32), tokens_BM.new_empty(B)
    )
    tree_build_kernel[(B,)](
        tokens_BM.contiguous(),
        parents_BM.contiguous(),
        scores_BM.contiguous(),
        root_B.contiguous(),
        *built,
        M,
        nodes,
        words,
        **_blocks(M, nodes),
        num_warps=_warps(M),
    )
    return built


def _warps(candidates: int) -> int:
    """With 4, more than 1024 candidates spill on sm_80."""
    return 4 if candidates <= 1024 else 8


def _blocks(candidates: int, nodes: int) -> dict[str, int]:
    return {
        "ROUNDS": (nodes - 1).bit_length(),
        "BLOCK_M": max(32, triton.next_power_of_2(candidates)),
        "BLOCK_N": max(32, triton.next_power_of_2(nodes)),
        "BLOCK_W": triton.next_power_of_2(triton.cdiv(nodes, 32)),
    }


@triton.jit
def top_of_tile_kernel(logits, keys, maxima, sums, vocab, stride, K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Grid (X, tiles): the tile's K largest keys, its maximum and its sum of exponentials."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * tl.num_programs(1) + tile
    v_V = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x_V = tl.load(logits + row * stride + v_V, mask=v_V < vocab, other=float("-inf")).to(tl.float32)
    largest = tl.max(x_V, 0)
    tl.store(maxima + at, largest)
    tl.store(sums + at, tl.sum(tl.exp(x_V - tl.where(largest == float("-inf"), 0.0, largest)), 0))
    key_V = tl.where(v_V < vocab, (ordered(x_V) << 32) | (v_V.to(tl.int64) ^ LOW), NOTHING)
    for i in tl.static_range(K):
        best = tl.max(key_V, 0)
        tl.store(keys + at * K + i, best)
        key_V = tl.where(key_V == best, NOTHING, key_V)


@triton.jit
def top_of_row_kernel(
    keys,
    maxima,
    sums,
    out_logp,
    out_tokens,
    tiles,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (X,): merges what the tiles of a row found."""
    row = tl.program_id(0).to(tl.int64)
    t_T = tl.arange(0, BLOCK_T)
    max_T = tl.load(maxima + row * tiles + t_T, mask=t_T < tiles, other=float("-inf"))
    sum_T = tl.load(sums + row * tiles + t_T, mask=t_T < tiles, other=0.0)
    largest = tl.max(max_T, 0)
    norm = largest + tl.log(tl.sum(sum_T * tl.exp(max_T - largest), 0))
    c_C = tl.arange(0, BLOCK_C)
    key_C = tl.load(keys + row * tiles * K + c_C, mask=c_C < tiles * K, other=NOTHING)
    for i in tl.static_range(K):
        best = tl.max(key_C, 0)
        key_C = tl.where(key_C == best, NOTHING, key_C)
        bits = (best >> 32).to(tl.int32)
        logit = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(out_logp + row * K + i, logit - norm)
        tl.store(out_tokens + row * K + i, (best & LOW) ^ LOW)


def top_tokens(logits_XV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See the dispatcher."""
    X, V = logits_XV.shape
    tiles = triton.cdiv(V, TILE_V)
    keys_XTk = logits_XV.new_empty(X, tiles, k, dtype=torch.int64)
    max_XT, sum_XT = logits_XV.new_empty(2, X, tiles, dtype=torch.float32)
    logp_Xk = logits_XV.new_empty(X, k, dtype=torch.float32)
    tokens_Xk = logits_XV.new_empty(X, k, dtype=torch.int64)
    logits_XV = logits_XV if logits_XV.stride(1) == 1 else logits_XV.contiguous()
    top_of_tile_kernel[(X, tiles)](
        logits_XV, keys_XTk, max_XT, sum_XT, V, logits_XV.stride(0), K=k, BLOCK_V=TILE_V
    )
    blocks = {"BLOCK_T": triton.next_power_of_2(tiles), "BLOCK_C": triton.next_power_of_2(tiles * k)}
    top_of_row_kernel[(X,)](keys_XTk, max_XT, sum_XT, logp_Xk, tokens_Xk, tiles, K=k, **blocks)
    return logp_Xk, tokens_Xk


def _compiled_build(candidates: int, nodes: int) -> Compiled:
    whole = ("tokens", "parents", "root", "out_tokens", "out_parents", "out_depth", "out_n")
    return Compiled(
        name=f"build M={candidates} N={nodes}",
        kernel=tree_build_kernel,
        types=dict.fromkeys(whole, "*i64") | {"scores": "*fp32", "out_words": "*i32"},
        constants=_blocks(candidates, nodes),
        warps=_warps(candidates),
    )


def _compiled_tile(dtype: str, k: int) -> Compiled:
    return Compiled(
        name=f"tile {dtype} k={k}",
        kernel=top_of_tile_kernel,
        types={"logits": f"*{dtype}", "keys": "*i64", "maxima": "*fp32", "sums": "*fp32"},
        constants={"K": k, "BLOCK_V": TILE_V},
        aligned=("vocab", "stride"),
    )


def _compiled_row(vocab: int, k: int) -> Compiled:
    tiles = triton.cdiv(vocab, TILE_V)
    types = {"keys": "*i64", "out_tokens": "*i64"} | dict.fromkeys(("maxima", "sums", "out_logp"), "*fp32")
    blocks = {"BLOCK_T": triton.next_power_of_2(tiles), "BLOCK_C": triton.next_power_of_2(tiles * k)}
    return Compiled(f"row V={vocab} k={k}", top_of_row_kernel, types, {"K": k} | blocks)


COMPILED = [
    *(_compiled_build(M, N) for M, N in ((42, 8), (224, 32), (510, 64), (510, 128), (1040, 256))),
    *(_compiled_tile(dtype, k) for dtype, k in (("bf16", 1), ("bf16", 10), ("bf16", 16), ("fp32", 10))),
    *(_compiled_row(V, 10) for V in (32000, 128256)),
]
