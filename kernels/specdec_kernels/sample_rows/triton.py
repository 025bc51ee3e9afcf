"""Keyed draws in Triton, without a sort: one program a row, which loops over tiles of the vocabulary.

A token's weight is exp((logit - largest) / temperature), in [0, 1], where floats sort like their bits.
Truncation keeps all tokens above an edge, and so many of those at the edge, lowest ids first. The edge is
found by bisection on the bits: exact, in at most 30 passes, fewer as bounds snap to weights that occur.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..listing import Compiled
from ..philox import Purpose
from .keyed import clocks, lead, winner

ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, which the likeliest token weighs
WARPS = 16


@triton.jit(do_not_specialize=["seed", "purpose", "top_k"])
def _sample(
    LOGITS,
    REQUEST,
    STEP,
    NODE,
    TOKENS,
    seed,
    purpose,
    temperature,
    top_k,
    top_p,
    V,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    TILE: tl.constexpr,
):
    x = tl.program_id(0).to(tl.int64)
    row = LOGITS + x * V
    top, best, bad = _largest(row, V, TILE)
    if GREEDY or bad:
        tl.store(TOKENS + x, tl.where(bad, -1, best).to(tl.int64))
        return
    edge, room = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    if TOP_K:
        edge, room = _edge(row, top, temperature, edge, top_k * 1.0, V, False, TILE)
    if TOP_P:
        mass, _, _ = _tally(row, top, temperature, edge + 1, V, True, TILE)
        mass += _weigh(edge) * room  # nothing where top-k didn't move the edge from 0
        lowest, fits = _edge(row, top, temperature, edge, top_p * mass, V, True, TILE)
        room = tl.where((lowest > edge) | (TOP_K == 0), fits, tl.minimum(room, fits))
        edge = lowest
    request, step = tl.load(REQUEST + x).to(tl.int32), tl.load(STEP + x).to(tl.int32)
    key = (purpose << 24) | tl.load(NODE + x).to(tl.int32)
    time, token = tl.full([TILE], -1.0, tl.float32), tl.zeros([TILE], tl.int32)
    level = 0
    for first in range(0, V, TILE):
        v = first + tl.arange(0, TILE)
        weight = _weights(row, v, top, temperature, V)
        if TOP_K or TOP_P:
            bits = weight.to(tl.int32, bitcast=True)
            at_edge = (bits == edge).to(tl.int32)
            rank = level + tl.cumsum(at_edge, 0) - at_edge
            kept = (bits > edge) | ((bits == edge) & (rank.to(tl.float32) < room))
            level += tl.sum(at_edge, 0)
            weight = tl.where(kept, weight, 0.0)
        time, token = lead(time, token, weight, clocks(seed, request, step, key, first, TILE), v)
    tl.store(TOKENS + x, winner(time, token).to(tl.int64))


@triton.jit
def _largest(row, V, TILE: tl.constexpr):
    """The largest logit, its lowest token, and whether that logit is no number."""
    time, token = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.int32)
    nan = tl.zeros([TILE], tl.int32)
    for first in range(0, V, TILE):
        v = first + tl.arange(0, TILE)
        logit = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        nan = nan | (logit != logit).to(tl.int32)
        time, token = lead(time, token, logit, 1.0, v)
    top = tl.max(time, 0)
    return top, winner(time, token), (tl.max(nan, 0) > 0) | (top == float("inf")) | (top == float("-inf"))


@triton.jit
def _weights(row, v, top, temperature, V):
    logit = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
    return tl.exp((logit - top) / temperature)


@triton.jit
def _weigh(bits):
    """The weight that has these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _tally(row, top, temperature, pivot, V, MASS: tl.constexpr, TILE: tl.constexpr):
    """Number or mass of the weights whose bits reach the pivot; the lowest such bits; the highest below."""
    total = tl.zeros([TILE], tl.float32)
    low = tl.full([TILE], ONE, tl.int32)
    high = tl.full([TILE], -1, tl.int32)
    for first in range(0, V, TILE):
        v = first + tl.arange(0, TILE)
        weight = _weights(row, v, top, temperature, V)
        bits = tl.where(v < V, weight.to(tl.int32, bitcast=True), -1)
        reaches = bits >= pivot
        total += tl.where(reaches & (v < V), weight if MASS else 1.0, 0.0)
        low = tl.where(reaches, tl.minimum(low, bits), low)
        high = tl.where(reaches, high, tl.maximum(high, bits))
    return tl.sum(total, 0), tl.min(low, 0), tl.max(high, 0)


@triton.jit
def _edge(row, top, temperature, low, target, V, MASS: tl.constexpr, TILE: tl.constexpr):
    """The highest edge that, with all above it, reaches the target, and how many at the edge it takes."""
    high = tl.full([], ONE + 1, tl.int32)  # nothing weighs as much
    above = tl.full([], 0.0, tl.float32)
    while low + 1 < high:
        total, least, most = _tally(row, top, temperature, low + (high - low) // 2, V, MASS, TILE)
        if total < target:
            high = most + 1
            above = total
        elif total > target:
            low = least
        else:  # all from the pivot on, and nothing at the edge just below it
            low += (high - low) // 2 - 1
            high = low + 1
            above = total
    return low, tl.where(above < target, (target - above) / (_weigh(low) if MASS else 1.0), 0.0)


def sample_rows(
    logits_XV: Tensor,
    seed: int,
    request_X: Tensor,
    step_X: Tensor,
    node_X: Tensor,
    purpose: Purpose,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """See the dispatcher."""
    X, V = logits_XV.shape
    token_X = torch.empty(X, dtype=torch.int64, device=logits_XV.device)
    given = (logits_XV, request_X, step_X, node_X)
    _sample[(X,)](
        *(x.contiguous() for x in given),
        token_X,
        seed,
        int(purpose),
        float(temperature),
        top_k,
        float(top_p),
        V,
        GREEDY=temperature == 0,
        TOP_K=0 < top_k < V,
        TOP_P=top_p < 1,
        TILE=min(4096, max(256, triton.next_power_of_2(V))),
        num_warps=WARPS,
    )
    return token_X


def _compiled(name: str, logits: str, greedy: bool, top_k: bool, top_p: bool) -> Compiled:
    keys = {"REQUEST": "*i64", "STEP": "*i64", "NODE": "*i64", "seed": "i64", "purpose": "i32"}
    types = {"LOGITS": logits, **keys, "TOKENS": "*i64", "temperature": "fp32", "top_p": "fp32"}
    constants = {"GREEDY": greedy, "TOP_K": top_k, "TOP_P": top_p, "TILE": 4096}
    return Compiled(name, _sample, types, constants, aligned=("V",), warps=WARPS)


COMPILED = [
    _compiled("top-k and top-p, bf16", "*bf16", False, True, True),
    _compiled("top-p, bf16", "*bf16", False, False, True),
    _compiled("top-k, fp16", "*fp16", False, True, False),
    _compiled("temperature, bf16", "*bf16", False, False, False),
    _compiled("temperature, fp32", "*fp32", False, False, False),
    _compiled("greedy, bf16", "*bf16", True, False, False),
]
