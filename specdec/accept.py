"""Acceptance rules: (tree, p, stream) -> Verdict, where p[n] is the target's next-token law at node n.

Every rule has two forms, equal coin for coin: a call on one sequence, the one to read, and `batch` on padded
tensors, which runs on the device without a synchronisation. A rule that you add needs only the first.
Shapes: B batch, N nodes, V vocabulary, A accepted, X any leading shape.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .rng import Purpose, Stream, StreamBatch
from .tree import TokenTree, TreeBatch, Verdict, VerdictBatch


class LawTable(Protocol):
    """The target's laws p: a tensor [N, V], or `sampling.Laws`, which computes the rows asked for."""

    def __getitem__(self, node: int) -> Tensor: ...


class Rule(ABC):
    """An acceptance rule.

    lossless            the emitted text has exactly the target's law; other rules are labelled in every table
    needs_q             drafted tokens must be drawn from a known law (a sampling tree policy)
    deterministic_only  drafted tokens must not be random
    chain_only          at most one child a node
    greedy_only         temperature must be 0
    """

    lossless: ClassVar[bool] = True
    needs_q: ClassVar[bool] = False
    deterministic_only: ClassVar[bool] = False
    chain_only: ClassVar[bool] = False
    greedy_only: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        """Decide one sequence."""

    def batch(self, trees: TreeBatch, p_BNV: Tensor, streams: StreamBatch) -> VerdictBatch:
        """Decide a batch on the device."""
        raise NotImplementedError(f"accept={self.name} has no batched form")


class Greedy(Rule):
    """Follow the target's most likely token. Exact for temperature 0."""

    greedy_only = True

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        return _follow(tree, lambda node, depth: int(p[node].argmax()))

    def batch(self, trees: TreeBatch, p_BNV: Tensor, streams: StreamBatch) -> VerdictBatch:
        return _follow_batch(trees, p_BNV.argmax(dim=-1))


class Match(Rule):
    """Sample the target at each node and follow the child that agrees; any tree, no q.

    Draws are keyed by position, so the text is the same for every proposer, plain decoding included.
    """

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        return _follow(tree, lambda node, depth: stream.draw_at(p[node], depth))

    def batch(self, trees: TreeBatch, p_BNV: Tensor, streams: StreamBatch) -> VerdictBatch:
        return _follow_batch(trees, streams.draw_at(p_BNV, trees.depth_BN))


class Recursive(Rule):
    """Recursive rejection over siblings drawn without replacement (Sequoia 2402.12374, RSD 2402.14160).

    Siblings are tried in the order of the draft, each against what is left of p and of q.
    """

    needs_q = True

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        node, path = 0, []
        while True:
            child, left_V = self._try_children(tree, node, p[node], stream)
            if child is None:
                return Verdict(path, stream.draw(left_V, node, Purpose.RESIDUAL))
            node = child
            path.append(child)

    def _try_children(
        self, tree: TokenTree, node: int, p_V: Tensor, stream: Stream
    ) -> tuple[int | None, Tensor]:
        """The accepted child if any, and what is left of p after the rejections."""
        for child, q_V in drafted(tree, node, p_V):
            x = tree.tokens_N[child]
            if stream.coin(float(p_V[x]), float(q_V[x]), child):
                return child, p_V
            p_V = residual(p_V, q_V)
        return None, p_V

    def batch(self, trees: TreeBatch, p_BNV: Tensor, streams: StreamBatch) -> VerdictBatch:
        B, N, _ = p_BNV.shape
        q_BNV, u_BN = _recorded_laws(trees, p_BNV), streams.coins(N)
        p_BV, q_BV, at_B1 = p_BNV[:, 0], q_BNV[:, 0], trees.n_B.new_zeros(B, 1)
        accepted_BN = torch.zeros_like(trees.drawn_BN)
        for n in range(1, N):  # index order tries the children of a node in the order of the draft
            x_B1 = trees.tokens_BN[:, n : n + 1]
            law_BV = torch.where(trees.drawn_BN.gather(1, at_B1), q_BV, _one_hot(x_B1, q_BV))
            tried_B1 = trees.parents_BN[:, n : n + 1] == at_B1
            kept_B1 = tried_B1 & (u_BN[:, n : n + 1] * law_BV.gather(1, x_B1) < p_BV.gather(1, x_B1))
            left_BV, struck_BV = residual(p_BV, law_BV), strike(q_BV, x_B1)
            p_BV = torch.where(kept_B1, p_BNV[:, n], torch.where(tried_B1, left_BV, p_BV))
            q_BV = torch.where(kept_B1, q_BNV[:, n], torch.where(tried_B1, struck_BV, q_BV))
            at_B1 = torch.where(kept_B1, n, at_B1)
            accepted_BN[:, n] = kept_B1.squeeze(1)
        return _verdicts(accepted_BN, streams.draw(p_BV, at_B1.squeeze(1), Purpose.RESIDUAL))


