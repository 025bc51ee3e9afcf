"""Prompt lookup, against a slow reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import below, cyclic

from specdec.decode import Sequence
from specdec.proposers.ngram import NGram
from specdec.rng import Philox
from specdec.tree import TokenTree
from specdec.trees import Chain, Sampled, TopK, TreePolicy


def ngram(tree: TreePolicy | None = None, **settings: object) -> NGram:
    return NGram(cyclic(), tree or Chain(depth=4), **settings)


def propose(proposer: NGram, text: list[int]) -> TokenTree:
    return proposer.propose([Sequence(0, list(text), 100, Philox(1))])[0]


def occurrences(text: list[int], max_n: int, min_n: int, recent: bool, matches: int) -> list[int]:
    """Where the text goes on after the suffix, as one would say it."""
    for n in range(min(max_n, len(text) - 1), min_n - 1, -1):
        ends = [i for i in range(n, len(text)) if text[i - n : i] == text[-n:]]
        if ends:
            return (ends[::-1] if recent else ends)[:matches]
    return []


texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)
lookups = {
    "min_n": st.integers(1, 3),
    "more": st.integers(0, 2),
    "recent": st.booleans(),
    "matches": st.integers(1, 4),
}


@given(text=texts, **lookups)
@settings(deadline=None)
def test_lookup_finds_the_longest_suffix(
    text: list[int], min_n: int, more: int, recent: bool, matches: int
) -> None:
    prefer = "recent" if recent else "first"
    proposer = ngram(max_n=min_n + more, min_n=min_n, prefer=prefer, matches=matches)
    want = occurrences(text, min_n + more, min_n, recent, matches)
    assert proposer.occurrences(np.asarray(text)) == want


@given(text=texts, recent=st.booleans())
@settings(deadline=None)
def test_a_chain_copies_the_preferred_occurrence(text: list[int], recent: bool) -> None:
    tree = propose(ngram(prefer="recent" if recent else "first"), text)
    starts = occurrences(text, 3, 1, recent, 8)
    copied = text[starts[0] : starts[0] + 4] if starts else []
    assert tree.is_chain
    assert tree.tokens_N[1 : len(copied) + 1] == copied
    assert tree.tokens_N[1:] in [text[s : s + len(tree) - 1] for s in starts] or len(tree) == 1


@given(text=texts)
@settings(deadline=None)
def test_a_wide_tree_merges_all_occurrences(text: list[int]) -> None:
    tree = propose(ngram(TopK(depth=2, widths=(3, 3))), text)
    tree.check(text[-1])
    paths = {tuple(below(tree, n)) for n in range(1, len(tree))}
    starts = occurrences(text, 3, 1, True, 8)
    assert paths == {tuple(text[s : s + n]) for s in starts for n in (1, 2) if s + n <= len(text)}


def test_one_preferred_occurrence_outweighs_all_others() -> None:
    text = [1, 9, 1, 8, 1, 8, 1, 8, 1, 7, 1]
    assert propose(ngram(TopK(depth=1, widths=(3,))), text).tokens_N == [1, 7, 8, 9]
    assert propose(ngram(TopK(depth=1, widths=(3,)), prefer="first"), text).tokens_N == [1, 9, 8, 7]
    assert propose(ngram(TopK(depth=1, widths=(3,)), matches=1), text).tokens_N == [1, 7]


def test_a_text_without_a_repetition_proposes_nothing() -> None:
    for tree in (Chain(), Sampled(depth=2, widths=(2, 2))):
        assert len(propose(ngram(tree), [1, 2, 3])) == 1
    assert len(propose(ngram(min_n=2), [1, 2, 1])) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_n": 4}, "proposer.min_n=4, max_n=3.*proposer.min_n=1"),
        ({"min_n": 0}, "proposer.min_n=0"),
        ({"prefer": "last"}, "proposer.prefer is 'last'.*proposer.prefer=recent"),
        ({"matches": 0}, "proposer.matches is 0.*proposer.matches=8"),
    ],
)
def test_ngram_refuses_wrong_values(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ngram(**wrong)
