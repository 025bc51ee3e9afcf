"""Two proposers in one: who drafts where, and that the second knows the text that it did not draft."""

from collections.abc import Callable

import pytest
from models import (
    GREEDY,
    VOCAB,
    requests,
    run,
    save_eagle,
    save_heads,
    tiny,
    untrained_eagle,
    untrained_heads,
)

from specdec.accept import Match
from specdec.config import load_config
from specdec.decode import Sequence, prefill
from specdec.proposers.base import Proposer
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.eagle3 import Eagle3
from specdec.proposers.first_of import FirstOf
from specdec.proposers.medusa import Medusa
from specdec.proposers.ngram import NGram
from specdec.rng import Philox
from specdec.target import HFTarget
from specdec.tree import TokenTree
from specdec.trees import Chain, TopK, TreePolicy

Make = Callable[[HFTarget, TreePolicy], Proposer]
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [9, 3, 9, 1, 4], [4, 4, 4, 2, 2, 5, 6, 7, 9, 9]]
TREE = TopK(depth=3, widths=(2, 1, 1))
Asked = list[tuple[int, list[int], TokenTree]]  # request, its tokens, and what was drafted behind them


def lookup(target: HFTarget, tree: TreePolicy) -> NGram:
    return NGram(target, tree, min_n=2)


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    folder, all_of_them = tmp_path_factory.mktemp("heads"), list(range(VOCAB))
    hydra = save_heads(untrained_heads(tiny(), all_of_them, hydra=True), tiny(), folder / "h.safetensors")
    eagle = save_eagle(untrained_eagle(tiny(), all_of_them), tiny(), folder / "e.safetensors")
    return {
        "medusa": lambda target, tree: Medusa(target, tree, heads=hydra),
        "eagle3": lambda target, tree: Eagle3(target, tree, heads=eagle),
        "draft_lm": lambda target, tree: DraftLM(target, tree, layers=1),
    }


def watched(proposer: Proposer, asked: Asked) -> None:
    """Note what the proposer is asked, and its answers."""
    propose = proposer.propose

    def noting(seqs: list[Sequence]) -> list[TokenTree]:
        trees = propose(seqs)
        asked.extend((s.request, list(s.tokens), tree) for s, tree in zip(seqs, trees, strict=True))
        return trees

    proposer.propose = noting


@pytest.mark.parametrize("second", ["medusa", "eagle3", "draft_lm"])
def test_the_second_drafts_as_if_the_text_were_its_own(second: str, seconds: dict[str, Make]) -> None:
    """Behind every text the tree of a fresh proposer, which was given that text as its prompt."""
    both = FirstOf(tiny(), TREE, first=lookup, second=seconds[second], first_tree=Chain(depth=4))
    by_first, by_second = [], []
    watched(both.first, by_first)
    watched(both.second, by_second)
    run(both, requests(PROMPTS, 40), GREEDY, Match())
    copied = [asked for asked in by_first if len(asked[2]) > 1]
    assert len(copied) > 10, "the first never drafted"
    resumed = [asked for asked in by_second if asked[0] in {request for request, _, _ in copied}]
    assert len(resumed) > 10, "the second was never asked behind the first"
    for _, tokens, tree in by_second:
        alone = seconds[second](tiny(), TREE)
        seq = Sequence(0, tokens, 40, Philox(0))
        prefill(tiny(), alone, [seq])
        [want] = alone.propose([seq])
        depth = max(tree.depth_N)  # less where the answer has little room
        kept = [n for n, d in enumerate(want.depth_N) if d <= depth]
        assert tree.tokens_N == [want.tokens_N[n] for n in kept]


def test_the_second_is_asked_only_where_the_first_has_nothing(seconds: dict[str, Make]) -> None:
    both = FirstOf(tiny(), TREE, first=lookup, second=seconds["medusa"], first_tree=Chain(depth=4))
    by_first, by_second = [], []
    watched(both.first, by_first)
    watched(both.second, by_second)
    run(both, requests(PROMPTS, 40))
    without = [(request, tokens) for request, tokens, tree in by_first if len(tree) == 1]
    assert without == [(request, tokens) for request, tokens, _ in by_second]
    assert 0 < len(without) < len(by_first)


def test_it_wants_what_either_wants(seconds: dict[str, Make]) -> None:
    for first, second in (("medusa", "eagle3"), ("eagle3", "medusa")):
        both = FirstOf(
            tiny(), TREE, first=seconds[first], second=seconds[second], first_tree=Chain(depth=1)
        )
        assert set(both.needs_hidden) == {"final", 0, 1}
        assert len(both.needs_hidden) == 3


def test_the_second_is_chosen_by_an_override() -> None:
    chosen = load_config(["proposer=lookup_first", "proposer@proposer.second=eagle3", "proposer.second.heads=x"])
    assert chosen.proposer.second._target_ == "specdec.proposers.eagle3.Eagle3"
    assert chosen.proposer.second.heads == "x"
    with pytest.raises(ValueError, match="eagle is unknown; the nearest is 'eagle3'"):
        load_config(["proposer=lookup_first", "proposer@proposer.second=eagle"])


