"""Trains Medusa heads (arXiv:2401.10774) or Hydra's (arXiv:2402.05109) on the laws of the target.

Shapes: S texts, T tokens, X tokens that the target said, D width, K heads, J = K - 1, U draft vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..proposers.medusa import Medusa
from ..proposers.medusa_heads import KIND, MedusaHeads, MedusaInfo, token_embeddings
from ..target import HFTarget
from ..trees import Chain
from .heads import HeadRecipe, expect_shape, laws
from .texts import TextBatch, Texts


@dataclass(frozen=True)
class MedusaRecipe(HeadRecipe):
    """How heads are trained, besides what all recipes say.

    heads  how many; each looks one token further
    root   they read the root's embedding too; false: Medusa-1 as published, which other engines can load
    hydra  they read those of all tokens drafted before too, in training the true ones
    decay  a head's share of the loss, against the head before
    """

    lr: float = 2e-3
    heads: int = 3
    root: bool = True
    hydra: bool = False
    decay: float = 0.8

    kind: ClassVar[str] = KIND

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("heads", self.heads >= 1, "1 or more", 3)
        if self.hydra and not self.root:
            raise ValueError(
                "head.hydra=true, head.root=false: heads that read the drafted path read the root before it: "
                "head.root=true"
            )

    def new(self, target: HFTarget, tokens_U: Tensor) -> MedusaHeads:
        tokens_U = tokens_U.to(target.device)
        lm_head = target.lm_head_of(tokens_U).float()
        heads = MedusaHeads(self.heads, lm_head, tokens_U, root=self.root, hydra=self.hydra)
        return heads.to(target.device)

    def begun(self, target: HFTarget, path: Path, texts: Texts) -> MedusaHeads:
        there, info = MedusaHeads.load(path, target, "head.start")
        shape = {"heads": info.heads, "root": there.root_KDD is not None, "hydra": there.hydra}
        expect_shape(path, shape, {name: getattr(self, name) for name in shape})
        head = self.new(target, texts.most_said(target.vocab, self.vocab, there.tokens_U))
        head.load_state_dict(there.state_dict() | {"tokens_U": head.tokens_U})
        return head

    def judged(
        self, head: MedusaHeads, target: HFTarget, batch: TextBatch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        text_X, place_X = batch.said_ST.nonzero(as_tuple=True)
        next_X = batch.next_ST[text_X, place_X]
        final_XD = batch.hidden["final"][text_X, place_X].to(head.lm_head.weight.dtype)
        laws_XU = laws(final_XD, head.lm_head)
        drafted_X = torch.isin(next_X, head.tokens_U)
        root_XD = token_embeddings(target, next_X).to(final_XD.dtype)
        path_XJD = _said_next(root_XD, len(head.bias_KD) - 1) if head.hydra else None
        logits_KXU = head(final_XD, root_XD, path_XJD)
        for k, logits_XU in enumerate(logits_KXU, start=1):
            same_X = text_X[k:] == text_X[:-k]  # k rows on is k tokens on, within a text
            yield logits_XU[:-k][same_X], laws_XU[k:][same_X], drafted_X[k:][same_X]

    def save(self, head: MedusaHeads, target: HFTarget, texts: Texts, path: Path) -> None:
        accuracy_KR = self.accuracy(head, target, texts)
        width = target.lm_head.shape[1]
        head.save(path, MedusaInfo(self.heads, width, target.name, target.fingerprint, accuracy_KR))

    def proposer(self, target: HFTarget, path: Path) -> Medusa:
        return Medusa(target, Chain(depth=self.heads), heads=str(path))


def _said_next(root_XD: Tensor, J: int) -> Tensor:
    """[X, J, D]: what is said behind each root. A path that leaves the text ends where no head is judged."""
    X, device = len(root_XD), root_XD.device
    row_X1 = torch.arange(X, device=device).unsqueeze(1)
    return root_XD[(row_X1 + torch.arange(1, J + 1, device=device)).clamp(max=X - 1)]
