"""What every recipe of a head says: how it is trained, and what the head is."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..proposers.base import Proposer
from ..taps import Tap
from ..target import HFTarget
from .texts import TextBatch, Texts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe(ABC):
    """How a head is trained.

    epochs      passes over the answers
    rows        tokens a batch, padding included
    accumulate  batches a step
    dtype       of the forward and backward; the weights that are updated stay in float32
    held_out    shards of answers kept for measuring
    patience    epochs without longer held-out drafts before it stops; 0: never
    """

    epochs: int = 6
    rows: int = 2048
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: str = "float32"
    held_out: int = 1
    patience: int = 0

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for name in ("epochs", "rows", "accumulate", "held_out"):
            self.expect(name, getattr(self, name) >= 1, "1 or more", 1)
        self.expect("lr", 0 < self.lr < math.inf, "more than 0", 1e-3)
        self.expect("warmup", 0 <= self.warmup <= 1, "a share of the steps in [0, 1]", 0.05)
        self.expect("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more", 0)
        self.expect("clip", self.clip > 0, "a norm of more than 0", 1)
        self.expect("patience", self.patience >= 0, "0 or more", 0)
        self.expect("dtype", self.dtype in DTYPES, " or ".join(DTYPES), "float32")

    def expect(self, name: str, fine: bool, expected: str, usual: object) -> None:
        """ValueError for a setting that is not fine: what it is, what was expected, what it usually is."""
        if not fine:
            raise ValueError(
                f"head.{name} is {getattr(self, name)!r}, expected {expected}: head.{name}={usual}"
            )

    @abstractmethod
    def taps(self, target: HFTarget) -> tuple[Tap, ...]:
        """What the head reads of the target, and what its loss needs."""

    @abstractmethod
    def fresh(self, target: HFTarget, texts: Texts) -> nn.Module:
        """An untrained head."""

    @abstractmethod
    def loss(self, head: nn.Module, target: HFTarget, batch: TextBatch) -> Tensor:
        """A scalar: the mean over what there is to predict in the batch."""

    @abstractmethod
    def save(self, head: nn.Module, target: HFTarget, texts: Texts, path: Path) -> None:
        """Write the file that `proposer` reads, with what was measured on `texts`."""

    @abstractmethod
    def proposer(self, target: HFTarget, path: Path) -> Proposer:
        """A proposer that drafts chains with the saved head."""
