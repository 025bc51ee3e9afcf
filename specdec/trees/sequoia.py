"""Sequoia (Chen et al. 2024, arXiv:2402.12374): the best static tree for measured chances of acceptance."""

from __future__ import annotations

from dataclasses import dataclass

from ..rng import Stream
from ..tree import TokenTree
from .base import DraftLaw
from .fixed import Added, Static, draw_children
from .worth import Paths


@dataclass(frozen=True)
class Sequoia(Static):
    """The tree of `nodes` nodes, root included, and at most `depth` levels that is expected to emit most.

    acceptance  [depth][branch]: how often that child is the one accepted, as specdec.tune measures it; None:
                what the draft has measured of itself: how often its likeliest tokens are right
    draws       children are drawn from the draft's law, for accept=recursive. What holds for its likeliest
                tokens is then a guess, which costs tokens a step, and no exactness; the paper measures draws
    """

    acceptance: tuple[tuple[float, ...], ...] | None = None
    draws: bool = False

    def __post_init__(self) -> None:
        rows = self.acceptance
        if rows is not None and not (rows and all(row and all(0 <= p <= 1 for p in row) for row in rows)):
            raise ValueError(
                f"tree.acceptance is {rows}, expected a row of chances for every depth, "
                "as python -m specdec.tune writes them, or tree.acceptance=null"
            )
        super().__post_init__()

    def _best(self, accuracy_KR: list[list[float]]) -> Paths:
        return super()._best(accuracy_KR if self.acceptance is None else self.acceptance)

    def _branch(self, tree: TokenTree, node: int, ranks: list[int], law: DraftLaw, stream: Stream) -> Added:
        if self.draws:
            return draw_children(tree, node, len(ranks), law, stream)
        return super()._branch(tree, node, ranks, law, stream)
