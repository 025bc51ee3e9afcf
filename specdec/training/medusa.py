"""Trains Medusa heads (arXiv:2401.10774) on the laws of the target.

Shapes: S texts, T tokens, X tokens that the target said, D width, K heads, U draft vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..proposers.medusa import Medusa, MedusaHeads, MedusaInfo, root_embeddings
from ..target import HFTarget, Tap
from ..trees import Chain
from .heads import HeadRecipe, laws
from .texts import TextBatch, Texts


@dataclass(frozen=True)
class MedusaRecipe(HeadRecipe):
    """How heads are trained, besides what all recipes say.

    heads  how many; each looks one token further
    root   they read the root's embedding too; false: Medusa-1 as published, which other engines can load
    """

    lr: float = 2e-3
    heads: int = 3
    root: bool = True

    kind: ClassVar[str] = "medusa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"head.heads is {self.heads}, expected 1 or more: head.heads=3")

    def taps(self, target: HFTarget) -> tuple[Tap, ...]:
        return ("final",)

    def fresh(self, target: HFTarget, texts: Texts) -> MedusaHeads:
        tokens_U = texts.most_said(target.vocab, self.vocab).to(target.device)
        lm_head_UD = target.lm_head[tokens_U].float()
        return MedusaHeads(self.heads, lm_head_UD, tokens_U, root=self.root).to(target.device)

    def judged(
        self, head: MedusaHeads, target: HFTarget, batch: TextBatch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        text_X, place_X = batch.said_ST.nonzero(as_tuple=True)
        next_X = batch.next_ST[text_X, place_X]
        final_XD = batch.hidden["final"][text_X, place_X].to(head.lm_head_UD.dtype)
        laws_XU = laws(final_XD, head.lm_head_UD)
        drafted_X = torch.isin(next_X, head.tokens_U)
        logits_KXU = head(final_XD, root_embeddings(target, next_X).to(final_XD.dtype))
        for k, logits_XU in enumerate(logits_KXU, start=1):
            same_X = text_X[k:] == text_X[:-k]  # k rows on is k tokens on, within a text
            yield logits_XU[:-k][same_X], laws_XU[k:][same_X], drafted_X[k:][same_X]

    def save(self, head: MedusaHeads, target: HFTarget, texts: Texts, path: Path) -> None:
        accuracy_KR = self.accuracy(head, target, texts)
        width = target.lm_head.shape[1]
        head.save(path, MedusaInfo(self.heads, width, target.name, target.fingerprint, accuracy_KR))

    def proposer(self, target: HFTarget, path: Path) -> Medusa:
        return Medusa(target, Chain(depth=self.heads), heads=str(path))
