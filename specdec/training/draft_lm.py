"""Distils a draft model from the target: a few of its layers learn to say what all of them say.

On the target's own answers, as in DistillSpec (arXiv:2310.08461). The embedding and the LM head stay the
target's. Shapes: S texts, T tokens, X tokens that the target said, D width, U draft vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..proposers.draft_head import KIND, DraftHead, DraftInfo, load, save
from ..proposers.draft_lm import DraftLM
from ..target import HFTarget
from ..trees import Chain
from .heads import HeadRecipe, expect_shape, laws
from .texts import TextBatch, Texts


@dataclass(frozen=True)
class DraftLMRecipe(HeadRecipe):
    """How a draft is trained, besides what all recipes say.

    layers  decoder layers of the draft: the target's first ones, and its last
    source  which of the target's layers they start as instead; `layers` then says nothing
    """

    lr: float = 5e-4
    layers: int = 2
    source: tuple[int, ...] | None = None

    kind: ClassVar[str] = KIND

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("layers", self.layers >= 1, "1 or more", 2)

    def new(self, target: HFTarget, tokens_U: Tensor) -> DraftHead:
        return _trainable(DraftHead(target, self._source(target)).drafting(target, tokens_U))

    def begun(self, target: HFTarget, path: Path, texts: Texts) -> DraftHead:
        head, info = load(path, target, "head.start")
        expect_shape(path, {"source": info.source}, {"source": self._source(target)})
        tokens_U = texts.most_said(target.vocab, self.vocab, head.tokens_U)
        return _trainable(head.drafting(target, tokens_U))

    def _source(self, target: HFTarget) -> tuple[int, ...]:
        if self.source is not None:
            return tuple(self.source)
        n = len(target.layers)
        if self.layers > n:
            raise ValueError(f"head.layers is {self.layers}, this target has {n}: head.layers={n}")
        return (*range(self.layers - 1), n - 1)

    def judged(
        self, head: DraftHead, target: HFTarget, batch: TextBatch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        text_X, place_X = batch.said_ST.nonzero(as_tuple=True)
        embedded_STD = target.model.get_input_embeddings()(batch.tokens_ST).to(head.lm_head.weight.dtype)
        # Attention is causal, so what lies behind a text's end changes nothing.
        read_XD = head(embedded_STD)[text_X, place_X]
        laws_XU = laws(batch.hidden["final"][text_X, place_X], head.lm_head)
        drafted_X = torch.isin(batch.next_ST[text_X, place_X], head.tokens_U)
        yield head.lm_head.logits(read_XD), laws_XU, drafted_X

    def save(self, head: DraftHead, target: HFTarget, texts: Texts, path: Path) -> None:
        accuracy_KR = self.accuracy(head, target, texts)
        save(path, head, DraftInfo(self._source(target), target.name, target.fingerprint, accuracy_KR))

    def proposer(self, target: HFTarget, path: Path) -> DraftLM:
        return DraftLM(target, Chain(depth=4), heads=str(path))


def _trainable(head: DraftHead) -> DraftHead:
    head.decoder.requires_grad_(True)
    return head.float()
