"""What recipes have in common whose heads give laws over a draft vocabulary: the losses, and the accuracy.

Shapes: X rows that count, U draft vocabulary, K depths, R ranks.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import einsum
from torch import Tensor, nn

from ..lm_head import LMHead
from ..taps import Tap
from ..target import HFTarget
from ..zoo import zoo_file
from .loop import Recipe
from .texts import TextBatch, Texts

RANKS = 10


def forward_kl(teacher_XU: Tensor, logits_XU: Tensor) -> Tensor:
    """[X]: the cross-entropy, which is the divergence KL(p, q) but for p's own entropy."""
    return logits_XU.logsumexp(-1) - einsum(teacher_XU, logits_XU, "x u, x u -> x")


def total_variation(teacher_XU: Tensor, logits_XU: Tensor) -> Tensor:
    """[X]: 1 - sum min(p, q), the probability that a drawn token is rejected (2211.17192)."""
    return 1 - torch.minimum(teacher_XU, logits_XU.softmax(-1)).sum(-1)


def lk(teacher_XU: Tensor, logits_XU: Tensor) -> Tensor:
    """[X]: from the divergence to the total variation as acceptance rises (LK losses, 2602.23881)."""
    tv_X = total_variation(teacher_XU, logits_XU)
    share_X = (-3 * (1 - tv_X.detach())).exp()
    return share_X * forward_kl(teacher_XU, logits_XU) + (1 - share_X) * tv_X


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": forward_kl,
    "tv": total_variation,
    "lk": lk,
}


@dataclass(frozen=True)
class HeadRecipe(Recipe):
    """How a head is trained, besides what all recipes say.

    start      a head to go on from, a file or a name in the zoo
    vocab      size of the draft vocabulary: the tokens that the target says most, and as far as there is room
               those of the head to go on from, however many that has. Only where the LM head is not the
               target's does a head keep the vocabulary that it has
    objective  kl: forward divergence; tv: total variation; lk: the one, then the other
    """

    start: str | None = None
    vocab: int = 8192
    objective: str = "kl"

    decay: ClassVar[float] = 1.0  # a depth's share of the loss against the depth before, where there are some

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("objective", self.objective in OBJECTIVES, ", ".join(OBJECTIVES), "kl")
        self.expect("vocab", self.vocab >= 1, "1 or more", 8192)
        self.expect("decay", 0 < self.decay <= 1, "a number in (0, 1]", 0.8)
        if self.start is not None:
            zoo_file(self.start, "head.start")  # before answers are made for nothing

    def taps(self, target: HFTarget) -> tuple[Tap, ...]:
        """What laws are made of. ValueError: the target makes its own of more than that."""
        target.lm_head_of()
        return ("final",)

    def fresh(self, target: HFTarget, texts: Texts) -> nn.Module:
        if self.start is not None:
            return self.begun(target, zoo_file(self.start, "head.start"), texts)
        return self.new(target, texts.most_said(target.vocab, self.vocab))

    @abstractmethod
    def new(self, target: HFTarget, tokens_U: Tensor) -> nn.Module:
        """An untrained head that drafts these tokens."""

    @abstractmethod
    def begun(self, target: HFTarget, path: Path, texts: Texts) -> nn.Module:
        """The head of a file, to be trained further. ValueError: of another shape than the recipe says."""

    @abstractmethod
    def judged(
        self, head: nn.Module, target: HFTarget, batch: TextBatch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each depth: logits [X, U], the target's law [X, U], and where its token can be drafted [X]."""

    def loss(self, head: nn.Module, target: HFTarget, batch: TextBatch) -> Tensor:
        objective, weights, losses = OBJECTIVES[self.objective], [], []
        for depth, (logits_XU, teacher_XU, drafted_X) in enumerate(self.judged(head, target, batch)):
            row_X = objective(teacher_XU, logits_XU.float())
            losses.append((row_X * drafted_X).sum() / drafted_X.sum().clamp(min=1))
            weights.append(self.decay**depth)
        return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)

    @torch.no_grad()
    def accuracy(self, head: nn.Module, target: HFTarget, texts: Texts) -> list[list[float]]:
        """[k][r]: how often the rank-r token at depth k + 1 is the target's, of all that the target said.

        A head is told the target's tokens before it, also where it would have drafted others.
        """
        hits_KR, seen_K = torch.zeros(0, RANKS), torch.zeros(0)
        for batch in texts.batches(target, self.rows, torch.Generator()):
            hits, seen = zip(*(_hits(*depth) for depth in self.judged(head, target, batch)), strict=True)
            hits_KR = _sum(hits_KR, torch.stack(hits))
            seen_K = _sum(seen_K, torch.tensor(seen))
        return (hits_KR / seen_K.clamp(min=1).unsqueeze(1)).tolist()


def _hits(logits_XU: Tensor, teacher_XU: Tensor, drafted_X: Tensor) -> tuple[Tensor, float]:
    """How often each rank was right, and rows."""
    top_XR = logits_XU.topk(min(RANKS, logits_XU.shape[1])).indices
    right_XR = (top_XR == teacher_XU.argmax(-1, keepdim=True)) & drafted_X.unsqueeze(1)
    hits_R = torch.zeros(RANKS)
    hits_R[: top_XR.shape[1]] = right_XR.sum(0).cpu()
    return hits_R, float(len(logits_XU))


def _sum(total: Tensor, part: Tensor) -> Tensor:
    """Their sum; texts that are too short for a depth have no row for it."""
    longer, shorter = (total, part) if len(total) >= len(part) else (part, total)
    longer = longer.clone()
    longer[: len(shorter)] += shorter
    return longer


def expect_shape(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """ValueError unless a head that training goes on from is what the recipe says, setting by setting."""
    for name, value in here.items():
        if there[name] != value:
            raise ValueError(
                f"head.start={path}: its {name} is {there[name]}, the recipe says {value}: "
                f"give head.{name} as it is there, or head.start=null"
            )


@torch.no_grad()
def laws(hidden_XD: Tensor, lm_head: LMHead) -> Tensor:
    """[X, U]: the target's laws over the draft vocabulary, from what its LM head read."""
    return lm_head.logits(hidden_XD.to(lm_head.weight.dtype)).float().softmax(-1)
