"""Triton functions of the tests: what kernels draw, and acceptance helpers that are wrong. Imports triton."""

import triton
import triton.language as tl

from specdec_kernels.sample_rows.keyed import clocks, coin, exponential
from specdec_kernels.tree_accept.kernels import _spend


@triton.jit
def draw_both(COIN, CLOCK, seed, c1, c2, c3, TILE: tl.constexpr):
    """Coins of the keys c3, c3 + 1, ..., and clocks of the tokens 64, 65, ... of one key."""
    lane = tl.arange(0, TILE)
    tl.store(COIN + lane, coin(seed, c1, c2, c3 + lane))
    tl.store(CLOCK + lane, clocks(seed, c1, c2, c3, 64, TILE))


@triton.jit
def ring(U, CLOCK, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    tl.store(CLOCK + lane, exponential(tl.load(U + lane)))


@triton.jit
def one_coin_for_all(seed, c1, c2, c3):
    return coin(seed, c1, c2, c3 * 0)


@triton.jit
def one_key_for_all(seed, c1, c2, c3, first, TILE: tl.constexpr):
    return clocks(seed, c1, c2, c3 * 0, first, TILE)


@triton.jit
def p_not_renormalised(
    P, p_sum, Q, q_sum, REST, STRUCK, x, drawn, V, HAS_Q: tl.constexpr, TILE: tl.constexpr
):
    rest, struck = _spend(P, p_sum, Q, q_sum, REST, STRUCK, x, drawn, V, HAS_Q, TILE)
    return tl.minimum(1.0, rest * 1e30), struck


@triton.jit
def q_not_renormalised(
    P, p_sum, Q, q_sum, REST, STRUCK, x, drawn, V, HAS_Q: tl.constexpr, TILE: tl.constexpr
):
    rest, struck = _spend(P, p_sum, Q, q_sum, REST, STRUCK, x, drawn, V, HAS_Q, TILE)
    return rest, tl.minimum(1.0, struck * 1e30)
