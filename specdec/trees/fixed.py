"""Trees whose shape is known before the draft speaks: chain, top-k, drawn, and any list of paths."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..rng import Purpose, Stream, StreamBatch
from ..tree import TokenTree, TreeBatch
from .base import DraftLaw, Growth, TreePolicy
from .device import DeviceDraft, Level, grow_drawn, grow_known
from .worth import Path, Paths, best_paths, every_prefix

Added = list[tuple[int, int]]  # rank among its siblings, and index, of every node added


@dataclass(frozen=True)
class Fixed(TreePolicy):
    """A tree of which `ranks` tells the shape."""

    @abstractmethod
    def ranks(self, path: Path) -> int | list[int]:
        """Which children a node gets, given its own ranks from the root: their number, or their ranks."""

    def grow(self, root: int, levels: int, stream: Stream) -> Growth:
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

    def layout(self) -> list[Level]:
        """Level by level the parent and the rank of every node, in the order in which they are added."""
        paths, newest, levels = [()], [0], []
        while level := [(node, rank) for node in newest for rank in _listed(self._ranks_at(paths[node]))]:
            newest = range(len(paths), len(paths) + len(level))
            paths += [(*paths[node], rank) for node, rank in level]
            levels.append(level)
        return levels

    def _ranks_at(self, path: Path) -> int | list[int]:
        return self.ranks(path) if len(path) < self.depth else 0

    def obstacle(self, draft_vocab: int) -> str | None:
        widest = max((rank for level in self.layout() for _, rank in level), default=0)
        if widest >= draft_vocab:
            return f"a node's child number {widest + 1} is asked of a draft of {draft_vocab} tokens"
        return self._obstacle()

    def grow_on_device(
        self, root_B: Tensor, levels_B: Tensor, draft: DeviceDraft, streams: StreamBatch
    ) -> TreeBatch:
        if self.draws:
            return grow_drawn(self.layout(), root_B, draft, streams).cut(levels_B)
        return grow_known(self.layout(), root_B, draft).cut(levels_B)

    def _branch(
        self, tree: TokenTree, node: int, ranks: int | list[int], law: DraftLaw, stream: Stream
    ) -> Added:
        """Add the children of `node`: the most likely tokens."""
        wanted = _listed(ranks)
        top = law.top(wanted[-1] + 1)
        return [(rank, tree.add(top[rank][0], node, top[rank][1])) for rank in wanted if rank < len(top)]


def _listed(ranks: int | list[int]) -> list[int]:
    return list(range(ranks)) if isinstance(ranks, int) else ranks


@dataclass(frozen=True)
class Chain(Fixed):
    """The draft's most likely token at every level."""

    chain: ClassVar[bool] = True

    def ranks(self, path: Path) -> int:
        return 1


@dataclass(frozen=True)
class TopK(Fixed):
    """The draft's most likely widths[d] tokens below every node of depth d, as many levels as widths."""

    depth: int | None = None
    widths: tuple[int, ...] = (4, 2, 1)

    def __post_init__(self) -> None:
        levels = len(self.widths)
        if self.depth is None:
            object.__setattr__(self, "depth", levels)
        super().__post_init__()
        if not self.widths or any(w < 1 for w in self.widths):
            raise ValueError(
                f"tree.widths is {list(self.widths)}, expected counts of 1 or more: tree.widths=[4,2,1]"
            )
        if levels != self.depth:
            raise ValueError(
                f"tree.widths is {list(self.widths)}, {levels} levels, tree.depth is {self.depth}: "
                f"tree.depth={levels}, or as many widths as levels"
            )

    @property
    def chain(self) -> bool:
        return max(self.widths) == 1

    def ranks(self, path: Path) -> int:
        return self.widths[len(path)] if len(path) < len(self.widths) else 0


def draw_children(tree: TokenTree, node: int, count: int, law: DraftLaw, stream: Stream) -> Added:
    """Add children of `node` that are drawn from the draft's law without replacement, and record the law."""
    q_V = law.q()
    tree.draw_children_from(node, q_V)
    left_V, grown = q_V.clone(), []
    for rank in range(min(count, int(q_V.count_nonzero()))):
        token = stream.draw(left_V, len(tree), Purpose.DRAFT)
        left_V[token] = 0
        grown.append((rank, tree.add(token, node, float(q_V[token].log()))))
    return grown


@dataclass(frozen=True)
class Sampled(TopK):
    """widths[d] tokens below every node of depth d, drawn from the draft's law without replacement."""

    draws: ClassVar[bool] = True

    def _branch(self, tree: TokenTree, node: int, ranks: int, law: DraftLaw, stream: Stream) -> Added:
        return draw_children(tree, node, ranks, law, stream)


# How often a drafted token of each rank is right, where nothing was measured.
TYPICAL_ACCURACY = [[0.5, 0.14, 0.07, 0.04, 0.03]] * 4


@dataclass(frozen=True)
class Static(Fixed):
    """A fixed tree: each path is the ranks of the tokens from the root, as Medusa's choices (2401.10774).

    paths  every prefix of a path belongs to the tree, listed or not; None: the best tree of `nodes` nodes,
           root included, and at most `depth` levels for the draft's measured accuracies
    """

    paths: Paths | None = None
    nodes: int = 8
    _children: dict[Path, list[int]] = field(init=False, repr=False, compare=False, default_factory=dict)

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
        for path in every_prefix(paths):
            self._children.setdefault(path[:-1], []).append(path[-1])

    @property
    def chain(self) -> bool:
        return all(len(ranks) == 1 for ranks in self._children.values())

    def ranks(self, path: Path) -> list[int]:
        return self._children.get(path, [])

    def fitted(self, accuracy_KR: list[list[float]]) -> Static:
        return self if self.paths is not None else replace(self, paths=self._best(accuracy_KR))

    def _best(self, accuracy_KR: list[list[float]]) -> Paths:
        return best_paths(accuracy_KR[: self.depth], self.nodes)
