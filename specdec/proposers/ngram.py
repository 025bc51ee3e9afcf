"""Prompt lookup: the text that followed earlier occurrences of the current suffix (Saxena 2023).

The longest suffix of max_n down to min_n tokens that occurs before is looked up. Each of its occurrences
votes for the token that followed it, with more weight than all less preferred ones together: a chain copies
the preferred one, a branching tree merges the others into it.
Shapes: B sequences, M occurrences, L tokens, N nodes, K tokens of a law.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specdec_kernels import ngram_match

from ..tree import TokenTree, TreeBatch
from ..trees import DraftLaw, Fixed
from ..trees.device import chains
from .base import Grown

if TYPE_CHECKING:
    from ..decode import Sequence
    from ..device_texts import DeviceTexts
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
        ends, matched = longest_suffix(tokens_L, self.max_n)
        if matched < self.min_n:
            return []
        order = ends[::-1] if self.prefer == "recent" else ends
        return (order[: self.matches] + 1).tolist()

    def obstacle(self, seqs: list[Sequence]) -> str | None:
        if not (self.tree.chain and isinstance(self.tree, Fixed)) or self.tree.draws:
            return "prompt lookup copies a chain of known length on the device: tree=chain"
        return self.tree.obstacle(self.target.vocab)

    def propose_device(self, texts: DeviceTexts) -> TreeBatch:
        start_BM, _ = ngram_match(
            texts.tokens_BL,
            texts.length_B,
            max_n=self.max_n,
            min_n=self.min_n,
            prefer=self.prefer,
            matches=self.matches,
        )
        copied_BN, found_B = copy_chain(texts, start_BM, len(self.tree.layout()))
        return chains(copied_BN).cut(torch.minimum(texts.levels_B, found_B))

    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        return [
            [self._law(seq, tree.tokens_to(node)[1:]) for node in frontier]
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


def longest_suffix(tokens_L: np.ndarray, max_n: int) -> tuple[np.ndarray, int]:
    """Where the longest suffix of up to `max_n` tokens that occurs before ended there, and its length."""
    last = len(tokens_L) - 1
    ends, matched = np.flatnonzero(tokens_L[:last] == tokens_L[last]), 1
    while matched < max_n:
        longer = ends[ends >= matched]
        longer = longer[tokens_L[longer - matched] == tokens_L[last - matched]]
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    return ends, matched if len(ends) else 0


def copy_chain(texts: DeviceTexts, start_BM: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """int64 [B, N]: the root, and what the first occurrence that agrees so far and goes on says; how many."""
    M, L = start_BM.shape[1], texts.tokens_BL.shape[1]
    agrees_BM, age_M = start_BM >= 0, torch.arange(M, device=start_BM.device)
    copied, found_B = [texts.root_B], torch.zeros_like(texts.length_B)
    for d in range(depth):
        at_BM = start_BM + d
        goes_on_BM = agrees_BM & (at_BM < texts.length_B.unsqueeze(1))
        first_B1 = torch.where(goes_on_BM, age_M, M).amin(1, keepdim=True)
        next_BM = texts.tokens_BL.gather(1, at_BM.clamp(0, L - 1))
        next_B1 = next_BM.gather(1, first_B1.clamp(max=M - 1))
        agrees_BM = goes_on_BM & (next_BM == next_B1)
        copied.append(next_B1.squeeze(1))
        found_B = found_B + goes_on_BM.any(1)
    return torch.stack(copied, 1), found_B
