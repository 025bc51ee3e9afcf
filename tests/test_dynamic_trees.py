"""Dynamic trees against slow ones that know every node."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.tree import TokenTree
from specdec.trees import BestFirst, DraftLaw, Eagle2, TreePolicy, followed
from specdec.trees.dynamic import worth

V = 4
Text = tuple[int, ...]
Worths = dict[Text, float]


class Table:
    """A draft that is a table: a law for every text, on `support` of V tokens; few `choices` make ties."""

    def __init__(self, seed: int, support: int = V, choices: int = 1000) -> None:
        self.seed, self.support, self.choices = seed, support, choices

    def law(self, text: Text) -> Tensor:
        g = torch.Generator().manual_seed(hash((self.seed, *text)) % 2**31)
        many = self.choices > V
        drawn_V = (
            torch.randperm(self.choices, generator=g)[:V]
            if many
            else torch.randint(self.choices, (V,), generator=g)
        )
        logits_V = drawn_V * (4.0 / self.choices)
        logits_V[torch.randperm(V, generator=g)[self.support :]] = -torch.inf
        return logits_V.log_softmax(0)


tables = st.builds(Table, st.integers(0, 10**6), st.integers(1, V))
tied_tables = st.builds(Table, st.integers(0, 10**6), st.integers(1, V), st.integers(1, 2))  # ties everywhere


def growth(policy: TreePolicy, draft: Table, levels: int) -> Iterator[tuple[TokenTree, list[int]]]:
    """The working trees with their frontiers; at last the tree, and no frontier."""
    growing, laws = policy.grow(0, levels, None), None
    try:
        while True:
            tree, frontier = growing.send(laws)
            yield tree, frontier
            laws = [DraftLaw(draft.law(texts(tree)[n]), V) for n in frontier]
    except StopIteration as end:
        yield end.value, []


def grown(policy: TreePolicy, draft: Table, levels: int | None = None) -> TokenTree:
    *_, (tree, _) = growth(policy, draft, policy.depth if levels is None else levels)
    return tree


def texts(tree: TokenTree) -> list[Text]:
    """The tokens below the root, down to each node."""
    found: list[Text] = [()]
    for token, parent in zip(tree.tokens_N[1:], tree.parents_N[1:], strict=True):
        found.append((*found[parent], token))
    return found


def worths(draft: Table, depth: int) -> Worths:
    """The log-probability of every text of up to `depth` tokens that the draft may say."""
    worth = {(): 0.0}
    for length in range(depth):
        for text in itertools.product(range(V), repeat=length):
            for token, logp in enumerate(draft.law(text).tolist() if text in worth else []):
                if logp > -torch.inf:
                    worth[*text, token] = worth[text] + logp
    return worth


def largest(worth: Worths, count: int) -> list[float]:
    return sorted(worth.values(), reverse=True)[:count]


def total(tree: TokenTree) -> list[float]:
    worth_N = [0.0]
    for parent, logp in zip(tree.parents_N[1:], tree.logp_N[1:], strict=True):
        worth_N.append(worth_N[parent] + logp)
    return sorted(worth_N, reverse=True)


@given(st.one_of(tables, tied_tables), st.integers(1, 14), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_tree_of_so_many_nodes_is_likelier(draft: Table, nodes: int, depth: int) -> None:
    tree = grown(BestFirst(depth=depth, nodes=nodes), draft)
    tree.check(0)
    worth = worths(draft, depth)
    assert total(tree) == pytest.approx(largest(worth, nodes))
    for text, token_worth in zip(texts(tree)[1:], tree.logp_N[1:], strict=True):
        assert token_worth == pytest.approx(worth[text] - worth[text[:-1]])


def eagle2(draft: Table, nodes: int, depth: int, width: int) -> Worths:
    """EAGLE-2 as it is published: the level's `width` best are expanded, then the best of all are kept."""
    worth: Worths = {(): 0.0}
    level = [()]
    for _ in range(depth):
        children: Worths = {}
        for text in level:
            likely = sorted(enumerate(draft.law(text).tolist()), key=lambda pair: -pair[1])[:width]
            children |= {(*text, token): worth[text] + p for token, p in likely if p > -torch.inf}
        worth |= children
        level = sorted(children, key=lambda text: -children[text])[:width]
    return {text: worth[text] for text in sorted(worth, key=lambda text: -worth[text])[:nodes]}


sizes = {"nodes": st.integers(1, 20), "depth": st.integers(0, 4), "width": st.integers(1, 5)}


@given(draft=tables, **sizes)
@settings(max_examples=80, deadline=None)
def test_eagle2_is_the_published_one(draft: Table, nodes: int, depth: int, width: int) -> None:
    tree = grown(Eagle2(depth=depth, nodes=nodes, width=width), draft)
    tree.check(0)
    assert set(texts(tree)) == set(eagle2(draft, nodes, depth, width))


