"""Checkpoints of other projects: read, tried, and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..proposers.eagle3_head import Eagle3Head, Eagle3Info
from ..proposers.medusa_heads import MedusaHeads, MedusaInfo
from . import eagle3, medusa
from .eagle3 import Eagle3InMemory, eagle3_head, read_eagle3
from .files import Reading, Unusable, is_checkpoint, refused
from .medusa import MedusaInMemory, medusa_heads, read_medusa
from .selftest import fit, questions

if TYPE_CHECKING:
    from ..proposers.base import Proposer
    from ..target import HFTarget
    from ..trees import TreePolicy

__all__ = ["is_checkpoint", "open_eagle3", "open_medusa"]


def open_eagle3(heads: str, target: HFTarget) -> tuple[Eagle3Head, Eagle3Info, str]:
    """The head of a folder or hub id in any dialect, read as it drafts best, and what was measured, in words.

    Its accuracies are unknown: the info has none. ValueError: it can't be read, or does not fit this target
    """

    def drafting(reading: Reading, tree: TreePolicy) -> Proposer:
        return Eagle3InMemory(target, tree, eagle3_head(reading, target))

    reading, words = _fitted(heads, target, read_eagle3(heads, target), drafting, eagle3.KIND)
    info = Eagle3Info(reading.config, target.name, target.fingerprint, [])
    return eagle3_head(reading, target), info, words


def open_medusa(heads: str, target: HFTarget) -> tuple[MedusaHeads, MedusaInfo, str]:
    """The same for Medusa heads."""

    def drafting(reading: Reading, tree: TreePolicy) -> Proposer:
        return MedusaInMemory(target, tree, medusa_heads(reading, target))

    reading, words = _fitted(heads, target, [read_medusa(heads, target)], drafting, medusa.KIND)
    return medusa_heads(reading, target), reading.config, words


def _fitted(
    heads: str,
    target: HFTarget,
    readings: list[Reading],
    drafting: Callable[[Reading, TreePolicy], Proposer],
    kind: str,
) -> tuple[Reading, str]:
    try:
        return fit(target, readings, questions(target), drafting)
    except Unusable as error:
        raise refused(heads, str(error), kind) from error
