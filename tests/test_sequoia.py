"""Trees of a known shape: the best one against all others, and what it is expected to emit."""

import heapq
import math
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.trees import TYPICAL_ACCURACY, Sequoia, Static, best_paths, every_prefix, expected_length

Path = tuple[int, ...]
MEDUSA = ((0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0), (1, 0), (0, 2), (3,), (0, 0, 1), (0, 1, 0), (4,))

chance = st.floats(0, 1)
uneven = st.lists(st.lists(chance, min_size=1, max_size=3), min_size=1, max_size=4)
falling = st.lists(
    st.lists(chance, min_size=1, max_size=6).map(lambda row: sorted(row, reverse=True)),
    min_size=1,
    max_size=6,
)


@cache
def every_tree(nodes: int, widths: tuple[int, ...]) -> set[frozenset[Path]]:
    """All trees of that many nodes below the root, in which no child comes without those before it."""
    if not nodes:
        return {frozenset()}
    return {
        tree | {(*parent, rank)}
        for tree in every_tree(nodes - 1, widths)
        for parent in [(), *tree]
        if len(parent) < len(widths)
        for rank in [sum(len(path) == len(parent) + 1 and path[:-1] == parent for path in tree)]
        if rank < widths[len(parent)]
    }


def emitted(paths: set[Path] | frozenset[Path], accuracy_KR: list[list[float]]) -> float:
    """The expectation, node by node."""
    return 1 + sum(math.prod(accuracy_KR[d][r] for d, r in enumerate(path)) for path in paths)


@given(uneven, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_no_tree_of_its_size_and_depth_is_expected_to_emit_more(
    accuracy_KR: list[list[float]], nodes: int
) -> None:
    chosen, widths = best_paths(accuracy_KR, nodes), tuple(map(len, accuracy_KR))
    rivals = every_tree(len(chosen), widths)
    assert frozenset(chosen) in rivals
    best = max(emitted(tree, accuracy_KR) for tree in rivals)
    assert expected_length(chosen, accuracy_KR) == pytest.approx(best)
    assert len(chosen) == nodes - 1 or not every_tree(len(chosen) + 1, widths)


def test_a_worse_child_before_a_better_one_has_to_be_drafted_too() -> None:
    """Taking the worthiest node next would never get past the first child."""
    accuracy_KR = [[0.1, 0.8], [0.4]]
    assert best_paths(accuracy_KR, 3) == ((0,), (1,))
    assert best_paths(accuracy_KR, 4) == ((0,), (1,), (1, 0))


def greedy(accuracy_KR: list[list[float]], nodes: int) -> float:
    """The worthiest nodes, one by one: optimal where no child is worth more than the one before it."""
    heap, total = [(-1.0, ())], 0.0
    for _ in range(nodes):
        if not heap:
            break
        worth, path = heapq.heappop(heap)
        total -= worth
        for rank, accuracy in enumerate(accuracy_KR[len(path)] if len(path) < len(accuracy_KR) else []):
            heapq.heappush(heap, (worth * accuracy, (*path, rank)))
    return total


@given(falling, st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_large_trees_are_as_good_as_taking_the_worthiest_nodes(
    accuracy_KR: list[list[float]], nodes: int
) -> None:
    assert expected_length(best_paths(accuracy_KR, nodes), accuracy_KR) == pytest.approx(
        greedy(accuracy_KR, nodes)
    )


def top_k(*widths: int) -> tuple[Path, ...]:
    return every_prefix(product(*map(range, widths)))


HAND_MADE = {
    "chain": top_k(1, 1, 1, 1),
    "binary": top_k(2, 2, 2, 2),
    "ternary": top_k(3, 3, 3),
    "wide, then narrow": top_k(5, 2, 1, 1),
    "one level": top_k(5),
    "medusa": MEDUSA,
}


@pytest.mark.parametrize("shape", HAND_MADE)
@given(
    accuracy_KR=st.lists(
        st.lists(chance, min_size=5, max_size=5).map(lambda row: sorted(row, reverse=True)),
        min_size=4,
        max_size=4,
    )
)
@settings(max_examples=20, deadline=None)
def test_no_tree_made_by_hand_is_better(shape: str, accuracy_KR: list[list[float]]) -> None:
    paths = HAND_MADE[shape]
    best = expected_length(best_paths(accuracy_KR, len(paths) + 1), accuracy_KR)
    assert best >= expected_length(paths, accuracy_KR) - 1e-9


@given(falling, st.sampled_from(sorted(HAND_MADE)))
@settings(deadline=None)
def test_the_expected_length_counts_every_prefix_once(accuracy_KR: list[list[float]], shape: str) -> None:
    paths = HAND_MADE[shape]
    known = [p for p in paths if len(p) <= len(accuracy_KR) and all(map(_listed, accuracy_KR, p))]
    leaves = [p for p in paths if not any(q[: len(p)] == p and q != p for q in paths)]
    want = emitted(set(known), accuracy_KR)
    assert expected_length(leaves, accuracy_KR) == pytest.approx(want)
    assert expected_length([*leaves, *paths], accuracy_KR) == pytest.approx(want)


def _listed(accuracy_R: list[float], rank: int) -> bool:
    return rank < len(accuracy_R)


@given(chance, st.integers(0, 8))
def test_a_chain_of_equal_chances_has_the_expected_length_of_theory(alpha: float, depth: int) -> None:
    want = sum(alpha**d for d in range(depth + 1))
    assert expected_length([(0,) * depth], [[alpha]] * depth) == pytest.approx(want)
    assert best_paths([[alpha]] * depth, depth + 1) == tuple((0,) * d for d in range(1, depth + 1))


def test_sequoia_is_fitted_to_what_was_measured_before_what_the_draft_says_of_itself() -> None:
    deep, flat = [[0.9, 0.01]] * 4, ((0.3, 0.29, 0.28),) * 4
    assert Sequoia(nodes=4).fitted(deep).paths == ((0,), (0, 0), (0, 0, 0))
    assert Sequoia(nodes=4, depth=2).fitted(deep).paths == ((0,), (0, 0), (1,))
    assert Sequoia(nodes=4, acceptance=flat).fitted(deep).paths == ((0,), (1,), (2,))
    assert Sequoia(nodes=4, acceptance=flat).ranks(()) == [0, 1, 2]
    assert Sequoia(nodes=9).ranks(()) == Static(nodes=9).fitted(TYPICAL_ACCURACY).ranks(())


@pytest.mark.parametrize("acceptance", [(), ((),), ((0.5, 1.5),), ((0.5,), (-0.1,)), ((float("nan"),),)])
def test_chances_that_are_none_are_refused(acceptance: tuple) -> None:
    with pytest.raises(ValueError, match=r"tree.acceptance is .*expected a row of chances.*=null"):
        Sequoia(acceptance=acceptance)


def test_a_tree_for_a_large_device_is_found_too() -> None:
    accuracy_KR = [[0.5 / (r + 1) ** 1.5 for r in range(10)]] * 10
    paths = best_paths(accuracy_KR, 256)
    assert len(paths) == 255
    assert expected_length(paths, accuracy_KR) == pytest.approx(greedy(accuracy_KR, 256))
