"""Keyed randomness inside Triton kernels, the same words as `specdec_kernels.philox`.

A key is the three words (c1, c2, c3) of `philox.counter`, as 32-bit integers.
"""

import triton
import triton.language as tl


@triton.jit
def coin(seed, c1, c2, c3):
    """float64 in [0, 1), a multiple of 2^-24; the shape is that of c3."""
    none = c3 * 0
    word, _, _, _ = tl.philox(seed, none, none + c1, none + c2, c3)
    return (word >> 8).to(tl.float64) * 5.9604644775390625e-08


@triton.jit
def clocks(seed, c1, c2, c3, first, TILE: tl.constexpr):
    """float32 [TILE]: exponential clocks of the tokens from `first` on, a multiple of 4."""
    block = first // 4 + tl.arange(0, TILE // 4)
    none = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, none + c1, none + c2, none + c3)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    return exponential(u)


@triton.jit
def exponential(u):
    """-log1p(-u). 1 - u is rounded; the quotient undoes what that does to the logarithm (Kahan)."""
    w = 1.0 - u
    return tl.where(w < 1.0, -tl.log(w) * tl.div_rn(u, 1.0 - w), u)


@triton.jit
def lead(time, token, weight, clock, v):
    """The race so far, lane by lane: the best weight / clock, its token. Tokens come in ascending order."""
    now = tl.div_rn(weight, clock)
    leads = now > time
    return tl.where(leads, now, time), tl.where(leads, v, token)


@triton.jit
def winner(time, token):
    """The token that leads over all lanes; the lowest on ties."""
    return tl.min(tl.where(time == tl.max(time, 0), token, 2147483647), 0)
