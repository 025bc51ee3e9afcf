"""Trees grown on the device: the nodes that `grow` would add, found without a look at any of them.

A draft answers `Expand`: given the tokens from the root down to each node of a level, it gives the laws there
as log-probabilities of its vocabulary.
Shapes: B sequences, F nodes of a level that get children, d tokens of a path, U draft vocabulary, R ranks,
M candidates, N nodes, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_kernels import top_tokens, tree_build
from specdec_kernels.philox import Purpose, race, rows

from ..rng import StreamBatch
from ..transfer import constant
from ..tree import TreeBatch

Expand = Callable[[Tensor], Tensor]  # int64 [B, F, d] -> float32 [B, F, U]


@dataclass(frozen=True)
class DeviceDraft:
    """What a tree is grown from.

    expand    the draft's laws
    vocab     V
    tokens_U  int64: the tokens they speak of; None for 0 .. U-1
    deepest   levels that it can say anything of; None: any number
    """

    expand: Expand
    vocab: int
    tokens_U: Tensor | None = None
    deepest: int | None = None

    def named(self, index_X: Tensor) -> Tensor:
        """Tokens of places in the draft vocabulary."""
        return index_X if self.tokens_U is None else self.tokens_U[index_X]

    def q(self, logq_BU: Tensor) -> Tensor:
        """[B, V]: a law, zero outside the draft vocabulary."""
        if self.tokens_U is None:
            return logq_BU.exp()
        q_BV = logq_BU.new_zeros(len(logq_BU), self.vocab)
        return q_BV.index_copy_(1, self.tokens_U, logq_BU.exp())


Level = list[tuple[int, int]]  # parent and rank among its siblings of each node


def root_alone(root_B: Tensor) -> TreeBatch:
    """Trees that are only their roots."""
    return chains(root_B.unsqueeze(1))


def grow_known(levels: list[Level], root_B: Tensor, draft: DeviceDraft) -> TreeBatch:
    """A tree of known shape, of the most likely tokens. levels: as `Fixed.layout` gives them."""
    tree = _Growing(levels[: draft.deepest], root_B)
    for level, inner, logq_BFU in tree.laws(draft):
        ranks = 1 + max(rank for _, rank in level)
        _, top_XR = top_tokens(logq_BFU.flatten(0, 1), ranks)
        top_BX = draft.named(top_XR).view(len(root_B), -1)
        places = tuple(inner.index(parent) * ranks + rank for parent, rank in level)
        tree.add(top_BX.index_select(1, constant(places, root_B.device)))
    return tree.batch({})


def grow_drawn(levels: list[Level], root_B: Tensor, draft: DeviceDraft, streams: StreamBatch) -> TreeBatch:
    """The same with tokens drawn from the laws without replacement, keyed as `draw_children` keys them.

    A law may have fewer tokens than are asked of it: so nodes may be missing, differently in each tree.
    """
    tree, laws = _Growing(levels[: draft.deepest], root_B), {}
    there = [torch.ones_like(root_B, dtype=torch.bool)]
    for level, inner, logq_BFU in tree.laws(draft):
        laws |= {node: draft.q(logq_BFU[:, f]) for f, node in enumerate(inner)}
        left, drawn = {node: laws[node].clone() for node in inner}, []
        for parent, _ in level:
            node_B = torch.stack(there).sum(0)
            there.append(there[parent] & left[parent].any(1))
            drawn.append(_draw(left[parent], streams, node_B))
        tree.add(torch.stack(drawn, 1))
    return _without_gaps(tree.batch(laws), torch.stack(there, 1))


def _draw(left_BV: Tensor, streams: StreamBatch, node_B: Tensor) -> Tensor:
    """A token of each law [B], which loses it."""
    keys = (streams.rng.seed, streams.request_B, streams.step_B, node_B, Purpose.DRAFT)
    token_B = race(left_BV, rows(*keys, left_BV.shape[-1]))
    left_BV.scatter_(1, token_B.unsqueeze(1), 0.0)
    return token_B


def _without_gaps(trees: TreeBatch, there_BN: Tensor) -> TreeBatch:
    """The nodes that are there, numbered in their order; what stands behind them means nothing."""
    order_BN = (~there_BN).int().argsort(dim=1, stable=True)
    tokens_BN, above_BN, depth_BN, drawn_BN = (
        x_BN.gather(1, order_BN)
        for x_BN in (trees.tokens_BN, trees.parents_BN, trees.depth_BN, trees.drawn_BN)
    )
    number_BN = there_BN.cumsum(1) - 1
    parents_BN = torch.where(above_BN < 0, -1, number_BN.gather(1, above_BN.clamp(min=0)))
    q_BNV = trees.q_BNV
    if q_BNV is not None:
        q_BNV = q_BNV.gather(1, order_BN.unsqueeze(2).expand_as(q_BNV))
    return TreeBatch(tokens_BN, parents_BN, there_BN.sum(1), depth_BN, q_BNV, drawn_BN)


class _Growing:
    """The tokens so far of trees whose shape is known."""

    def __init__(self, levels: list[Level], root_B: Tensor) -> None:
        self.levels, self.device = levels, root_B.device
        self.tokens_BN = root_B.unsqueeze(1)
        self.paths: list[tuple[int, ...]] = [(0,)]  # nodes from the root down, of every node

    @property
    def size(self) -> int:
        return self.tokens_BN.shape[1]

    def laws(self, draft: DeviceDraft) -> Iterator[tuple[Level, list[int], Tensor]]:
        """Level by level: its nodes, those above that get children, and the laws of these [B, F, U]."""
        for level in self.levels:
            inner = sorted({parent for parent, _ in level})
            nodes = tuple(node for parent in inner for node in self.paths[parent])
            tokens_BX = self.tokens_BN.index_select(1, constant(nodes, self.device))
            yield level, inner, draft.expand(tokens_BX.view(len(tokens_BX), len(inner), -1))

    def add(self, tokens_BX: Tensor) -> None:
        """The tokens of a level."""
        level, first = self.levels[len(self.paths[-1]) - 1], self.size
        self.paths += [(*self.paths[parent], first + i) for i, (parent, _) in enumerate(level)]
        self.tokens_BN = torch.cat([self.tokens_BN, tokens_BX], 1)

    def batch(self, laws: dict[int, Tensor]) -> TreeBatch:
        """The trees; laws: those that the children of nodes were drawn from."""
        parents = (-1, *(parent for level in self.levels for parent, _ in level))
        depth = tuple(len(path) - 1 for path in self.paths)
        drawn = tuple(node in laws for node in range(self.size))
        return known(self.tokens_BN, parents, depth, drawn, self._q(laws))

    def _q(self, laws: dict[int, Tensor]) -> Tensor | None:
        if not laws:
            return None
        none_BV = torch.zeros_like(next(iter(laws.values())))
        return torch.stack([laws.get(node, none_BV) for node in range(self.size)], 1)


def known(
    tokens_BN: Tensor,
    parents: tuple[int, ...],
    depth: tuple[int, ...],
    drawn: tuple[bool, ...],
    q_BNV: Tensor | None,
) -> TreeBatch:
    """Trees that all have the same shape."""
    (B, N), device = tokens_BN.shape, tokens_BN.device
    n_B, parents_BN, depth_BN = (constant(row, device).expand(B, -1) for row in ((N,), parents, depth))
    drawn_BN = constant(drawn, device, torch.bool).expand(B, -1)
    return TreeBatch(tokens_BN, parents_BN, n_B.squeeze(1), depth_BN, q_BNV, drawn_BN)


def chains(tokens_BN: Tensor) -> TreeBatch:
    """Deterministic chains; the first token of each is its root."""
    N = tokens_BN.shape[1]
    return known(tokens_BN, tuple(range(-1, N - 1)), tuple(range(N)), (False,) * N, None)


def grow_best(
    depth: int, width: int, nodes: int, root_B: Tensor, levels_B: Tensor, draft: DeviceDraft
) -> TreeBatch:
    """The best `nodes` nodes of those drafted, the root among them.

    width  nodes of a level that are expanded, the best, and children that each of them gets
    """
    front = _Front(root_B.view(-1, 1, 1), torch.full_like(root_B, -1).unsqueeze(1))
    scores_BF, found = torch.zeros_like(front.index_BF, dtype=torch.float32), []
    for level in range(depth)[: draft.deepest]:
        logp_BX, tokens_BX, ranks = _children(front, width, draft)
        scores_BX = scores_BF.repeat_interleave(ranks, 1) + logp_BX.clamp(max=0)
        scores_BX = scores_BX.masked_fill((levels_B <= level).unsqueeze(1), -torch.inf)
        found.append((tokens_BX, front.index_BF.repeat_interleave(ranks, 1), scores_BX))
        first = sum(scores.shape[1] for *_, scores in found[:-1])
        best_BF = _best(scores_BX, width)
        scores_BF = scores_BX.gather(1, best_BF)
        front = front.below(best_BF, tokens_BX, ranks, first)
    tokens_BM, parents_BM, scores_BM = (torch.cat(each, 1) for each in zip(*found, strict=True))
    built = tree_build(tokens_BM, parents_BM, scores_BM, root_B, nodes)
    none_BN = torch.zeros_like(built.tokens_BN, dtype=torch.bool)
    return TreeBatch(built.tokens_BN, built.parents_BN, built.n_B, built.depth_BN, None, none_BN)


@dataclass
class _Front:
    """The nodes that are expanded next: their paths [B, F, d], and which candidates they are, -1 the root."""

    paths_BFd: Tensor
    index_BF: Tensor

    def below(self, best_BF: Tensor, tokens_BX: Tensor, ranks: int, first: int) -> _Front:
        """The front of some of the children, of which `first` candidates came before."""
        above_BF1 = (best_BF // ranks).unsqueeze(2)
        paths_BFd = self.paths_BFd.gather(1, above_BF1.expand(-1, -1, self.paths_BFd.shape[2]))
        newest_BF1 = tokens_BX.gather(1, best_BF).unsqueeze(2)
        return _Front(torch.cat([paths_BFd, newest_BF1], 2), best_BF + first)


def _children(front: _Front, width: int, draft: DeviceDraft) -> tuple[Tensor, Tensor, int]:
    """Log-probabilities and tokens [B, X] of the children of a front, and how many each node has."""
    logq_BFU = draft.expand(front.paths_BFd)
    ranks = min(width, logq_BFU.shape[-1])
    logp_XR, index_XR = top_tokens(logq_BFU.flatten(0, 1), ranks)
    B = len(logq_BFU)
    return logp_XR.reshape(B, -1), draft.named(index_XR).reshape(B, -1), ranks


def _best(scores_BX: Tensor, width: int) -> Tensor:
    """Places of the best children, ascending; of equals the first."""
    order_BX = scores_BX.sort(dim=1, descending=True, stable=True).indices
    return order_BX[:, :width].sort(dim=1).values
