"""Token trees and verdicts: the values that proposers, target and acceptance rules exchange.

Shapes: N nodes, R rows of q, V vocabulary, B batch, W 32-bit ancestor words, A accepted nodes.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec_kernels import words

from .transfer import to_device


@dataclass
class TokenTree:
    """One sequence's proposal. Node 0 is the root: the last committed token, whose KV is not cached yet.

    tokens_N   token at each node
    parents_N  index of the parent; -1 at the root and smaller than the node's own index elsewhere
    q_rows     R rows of [V] float32: the laws that children were really drawn from
    q_row_N    row of q from which the children of n were drawn one after the other, without replacement, in
               index order; -1 where they are deterministic. q and the target's p share an index: both are
               next-token laws *at* node n
    logp_N     log-probability that the draft gives each node after its parent; information only
    """

    tokens_N: list[int]
    parents_N: list[int] = field(default_factory=lambda: [-1])
    q_rows: list[Tensor] = field(default_factory=list)
    q_row_N: list[int] = field(default_factory=lambda: [-1])
    logp_N: list[float] = field(default_factory=lambda: [0.0])

    @classmethod
    def chain(cls, tokens: list[int]) -> "TokenTree":
        """A deterministic chain; tokens[0] is the root."""
        n = len(tokens)
        return cls(list(tokens), list(range(-1, n - 1)), [], [-1] * n, [0.0] * n)

    def add(self, token: int, parent: int, logp: float = 0.0) -> int:
        """Append a node and return its index."""
        self.tokens_N.append(token)
        self.parents_N.append(parent)
        self.q_row_N.append(-1)
        self.logp_N.append(logp)
        return len(self) - 1

    def draw_children_from(self, node: int, q_V: Tensor) -> None:
        """Record that the children of `node` are drawn from q_V without replacement."""
        self.q_row_N[node] = len(self.q_rows)
        self.q_rows.append(q_V)

    def __len__(self) -> int:
        return len(self.tokens_N)

    def q(self, node: int) -> Tensor | None:
        """The law that the children of `node` were drawn from, or None if they are deterministic."""
        return None if self.q_row_N[node] < 0 else self.q_rows[self.q_row_N[node]]

    def children(self, node: int) -> list[int]:
        return [n for n in range(node + 1, len(self)) if self.parents_N[n] == node]

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
        return next((n for n in self.children(node) if self.tokens_N[n] == token), None)

    def tokens_to(self, node: int) -> list[int]:
        """The tokens from the root down to `node`."""
        path = [node]
        while path[-1]:
            path.append(self.parents_N[path[-1]])
        return [self.tokens_N[n] for n in reversed(path)]

    @property
    def depth_N(self) -> list[int]:
        depth: list[int] = []
        for parent in self.parents_N:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return depth

    @property
    def ancestors_NN(self) -> np.ndarray:
        """bool [N, N]: [i, j] is true where j is i or an ancestor of i, so i attends to j."""
        mask_NN = np.eye(len(self), dtype=bool)
        for n in range(1, len(self)):
            mask_NN[n] |= mask_NN[self.parents_N[n]]
        return mask_NN

    @property
    def is_chain(self) -> bool:
        return self.parents_N == list(range(-1, len(self) - 1))

    def check(self, last_token: int) -> None:
        """Raise ValueError unless the tree is well formed and starts at `last_token`."""
        if self.tokens_N[0] != last_token:
            raise ValueError(
                f"the tree's root is token {self.tokens_N[0]}, the last committed token is {last_token}"
            )
        if self.parents_N[0] != -1 or any(not 0 <= p < n for n, p in enumerate(self.parents_N) if n):
            raise ValueError(f"parents must be [-1, then an earlier node each], got {self.parents_N}")
        edges = set(zip(self.parents_N, self.tokens_N, strict=True))
        if len(edges) != len(self):
            raise ValueError(
                "a node has two children with the same token; merge them before returning the tree"
            )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What survived: accepted nodes below the root in order, and the token that follows them."""

    path_A: list[int]
    bonus: int

    def emitted(self, tree: TokenTree) -> list[int]:
        """The tokens of this step: accepted ones, then the bonus."""
        return [tree.tokens_N[n] for n in self.path_A] + [self.bonus]


