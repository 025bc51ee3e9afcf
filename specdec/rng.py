"""Keyed randomness: each coin and draw has its own key, so results depend on neither batch nor call order.

A key is (request, step, node, purpose) under the run's seed and is used once. Only rules that sample the
target itself key their draw by absolute position (`Stream.draw_at`): every proposer then gives the same text.
Shapes: V vocabulary, S support, B batch, N nodes, X any leading shape.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from specdec_kernels.philox import Purpose, blocks, counter, open_unit, philox, race, row

from .transfer import to_device

ROUND = 1024  # a kept row has a multiple of so many numbers, and serves every support
ROWS = 64  # of positions: more than a draft has levels
FEW = 512  # tokens whose numbers cost less than a row that may never be used


class Key(NamedTuple):
    """request and step are 32-bit, node 24-bit."""

    request: int
    step: int
    node: int
    purpose: Purpose


class Rng(ABC):
    """A source of coins and draws. Backends give uniforms; the tests' exhaustive one overrides both."""

    @abstractmethod
    def uniform(self, key: Key) -> float:
        """One number in [0, 1), a multiple of 2^-24."""

    @abstractmethod
    def uniforms(self, key: Key, support_S: Tensor) -> Tensor:
        """float32 [S]: one number in (0, 1) for each token id of the support."""

    def coin(self, num: float, den: float, key: Key) -> bool:
        """True with probability min(1, num / den); False where both are 0."""
        return self.uniform(key) * den < num

    def kept(self) -> "Rng":
        """The same numbers for one sequence, of which some may be asked for twice."""
        return self

    def noise(self, support_S: Tensor, key: Key) -> Tensor:
        """float32 [S]: the Gumbel noise that a draw adds to these tokens' log-weights to take the largest."""
        u_S = self.uniforms(key, support_S) if len(support_S) else torch.empty(0)
        return -torch.log(-torch.log1p(-u_S))

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
        return (philox(self.seed, 0, *counter(*key))[0] >> 8) * 2.0**-24

    def kept(self) -> Rng:
        return Kept(self.seed)

    def uniforms(self, key: Key, support_S: Tensor) -> Tensor:
        vocab = int(support_S.max()) + 1
        if self._takes_row(key, vocab, len(support_S)):
            return self._row(key, vocab, support_S.device)[support_S]
        words_S4 = blocks(self.seed, support_S >> 2, *counter(*key))
        return open_unit(words_S4.gather(1, (support_S & 3).unsqueeze(1)).squeeze(1))

    def _takes_row(self, key: Key, vocab: int, support: int) -> bool:
        return vocab < 4 * support  # a block serves four tokens: here the whole row costs less

    def _row(self, key: Key, vocab: int, device: torch.device) -> Tensor:
        """float32 [V] or longer."""
        return row(self.seed, vocab, *counter(*key), device)


@dataclass(frozen=True)
class Kept(Philox):
    """Remembers the latest rows: the target draws with those that a coupled draft has asked for."""

    _rows: dict[Key, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _takes_row(self, key: Key, vocab: int, support: int) -> bool:
        return key in self._rows or support > FEW

    def _row(self, key: Key, vocab: int, device: torch.device) -> Tensor:
        kept_V = self._rows.pop(key, None)  # and put in again, as the latest
        if kept_V is None or len(kept_V) < vocab:
            kept_V = super()._row(key, -(-vocab // ROUND) * ROUND, device)
        if len(self._rows) == ROWS:
            del self._rows[next(iter(self._rows))]
        self._rows[key] = kept_V
        return kept_V


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
        return self.rng.draw(weights_V, self._target(depth))

    def noise_at(self, support_S: Tensor, depth: int) -> Tensor:
        """float32 [S]: the noise of that draw for some tokens."""
        return self.rng.noise(support_S, self._target(depth))

    def _target(self, depth: int) -> Key:
        return Key(self.request, self.position + depth, 0, Purpose.TARGET)


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
        return cls(streams[0].rng, *(to_device(values, device) for values in fields))
