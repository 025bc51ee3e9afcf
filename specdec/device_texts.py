"""The sequences of a batch as the device keeps them, at fixed addresses.

Shapes: B sequences, L room for tokens, S stop tokens, A accepted nodes, E emitted tokens, A + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rng import Philox, StreamBatch
from .transfer import to_device
from .tree import TreeBatch, VerdictBatch

if TYPE_CHECKING:
    from .decode import Sequence


@dataclass
class DeviceTexts:
    """What `decode.Sequence` holds, of a whole batch. A sequence that is done goes on as a lone root.

    tokens_BL   int64: committed tokens, then anything
    length_B    int64: how many; the last of them is the root, the target's cache holds those before
    end_B       int64: the length at which the text ends
    request_B, step_B  int64: what keys its randomness
    done_B      bool
    stops_S     int64
    draft       what the proposer keeps, by name; the first axis is B
    """

    rng: Philox
    tokens_BL: Tensor
    length_B: Tensor
    end_B: Tensor
    request_B: Tensor
    step_B: Tensor
    done_B: Tensor
    stops_S: Tensor
    draft: dict[str, Tensor]

    @classmethod
    def of(
        cls, seqs: list[Sequence], draft: dict[str, Tensor], room: int, device: torch.device
    ) -> DeviceTexts:
        """Texts that have room for so many tokens."""
        rows = [s.tokens + [0] * (room - len(s.tokens)) for s in seqs]
        columns = [[len(s.tokens), s.prompt_len + s.max_new_tokens, s.request, len(s.history)] for s in seqs]
        length_B, end_B, request_B, step_B = to_device(columns, device).T.contiguous()
        done_B = torch.zeros(len(seqs), dtype=torch.bool, device=device)
        stops_S = to_device(list(seqs[0].stop_ids), device, torch.int64)
        tokens_BL = to_device(rows, device)
        return cls(seqs[0].rng, tokens_BL, length_B, end_B, request_B, step_B, done_B, stops_S, draft)

    def clone(self) -> DeviceTexts:
        """The same at addresses of its own."""
        own = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return replace(self, **own, draft={name: tensor.clone() for name, tensor in self.draft.items()})

    def copy_(self, other: DeviceTexts) -> None:
        """Become the other, at the same addresses."""
        for mine, theirs in ((self._tensors(), other._tensors()), (self.draft, other.draft)):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def root_B(self) -> Tensor:
        """The last committed tokens."""
        return self.tokens_BL.gather(1, self.length_B.unsqueeze(1) - 1).squeeze(1)

    @property
    def prefix_B(self) -> Tensor:
        """Rows that the target has cached."""
        return self.length_B - 1

    @property
    def levels_B(self) -> Tensor:
        """Levels of a tree that may still be emitted, before the bonus; none of a sequence that is done."""
        return (self.end_B - self.length_B - 1).masked_fill(self.done_B, 0)

    @property
    def streams(self) -> StreamBatch:
        """The randomness of the step that comes next."""
        return StreamBatch(self.rng, self.request_B, self.step_B, self.length_B)

    def advance(self, trees: TreeBatch, verdicts: VerdictBatch) -> None:
        """Append what was emitted, as `Sequence.extend` does; a text that ends keeps its length."""
        emitted_BE, within_BE = _emitted(trees, verdicts)
        at_BE = self.length_B.unsqueeze(1) + torch.arange(emitted_BE.shape[1], device=emitted_BE.device)
        self.tokens_BL.scatter_(1, at_BE, emitted_BE.clamp(min=0))
        stopped_BE = (emitted_BE.unsqueeze(2) == self.stops_S).any(2) & within_BE
        longer_B = self.length_B + verdicts.count_B + 1
        over_B = stopped_BE.any(1) | (longer_B >= self.end_B) | (verdicts.bonus_B < 0)
        self.done_B.logical_or_(over_B)
        self.length_B.copy_(torch.where(self.done_B, self.length_B, longer_B))
        self.step_B.add_(1)


def _emitted(trees: TreeBatch, verdicts: VerdictBatch) -> tuple[Tensor, Tensor]:
    """The tokens of a step [B, E], and which of them count: the accepted ones, then the bonus."""
    path_BA, count_B1 = verdicts.path_BA, verdicts.count_B.unsqueeze(1)
    accepted_BA = trees.tokens_BN.gather(1, path_BA.clamp(min=0))
    emitted_BE = torch.cat([accepted_BA, accepted_BA[:, :1]], 1)
    emitted_BE.scatter_(1, count_B1, verdicts.bonus_B.unsqueeze(1))
    return emitted_BE, torch.arange(emitted_BE.shape[1], device=path_BA.device) <= count_B1