class Rejection(Recursive):
    """Token-level rejection on a sampled chain (Leviathan 2211.17192, Chen 2302.01318)."""

    chain_only = True


class Block(Rule):
    """Block verification of a sampled chain (Sun et al. 2403.10444).

    `weight` is min(1, weight * p / q) down the chain. Every coin is thrown: the last success wins, not the
    first failure. Where nothing is drafted q is 0, so the end of the chain is no special case.
    """

    needs_q = True
    chain_only = True

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        if not tree.is_chain:
            raise ValueError("accept=block verifies chains, this tree branches: try accept=recursive")
        weight, q_V = 1.0, _law_below(tree, 0, p[0])
        end, left_V = 0, residual(p[0], q_V)
        for n in range(1, len(tree)):
            x = tree.tokens_N[n]
            weight = min(1.0, weight * float(p[n - 1][x]) / float(q_V[x]))
            q_V = _law_below(tree, n, p[n])
            gain = float((weight * p[n] - q_V).clamp(min=0).sum())
            if stream.coin(gain, gain + (1.0 - weight), n):
                end, left_V = n, residual(weight * p[n], q_V)
        return Verdict(list(range(1, end + 1)), stream.draw(left_V, end, Purpose.RESIDUAL))

    def batch(self, trees: TreeBatch, p_BNV: Tensor, streams: StreamBatch) -> VerdictBatch:
        N = p_BNV.shape[1]
        q_BNV, u_BN = _chain_laws(trees, p_BNV), streams.coins(N)
        weight_B1 = torch.ones_like(u_BN[:, :1])
        end_B1, left_BV = torch.zeros_like(trees.n_B).unsqueeze(1), residual(p_BNV[:, 0], q_BNV[:, 0])
        for n in range(1, N):
            x_B1, p_BV, q_BV = trees.tokens_BN[:, n : n + 1], p_BNV[:, n], q_BNV[:, n]
            ratio_B1 = p_BNV[:, n - 1].gather(1, x_B1).double() / q_BNV[:, n - 1].gather(1, x_B1)
            weight_B1 = (weight_B1 * ratio_B1).clamp(max=1.0)
            weighted_BV = weight_B1.to(p_BV.dtype) * p_BV
            gain_B1 = (weighted_BV - q_BV).clamp(min=0).sum(-1, keepdim=True).double()
            success_B1 = u_BN[:, n : n + 1] * (gain_B1 + (1.0 - weight_B1)) < gain_B1
            success_B1 = success_B1 & (n < trees.n_B.unsqueeze(1))
            end_B1 = torch.where(success_B1, n, end_B1)
            left_BV = torch.where(success_B1, residual(weighted_BV, q_BV), left_BV)
        node_1N = torch.arange(N, device=end_B1.device).unsqueeze(0)
        bonus_B = streams.draw(left_BV, end_B1.squeeze(1), Purpose.RESIDUAL)
        return _verdicts((node_1N > 0) & (node_1N <= end_B1), bonus_B)


@dataclass(frozen=True)
class Typical(Rule):
    """Medusa's typical acceptance (2401.10774). LOSSY: it samples another law than the target's.

    A drafted token stands where p(x) > min(epsilon, delta * exp(-entropy(p))); the longest such path wins,
    ties by the sum of log p.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    lossless = False
    deterministic_only = True

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        paths: dict[int, tuple[list[int], float]] = {0: ([], 0.0)}  # of each node that stands, and its log p
        for n in range(1, len(tree)):
            parent, x = tree.parents_N[n], tree.tokens_N[n]
            if parent in paths and p[parent][x] > self.threshold(p[parent]):
                path, logp = paths[parent]
                paths[n] = ([*path, n], logp + float(p[parent][x].log()))
        path, _ = max(paths.values(), key=lambda found: (len(found[0]), found[1]))
        return Verdict(path, stream.draw_at(p[path[-1] if path else 0], len(path)))

    def batch(self, trees: TreeBatch, p_BNV: Tensor, streams: StreamBatch) -> VerdictBatch:
        parent_BN = trees.parents_BN.clamp(min=0)
        at_parent_BNV = p_BNV.gather(1, parent_BN.unsqueeze(-1).expand_as(p_BNV))
        p_x_BN = at_parent_BNV.gather(2, trees.tokens_BN.unsqueeze(-1)).squeeze(-1)
        stands_BN = _all_the_way(trees, p_x_BN > self.threshold(p_BNV).gather(1, parent_BN))
        depth_BN = torch.where(stands_BN, trees.depth_BN, 0)
        below_root_BNN = trees.ancestors_BNN & (trees.parents_BN >= 0).unsqueeze(1)
        logp_BN = torch.where(below_root_BNN, p_x_BN.log().unsqueeze(1), 0.0).sum(-1)
        longest_BN = depth_BN == depth_BN.max(dim=1, keepdim=True).values
        end_B1 = torch.where(longest_BN, logp_BN, -torch.inf).argmax(dim=1, keepdim=True)
        path_BN = below_root_BNN.gather(1, end_B1.unsqueeze(-1).expand_as(below_root_BNN[:, :1])).squeeze(1)
        y_BN = streams.draw_at(p_BNV, trees.depth_BN)
        return _verdicts(path_BN, y_BN.gather(1, end_B1).squeeze(1))

    def threshold(self, p_XV: Tensor) -> Tensor:
        """What p(x) must exceed, for each law [X]."""
        entropy_X = torch.special.entr(p_XV).sum(-1)
        return (self.delta * torch.exp(-entropy_X)).clamp(max=self.epsilon)


def drafted(tree: TokenTree, node: int, like_V: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The children of `node` in the order of the draft, each with the law it came from given those before it.

    A deterministic child came from a one-hot law: so drawn and deterministic nodes mix in one tree.
    """
    q_V = tree.q(node)
    for child in tree.children(node):
        x_1 = torch.tensor([tree.tokens_N[child]], device=like_V.device)
        yield child, _one_hot(x_1, like_V) if q_V is None else q_V
        q_V = None if q_V is None else strike(q_V, x_1)


