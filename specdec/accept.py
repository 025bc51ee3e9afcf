"""Acceptance rules: (tree, p, stream) -> Verdict, where p[n] is the target's next-token law at node n.

Every rule has two forms, equal coin for coin: a call on one sequence, the one to read, and `batch` on padded
tensors, which runs on the device without a synchronisation (`specdec_kernels.tree_accept`).
A rule that you add needs only the first.
Shapes: B batch, N nodes, V vocabulary, A accepted, X any leading shape.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specdec_kernels.philox import coins
from specdec_kernels.tree_accept import block, recursive, walk
from specdec_kernels.tree_accept.naive import all_the_way, one_hot, path_to, paths, residual, strike

from .rng import Purpose, Stream, StreamBatch
from .sampling import LawBatch, LawTable
from .transfer import constant
from .tree import TokenTree, TreeBatch, Verdict, VerdictBatch


class Rule(ABC):
    """An acceptance rule.

    lossless            the emitted text has exactly the target's law; other rules are labelled in every table
    needs_q             drafted tokens must be drawn from a known law (a sampling tree policy)
    deterministic_only  drafted tokens must not be random
    chain_only          at most one child a node
    greedy_only         temperature must be 0
    synthetic           it does not look at what the target says: only what steps cost is real
    coupled             what it emits does not depend on the draft, which may know the noise of its draws
    """

    lossless: ClassVar[bool] = True
    needs_q: ClassVar[bool] = False
    deterministic_only: ClassVar[bool] = False
    chain_only: ClassVar[bool] = False
    greedy_only: ClassVar[bool] = False
    synthetic: ClassVar[bool] = False
    coupled: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        """Decide one sequence."""

    def batch(self, trees: TreeBatch, p: LawBatch, streams: StreamBatch) -> VerdictBatch:
        """Decide a batch on the device."""
        raise NotImplementedError(f"accept={self.name} has no batched form")


@dataclass(frozen=True)
class Greedy(Rule):
    """Follow the target's most likely token. Exact for temperature 0."""

    greedy_only = True

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        return _follow(tree, lambda node, depth: int(p[node].argmax()))

    def batch(self, trees: TreeBatch, p: LawBatch, streams: StreamBatch) -> VerdictBatch:
        return _walk(trees, p.best())


@dataclass(frozen=True)
class Match(Rule):
    """Sample the target at each node and follow the child that agrees; any tree, no q.

    Draws are keyed by position, so the text is the same for every proposer, plain decoding included.
    """

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        return _follow(tree, lambda node, depth: stream.draw_at(p[node], depth))

    def batch(self, trees: TreeBatch, p: LawBatch, streams: StreamBatch) -> VerdictBatch:
        return _walk(trees, p.draw(streams, trees.depth_BN))


@dataclass(frozen=True)
class Coupled(Match):
    """Match, beside drafts that add the noise of the target's draws to their own laws.

    Gumbel coupling (Daliri et al. 2408.07978), here of trees: their nodes are the tokens most likely to win
    the target's race (2506.05632 has lists of them). A draft that is the target is always right, however that
    is sampled. Only proposers with laws (`Grown`) are told, and take these for the target's: leave
    proposer.temperature at 1.
    """

    coupled = True
    deterministic_only = True


@dataclass(frozen=True)
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

    def batch(self, trees: TreeBatch, p: LawBatch, streams: StreamBatch) -> VerdictBatch:
        nodes = (trees.tokens_BN, trees.parents_BN, trees.drawn_BN)
        keys = (streams.rng.seed, streams.request_B, streams.step_B)
        return VerdictBatch(*recursive(*nodes, p.p_BNV, trees.q_BNV, *keys))


@dataclass(frozen=True)
class Rejection(Recursive):
    """Token-level rejection on a sampled chain (Leviathan 2211.17192, Chen 2302.01318)."""

    chain_only = True