@given(draft=tables, **sizes)
@settings(max_examples=40, deadline=None)
def test_eagle2_wide_enough_is_best_first(draft: Table, nodes: int, depth: int, width: int) -> None:
    wide = Eagle2(depth=depth, nodes=nodes, width=nodes)
    assert grown(wide, draft) == grown(BestFirst(depth=depth, nodes=nodes), draft)


@given(draft=st.one_of(tables, tied_tables), **sizes)
@settings(max_examples=60, deadline=None)
def test_the_working_tree_only_grows(draft: Table, nodes: int, depth: int, width: int) -> None:
    """By the frontier, which is no wider than allowed, a level at a time, and no deeper than asked."""
    before = TokenTree([], [])
    *asked, (tree, _) = growth(Eagle2(depth=depth, nodes=nodes, width=width), draft, depth)
    assert len(asked) <= depth
    for level, (working, frontier) in enumerate(asked):
        assert working.tokens_N[: len(before)] == before.tokens_N
        assert working.parents_N[: len(before)] == before.parents_N
        assert frontier == list(range(len(before), len(working)))
        assert len(frontier) <= min(width, nodes - 1)
        assert {working.depth_N[n] for n in frontier} == {level}
        before = working
    assert max(tree.depth_N) <= depth
    assert {texts(tree)[p] for p in tree.parents_N[1:]} <= set(texts(before) if asked else ())


def test_nobody_is_asked_whose_children_could_not_stay() -> None:
    """Of three nodes: the root's second best token is not kept, and what is below its best has no room."""

    class Sure(Table):
        def law(self, text: Text) -> Tensor:
            return torch.tensor([0.9, 0.1, 0.0, 0.0]).log()

    *asked, (tree, _) = growth(BestFirst(depth=9, nodes=3), Sure(0), 9)
    assert [texts(working) for working, _ in asked] == [[()], [(), (0,)]]
    assert texts(tree) == [(), (0,), (0, 0)]


@given(tied_tables, st.integers(2, 12), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_of_equals_parents_and_the_lower_index_come_first(draft: Table, nodes: int, depth: int) -> None:
    """Each tree holds the smaller ones, so a node's place does not depend on how many are kept."""
    smaller = grown(BestFirst(depth=depth, nodes=nodes - 1), draft)
    larger = grown(BestFirst(depth=depth, nodes=nodes), draft)
    assert set(texts(smaller)) <= set(texts(larger))
    assert larger.parents_N == sorted(larger.parents_N)


class Certain(Table):
    """One token at every node, with a log-probability that rounding lifted above 0."""

    def law(self, text: Text) -> Tensor:
        return torch.full((V,), -torch.inf).index_fill(0, torch.tensor([len(text) % V]), 1e-6)


def test_a_certain_child_does_not_come_before_its_parent() -> None:
    tree = grown(BestFirst(depth=6, nodes=4), Certain(0))
    assert tree.is_chain
    assert len(tree) == 4


def test_nothing_is_drafted_behind_a_path_that_the_draft_doubts() -> None:
    policy = Eagle2(depth=4, nodes=20, width=4, length="confidence", threshold=0.2)
    doubted = 0
    for seed in range(20):
        tree = grown(policy, Table(seed))
        worth_N = worth(tree)
        parents = {p for p in tree.parents_N[1:] if p}
        assert all(worth_N[p] >= math.log(0.2) for p in parents)
        doubted += any(worth_N[n] < math.log(0.2) <= tree.logp_N[n] for n in range(1, len(tree)))
    assert doubted


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_no_deeper_than_its_levels(levels: int) -> None:
    for policy in (BestFirst(nodes=30), Eagle2(nodes=30)):
        assert max(grown(policy, Table(1), levels).depth_N) == levels


def test_which_of_them_are_chains() -> None:
    assert BestFirst(nodes=2).chain
    assert Eagle2(width=1).chain
    assert not BestFirst(nodes=3).chain
    assert not Eagle2().chain
    assert grown(Eagle2(width=1, depth=3), Table(2)).is_chain
    assert not any(policy.draws for policy in (BestFirst, Eagle2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestFirst(nodes=0), r"tree.nodes is 0.*tree.nodes=16"),
        (lambda: Eagle2(nodes=-1), r"tree.nodes is -1.*tree.nodes=16"),
        (lambda: Eagle2(width=0), r"tree.width is 0.*tree.width=8"),
        (lambda: Eagle2(depth=-1), r"tree.depth is -1.*tree.depth=5"),
    ],
)
def test_wrong_values_are_refused_with_the_override_that_helps(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_path_is_followed_as_far_as_it_goes() -> None:
    tree = TokenTree([9, 4, 5, 6, 4], [-1, 0, 0, 2, 2])
    assert followed(tree, [5, 4, 7]) == [2, 4]
    assert followed(tree, [6]) == []
    assert followed(tree, []) == []


def test_a_dynamic_tree_is_a_value() -> None:
    assert replace(Eagle2(), width=3) == Eagle2(width=3)
    assert hash(Eagle2()) == hash(Eagle2())
