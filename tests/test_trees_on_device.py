"""Trees grown on the device are those that `grow` grows, node by node.

Shapes: B sequences, F nodes, d tokens of a path, U draft vocabulary, V vocabulary, N nodes of a tree.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specdec.rng import Philox, Stream, StreamBatch
from specdec.tree import TokenTree, TreeBatch
from specdec.trees import BestFirst, Chain, DraftLaw, Eagle2, Sampled, Sequoia, Static, TopK, TreePolicy
from specdec.trees.device import DeviceDraft

V, U, DEPTH = 40, 24, 3
TOKENS_U = torch.arange(U) + 7
ROOTS = [5, 9, 30]
POLICIES = {
    "chain": Chain(depth=DEPTH),
    "top-k": TopK(depth=DEPTH, widths=(3, 2, 1)),
    "static": Static(depth=DEPTH, nodes=9),
    "ranks with gaps": Static(depth=DEPTH, paths=((0, 2), (3,), (1, 1, 1))),
    "sequoia": Sequoia(depth=DEPTH, nodes=7),
    "sampled": Sampled(depth=DEPTH, widths=(3, 2, 1)),
    "sampled sequoia": Sequoia(depth=DEPTH, nodes=7, draws=True),
    "best first": BestFirst(depth=DEPTH, nodes=8),
    "eagle2": Eagle2(depth=DEPTH, nodes=12, width=4),
    "one node": Eagle2(depth=DEPTH, nodes=1),
    "no level": Chain(depth=0),
}


def law(path: list[int]) -> Tensor:
    """Log-probabilities [U] behind the tokens from the root down."""
    seed = sum(t * 31**i for i, t in enumerate(path))
    gen = torch.Generator().manual_seed(seed)
    few = seed % 3 == 0  # of whose tokens all but one or two have no probability that a float32 could hold
    return torch.log_softmax((200 if few else 2) * torch.randn(U, generator=gen), 0)


def expand(paths_BFd: Tensor) -> Tensor:
    return torch.stack([torch.stack([law(path) for path in paths]) for paths in paths_BFd.tolist()])


def grown_by_the_host(policy: TreePolicy, root: int, levels: int, stream: Stream) -> TokenTree:
    growth, laws = policy.grow(root, levels, stream), None
    while True:
        try:
            tree, frontier = growth.send(laws)
        except StopIteration as done:
            return done.value
        laws = [DraftLaw(law(path_to(tree, node)), V, TOKENS_U) for node in frontier]


def path_to(tree: TokenTree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.insert(0, tree.tokens_N[node])
        node = tree.parents_N[node]
    return path


def grown_on_device(policy: TreePolicy, levels: list[int]) -> TreeBatch:
    streams = StreamBatch.pack(STREAMS)
    draft = DeviceDraft(expand, V, TOKENS_U)
    return policy.grow_on_device(torch.tensor(ROOTS), torch.tensor(levels), draft, streams)


STREAMS = [Stream(Philox(1), request, 4 * request, 10) for request in range(len(ROOTS))]


def check(policy: TreePolicy, levels: list[int]) -> None:
    got = grown_on_device(policy, levels)
    places = zip(ROOTS, levels, STREAMS, strict=True)
    want = TreeBatch.pack(
        [grown_by_the_host(policy, root, min(n, policy.depth), stream) for root, n, stream in places],
        got.tokens_BN.shape[1],
    )
    for name in ("tokens_BN", "parents_BN", "n_B", "depth_BN", "drawn_BN"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    if want.q_BNV is not None:
        assert torch.equal(got.q_BNV[want.drawn_BN], want.q_BNV[want.drawn_BN])


@pytest.mark.parametrize("levels", [[DEPTH] * 3, [9, 1, 0], [2, 0, 3]], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_the_same_nodes(name: str, levels: list[int]) -> None:
    check(POLICIES[name], levels)


@pytest.mark.parametrize("name", POLICIES)
def test_it_says_when_it_can(name: str) -> None:
    assert POLICIES[name].obstacle(U) is None
    assert "tree.length=confidence" in replace(POLICIES[name], length="confidence").obstacle(U)


def test_a_child_beyond_the_draft_vocabulary_is_refused() -> None:
    assert "child number 4 is asked of a draft of 3 tokens" in TopK(widths=(4,)).obstacle(3)


def test_more_than_the_kernels_choose_from_is_refused() -> None:
    assert "342 nodes of width 18 to choose from" in BestFirst(depth=2, nodes=19).obstacle(U)
    assert BestFirst(depth=2, nodes=19).obstacle(16) is None
    assert "are too many" in Eagle2(depth=6, nodes=30, width=16).obstacle(U)


def test_a_policy_of_somebody_else_is_left_to_the_host() -> None:
    class Mine(TreePolicy):
        chain = True

        def grow(self, root: int, levels: int, stream: Stream) -> None:
            """Not asked here."""

    assert Mine().obstacle(U) == "Mine trees are grown by the host"
