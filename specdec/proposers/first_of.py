"""Two proposers, the first with a draft going first: lookup where the text repeats itself, heads elsewhere.

SAM-Decoding (Hu et al. 2024, arXiv:2411.10666) chooses so between retrieval and EAGLE-2, by the length of
what was matched. Here the first proposer's own limit decides (`first.min_n` of prompt lookup).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..tree import TokenTree, Verdict
from ..trees import TreePolicy
from .base import Proposer

if TYPE_CHECKING:
    from torch import Tensor

    from ..decode import Sequence
    from ..target import HFTarget, TargetOutput

Make = Callable[["HFTarget", TreePolicy], Proposer]


class FirstOf(Proposer):
    """Drafts with `first` where that has a draft, and with `second` elsewhere.

    first, second  each makes a proposer of (target, tree), as a YAML in conf/proposer does with _partial_
    first_tree     the tree that `first` grows; `second` grows the run's
    """

    def __init__(
        self, target: HFTarget, tree: TreePolicy, *, first: Make, second: Make, first_tree: TreePolicy
    ) -> None:
        super().__init__(target, tree)
        self.first, self.second = first(target, first_tree), second(target, tree)
        self.tree = self.second.tree
        self.needs_hidden = tuple(dict.fromkeys((*self.first.needs_hidden, *self.second.needs_hidden)))

    def start(self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]) -> None:
        for seq in seqs:
            seq.draft = _Drafts()
        for which in ("first", "second"):
            with _belonging_to(which, seqs):
                getattr(self, which).start(seqs, hidden)

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        with _belonging_to("first", seqs):
            trees = self.first.propose(seqs)
        without = [b for b, tree in enumerate(trees) if len(tree) == 1]
        if others := [seqs[b] for b in without]:
            with _belonging_to("second", others):
                for b, tree in zip(without, self.second.propose(others), strict=True):
                    trees[b] = tree
        return trees

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        for which in ("first", "second"):
            with _belonging_to(which, seqs):
                getattr(self, which).observe(seqs, trees, verdicts, out)


@dataclass
class _Drafts:
    """What each of the two keeps of a sequence."""

    first: Any = None
    second: Any = None


@contextmanager
def _belonging_to(which: str, seqs: list[Sequence]) -> Iterator[None]:
    """Sequences as one of the two knows them."""
    both = [seq.draft for seq in seqs]
    for seq, drafts in zip(seqs, both, strict=True):
        seq.draft = getattr(drafts, which)
    try:
        yield
    finally:
        for seq, drafts in zip(seqs, both, strict=True):
            setattr(drafts, which, seq.draft)
            seq.draft = drafts
