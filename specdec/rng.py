"""Keyed randomness: each coin and draw has its own key, so results depend on neither batch nor call order.

A key is (request, step, node, purpose) under the run's seed and is used once. Only rules that sample the
target itself key their draw by absolute position (`Stream.draw_at`): every proposer then gives the same text.
Shapes: V vocabulary, S support, B batch, N nodes, X any leading shape.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
Word = int | Tensor  # 32 bits, held in a Python int or in int64


class Purpose(IntEnum):
    DRAFT = 0  # which tokens the proposer drafts
    ACCEPT = 1  # coins of the acceptance rule
    RESIDUAL = 2  # the bonus token
    TARGET = 3  # a draw from the target, keyed by position


class Key(NamedTuple):
    """request and step are 32-bit, node 24-bit."""

    request: int
    step: int
    node: int
    purpose: Purpose


def philox(seed: int, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[Word, Word, Word, Word]:
    """Philox-4x32-10 (Salmon et al. 2011): four random words for each counter (c0, c1, c2, c3), broadcast."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def race(weights_XS: Tensor, u_XS: Tensor) -> Tensor:
    """Index [X] drawn in proportion to the weights: the first of exponential clocks, lowest on ties.

    -log1p(-u) rather than -log(u): the winner is the shortest clock, and floats are finest near u = 0.
    """
    return (weights_XS / -torch.log1p(-u_XS)).argmax(dim=-1)


class Rng(ABC):
    """A source of coins and draws. Backends give uniforms; the tests' exhaustive one overrides both."""

    @abstractmethod
    def uniform(self, key: Key) -> float:
        """One number in [0, 1), a multiple of 2^-24."""

    @abstractmethod
    def uniforms(self, key: Key, support_S: Tensor) -> Tensor:
        """float32 [S]: one number in (0, 1) for each token id of the support, which is in ascending order."""

    def coin(self, num: float, den: float, key: Key) -> bool:
        """True with probability min(1, num / den); False where both are 0."""
        return self.uniform(key) * den < num

    def draw(self, weights_V: Tensor, key: Key) -> int:
        """A token with probability proportional to its weight."""
        support_S = weights_V.nonzero().squeeze(-1)
        if len(support_S) == 1:
            return int(support_S)
        u_S = self.uniforms(key, support_S)
        return int(support_S[race(weights_V[support_S], u_S.to(weights_V.dtype))])


