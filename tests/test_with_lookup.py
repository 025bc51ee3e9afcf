"""Lookup beside another proposer: what is copied, what is kept of both, and what the other one knows."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    VOCAB,
    requests,
    run,
    save_eagle,
    save_heads,
    tiny,
    untrained_eagle,
    untrained_heads,
)

from experiments.lookup_chances import chances, hits
from specdec.config import load_config
from specdec.decode import Sequence, prefill
from specdec.proposers.base import Proposer
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.eagle3 import Eagle3
from specdec.proposers.medusa import Medusa
from specdec.proposers.none import NoDraft
from specdec.proposers.with_lookup import WithLookup, merged
from specdec.rng import Philox
from specdec.target import HFTarget
from specdec.tree import TokenTree
from specdec.trees import Sampled, TopK, TreePolicy
from specdec.trees.dynamic import worth

Make = Callable[[HFTarget, TreePolicy], Proposer]
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [9, 3, 9, 1, 4], [4, 4, 4, 2, 2, 5, 6, 7, 9, 9]]
TREE = TopK(depth=3, widths=(2, 1, 1))
CHANCES = [0.2, 0.5, 0.8]


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    folder, all_of_them = tmp_path_factory.mktemp("heads"), list(range(VOCAB))
    hydra = save_heads(untrained_heads(tiny(), all_of_them, hydra=True), tiny(), folder / "h.safetensors")
    eagle = save_eagle(untrained_eagle(tiny(), all_of_them), tiny(), folder / "e.safetensors")
    return {
        "medusa": lambda target, tree: Medusa(target, tree, heads=hydra),
        "eagle3": lambda target, tree: Eagle3(target, tree, heads=eagle),
        "draft_lm": lambda target, tree: DraftLM(target, tree, layers=1),
        "none": NoDraft,
    }


def with_lookup(draft: Make, tree: TreePolicy = TREE, **options: object) -> WithLookup:
    return WithLookup(tiny(), tree, draft=draft, chances=CHANCES, **options)


def watched(proposer: Proposer) -> list[tuple[Sequence, list[int], TokenTree]]:
    """What the proposer will have been asked: sequences, their tokens at that time, and its answers."""
    propose, asked = proposer.propose, []

    def noting(seqs: list[Sequence]) -> list[TokenTree]:
        trees = propose(seqs)
        asked.extend((s, list(s.tokens), tree) for s, tree in zip(seqs, trees, strict=True))
        return trees

    proposer.propose = noting
    return asked


def copied(text: list[int], room: int = 100, **options: object) -> TokenTree:
    return with_lookup(NoDraft, **options)._copied(Sequence(0, text, room, Philox(0)))


def test_it_copies_what_followed_the_longest_suffix() -> None:
    tree = copied([1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3])
    assert tree.tokens_N[:5] == [3, 9, 8, 2, 3]
    assert tree.is_chain
    assert np.allclose(np.exp(tree.logp_N[1:4]), 0.8)
    assert copied([4, 5, 6]).tokens_N == [6]


def test_a_loop_goes_round() -> None:
    assert copied([1, 2, 1, 2, 1]).tokens_N == [1, *[2, 1] * 7, 2]
    assert copied([5, 5, 5, 5]).tokens_N == [5] * 16


def test_a_longer_match_is_likelier() -> None:
    once, twice = copied([1, 7, 8, 2, 3, 1]), copied([1, 7, 8, 3, 1, 7])
    assert np.allclose(np.exp(once.logp_N[1:5]), [0.2, 0.5, 0.8, 0.8])
    assert np.allclose(np.exp(twice.logp_N[1:4]), [0.5, 0.8, 0.8])


def test_it_copies_no_more_than_there_is_room_for() -> None:
    assert len(copied([5] * 4, room=4)) == 4
    assert len(copied([5] * 4, room=1)) == 1
    assert len(copied([5] * 4, nodes=3, most=6)) == 6


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    tree = TokenTree([0])
    for _ in range(draw(st.integers(0, 9))):
        parent, token = draw(st.integers(0, len(tree) - 1)), draw(st.integers(0, 3))
        if tree.child(parent, token) is None:
            tree.add(token, parent, math.log(draw(st.sampled_from([0.1, 0.3, 0.5, 0.9]))))
    return tree


def by_path(tree: TokenTree) -> dict[tuple[int, ...], float]:
    paths = {0: ()}
    for n in range(1, len(tree)):
        paths[n] = (*paths[tree.parents_N[n]], tree.tokens_N[n])
    return {paths[n]: tree.logp_N[n] for n in range(len(tree))}


@given(one=trees(), other=trees())
def test_a_merged_tree_has_the_nodes_of_both(one: TokenTree, other: TokenTree) -> None:
    before, both = by_path(one), merged(one, other)
    both.check(0)
    mine, theirs = by_path(one), by_path(other)
    assert mine == before
    want = {p: max(mine.get(p, -math.inf), theirs.get(p, -math.inf)) for p in mine.keys() | theirs.keys()}
    assert by_path(both) == want


@given(tree=trees(), nodes=st.integers(2, 6), more=st.integers(0, 4), gain=st.sampled_from([0.0, 0.3, 9.0]))
@settings(max_examples=200)
def test_the_best_nodes_are_kept(tree: TokenTree, nodes: int, more: int, gain: float) -> None:
    """No node left out is worth more than one kept, and nodes beyond `nodes` are worth `gain` together."""
    kept = with_lookup(NoDraft, nodes=nodes, most=nodes + more, gain=gain)._cut(tree)
    kept.check(0)
    paths, worth_N = list(by_path(tree)), np.exp(worth(tree))
    inside = sorted((w for p, w in zip(paths, worth_N, strict=True) if p in by_path(kept)), reverse=True)
    outside = [w for p, w in zip(paths, worth_N, strict=True) if p not in by_path(kept)]
    assert len(inside) == len(kept)
    assert max(outside, default=0) <= min(inside)
    further = sorted(outside, reverse=True)[:more]
    if len(kept) > nodes:
        assert sum(inside[nodes:]) >= gain
        assert len(kept) == min(nodes + more, len(tree))
    elif len(tree) > nodes:
        assert len(kept) == nodes
        assert sum(further) < gain or not further


@pytest.mark.parametrize("draft", ["medusa", "eagle3", "draft_lm"])
def test_the_other_drafts_as_if_it_had_drafted_all_along(draft: str, drafts: dict[str, Make]) -> None:
    """Behind every text the tree of a fresh proposer, which was given that text as its prompt."""
    both = with_lookup(drafts[draft], sure=0.5)
    asked = watched(both.draft)
    steps = run(both, requests(PROMPTS, 40))
    assert 10 < len(asked) < len(steps), "it was asked always, or never"
    texts = [
        [len(tokens) for s, tokens, _ in asked if s.request == request] for request in range(len(PROMPTS))
    ]
    more_than_it_can = [b - a > TREE.depth + 1 for each in texts for a, b in pairwise(each)]
    assert any(more_than_it_can), "it never went on behind what lookup drafted"
    for _, tokens, tree in asked:
        alone, seq = drafts[draft](tiny(), TREE), Sequence(0, tokens, 40, Philox(0))
        prefill(tiny(), alone, [seq])
        [want] = alone.propose([seq])
        depth = max(tree.depth_N)  # less where the answer has little room
        assert tree.tokens_N == [want.tokens_N[n] for n, d in enumerate(want.depth_N) if d <= depth]


def test_the_other_is_asked_where_lookup_is_not_sure(drafts: dict[str, Make]) -> None:
    both = with_lookup(drafts["medusa"], sure=0.5)
    asked, answered = watched(both.draft), watched(both)
    run(both, requests(PROMPTS, 40))
    wanted = [tokens for _, tokens, _ in asked]
    for seq, tokens, tree in answered:
        found = both._copied(Sequence(0, tokens, seq.prompt_len + 40 - len(tokens), Philox(0)))
        likely = len(found) > 1 and math.exp(found.logp_N[1]) >= 0.5
        assert (tokens in wanted) != likely
        if likely:
            assert tree.tokens_N == found.tokens_N[: len(tree)]
    assert 0 < len(asked) < len(answered)


def test_a_drawn_tree_stays_as_it_was_drawn(drafts: dict[str, Make]) -> None:
    both = with_lookup(drafts["medusa"], Sampled(depth=2, widths=(2, 1)))
    asked, answered = watched(both.draft), watched(both)
    run(both, requests(PROMPTS, 40))
    given_back = {id(tree) for _, _, tree in asked}
    assert given_back
    assert given_back <= {id(tree) for _, _, tree in answered}
    assert all(not tree.q_rows for _, _, tree in answered if id(tree) not in given_back)


def test_chances_are_measured_on_answers() -> None:
    text = np.array([1, 2, 3, 1, 2, 4, 1, 2, 4, 9])  # an answer behind the first three
    found = list(hits(text, 3, 2))
    assert found == [(1, True), (2, False), (1, True), (2, True), (2, False)]
    assert chances(found, 2) == [(2, 1.0), (3, 1 / 3)]


def test_alone_it_is_prompt_lookup(drafts: dict[str, Make]) -> None:
    steps = run(with_lookup(drafts["none"]), requests(PROMPTS, 40))
    assert sum(step.emitted for step in steps) / len(steps) > 1.2


def test_the_other_is_chosen_by_an_override() -> None:
    chosen = load_config(["proposer=with_lookup", "proposer@proposer.draft=eagle3", "proposer.draft.heads=x"])
    assert chosen.proposer.draft._target_ == "specdec.proposers.eagle3.Eagle3"
    assert chosen.proposer.draft.heads == "x"
    with pytest.raises(ValueError, match="eagle is unknown; the nearest is 'eagle3'"):
        load_config(["proposer=with_lookup", "proposer@proposer.draft=eagle"])


def test_errors_name_the_options_of_the_other_as_they_are_here() -> None:
    def draft(target: HFTarget, tree: TreePolicy) -> Proposer:
        return Medusa(target, tree, heads="nonsense")

    with pytest.raises(ValueError, match=r"^proposer\.draft\.heads=nonsense"):
        with_lookup(draft)


def test_it_says_how_the_heads_of_the_other_were_read() -> None:
    class Foreign(NoDraft):
        reading = "official, layers [2, 4, 5]"

    assert with_lookup(Foreign).reading == Foreign.reading
    assert with_lookup(NoDraft).reading is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chances": []}, "proposer.chances"),
        ({"chances": [0.5, 0.0]}, "proposer.chances"),
        ({"chances": [0.5, 1.5]}, "proposer.chances"),
        ({"sure": 0.0}, "proposer.sure=0.7"),
        ({"nodes": 1}, "proposer.nodes=2 proposer.most=16"),
        ({"nodes": 9, "most": 8}, "proposer.most=9"),
    ],
)
def test_what_it_refuses(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        WithLookup(tiny(), TREE, **{"draft": NoDraft, "chances": CHANCES} | options)
