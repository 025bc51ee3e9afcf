"""What a proposer is. Add one with a file here and a YAML in conf/proposer: the contract tests enrol it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..tree import TokenTree, Verdict
from ..trees import DraftLaw, TreePolicy

if TYPE_CHECKING:
    from ..decode import Sequence
    from ..target import HFTarget, TargetOutput


class Proposer(ABC):
    """Proposes what the target may say next. Built as `MyProposer(target, tree, **yaml_keys)`.

    What it must remember of a sequence goes in `seq.draft`, which belongs to the proposer alone. `observe` stores,
    `propose` computes, so that the drafts of all sequences run in one batch.
    needs_hidden  taps of the target to be returned: a layer's index (the residual that enters it) or "final"
    """

    needs_hidden: ClassVar[tuple[int | str, ...]] = ()

    def __init__(self, target: HFTarget, tree: TreePolicy) -> None:
        self.target, self.tree = target, tree

    def start(self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]) -> None:
        """A prompt was prefilled: hidden[i][tap] is [len(tokens) - 1, D] of sequence i."""

    @abstractmethod
    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        """One tree a sequence, rooted at its last token."""

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        """The trees were verified; the sequences' tokens do not hold the new ones yet."""

    def finish(self, seq: Sequence) -> None:
        """The sequence is complete; free what was kept for it."""


class Grown(Proposer):
    """A proposer that answers with laws and leaves the shape of the tree to the policy."""

    @abstractmethod
    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        """For each sequence the draft's law at each frontier node of its unfinished tree."""

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        grown: dict[int, TokenTree] = {}
        growing = {i: self.tree.grow(s.tokens[-1], self.levels(s), s.stream) for i, s in enumerate(seqs)}
        send: dict[int, list[DraftLaw] | None] = dict.fromkeys(growing)
        while growing:
            wants = {}
            for i, growth in list(growing.items()):
                try:
                    wants[i] = growth.send(send[i])
                except StopIteration as done:
                    grown[i] = done.value
                    del growing[i]
            if wants:
                trees, frontiers = zip(*wants.values(), strict=True)
                laws = self.expand([seqs[i] for i in wants], list(trees), list(frontiers))
                send = dict(zip(wants, laws, strict=True))
        return [grown[i] for i in range(len(seqs))]

    def levels(self, seq: Sequence) -> int:
        """Levels to draft: what the policy asks for, and no more than can still be emitted before the bonus."""
        return min(self.tree.levels(seq.history), seq.room - 1)
