"""Prompt lookup beside another proposer, in one tree: heads know what may come next, lookup what came before.

SAM-Decoding (Hu et al. 2024, arXiv:2411.10666) and SuffixDecoding (Oliaro et al. 2024, 2411.04975) choose one
of the two by the length of what matched. Here that length says how likely the copied token is, so both kinds
of nodes have a worth, and the tree keeps the best of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..tree import TokenTree, Verdict
from ..trees import TreePolicy
from ..trees.dynamic import best, part, worth
from .base import Proposer
from .ngram import longest_suffix

if TYPE_CHECKING:
    from torch import Tensor

    from ..decode import Sequence
    from ..target import HFTarget, TargetOutput


class WithLookup(Proposer):
    """Merges what the text said before into the trees of another proposer.

    draft    makes that proposer of (target, tree), as a YAML in conf/proposer does with _partial_
    chances  chances[n - 1]: how often a copied token is right that the other draft would not say, where the
             last n tokens occurred before; the last one holds for longer suffixes too
    sure     with a first token as likely as this, lookup drafts alone
    nodes    of a tree, root included
    most     of a tree whose nodes beyond `nodes` are expected to add `gain` tokens or more

    Where the other's tree is drawn, nothing is merged into it: to leave out some of its nodes by their
    probability would look at the draw.
    """

    def __init__(
        self,
        target: HFTarget,
        tree: TreePolicy,
        *,
        draft: Callable[[HFTarget, TreePolicy], Proposer],
        chances: list[float],
        sure: float = 0.7,
        nodes: int = 8,
        most: int = 16,
        gain: float = 0.5,
    ) -> None:
        if not chances or not all(0 < chance <= 1 for chance in chances):
            raise ValueError(
                f"proposer.chances is {chances}, expected probabilities above 0: proposer.chances=[0.2,0.5]"
            )
        if not 0 < sure <= 1:
            raise ValueError(f"proposer.sure is {sure}, expected a probability above 0: proposer.sure=0.7")
        if not 2 <= nodes <= most:
            raise ValueError(
                f"proposer.nodes={nodes}, most={most}: expected 2 <= nodes <= most: "
                f"proposer.nodes={max(nodes, 2)} proposer.most={max(nodes, most, 2)}"
            )
        try:
            self.draft = draft(target, tree)
        except ValueError as error:  # it knows its options as those of the run's proposer
            raise ValueError(str(error).replace("proposer.", "proposer.draft.")) from error
        super().__init__(target, self.draft.tree)
        self.needs_hidden, self.reading = self.draft.needs_hidden, self.draft.reading
        self.chances, self.sure = chances, sure
        self.nodes, self.most, self.gain = nodes, most, gain

    def start(self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]) -> None:
        self.draft.start(seqs, hidden)

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        self.draft.observe(seqs, trees, verdicts, out)

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        copied = [self._copied(seq) for seq in seqs]
        unsure = [seq for seq, tree in zip(seqs, copied, strict=True) if not self._is_sure(tree)]
        drafted = iter(self.draft.propose(unsure) if unsure else [])
        return [self._cut(c) if self._is_sure(c) else self._beside(next(drafted), c) for c in copied]

    def _beside(self, drafted: TokenTree, copied: TokenTree) -> TokenTree:
        return drafted if self.tree.draws else self._cut(merged(drafted, copied))

    def _copied(self, seq: Sequence) -> TokenTree:
        """What followed the longest suffix that occurred before, going round where it reaches the end."""
        tree, text = TokenTree(seq.tokens[-1:]), np.asarray(seq.tokens)
        ends, matched = longest_suffix(text, len(self.chances))
        if not matched:
            return tree
        after, here = int(ends[-1]) + 1, len(text)
        for d in range(min(self.most, seq.room) - 1):
            chance = self.chances[min(matched + d, len(self.chances)) - 1]
            tree.add(int(text[after + d % (here - after)]), d, math.log(chance))
        return tree

    def _is_sure(self, copied: TokenTree) -> bool:
        return len(copied) > 1 and copied.logp_N[1] >= math.log(self.sure)

    def _cut(self, tree: TokenTree) -> TokenTree:
        """The best nodes: `most` of them if that is expected to gain enough."""
        worth_N = worth(tree)
        order = best(worth_N, self.most)
        gained = sum(math.exp(worth_N[n]) for n in order[self.nodes :])
        return part(tree, sorted(order if gained >= self.gain else order[: self.nodes]))


def merged(one: TokenTree, other: TokenTree) -> TokenTree:
    """The nodes of both deterministic trees; one of both has the larger of its two probabilities."""
    both, at = part(one, list(range(len(one)))), [0]
    for token, parent, logp in zip(other.tokens_N[1:], other.parents_N[1:], other.logp_N[1:], strict=True):
        node = both.child(at[parent], token)
        at.append(both.add(token, at[parent], logp) if node is None else node)
        both.logp_N[at[-1]] = max(both.logp_N[at[-1]], logp)
    return both
