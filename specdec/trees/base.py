"""What a tree policy is, and what a draft answers it.

A policy is a value. `grow` is a generator, so that drafts of many sequences run in one batch: it yields the
nodes whose laws it wants next, is sent one DraftLaw for each, and returns the tree. A decision about a node
never looks at that node's own draw: a drawn token stays in the tree, only what follows it may be left out.
Shapes: K tokens that a law speaks of, V vocabulary, N nodes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..rng import Stream, StreamBatch
from ..sampling import Sampling
from ..tree import TokenTree, TreeBatch
from .device import DeviceDraft

LENGTHS = ("fixed", "heuristic", "confidence")


@dataclass
class DraftLaw:
    """What the draft thinks comes next at a node: log-probabilities of some tokens, or of all.

    logq_K    normalised log-probabilities; -inf where there is no support
    tokens_K  int64: the tokens they belong to, None for 0 .. K-1
    vocab     V of the target
    """

    logq_K: Tensor
    vocab: int
    tokens_K: Tensor | None = None
    _top: list[tuple[int, float]] = field(default_factory=list)

    @property
    def known_K(self) -> Tensor:
        """int64: the tokens it speaks of."""
        if self.tokens_K is not None:
            return self.tokens_K
        return torch.arange(len(self.logq_K), device=self.logq_K.device)

    def top(self, k: int) -> list[tuple[int, float]]:
        """The k most likely tokens with their log-probabilities, as far as there is support."""
        k = min(k, len(self.logq_K))
        if len(self._top) < k:
            logp_K, index_K = self.logq_K.topk(k)
            tokens_K = index_K if self.tokens_K is None else self.tokens_K[index_K]
            self._top = list(zip(tokens_K.tolist(), logp_K.tolist(), strict=True))
        return [pair for pair in self._top[:k] if pair[1] > -torch.inf]

    def coupled(self, noise_K: Tensor, sampling: Sampling) -> DraftLaw:
        """What the target says here, as far as the noise of its draw tells.

        Of the tokens that `sampling` leaves it takes the largest of logits / temperature + noise, and these
        log-probabilities are guesses of those logits.
        """
        if not len(noise_K):
            return self
        left_K = sampling.law(self.logq_K) > 0
        logq_K = (self.logq_K + sampling.temperature * noise_K).masked_fill(~left_K, -torch.inf)
        return DraftLaw(logq_K.log_softmax(-1), self.vocab, self.tokens_K)

    def q(self) -> Tensor:
        """[V]: the law itself, zero outside its tokens."""
        if self.tokens_K is None:
            return self.logq_K.exp()
        q_V = torch.zeros(self.vocab, dtype=self.logq_K.dtype, device=self.logq_K.device)
        return q_V.index_copy_(0, self.tokens_K, self.logq_K.exp())


Growth = Generator[tuple[TokenTree, list[int]], list[DraftLaw], TokenTree]


@dataclass(frozen=True)
class TreePolicy(ABC):
    """How far and how wide to draft.

    depth      levels below the root
    length     "fixed"; "heuristic": two more after a fully accepted draft, one less after another;
               "confidence": nothing is drafted behind a token, in best-first trees behind a path, that the
               draft gives less than `threshold`
    draws      children are drawn from the draft's law (and its law recorded), not its most likely tokens
    """

    depth: int = 5
    length: str = "fixed"
    threshold: float = 0.4

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.length not in LENGTHS:
            raise ValueError(
                f"tree.length is {self.length!r}, expected {', '.join(LENGTHS)}: tree.length=fixed"
            )
        if self.depth < 0:
            raise ValueError(f"tree.depth is {self.depth}, expected 0 or more: tree.depth=5")
        if not 0 <= self.threshold <= 1:
            raise ValueError(
                f"tree.threshold is {self.threshold}, expected a probability: "
                f"tree.threshold={type(self).threshold}"
            )

    @property
    @abstractmethod
    def chain(self) -> bool:
        """Whether every node has at most one child."""

    @abstractmethod
    def grow(self, root: int, levels: int, stream: Stream) -> Growth:
        """Grow a tree of at most `levels` levels; yields (working tree, nodes to expand), wants their laws.

        Nodes of the working tree keep their indices while it grows. The tree returned may lack some of them,
        and number the others anew: `followed` finds in one what was accepted in the other.
        """

    def obstacle(self, draft_vocab: int) -> str | None:
        """Why its trees can't be grown on the device for a draft of so many tokens, where they can't."""
        return f"{type(self).__name__} trees are grown by the host"

    def _obstacle(self) -> str | None:
        """The same, where only the length could be one."""
        return None if self.length == "fixed" else f"tree.length={self.length} is decided by the host"

    def grow_on_device(
        self, root_B: Tensor, levels_B: Tensor, draft: DeviceDraft, streams: StreamBatch
    ) -> TreeBatch:
        """`grow` for a batch, without a synchronisation. levels_B: of each sequence, at most `depth`."""
        raise NotImplementedError(f"{type(self).__name__} trees are grown by the host")

    def fitted(self, accuracy_KR: list[list[float]]) -> TreePolicy:
        """This policy for a draft whose rank-r token at depth d + 1 is right with accuracy_KR[d][r]."""
        return self

    def levels(self, history: list[tuple[int, int]]) -> int:
        """Levels to draft next; history holds (drafted depth, accepted) of every step so far."""
        if self.length != "heuristic":
            return self.depth
        levels = self.depth
        for drafted, accepted in history:
            if drafted:  # a step without a draft says nothing of how good drafts are
                levels = levels + 2 if accepted == drafted else max(1, levels - 1)
        return levels

    def _go_on(self, logp: float) -> bool:
        return self.length != "confidence" or math.exp(logp) >= self.threshold


def followed(tree: TokenTree, tokens: list[int]) -> list[int]:
    """The nodes below the root that spell `tokens`, as far as the tree has them."""
    path = [0]
    for token in tokens:
        child = tree.child(path[-1], token)
        if child is None:
            break
        path.append(child)
    return path[1:]