@dataclass(frozen=True)
class Philox(Rng):
    """Counter-based uniforms: the same key gives the same number on any device and in any order."""

    seed: int = 0

    def uniform(self, key: Key) -> float:
        return (philox(self.seed, 0, *_counter(*key))[0] >> 8) * 2.0**-24

    def uniforms(self, key: Key, support_S: Tensor) -> Tensor:
        vocab = int(support_S[-1]) + 1
        if vocab < 4 * len(support_S):  # a block serves four tokens: here the whole row costs less
            return self._row(vocab, *_counter(*key), support_S.device)[support_S]
        words_4S = torch.stack(philox(self.seed, support_S >> 2, *_counter(*key)))
        return _open_unit(words_4S.gather(0, (support_S & 3).unsqueeze(0)).squeeze(0))

    def table(self, request_X: Tensor, step_X: Tensor, node_X: Tensor, purpose: Purpose) -> Tensor:
        """float64 [X]: `uniform` of many keys at once; float64 makes u * q < p exact for float32 laws."""
        word_X = philox(self.seed, 0, *_counter(request_X, step_X, node_X, purpose))[0]
        return (word_X >> 8).double() * 2.0**-24

    def rows(self, request_X: Tensor, step_X: Tensor, node_X: Tensor, purpose: Purpose, vocab: int) -> Tensor:
        """float32 [X, V]: `uniforms` of many keys at once, over the whole vocabulary."""
        counter = (c.unsqueeze(-1) for c in _counter(request_X, step_X, node_X, purpose))
        return self._row(vocab, *counter, request_X.device)

    def _row(self, vocab: int, c1: Word, c2: Word, c3: Word, device: torch.device) -> Tensor:
        """float32 [X, V]: word v & 3 of block v >> 2 belongs to token v."""
        block_V = torch.arange(-(-vocab // 4), device=device)
        words = torch.stack(philox(self.seed, block_V, c1, c2, c3), dim=-1)
        return _open_unit(words.flatten(-2)[..., :vocab])


def _counter(request: Word, step: Word, node: Word, purpose: Purpose) -> tuple[Word, Word, Word]:
    return request & MASK, step & MASK, (int(purpose) << 24) | node


def _open_unit(bits: Tensor) -> Tensor:
    """32 random bits to float32 in (0, 1), never rounded up to 1, where a clock would never ring."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)


@dataclass(frozen=True)
class Replay(Rng):
    """Uniforms that were written down: `coins[key]` is a number, `draws[key]` float32 [V]."""

    coins: dict[Key, float]
    draws: dict[Key, Tensor]

    def uniform(self, key: Key) -> float:
        return self.coins[key]

    def uniforms(self, key: Key, support_S: Tensor) -> Tensor:
        return self.draws[key][support_S]


@dataclass(frozen=True, slots=True)
class Stream:
    """The randomness of one sequence at one step. `position` is the index of the token after the root."""

    rng: Rng
    request: int
    step: int
    position: int

    def coin(self, num: float, den: float, node: int) -> bool:
        """The acceptance coin of `node`: true with probability min(1, num / den)."""
        return self.rng.coin(num, den, Key(self.request, self.step, node, Purpose.ACCEPT))

    def draw(self, weights_V: Tensor, node: int, purpose: Purpose) -> int:
        """The draw that `node` makes for `purpose`."""
        return self.rng.draw(weights_V, Key(self.request, self.step, node, purpose))

    def draw_at(self, weights_V: Tensor, depth: int) -> int:
        """The target's own draw `depth` tokens below the root: the same whoever drafted."""
        return self.rng.draw(weights_V, Key(self.request, self.position + depth, 0, Purpose.TARGET))


@dataclass(frozen=True)
class StreamBatch:
    """The streams of one step on the device: request_B, step_B, position_B int64."""

    rng: Philox
    request_B: Tensor
    step_B: Tensor
    position_B: Tensor

    @classmethod
    def pack(cls, streams: list[Stream], device: torch.device | str = "cpu") -> "StreamBatch":
        if any(s.rng != streams[0].rng for s in streams):
            raise ValueError("the sequences of a batch must share one rng; give them the same seed: seed=0")
        fields = [[getattr(s, name) for s in streams] for name in ("request", "step", "position")]
        return cls(streams[0].rng, *(torch.tensor(values, device=device) for values in fields))

    def coins(self, nodes: int) -> Tensor:
        """float64 [B, N]: the uniform behind the acceptance coin of every node."""
        node_1N = torch.arange(nodes, device=self.request_B.device).unsqueeze(0)
        return self.rng.table(self.request_B[:, None], self.step_B[:, None], node_1N, Purpose.ACCEPT)

    def draw(self, weights_BV: Tensor, node_B: Tensor, purpose: Purpose) -> Tensor:
        """int64 [B]: one draw a sequence, keyed by its node."""
        u_BV = self.rng.rows(self.request_B, self.step_B, node_B, purpose, weights_BV.shape[-1])
        return race(weights_BV, u_BV.to(weights_BV.dtype))

    def draw_at(self, weights_BNV: Tensor, depth_BN: Tensor) -> Tensor:
        """int64 [B, N]: the target's draw at every node, keyed by position."""
        position_BN = self.position_B[:, None] + depth_BN
        request_BN, node_BN = self.request_B[:, None], torch.zeros_like(depth_BN)
        u_BNV = self.rng.rows(request_BN, position_BN, node_BN, Purpose.TARGET, weights_BNV.shape[-1])
        return race(weights_BNV, u_BNV.to(weights_BNV.dtype))
