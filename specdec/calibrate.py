"""What a draft is worth here: where its tokens are accepted, and what drafting and verifying cost.

Everything comes from the real loop on one sequence at a time.
Shapes: K depths, R ranks among siblings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, cycle
from statistics import mean, median
from typing import ClassVar

from torch import Tensor

from .accept import Match
from .arms import Experiment, LoopArm
from .decode import Clock, Sequence
from .metrics import tokens_per_step
from .proposers.base import Proposer
from .proposers.none import NoDraft
from .records import StepRecord
from .rng import Stream
from .target import HFTarget, TargetOutput
from .text import Request
from .tree import TokenTree, Verdict
from .trees import Chain, Growth, TreePolicy, every_prefix

MISS = -1  # the rank of a token that is not among the draft's first ones
WARM_UP = 2  # steps of each kind that are not counted: the first meet new shapes
BRANCHING = 8  # children of a node whose tokens don't matter

Ranks = dict[int, list[list[int]]]


@dataclass(frozen=True)
class Along(TreePolicy):
    """Drafts along texts that are known, and notes the ranks of their tokens. Nothing is left to verify.

    texts     prompt and answer of every request
    branches  ranks that count; a token beyond them is a MISS
    ranks     of every request, from each of its positions on: the ranks of the next tokens in the draft's
              laws behind those before, up to and with the first MISS
    """

    branches: int = 8
    texts: Mapping[int, list[int]] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=dict)

    chain: ClassVar[bool] = True

    def grow(self, root: int, levels: int, stream: Stream) -> Growth:
        tree, node, noted = TokenTree([root]), 0, []
        self.ranks.setdefault(stream.request, []).append(noted)
        for token in self.texts[stream.request][stream.position :][:levels]:
            [law] = yield tree, [node]
            likely = [each for each, _ in law.top(self.branches)]
            noted.append(likely.index(token) if token in likely else MISS)
            if noted[-1] == MISS:
                break
            node = tree.add(token, node)
        return TokenTree([root])


@contextmanager
def growing(proposer: Proposer, tree: TreePolicy) -> Iterator[None]:
    """Let the proposer grow other trees for a while."""
    before, proposer.tree = proposer.tree, tree
    try:
        yield
    finally:
        proposer.tree = before


def ranks_along(e: Experiment, requests: list[Request], depth: int, branches: int) -> Ranks:
    """The ranks of the target's own text in the draft's laws, from every position of its answers on.

    A greedy or matched tree accepts what the target says anyway, so `replayed` can tell from these ranks what
    a loop with any tree of fixed shape emits.
    """
    rule = e.accept if isinstance(e.accept, Match) else Match()
    plain = LoopArm(e, NoDraft(e.target, Chain()), rule)
    texts = {r.number: r.ids + steps_and_tokens(plain, e, r)[1] for r in requests}
    along = Along(depth=depth, branches=branches, texts=texts)
    with growing(e.proposer, along):
        for r in requests:
            steps_and_tokens(LoopArm(e, e.proposer, rule), e, r)
    return along.ranks


def steps_and_tokens(arm: LoopArm, e: Experiment, request: Request) -> tuple[list[StepRecord], list[int]]:
    """One request's answer."""
    [answer] = arm([request], e.settings.max_new_tokens)
    return answer.steps, answer.tokens


def loop_tokens_per_step(e: Experiment, requests: list[Request], tree: TreePolicy) -> float:
    """Tokens per step of the loop itself with this tree."""
    with growing(e.proposer, tree):
        arm = LoopArm(e, e.proposer, e.accept)
        steps = [step for r in requests for step in steps_and_tokens(arm, e, r)[0]]
    return tokens_per_step(steps)


@dataclass(frozen=True)
class Acceptance:
    """Where a draft's tokens are accepted, by depth and branch.

    counts_KR[d][r]  texts that went on with child r of a node at depth d
    reached_K[d]     texts that had come to depth d, and went on
    """

    counts_KR: list[list[int]]
    reached_K: list[int]

    @classmethod
    def of(cls, ranks: Ranks, depth: int, branches: int) -> Acceptance:
        """Counts over all positions of all requests."""
        rows = list(chain.from_iterable(ranks.values()))
        at_K = [[row[d] for row in rows if d < len(row)] for d in range(depth)]
        return cls([[at.count(r) for r in range(branches)] for at in at_K], [len(at) for at in at_K])

    @property
    def rates_KR(self) -> list[list[float]]:
        """How often child r of a node at depth d is accepted; 0 at a depth that no text reached."""
        return [
            [count / max(reached, 1) for count in counts_R]
            for counts_R, reached in zip(self.counts_KR, self.reached_K, strict=True)
        ]

    @property
    def pooled_KR(self) -> list[list[float]]:
        """The simpler model: the same chances at every depth, as if tokens were independent."""
        pooled_R = [sum(counts) / max(sum(self.reached_K), 1) for counts in zip(*self.counts_KR, strict=True)]
        return [pooled_R] * len(self.counts_KR)


