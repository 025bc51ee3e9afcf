"""Tree building in plain torch, without a host synchronisation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..words import ancestors, pack
from . import BuiltTree

LOW = 0xFFFFFFFF


def tree_build(
    tokens_BM: Tensor, parents_BM: Tensor, scores_BM: Tensor, root_B: Tensor, nodes: int
) -> BuiltTree:
    """See the dispatcher. Index M stands for a pad."""
    M = tokens_BM.shape[1]
    index_BK = _best(scores_BM, nodes - 1)
    place_BM = tokens_BM.new_zeros(len(tokens_BM), M + 1)
    place_BM.scatter_(1, index_BK, torch.arange(1, nodes, device=index_BK.device).expand_as(index_BK))
    place_BM[:, M] = 0  # here the root, as -1 becomes M
    live_BK = index_BK < M
    above_BK = F.pad(parents_BM, (0, 1), value=-1).gather(1, index_BK)
    parents_BK = place_BM.gather(1, torch.where(above_BK < 0, M, above_BK))
    tokens_BN = torch.cat([root_B[:, None], F.pad(tokens_BM, (0, 1)).gather(1, index_BK)], 1)
    parents_BN = F.pad(torch.where(live_BK, parents_BK, -1), (1, 0), value=-1)
    return BuiltTree(tokens_BN, parents_BN, *ancestry(parents_BN), 1 + live_BK.sum(1))


def _best(scores_BM: Tensor, count: int) -> Tensor:
    """Indices of the best candidates, ascending, filled up with M."""
    M = scores_BM.shape[1]
    best_BK = scores_BM.sort(dim=1, descending=True, stable=True).indices[:, :count]
    alive_BK = scores_BM.gather(1, best_BK) > -torch.inf
    index_BK = torch.where(alive_BK, best_BK, M).sort(dim=1).values
    return F.pad(index_BK, (0, count - index_BK.shape[1]), value=M)


def ancestry(parents_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Depth and ancestor words of each row, from parents."""
    seen_BNN = ancestors(parents_BN)
    return seen_BNN.sum(-1) - 1, pack(seen_BNN)


def top_tokens(logits_XV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See the dispatcher. topk has no order among ties, so tokens are made part of the keys."""
    logits_XV = logits_XV.float()
    lowest_first_V = LOW - torch.arange(logits_XV.shape[1], device=logits_XV.device)
    keys_Xk = ((_ordered(logits_XV).long() << 32) | lowest_first_V).topk(k).values
    tokens_Xk = LOW - (keys_Xk & LOW)
    return logits_XV.log_softmax(-1).gather(1, tokens_Xk), tokens_Xk


def _ordered(x: Tensor) -> Tensor:
    """int32 in the order of the floats, both zeros alike."""
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
