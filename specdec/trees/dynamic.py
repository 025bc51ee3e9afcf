"""Dynamic trees: the draft's own laws say, step by step, which nodes are worth verifying.

A node is worth its path's probability under the draft. What is worth most shows only when more is known
than will be kept, so there are two trees: the working tree, of the nodes that the draft is asked about, and
the tree returned, of the best ones. Children are the most likely tokens, never drawn: to choose among drawn
nodes by their probability would look at the draw.
Shapes: N nodes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from torch import Tensor

from ..rng import Stream, StreamBatch
from ..tree import TokenTree, TreeBatch
from .base import Growth, TreePolicy
from .device import DeviceDraft, grow_best, root_alone

WIDEST, MOST_DRAFTED = 16, 1040  # that top_tokens and tree_build are compiled for


@dataclass(frozen=True)
class BestFirst(TreePolicy):
    """The `nodes` nodes, root included, of largest path probability under the draft.

    Of a fixed length no other tree of that many nodes and `depth` levels has a larger sum of them (OPT-Tree,
    2406.17276). By confidence it looks at paths: a level that few texts reach costs as much as any other.
    """

    threshold: float = 0.1
    nodes: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes < 1:
            raise ValueError(f"tree.nodes is {self.nodes}, expected 1 or more: tree.nodes=16")

    @property
    def chain(self) -> bool:
        return self._widest == 1

    @property
    def _widest(self) -> int:
        """How many nodes of a level are expanded, and into how many children each."""
        return max(1, self.nodes - 1)

    def grow(self, root: int, levels: int, stream: Stream) -> Growth:
        known, worth_N, expanded = TokenTree([root]), [0.0], []
        newest = 0
        for _ in range(levels):
            frontier = self._frontier(known, worth_N, newest)
            if not frontier:
                break
            newest, first = len(known), len(expanded)
            expanded += frontier
            laws = yield part(known, expanded), list(range(first, len(expanded)))
            for node, law in zip(frontier, laws, strict=True):
                for token, logp in law.top(self._widest):
                    known.add(token, node, logp)
                    worth_N.append(_worth_below(worth_N[node], logp))
        return part(known, sorted(best(worth_N, self.nodes)))

    def obstacle(self, draft_vocab: int) -> str | None:
        width = min(self._widest, draft_vocab)
        drafted = width + max(0, self.depth - 1) * width**2
        if width > WIDEST or drafted > MOST_DRAFTED:
            return f"{drafted} nodes of width {width} to choose from are too many for its kernels"
        return self._obstacle()

    def grow_on_device(
        self, root_B: Tensor, levels_B: Tensor, draft: DeviceDraft, streams: StreamBatch
    ) -> TreeBatch:
        if self.nodes == 1 or self.depth == 0:
            return root_alone(root_B)
        return grow_best(self.depth, self._widest, self.nodes, root_B, levels_B, draft)

    def _frontier(self, known: TokenTree, worth_N: list[float], newest: int) -> list[int]:
        """The best nodes of the newest level; nothing below the last of `nodes` could displace it."""
        hopeful = [n for n in best(worth_N, self.nodes - 1) if n >= newest and self._go_on(worth_N[n])]
        return sorted(hopeful[: self._widest])


@dataclass(frozen=True)
class Eagle2(BestFirst):
    """The dynamic tree of EAGLE-2 (2406.16858): no more than `width` nodes of a level are expanded, and into
    no more than `width` children each. The paper's: nodes 60, depth 7, width 10.
    """

    width: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"tree.width is {self.width}, expected 1 or more: tree.width=8")

    @property
    def _widest(self) -> int:
        return min(self.width, super()._widest)


def worth(tree: TokenTree) -> list[float]:
    """The log-probability of the path to each node under the draft."""
    worth_N = [0.0]
    for parent, logp in zip(tree.parents_N[1:], tree.logp_N[1:], strict=True):
        worth_N.append(_worth_below(worth_N[parent], logp))
    return worth_N


def _worth_below(parent: float, logp: float) -> float:
    return parent + min(logp, 0.0)  # rounding must not lift a child above its parent


def best(worth_N: list[float], count: int) -> list[int]:
    """The nodes of largest worth, best first; of equals the lower index, so no child without its parent."""
    return heapq.nlargest(count, range(len(worth_N)), key=worth_N.__getitem__)


def part(tree: TokenTree, nodes: list[int]) -> TokenTree:
    """The tree of these nodes, ascending: the root, and none without its parent."""
    kept, at = TokenTree(tree.tokens_N[:1]), {0: 0}
    for node in nodes[1:]:
        at[node] = kept.add(tree.tokens_N[node], at[tree.parents_N[node]], tree.logp_N[node])
    return kept
