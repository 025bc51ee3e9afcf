"""Plain decoding through the same loop: a tree that is only its root. The denominator of every speedup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tree import TokenTree, TreeBatch
from ..trees.device import root_alone
from .base import Proposer

if TYPE_CHECKING:
    from ..decode import Sequence
    from ..device_texts import DeviceTexts


class NoDraft(Proposer):
    """Proposes nothing."""

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        return [TokenTree([s.tokens[-1]]) for s in seqs]

    def obstacle(self, seqs: list[Sequence]) -> str | None:
        return None

    def propose_device(self, texts: DeviceTexts) -> TreeBatch:
        return root_alone(texts.root_B)
