"""Tree policies, and the batched forms of trees and verdicts against the per-tree ones."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.rng import Key, Philox, Purpose, Stream
from specdec.tree import TokenTree, TreeBatch, Verdict, VerdictBatch
from specdec.trees import TYPICAL_ACCURACY, Chain, DraftLaw, Sampled, Static, TopK, TreePolicy, best_paths

V = 12
Path = tuple[int, ...]


def law_after(tokens: list[int], support: int = V) -> Tensor:
    """A law of logits, another one for every text."""
    g = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    logits_V = 2 * torch.randn(V, generator=g)
    logits_V[logits_V.argsort()[: V - support]] = -torch.inf
    return logits_V.log_softmax(0)


def grown(policy: TreePolicy, levels: int | None = None, support: int = V, step: int = 0) -> TokenTree:
    growth = policy.grow(3, policy.depth if levels is None else levels, Stream(Philox(1), 0, step, 1))
    laws = None
    try:
        while True:
            tree, frontier = growth.send(laws)
            laws = [DraftLaw(law_after(path_tokens(tree, n), support), V) for n in frontier]
    except StopIteration as end:
        return end.value


def path_tokens(tree: TokenTree, node: int) -> list[int]:
    return [tree.tokens_N[n] for n in range(node + 1) if tree.ancestors_NN[node, n]]


def law_above(tree: TokenTree, node: int) -> Tensor:
    return law_after(path_tokens(tree, tree.parents_N[node]))


def rank_paths(tree: TokenTree) -> set[Path]:
    """The ranks, from the root, of each node below it."""
    paths: dict[int, Path] = {0: ()}
    for n in range(1, len(tree)):
        rank = law_above(tree, n).argsort(descending=True).tolist().index(tree.tokens_N[n])
        paths[n] = (*paths[tree.parents_N[n]], rank)
    return set(paths.values()) - {()}


def prefixes(paths: set[Path]) -> set[Path]:
    return {path[: d + 1] for path in paths for d in range(len(path))}


def test_a_chain_is_the_most_likely_token_at_every_level() -> None:
    tree = grown(Chain(depth=4))
    assert tree.is_chain
    assert rank_paths(tree) == {(0,) * d for d in range(1, 5)}
    assert not tree.q_rows


def test_top_k_grows_widths_below_every_node() -> None:
    tree = grown(TopK(depth=3, widths=(3, 2, 1)))
    want = itertools.product(range(3), range(2), range(1))
    assert rank_paths(tree) == prefixes(set(want))
    for n in range(1, len(tree)):
        assert tree.logp_N[n] == pytest.approx(float(law_above(tree, n)[tree.tokens_N[n]]))


def test_widths_say_how_deep_a_tree_is() -> None:
    assert TopK(widths=(3, 1)) == TopK(depth=2, widths=(3, 1))


@pytest.mark.parametrize(
    "policy", [Chain(depth=5), TopK(widths=(2, 2, 2)), Sampled(widths=(2, 2, 2)), Static()]
)
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_no_tree_is_deeper_than_its_levels(policy: TreePolicy, levels: int) -> None:
    assert max(grown(policy, levels).depth_N) == levels


paths_of_ranks = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=6)


@given(paths_of_ranks)
def test_a_static_tree_holds_every_prefix_of_its_paths_and_nothing_else(paths: list[Path]) -> None:
    assert rank_paths(grown(Static(depth=3, paths=tuple(paths)))) == prefixes(set(paths))


@given(paths_of_ranks)
def test_a_static_tree_knows_whether_it_branches(paths: list[Path]) -> None:
    policy = Static(depth=3, paths=tuple(paths))
    assert policy.chain == grown(policy).is_chain


def test_what_the_draft_has_no_support_for_is_left_out() -> None:
    assert len(grown(TopK(depth=1, widths=(5,)), support=3)) == 4
    assert len(grown(Sampled(depth=1, widths=(5,)), support=3)) == 4
    assert rank_paths(grown(Static(depth=1, paths=((1,), (4,))), support=3)) == {(1,)}


def test_a_static_tree_is_fitted_to_the_draft_unless_its_paths_are_given() -> None:
    accuracy_KR = [[0.9, 0.01], [0.9, 0.01], [0.9, 0.01]]
    assert Static(nodes=4).fitted(accuracy_KR).paths == ((0,), (0, 0), (0, 0, 0))
    assert Static(nodes=4, depth=2).fitted(accuracy_KR).paths == ((0,), (0, 0), (1,))
    given_paths = Static(paths=((0,), (1,)))
    assert given_paths.fitted(accuracy_KR) is given_paths
    assert len(grown(Static(nodes=8, depth=2))) == 8
    assert rank_paths(grown(Static(nodes=6))) == set(best_paths(TYPICAL_ACCURACY, 6))


@pytest.mark.parametrize("step", range(8))
def test_drawn_siblings_are_distinct_and_stand_in_the_order_drawn(step: int) -> None:
    tree = grown(Sampled(depth=2, widths=(4, 3)), step=step)
    assert len(tree) == 1 + 4 + 4 * 3
    for node in (n for n in range(len(tree)) if tree.children(n)):
        left_V = law_after(path_tokens(tree, node)).exp()
        assert torch.equal(tree.q(node), left_V)
        for child in tree.children(node):
            assert tree.tokens_N[child] == Philox(1).draw(left_V, Key(0, step, child, Purpose.DRAFT))
            left_V[tree.tokens_N[child]] = 0
    tree.check(3)


def test_the_heuristic_adds_two_after_a_full_acceptance_and_takes_one_after_any_other() -> None:
    policy = Chain(depth=3, length="heuristic")
    assert policy.levels([]) == 3
    assert policy.levels([(3, 3)]) == 5
    assert policy.levels([(3, 3), (5, 4)]) == 4
    assert policy.levels([(3, 0)] * 5) == 1
    assert policy.levels([(3, 0)] * 5 + [(1, 1)]) == 3
    assert policy.levels([(0, 0), (0, 0)]) == 3, "a step without a draft is no evidence"
    assert replace(policy, length="fixed").levels([(3, 3)]) == 3


@pytest.mark.parametrize(
    "policy", [Chain(depth=6), TopK(depth=3, widths=(3, 3, 3)), Sampled(depth=3, widths=(2, 2, 2))]
)
def test_confidence_keeps_the_unlikely_token_and_drafts_nothing_behind_it(policy: TreePolicy) -> None:
    tree = grown(replace(policy, length="confidence", threshold=0.2))
    likely = [n == 0 or math.exp(tree.logp_N[n]) >= 0.2 for n in range(len(tree))]
    parents = {p for p in tree.parents_N if p >= 0}
    levels = policy.depth
    assert parents == {n for n in range(len(tree)) if likely[n] and tree.depth_N[n] < levels}
    assert not all(likely), "no token was unlikely: the test says nothing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain(length="long"), r"tree.length is 'long'.*tree.length=fixed"),
        (lambda: Chain(depth=-1), r"tree.depth is -1.*tree.depth=5"),
        (lambda: Chain(threshold=1.5), r"tree.threshold is 1.5.*tree.threshold=0.4"),
        (lambda: TopK(widths=()), r"tree.widths is \[\].*tree.widths=\[4,2,1\]"),
        (lambda: Sampled(widths=(2, 0)), r"tree.widths is \[2, 0\].*tree.widths=\[4,2,1\]"),
        (lambda: TopK(depth=2, widths=(4, 3, 2)), r"\[4, 3, 2\], 3 levels, tree.depth is 2: tree.depth=3"),
        (lambda: Sampled(depth=8, widths=(1, 1)), r"\[1, 1\], 2 levels, tree.depth is 8: tree.depth=2"),
        (lambda: Static(nodes=0), r"tree.nodes is 0.*tree.nodes=8"),
        (lambda: Static(paths=((0,), (-1,))), r"negative rank.*tree.paths=\[\[0,0\],\[1\]\]"),
        (lambda: Static(depth=2, paths=((0, 0, 0),)), r"3 levels deep, tree.depth is 2: tree.depth=3"),
    ],
)
def test_wrong_values_are_refused_with_the_override_that_helps(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(st.sets(st.integers(0, V - 1), min_size=1, max_size=6), st.integers(0, 8))
def test_a_law_of_some_tokens_is_zero_elsewhere(tokens: set[int], k: int) -> None:
    tokens_K = torch.tensor(sorted(tokens))
    logq_K = law_after(sorted(tokens))[: len(tokens)].log_softmax(0)
    law = DraftLaw(logq_K, V, tokens_K)
    assert float(law.q().sum()) == pytest.approx(1)
    assert law.q().nonzero().squeeze(-1).tolist() == tokens_K.tolist()
    want = sorted(zip(tokens_K.tolist(), logq_K.tolist(), strict=True), key=lambda pair: -pair[1])
    law.top(1)
    assert law.top(k) == want[:k]


@st.composite
def random_trees(draw: st.DrawFn, most: int = 40) -> TokenTree:
    nodes = draw(st.integers(1, most))
    tree = TokenTree([draw(st.integers(0, V - 1))])
    for token in range(nodes - 1):
        tree.add(token, draw(st.integers(0, len(tree) - 1)))
    for node in draw(st.sets(st.integers(0, nodes - 1), max_size=3)):
        tree.draw_children_from(node, law_after([node]).exp())
    return tree


@given(st.lists(random_trees(), min_size=1, max_size=3), st.integers(0, 30))
@settings(deadline=None)
def test_a_batch_of_trees_says_what_its_trees_say(trees: list[TokenTree], pads: int) -> None:
    nodes = max(map(len, trees)) + pads
    batch = TreeBatch.pack(trees, nodes)
    assert batch.n_B.tolist() == [len(t) for t in trees]
    for b, tree in enumerate(trees):
        n = len(tree)
        assert batch.tokens_BN[b, :n].tolist() == tree.tokens_N
        assert batch.parents_BN[b].tolist() == tree.parents_N + [-1] * (nodes - n)
        assert batch.depth_BN[b, :n].tolist() == tree.depth_N
        want_NN = torch.eye(nodes, dtype=torch.bool)
        want_NN[:n, :n] = torch.from_numpy(tree.ancestors_NN)
        assert torch.equal(batch.ancestors_BNN[b], want_NN)
        assert batch.anc_BNW[b].tolist() == [ancestor_words(row_N, nodes) for row_N in want_NN.tolist()]
        for node in range(nodes):
            q_V = tree.q(node) if node < n else None
            assert bool(batch.drawn_BN[b, node]) == (q_V is not None)
            if batch.q_BNV is not None:
                assert torch.equal(batch.q_BNV[b, node], torch.zeros(V) if q_V is None else q_V)
    assert (batch.q_BNV is None) == (not any(t.q_rows for t in trees))


def ancestor_words(row_N: list[bool], nodes: int) -> list[int]:
    """32 nodes a word, the lowest bit first, as signed numbers of 32 bits."""
    whole = sum(bit << j for j, bit in enumerate(row_N))
    words = [(whole >> 32 * w) & 0xFFFFFFFF for w in range(-(-nodes // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(st.lists(st.builds(Verdict, st.lists(st.integers(1, 9), max_size=4), st.integers(0, 99)), min_size=1))
def test_verdicts_unpack_to_what_was_packed(verdicts: list[Verdict]) -> None:
    paths = torch.tensor([v.path_A + [-1] * (4 - len(v.path_A)) for v in verdicts])
    counts = torch.tensor([len(v.path_A) for v in verdicts])
    assert VerdictBatch(paths, counts, torch.tensor([v.bonus for v in verdicts])).unpack() == verdicts


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (TokenTree([4]), "root is token 4, the last committed token is 3"),
        (TokenTree([3, 5], [-1, 1], [], [-1, -1]), "an earlier node each"),
        (TokenTree([3, 5], [0, 0], [], [-1, -1]), "an earlier node each"),
        (TokenTree([3, 5, 5], [-1, 0, 0], [], [-1] * 3), "two children with the same token"),
    ],
)
def test_malformed_trees_are_refused(tree: TokenTree, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree.check(3)
