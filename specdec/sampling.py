"""From logits to laws: temperature, top-k, top-p. One-hot at temperature 0, so greedy is no special case.

Shapes: B batch, N nodes, V vocabulary, K candidates kept, X any leading shape.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from specdec_kernels import sample_rows
from specdec_kernels.philox import Purpose

from .rng import StreamBatch

HEAD = 512  # candidates tried before a whole row is sorted for top-p


@dataclass(frozen=True)
class Sampling:
    """How text is sampled. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}, expected 0 (greedy) or above: temperature=0.7"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number in (0, 1]: top_p=0.9")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k is {self.top_k}, expected a count, or 0 for all tokens: top_k=50")

    def law(self, logits_V: Tensor) -> Tensor:
        """float32 [V]: the next-token law; one-hot at the lowest-index maximum at temperature 0."""
        return self.laws(logits_V)

    def laws(self, logits_XV: Tensor) -> Tensor:
        """float32 [X, V]: the laws of many rows at once; no synchronisation on CUDA."""
        # In 16 bits a CPU takes five times as long to find the largest (experiments/LOG.md).
        best_X1 = (logits_XV if logits_XV.is_cuda else logits_XV.float()).argmax(dim=-1, keepdim=True)
        if self.temperature == 0:
            return torch.zeros_like(logits_XV, dtype=torch.float32).scatter_(-1, best_X1, 1.0)
        below_XV = logits_XV.float() - logits_XV.gather(-1, best_X1).float()  # cannot overflow when divided
        return self._truncate(torch.softmax(below_XV / self.temperature, dim=-1))

    def _truncate(self, p_XV: Tensor) -> Tensor:
        """Keep the top-k most likely tokens, then the fewest of those that reach top_p of their mass."""
        if not self.top_k and self.top_p == 1:
            return p_XV
        ids_XK = self._candidates(p_XV)
        p_XK = p_XV.gather(-1, ids_XK)
        if self.top_k:
            p_XK = p_XK / p_XK.sum(-1, keepdim=True)
        above_XK = p_XK.cumsum(-1) - p_XK
        kept_XK = torch.where(above_XK < self.top_p, p_XK, 0.0)
        return torch.zeros_like(p_XV).scatter_(-1, ids_XK, kept_XK / kept_XK.sum(-1, keepdim=True))

    def _candidates(self, p_XV: Tensor) -> Tensor:
        """Ids [X, K] of the most likely tokens: the top-k, or a head that holds top_p of the mass."""
        vocab = p_XV.shape[-1]
        if self.top_k:
            return _most_likely(p_XV, min(self.top_k, vocab))
        if vocab > HEAD and not p_XV.is_cuda:  # a device can't be asked without waiting for it
            ids_XK = _most_likely(p_XV, HEAD)
            if (p_XV.gather(-1, ids_XK).sum(-1) >= self.top_p).all():
                return ids_XK
        return _most_likely(p_XV, vocab)


class LawTable(Protocol):
    """The target's laws p: a tensor [N, V], or `Laws`, which computes the rows asked for."""

    def __getitem__(self, node: int) -> Tensor: ...


def _most_likely(p_XV: Tensor, count: int) -> Tensor:
    """Ids [X, K] in descending order of p, lowest id first among equals, which `topk` alone leaves open."""
    vocab = p_XV.shape[-1]
    backwards_V = torch.arange(vocab - 1, -1, -1, device=p_XV.device)
    bits_XV = p_XV.view(torch.int32).long()  # floats that are not negative sort like their bits
    return vocab - 1 - ((bits_XV << 32) + backwards_V).topk(count).values % 2**32


@dataclass
class Laws:
    """The target's laws p at the nodes of one tree, computed when a rule asks for one: `p[n]` is float32 [V].

    where  names the request and the step in the error raised for logits that are not numbers.
    """

    logits_NV: Tensor
    sampling: Sampling
    where: str = ""
    _seen: dict[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, node: int) -> Tensor:
        if node not in self._seen:
            logits_V = self.logits_NV[node]
            if not logits_V.max().isfinite():  # the largest is NaN where any is
                raise not_numbers(self.where)
            self._seen[node] = self.sampling.law(logits_V)
        return self._seen[node]


@dataclass(frozen=True)
class LawBatch:
    """The target's laws of a whole batch, computed as far as a rule asks, without a synchronisation."""

    logits_BNV: Tensor
    sampling: Sampling

    @cached_property
    def p_BNV(self) -> Tensor:
        """float32: the laws themselves."""
        return self.sampling.laws(self.logits_BNV)

    def best(self) -> Tensor:
        """int64 [B, N]: the most likely token at each node."""
        return self.logits_BNV.argmax(-1)

    def draw(self, streams: StreamBatch, depth_BN: Tensor) -> Tensor:
        """int64 [B, N]: the target's own draw at each node, as Stream.draw_at's; -1 at a bad row."""
        B, N, V = self.logits_BNV.shape
        keys = (
            streams.request_B[:, None],
            streams.position_B[:, None] + depth_BN,
            torch.zeros_like(depth_BN),
        )
        request_X, position_X, node_X = (key_BN.expand(B, N).reshape(-1) for key_BN in keys)
        return sample_rows(
            self.logits_BNV.reshape(-1, V),
            streams.rng.seed,
            request_X,
            position_X,
            node_X,
            Purpose.TARGET,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
        ).view(B, N)


def not_numbers(where: str) -> FloatingPointError:
    """The error for logits that are NaN or infinite; `where` names the request and the step."""
    return FloatingPointError(f"{where}: the target's logits are NaN or infinite; try target.dtype=float32")