def replayed(paths: Iterable[Iterable[int]], ranks: Ranks) -> float:
    """Tokens per step of a loop that answers the requests of `ranks` with a tree of these paths of ranks.

    What the loop accepts behind a stop token, and drops, is not in the ranks.
    """
    tree, steps, emitted = set(every_prefix(paths)), 0, 0
    for rows in ranks.values():
        at = 0
        while at < len(rows):
            row = rows[at]
            accepted = next((d for d in range(len(row)) if tuple(row[: d + 1]) not in tree), len(row))
            at += accepted + 1
            steps, emitted = steps + 1, emitted + accepted + 1
    return emitted / steps


class Padding(NoDraft):
    """Proposes trees that mean nothing, of each size in turn, so that sizes are timed side by side."""

    def __init__(self, target: HFTarget, sizes: list[int]) -> None:
        super().__init__(target, Chain())
        self.sizes = cycle(sizes)

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        nodes = next(self.sizes)
        trees = super().propose(seqs)
        for tree in trees:
            for n in range(nodes - 1):
                tree.add(n % BRANCHING, n // BRANCHING)
        return trees


def verify_seconds(e: Experiment, requests: list[Request], sizes: list[int], rounds: int) -> dict[int, float]:
    """Median seconds of a step without its draft, for every size of the tree."""
    arm, asked = LoopArm(e, Padding(e.target, sizes), e.accept), cycle(requests)
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    while min(map(len, seconds.values())) < WARM_UP + rounds:
        for step in steps_and_tokens(arm, e, next(asked))[0]:
            seconds[step.nodes].append(step.seconds)
    return {n: median(each[WARM_UP:]) for n, each in seconds.items()}


class Stopwatch(Proposer):
    """Another proposer with each tree policy in turn.

    seconds[i]  what drafting took with the i-th, where the answer had room for its depth
    """

    def __init__(self, inner: Proposer, trees: list[TreePolicy]) -> None:
        super().__init__(inner.target, inner.tree)
        self.inner, self.trees, self.needs_hidden = inner, trees, inner.needs_hidden
        self.clock, self.turn = Clock(inner.target.device), 0
        self.seconds: list[list[float]] = [[] for _ in trees]

    def start(self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]) -> None:
        self.inner.start(seqs, hidden)

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        tree = self.trees[self.turn]
        self.whole = seqs[0].room > min(tree.depth, seqs[0].max_new_tokens - 1)
        began = self.clock.settled()
        with growing(self.inner, tree):
            trees = self.inner.propose(seqs)
        self.spent = self.clock.settled() - began
        return trees

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        began = self.clock.settled()
        self.inner.observe(seqs, trees, verdicts, out)
        self.spent += self.clock.settled() - began
        if self.whole:
            self.seconds[self.turn].append(self.spent)
            self.turn = (self.turn + 1) % len(self.trees)


def draft_seconds(
    e: Experiment, requests: list[Request], trees: list[TreePolicy], rounds: int
) -> list[float]:
    """Seconds of drafting with each of some trees.

    The median; the mean where a tree looks how far to go, as its levels differ from step to step.
    """
    watch, asked = Stopwatch(e.proposer, trees), cycle(requests)
    while min(map(len, watch.seconds)) < WARM_UP + rounds:
        steps_and_tokens(LoopArm(e, watch, e.accept), e, next(asked))
    timed = zip(trees, (each[WARM_UP:] for each in watch.seconds), strict=True)
    return [(median if tree.length == "fixed" else mean)(seconds) for tree, seconds in timed]


@dataclass(frozen=True)
class Size:
    """Limits of a tree, the tokens that a step with it emits, and the seconds that the step takes."""

    nodes: int
    depth: int
    tokens: float
    seconds: float

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.tokens


def sizes(
    verify: Mapping[int, float],
    draft: Mapping[tuple[int, int], float],
    tokens: Callable[[int, int], float],
) -> list[Size]:
    """Every size that was drafted with, fastest first.

    verify, draft  seconds by nodes, and by (nodes, depth)
    tokens         tokens per step of a tree of (nodes, depth)
    """
    every = [Size(n, d, tokens(n, d), verify[n] + seconds) for (n, d), seconds in draft.items()]
    return sorted(every, key=lambda size: size.seconds_per_token)
