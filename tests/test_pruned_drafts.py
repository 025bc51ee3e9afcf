"""A draft model whose tree is pruned keeps the rows of what was accepted in it."""

import pytest
import torch
from models import GREEDY, PROMPTS, SAMPLED, below, check_draft_cache, plain, requests, run, tiny, tiny_model

from specdec.decode import Sequence
from specdec.proposers.draft_lm import DraftLM, first_layers
from specdec.target import TargetOutput
from specdec.tree import TokenTree, Verdict
from specdec.trees import BestFirst, DraftLaw, Eagle2

PRUNED = {
    "best first": BestFirst(depth=4, nodes=8),
    "eagle2": Eagle2(depth=4, nodes=9, width=4),
    "keeps few": Eagle2(depth=4, nodes=4, width=6),
    "stops where unsure": Eagle2(depth=4, nodes=9, width=3, length="confidence", threshold=0.1),
    "heuristic": BestFirst(depth=2, nodes=9, length="heuristic"),
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("policy", PRUNED)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_draft_keeps_the_rows_of_the_text(policy: str, layers: int, sampling: object) -> None:
    """Next to neighbours that draft deeper, longer, or are done; and the text is plain decoding's."""
    proposer, limits = DraftLM(tiny(), PRUNED[policy], layers=layers), [24, 30, 9, 26]
    seqs = requests(PROMPTS, limits)
    steps = run(proposer, seqs, sampling)
    check_draft_cache(proposer, [s for s in seqs if s.request != 2])
    assert [s.new_tokens for s in seqs] == plain(tiny(), requests(PROMPTS, limits), sampling)
    assert max(s.accepted for s in steps) > 1


class ByReturnedIndex(DraftLM):
    """Keeps rows by the indices of the tree that was verified."""

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        for seq, tree in zip(seqs, trees, strict=True):
            seq.draft.tree = tree
        super().observe(seqs, trees, verdicts, out)


class ForgetsTheWorkingTree(DraftLM):
    """Lets complete trees run along in their returned form."""

    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        for seq, tree in zip(seqs, trees, strict=True):
            seq.draft.tree = tree
        return super().expand(seqs, trees, frontiers)


@pytest.mark.parametrize("wrong", [ByReturnedIndex, ForgetsTheWorkingTree])
def test_a_draft_that_mixes_up_the_two_trees_is_caught(wrong: type[DraftLM]) -> None:
    class Shallow(wrong):
        def levels(self, seq: Sequence) -> int:
            return min(super().levels(seq), 2 if seq.request % 2 else 4)

    proposer, seqs = Shallow(tiny(), Eagle2(depth=4, nodes=9, width=6), layers=2), requests(PROMPTS, 30)
    run(proposer, seqs)
    with pytest.raises(AssertionError, match="the draft's cache"):
        check_draft_cache(proposer, seqs)


@pytest.mark.parametrize("policy", PRUNED)
def test_every_law_is_that_of_a_plain_forward(policy: str) -> None:
    proposer, reference = DraftLM(tiny(), PRUNED[policy], layers=1), first_layers(tiny_model(), 1)
    expand, checked = proposer.expand, []

    def checking(
        seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        given_laws = expand(seqs, trees, frontiers)
        for seq, tree, frontier, laws in zip(seqs, trees, frontiers, given_laws, strict=True):
            for node, law in zip(frontier, laws, strict=True):
                ids = torch.tensor([seq.tokens + below(tree, node)])
                logits_V = reference(input_ids=ids, use_cache=False).logits[0, -1]
                checked.append(torch.allclose(law.logq_K, logits_V.log_softmax(-1), atol=1e-4))
        return given_laws

    proposer.expand = checking
    run(proposer, requests(PROMPTS, 10), SAMPLED)
    assert len(checked) > 40
    assert all(checked)