@dataclass
class TreeBatch:
    """Trees of one step on the device, padded to N nodes. Pads are children of nobody (parent -1) past `n_B`.

    tokens_BN, parents_BN, depth_BN  int64
    n_B                              int64, nodes that are real
    q_BNV                            float32 or None: the law at each node, 0 where children are deterministic
    drawn_BN                         bool: the node's children were drawn from its row of q
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    n_B: Tensor
    depth_BN: Tensor
    q_BNV: Tensor | None
    drawn_BN: Tensor

    @classmethod
    def pack(cls, trees: list[TokenTree], nodes: int, device: torch.device | str = "cpu") -> "TreeBatch":
        """Pad `trees` to `nodes` nodes each."""

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return to_device([row + [fill] * (nodes - len(row)) for row in rows], device)

        drawn_BN = padded([t.q_row_N for t in trees], -1) >= 0
        return cls(
            padded([t.tokens_N for t in trees], 0),
            padded([t.parents_N for t in trees], -1),
            to_device([len(t) for t in trees], device),
            padded([t.depth_N for t in trees], 0),
            _pack_q(trees, nodes, device),
            drawn_BN,
        )

    def cut(self, levels_B: Tensor) -> "TreeBatch":
        """Without the nodes deeper than `levels_B`, which must be the last of their trees."""
        left_BN = levels_B.unsqueeze(1) - self.depth_BN
        kept_BN = self.real_BN & (left_BN >= 0)
        return TreeBatch(
            torch.where(kept_BN, self.tokens_BN, 0),
            torch.where(kept_BN, self.parents_BN, -1),
            kept_BN.sum(1),
            torch.where(kept_BN, self.depth_BN, 0),
            self.q_BNV,
            self.drawn_BN & kept_BN & (left_BN > 0),
        )

    def padded(self, nodes: int) -> "TreeBatch":
        """The same with so many nodes."""
        if not (more := nodes - self.tokens_BN.shape[1]):
            return self
        q_BNV = None if self.q_BNV is None else F.pad(self.q_BNV, (0, 0, 0, more))
        parents_BN = F.pad(self.parents_BN, (0, more), value=-1)
        tokens_BN, depth_BN, drawn_BN = (
            F.pad(x_BN, (0, more)) for x_BN in (self.tokens_BN, self.depth_BN, self.drawn_BN)
        )
        return TreeBatch(tokens_BN, parents_BN, self.n_B, depth_BN, q_BNV, drawn_BN)

    @property
    def real_BN(self) -> Tensor:
        """bool: nodes that are no pads."""
        return torch.arange(self.tokens_BN.shape[1], device=self.n_B.device) < self.n_B.unsqueeze(1)

    @cached_property
    def ancestors_BNN(self) -> Tensor:
        """bool [B, N, N]: as TokenTree.ancestors_NN; a pad sees only itself."""
        return words.ancestors(self.parents_BN)

    @property
    def anc_BNW(self) -> Tensor:
        """int32 [B, N, W]: the ancestor rows as 32-bit words, bit j of word w is node 32 w + j."""
        return words.pack(self.ancestors_BNN)


def _pack_q(trees: list[TokenTree], nodes: int, device: torch.device | str) -> Tensor | None:
    rows = [q for t in trees for q in t.q_rows]
    if not rows:
        return None
    q_BNV = torch.zeros(len(trees), nodes, rows[0].shape[-1], dtype=rows[0].dtype, device=device)
    for b, tree in enumerate(trees):
        for n, row in enumerate(tree.q_row_N):
            if row >= 0:
                q_BNV[b, n] = tree.q_rows[row]
    return q_BNV


@dataclass
class VerdictBatch:
    """Verdicts on the device: path_BA int64 padded with -1, count_B accepted nodes, bonus_B tokens."""

    path_BA: Tensor
    count_B: Tensor
    bonus_B: Tensor

    def unpack(self) -> list[Verdict]:
        """Per-sequence verdicts; one device-to-host copy."""
        rows = torch.cat([self.count_B[:, None], self.bonus_B[:, None], self.path_BA], dim=1).tolist()
        return [Verdict(path[:count], bonus) for count, bonus, *path in rows]
