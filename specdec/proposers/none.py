"""Plain decoding through the same loop: a tree that is only its root. The denominator of every speedup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tree import TokenTree
from .base import Proposer

if TYPE_CHECKING:
    from ..decode import Sequence


class NoDraft(Proposer):
    """Proposes nothing."""

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        return [TokenTree([s.tokens[-1]]) for s in seqs]
