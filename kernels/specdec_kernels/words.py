"""Who is above whom in a tree: as masks, and as the 32-bit words that kernels read.

Bit j of word w of a row is column 32 w + j. Shapes: X any, C columns, W words, B batch, N nodes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32


def pack(mask_XC: Tensor) -> Tensor:
    """int32 [X, W] of a bool mask [X, C]."""
    padded_XC = F.pad(mask_XC, (0, -mask_XC.shape[-1] % WORD)).int()
    shifts_J = torch.arange(WORD, dtype=torch.int32, device=mask_XC.device)
    return (padded_XC.unflatten(-1, (-1, WORD)) << shifts_J).sum(-1, dtype=torch.int32)


def unpack(words_XW: Tensor, columns: int) -> Tensor:
    """The bool mask [X, C] of int32 words."""
    bits_XWJ = words_XW.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=words_XW.device)
    return (bits_XWJ & 1).flatten(-2)[..., :columns].bool()


def ancestors(parents_BN: Tensor) -> Tensor:
    """bool [B, N, N]: [n, m] is true where m is n or an ancestor of n. A node without a parent has -1."""
    B, N = parents_BN.shape
    above_BN = torch.where(parents_BN < 0, torch.arange(N, device=parents_BN.device), parents_BN)
    seen_BNN = torch.eye(N, dtype=torch.bool, device=parents_BN.device).expand(B, N, N)
    for _ in range((N - 1).bit_length()):  # each round looks twice as far up
        seen_BNN = seen_BNN | seen_BNN.gather(1, above_BN.unsqueeze(-1).expand(B, N, N))
        above_BN = above_BN.gather(1, above_BN)
    return seen_BNN
