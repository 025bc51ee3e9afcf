"""Keyed randomness on tensors: every key names its own uniforms, the same on any device and in any order.

A key is (request, step, node, purpose) under a seed. Shapes: X any leading shape, V vocabulary, S support.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
Word = int | np.ndarray | Tensor  # 32 bits, held in a Python int or in 64 bits


class Purpose(IntEnum):
    """What a key's randomness is for."""

    DRAFT = 0  # which tokens the proposer drafts
    ACCEPT = 1  # coins of the acceptance rule
    RESIDUAL = 2  # the bonus token
    TARGET = 3  # a draw from the target, keyed by position


def philox(seed: int, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[Word, Word, Word, Word]:
    """Philox-4x32-10 (Salmon et al. 2011): four random words for each counter (c0, c1, c2, c3), broadcast."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def counter(request: Word, step: Word, node: Word, purpose: Purpose) -> tuple[Word, Word, Word]:
    """(c1, c2, c3) of a key; c0 counts the blocks that it owns. request and step are 32-bit, node 24-bit."""
    return request & MASK, step & MASK, (int(purpose) << 24) | node


def coins(seed: int, request_X: Tensor, step_X: Tensor, node_X: Tensor, purpose: Purpose) -> Tensor:
    """float64 [X]: one number in [0, 1) a key, a multiple of 2^-24.

    So float64 holds u * q exactly for a float32 q, and u * q < p is decided without rounding.
    """
    word_X = philox(seed, 0, *counter(request_X, step_X, node_X, purpose))[0]
    return (word_X >> 8).double() * 2.0**-24


def rows(
    seed: int, request_X: Tensor, step_X: Tensor, node_X: Tensor, purpose: Purpose, vocab: int
) -> Tensor:
    """float32 [X, V]: one number in (0, 1) for each key and token id."""
    key = (c.unsqueeze(-1) for c in counter(request_X, step_X, node_X, purpose))
    return row(seed, vocab, *key, request_X.device)


def row(seed: int, vocab: int, c1: Word, c2: Word, c3: Word, device: torch.device) -> Tensor:
    """float32 [X, V] for counters [X, 1]: word v & 3 of block v >> 2 belongs to token v."""
    words = blocks(seed, torch.arange(-(-vocab // 4), device=device), c1, c2, c3)
    return open_unit(words.flatten(-2)[..., :vocab])


def blocks(seed: int, block_S: Tensor, c1: Word, c2: Word, c3: Word) -> Tensor:
    """int64 [..., S, 4]: the words of some blocks of a key, or of each of many."""
    if block_S.device.type != "cpu" or not isinstance(c1, int):
        return torch.stack(philox(seed, block_S, c1, c2, c3), dim=-1)
    # Of one key on a CPU: a hundred small operations, which cost numpy a third.
    words_4S = philox(seed, block_S.numpy().view(np.uint64), c1, c2, c3)
    return torch.from_numpy(np.stack(words_4S, axis=-1).view(np.int64))


def open_unit(bits: Tensor) -> Tensor:
    """32 random bits to float32 in (0, 1), never rounded up to 1, where a clock would never ring."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)


def race(weights_XS: Tensor, u_XS: Tensor) -> Tensor:
    """Index [X] drawn in proportion to the weights: the first of exponential clocks, lowest on ties.

    -log1p(-u) rather than -log(u): the winner is the shortest clock, and floats are finest near u = 0.
    """
    return (weights_XS / -torch.log1p(-u_XS)).argmax(dim=-1)
