"""Prompt lookup: the text that followed earlier occurrences of the current suffix (Saxena 2023).

The longest suffix of max_n down to min_n tokens that occurs before is looked up. Each of its occurrences
votes for the token that followed it, with more weight than all less preferred ones together: a chain copies
the preferred one, a branching tree merges the others into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..tree import TokenTree
from ..trees import DraftLaw
from .base import Grown

if TYPE_CHECKING:
    from ..decode import Sequence
    from ..target import HFTarget
    from ..trees import TreePolicy


class NGram(Grown):
    """Prompt lookup.

    max_n, min_n  longest and shortest suffix looked up
    prefer        "recent" or "first": which occurrence is copied first
    matches       occurrences that take part, the preferred ones first
    """

    def __init__(
        self,
        target: HFTarget,
        tree: TreePolicy,
        *,
        max_n: int = 3,
        min_n: int = 1,
        prefer: str = "recent",
        matches: int = 8,
    ) -> None:
        super().__init__(target, tree)
        if not 1 <= min_n <= max_n:
            raise ValueError(
                f"proposer.min_n={min_n}, max_n={max_n}: expected 1 <= min_n <= max_n: proposer.min_n=1"
            )
        if prefer not in ("recent", "first"):
            raise ValueError(
                f"proposer.prefer is {prefer!r}, expected recent or first: proposer.prefer=recent"
            )
        if not 1 <= matches <= 16:
            raise ValueError(f"proposer.matches is {matches}, expected 1 to 16: proposer.matches=8")
        self.max_n, self.min_n, self.prefer, self.matches = max_n, min_n, prefer, matches

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        for seq in seqs:
            seq.draft = self.occurrences(np.asarray(seq.tokens))
        return super().propose(seqs)

    def occurrences(self, tokens_L: np.ndarray) -> list[int]:
        """Where the text goes on after earlier occurrences of its longest such suffix, preferred first."""
        last = len(tokens_L) - 1
        ends, matched = np.flatnonzero(tokens_L[:last] == tokens_L[last]), 1
        while matched < self.max_n:
            longer = ends[ends >= matched]
            longer = longer[tokens_L[longer - matched] == tokens_L[last - matched]]
            if not len(longer):
                break
            ends, matched = longer, matched + 1
        if matched < self.min_n:
            return []
        order = ends[::-1] if self.prefer == "recent" else ends
        return (order[: self.matches] + 1).tolist()

    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        return [
            [self._law(seq, _path_tokens(tree, node)) for node in frontier]
            for seq, tree, frontier in zip(seqs, trees, frontiers, strict=True)
        ]

    def _law(self, seq: Sequence, path: list[int]) -> DraftLaw:
        votes = self._votes(seq, path)
        device = self.target.device if self.tree.draws else "cpu"  # a recorded law meets the target's there
        weights_K = torch.tensor(list(votes.values()), device=device)
        tokens_K = torch.tensor(list(votes), dtype=torch.long, device=device)
        return DraftLaw((weights_K / weights_K.sum()).log(), self.target.vocab, tokens_K)

    def _votes(self, seq: Sequence, path: list[int]) -> dict[int, float]:
        """Weight of each token that followed `path` after one of the occurrences."""
        votes: dict[int, float] = {}
        for age, start in enumerate(seq.draft):
            end = start + len(path)
            if end < len(seq.tokens) and seq.tokens[start:end] == path:
                votes[seq.tokens[end]] = votes.get(seq.tokens[end], 0.0) + 3.0**-age
        return votes


def _path_tokens(tree: TokenTree, node: int) -> list[int]:
    """Tokens from below the root down to `node`."""
    tokens: list[int] = []
    while node:
        tokens.insert(0, tree.tokens_N[node])
        node = tree.parents_N[node]
    return tokens