@dataclass(frozen=True)
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

    def batch(self, trees: TreeBatch, p: LawBatch, streams: StreamBatch) -> VerdictBatch:
        nodes = (trees.tokens_BN, trees.n_B, trees.drawn_BN)
        keys = (streams.rng.seed, streams.request_B, streams.step_B)
        return VerdictBatch(*block(*nodes, p.p_BNV, trees.q_BNV, *keys))


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

    def __post_init__(self) -> None:
        for name, usual in (("epsilon", 0.09), ("delta", 0.3)):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(
                    f"accept.{name} is {value}, expected a number in (0, 1]: accept.{name}={usual}"
                )

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        paths: dict[int, tuple[list[int], float]] = {0: ([], 0.0)}  # of each node that stands, and its log p
        for n in range(1, len(tree)):
            parent, x = tree.parents_N[n], tree.tokens_N[n]
            if parent in paths and p[parent][x] > self.threshold(p[parent]):
                path, logp = paths[parent]
                paths[n] = ([*path, n], logp + float(p[parent][x].log()))
        path, _ = max(paths.values(), key=lambda found: (len(found[0]), found[1]))
        return Verdict(path, stream.draw_at(p[path[-1] if path else 0], len(path)))

    def batch(self, trees: TreeBatch, p: LawBatch, streams: StreamBatch) -> VerdictBatch:
        p_BNV, parent_BN = p.p_BNV, trees.parents_BN.clamp(min=0)
        at_parent_BNV = p_BNV.gather(1, parent_BN.unsqueeze(-1).expand_as(p_BNV))
        p_x_BN = at_parent_BNV.gather(2, trees.tokens_BN.unsqueeze(-1)).squeeze(-1)
        good_BN = p_x_BN > self.threshold(p_BNV).gather(1, parent_BN)
        stands_BN = all_the_way(trees.parents_BN, trees.ancestors_BNN, good_BN)
        depth_BN = torch.where(stands_BN, trees.depth_BN, 0)
        below_root_BNN = trees.ancestors_BNN & (trees.parents_BN >= 0).unsqueeze(1)
        logp_BN = torch.where(below_root_BNN, p_x_BN.log().unsqueeze(1), 0.0).sum(-1)
        longest_BN = depth_BN == depth_BN.max(dim=1, keepdim=True).values
        end_B1 = torch.where(longest_BN, logp_BN, -torch.inf).argmax(dim=1, keepdim=True)
        y_BN = p.draw(streams, trees.depth_BN)
        path = path_to(end_B1, trees.parents_BN, trees.ancestors_BNN)
        return VerdictBatch(*path, y_BN.gather(1, end_B1).squeeze(1))

    def threshold(self, p_XV: Tensor) -> Tensor:
        """What p(x) must exceed, for each law [X]."""
        entropy_X = torch.special.entr(p_XV).sum(-1)
        return (self.delta * torch.exp(-entropy_X)).clamp(max=self.epsilon)


@dataclass(frozen=True)
class Synthetic(Rule):
    """SYNTHETIC: accepts by a stated schedule, whatever the target says; for what steps cost without weights.

    rates  chance that the first child at depth 1, 2, ... is accepted; deeper ones have the last
    """

    rates: tuple[float, ...] = (0.8, 0.7, 0.6)

    lossless = False
    synthetic = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))
        if not self.rates or not all(0 <= rate <= 1 for rate in self.rates):
            raise ValueError(
                f"accept.rates is {list(self.rates)}, expected numbers in [0, 1]: accept.rates=[0.8,0.6]"
            )

    def __call__(self, tree: TokenTree, p: LawTable, stream: Stream) -> Verdict:
        node, path = 0, []
        while children := tree.children(node):
            rate = self.rates[min(len(path), len(self.rates) - 1)]
            if not stream.coin(rate, 1.0, children[0]):
                break
            node = children[0]
            path.append(node)
        return Verdict(path, int(p[node].argmax()))

    def batch(self, trees: TreeBatch, p: LawBatch, streams: StreamBatch) -> VerdictBatch:
        node_N = torch.arange(trees.depth_BN.shape[1], device=trees.depth_BN.device)
        rate_R = constant(self.rates, trees.depth_BN.device, torch.float64)
        rate_BN = rate_R[(trees.depth_BN - 1).clamp(0, len(self.rates) - 1)]
        siblings_BNN = trees.parents_BN.unsqueeze(1) == trees.parents_BN.unsqueeze(2)
        first_BN = ~(siblings_BNN & (node_N < node_N.unsqueeze(1))).any(-1)
        keys = (streams.rng.seed, streams.request_B[:, None], streams.step_B[:, None], node_N)
        good_BN = first_BN & (coins(*keys, Purpose.ACCEPT) < rate_BN)
        path_BA, count_B = paths(all_the_way(trees.parents_BN, trees.ancestors_BNN, good_BN))
        end_B1 = path_BA.amax(1, keepdim=True).clamp(min=0)
        return VerdictBatch(path_BA, count_B, p.best().gather(1, end_B1).squeeze(1))


def drafted(tree: TokenTree, node: int, like_V: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The children of `node` in the order of the draft, each with the law it came from given those before it.

    A deterministic child came from a one-hot law: so drawn and deterministic nodes mix in one tree.
    """
    q_V = tree.q(node)
    for child in tree.children(node):
        x_1 = torch.tensor([tree.tokens_N[child]], device=like_V.device)
        yield child, one_hot(x_1, like_V) if q_V is None else q_V
        q_V = None if q_V is None else strike(q_V, x_1)


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


def _walk(trees: TreeBatch, choice_BN: Tensor) -> VerdictBatch:
    return VerdictBatch(*walk(trees.tokens_BN, trees.parents_BN, trees.anc_BNW, trees.n_B, choice_BN))