def residual(p_XV: Tensor, q_XV: Tensor) -> Tensor:
    """norm((p - q)+): what is left of p once its overlap with q is spent; p itself where nothing is left."""
    left_XV = (p_XV - q_XV).clamp(min=0)
    total_X1 = left_XV.sum(-1, keepdim=True)
    return torch.where(total_X1 > 0, left_XV / total_X1, p_XV)


def strike(q_XV: Tensor, x_X1: Tensor) -> Tensor:
    """q without token x, renormalised; all zero once its support is used up."""
    left_XV = q_XV.scatter(-1, x_X1, 0.0)
    total_X1 = left_XV.sum(-1, keepdim=True)
    return torch.where(total_X1 > 0, left_XV / total_X1, left_XV)


def _one_hot(x_X1: Tensor, like_XV: Tensor) -> Tensor:
    return torch.zeros_like(like_XV).scatter(-1, x_X1, 1.0)


def _law_below(tree: TokenTree, node: int, like_V: Tensor) -> Tensor:
    """The law that the first child of `node` came from; zero where there is none."""
    return next((q_V for _, q_V in drafted(tree, node, like_V)), torch.zeros_like(like_V))


def _follow(tree: TokenTree, choose: Callable[[int, int], int]) -> Verdict:
    """Walk down while the token chosen at a node, choose(node, depth), is one of its children."""
    node, path = 0, []
    while True:
        token = choose(node, len(path))
        child = tree.child(node, token)
        if child is None:
            return Verdict(path, token)
        node = child
        path.append(child)


def _follow_batch(trees: TreeBatch, choice_BN: Tensor) -> VerdictBatch:
    chosen_BN = trees.tokens_BN == choice_BN.gather(1, trees.parents_BN.clamp(min=0))
    accepted_BN = _all_the_way(trees, chosen_BN)
    end_B1 = torch.where(accepted_BN, trees.depth_BN, 0).argmax(dim=1, keepdim=True)
    return _verdicts(accepted_BN, choice_BN.gather(1, end_B1).squeeze(1))


def _all_the_way(trees: TreeBatch, good_BN: Tensor) -> Tensor:
    """bool [B, N]: nodes below the root that are good, and whose ancestors below the root all are."""
    below_root_BN = trees.parents_BN >= 0
    bad_BN = below_root_BN & ~good_BN
    return below_root_BN & ~(trees.ancestors_BNN & bad_BN.unsqueeze(1)).any(dim=-1)


def _verdicts(accepted_BN: Tensor, bonus_B: Tensor) -> VerdictBatch:
    """Verdicts from the accepted nodes, which form one path: index order is order of depth."""
    N = accepted_BN.shape[1]
    node_1N = torch.arange(N, device=accepted_BN.device).unsqueeze(0)
    path_BN = torch.where(accepted_BN, node_1N, N).sort(dim=1).values
    return VerdictBatch(torch.where(path_BN < N, path_BN, -1), accepted_BN.sum(dim=1), bonus_B)


def _recorded_laws(trees: TreeBatch, p_BNV: Tensor) -> Tensor:
    return torch.zeros_like(p_BNV) if trees.q_BNV is None else trees.q_BNV.to(p_BNV.dtype)


def _chain_laws(trees: TreeBatch, p_BNV: Tensor) -> Tensor:
    """[B, N, V]: `_law_below` every node of every chain."""
    child_BN1 = trees.tokens_BN.roll(-1, dims=1).unsqueeze(-1)
    law_BNV = torch.where(
        trees.drawn_BN.unsqueeze(-1), _recorded_laws(trees, p_BNV), _one_hot(child_BN1, p_BNV)
    )
    node_1N = torch.arange(p_BNV.shape[1], device=p_BNV.device).unsqueeze(0)
    return law_BNV * (node_1N < trees.n_B.unsqueeze(1) - 1).unsqueeze(-1)
