"""Tree policies: which continuations of the draft's laws become nodes.

A policy is a value. `grow` is a generator, so that drafts of many sequences run in one batch: it yields the
nodes whose laws it wants next, is sent one DraftLaw for each, and returns the tree. A decision about a node
never looks at that node's own draw: a drawn token stays in the tree, only what follows it may be left out.
Shapes: K tokens that a law speaks of, V vocabulary.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .rng import Purpose, Stream
from .tree import TokenTree

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

    def top(self, k: int) -> list[tuple[int, float]]:
        """The k most likely tokens with their log-probabilities, as far as there is support."""
        k = min(k, len(self.logq_K))
        if len(self._top) < k:
            logp_K, index_K = self.logq_K.topk(k)
            tokens_K = index_K if self.tokens_K is None else self.tokens_K[index_K]
            self._top = list(zip(tokens_K.tolist(), logp_K.tolist(), strict=True))
        return [pair for pair in self._top[:k] if pair[1] > -torch.inf]

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
               "confidence": nothing is drafted behind a token that the draft gives less than `threshold`
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
                f"tree.threshold is {self.threshold}, expected a probability: tree.threshold=0.4"
            )

    @property
    @abstractmethod
    def chain(self) -> bool:
        """Whether every node has at most one child."""

    @abstractmethod
    def ranks(self, path: tuple[int, ...]) -> int | list[int]:
        """Which children a node gets, given its own ranks from the root: their number, or their ranks."""

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

    def grow(self, root: int, levels: int, stream: Stream) -> Growth:
        """Grow a tree of at most `levels` levels; yields (tree so far, nodes to expand), wants their laws."""
        tree, ranks, frontier = TokenTree([root]), [()], [0]
        for _ in range(levels):
            frontier = [n for n in frontier if self.ranks(ranks[n])]
            if not frontier:
                break
            laws = yield tree, frontier
            grown = []
            for node, law in zip(frontier, laws, strict=True):
                for rank, child in self._branch(tree, node, self.ranks(ranks[node]), law, stream):
                    ranks.append((*ranks[node], rank))
                    grown.append(child)
            frontier = [n for n in grown if self._go_on(tree.logp_N[n])]
        return tree

    def _go_on(self, logp: float) -> bool:
        return self.length != "confidence" or math.exp(logp) >= self.threshold

    def _branch(
        self, tree: TokenTree, node: int, ranks: int | list[int], law: DraftLaw, stream: Stream
    ) -> list[tuple[int, int]]:
        """Add the most likely children of `node`; returns (rank, index) of each."""
        wanted = list(range(ranks)) if isinstance(ranks, int) else ranks
        top = law.top(wanted[-1] + 1)
        return [(rank, tree.add(top[rank][0], node, top[rank][1])) for rank in wanted if rank < len(top)]


@dataclass(frozen=True)
class Chain(TreePolicy):
    """The draft's most likely token at every level."""

    chain: ClassVar[bool] = True

    def ranks(self, path: tuple[int, ...]) -> int:
        return 1


@dataclass(frozen=True)
class TopK(TreePolicy):
    """The draft's most likely widths[d] tokens below every node of depth d, and none below the last width."""

    widths: tuple[int, ...] = (4, 2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or any(w < 1 for w in self.widths):
            raise ValueError(
                f"tree.widths is {list(self.widths)}, expected counts of 1 or more: tree.widths=[4,2,1]"
            )

    @property
    def chain(self) -> bool:
        return max(self.widths) == 1

    def ranks(self, path: tuple[int, ...]) -> int:
        return self.widths[len(path)] if len(path) < len(self.widths) else 0


@dataclass(frozen=True)
class Sampled(TopK):
    """widths[d] tokens below every node of depth d, drawn from the draft's law without replacement."""

    draws: ClassVar[bool] = True

    def _branch(
        self, tree: TokenTree, node: int, ranks: int, law: DraftLaw, stream: Stream
    ) -> list[tuple[int, int]]:
        q_V = law.q()
        tree.draw_children_from(node, q_V)
        left_V, branched = q_V.clone(), []
        while len(branched) < ranks and left_V.any():
            token = stream.draw(left_V, len(tree), Purpose.DRAFT)
            left_V[token] = 0
            branched.append((len(branched), tree.add(token, node, float(q_V[token].log()))))
        return branched


# How often a drafted token of each rank is right, where nothing was measured.
TYPICAL_ACCURACY = [[0.5, 0.14, 0.07, 0.04, 0.03]] * 4


@dataclass(frozen=True)
class Static(TreePolicy):
    """A fixed tree: each path is the ranks of the tokens from the root, as Medusa's choices (2401.10774).

    paths  every prefix of a path belongs to the tree, listed or not; None: the best tree of `nodes` nodes,
           root included, and at most `depth` levels for the draft's measured accuracies
    """

    paths: tuple[tuple[int, ...], ...] | None = None
    nodes: int = 8
    _children: dict[tuple[int, ...], list[int]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes < 1:
            raise ValueError(f"tree.nodes is {self.nodes}, expected 1 or more: tree.nodes=8")
        paths = self._best(TYPICAL_ACCURACY) if self.paths is None else self.paths
        deepest = max(map(len, paths), default=0)
        if deepest > self.depth:
            raise ValueError(
                f"tree.paths go {deepest} levels deep, tree.depth is {self.depth}: tree.depth={deepest}"
            )
        if any(rank < 0 for path in paths for rank in path):
            raise ValueError(
                f"tree.paths holds a negative rank: {paths}; expected lists such as tree.paths=[[0,0],[1]]"
            )
        for prefix in sorted({tuple(path[: d + 1]) for path in paths for d in range(len(path))}):
            self._children.setdefault(prefix[:-1], []).append(prefix[-1])

    @property
    def chain(self) -> bool:
        return all(len(ranks) == 1 for ranks in self._children.values())

    def ranks(self, path: tuple[int, ...]) -> list[int]:
        return self._children.get(path, [])

    def fitted(self, accuracy_KR: list[list[float]]) -> Static:
        return self if self.paths is not None else replace(self, paths=self._best(accuracy_KR))

    def _best(self, accuracy_KR: list[list[float]]) -> tuple[tuple[int, ...], ...]:
        return best_paths(accuracy_KR[: self.depth], self.nodes)


def best_paths(accuracy_KR: list[list[float]], nodes: int) -> tuple[tuple[int, ...], ...]:
    """Paths of the tree of `nodes` nodes, root included, from which most tokens are expected to be accepted.

    accuracy_KR[d][r]: how often the draft's rank-r token at depth d + 1 is right, whatever stands above it.
    """
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < nodes:  # no node is worth more than its parent, so greed is optimal
        worth, path = heapq.heappop(heap)
        chosen.append(path)
        for rank, accuracy in enumerate(accuracy_KR[len(path)] if len(path) < len(accuracy_KR) else []):
            heapq.heappush(heap, (worth * accuracy, (*path, rank)))
    return tuple(chosen[1:])
