"""Which cached rows each node of a tree sees.

Shapes: B batch, T rows asked for, C rows of the tree, W 32-bit words, L cache rows.
"""

from functools import cached_property

import torch
from torch import Tensor

from ..words import pack, unpack


class TreeMask:
    """A tree that lies in the cache behind prefixes of different lengths.

    prefix_B       integers: rows [0, prefix) are visible to every node
    depth_BC       integers: depth of each tree row; row c lies at cache row prefix + c
    ancestors_BTC  bool: the last T of the C rows ask, and see these rows of the tree: none below themselves
    words_BTW      the same as int32: bit j of word w is row 32 w + j; either is made from the other
    """

    def __init__(
        self,
        prefix_B: Tensor,
        depth_BC: Tensor,
        ancestors_BTC: Tensor | None = None,
        words_BTW: Tensor | None = None,
    ) -> None:
        self.prefix_B, self.depth_BC = prefix_B, depth_BC
        if ancestors_BTC is None and words_BTW is None:
            raise ValueError("neither ancestors_BTC nor words_BTW is given, expected at least one of them")
        if ancestors_BTC is not None:
            self.ancestors_BTC = ancestors_BTC
        if words_BTW is not None:
            self.words_BTW = words_BTW
        self._biases: dict[tuple[int, int | None, torch.dtype], Tensor] = {}

    @cached_property
    def ancestors_BTC(self) -> Tensor:
        return unpack(self.words_BTW, self.depth_BC.shape[1])

    @cached_property
    def words_BTW(self) -> Tensor:
        return pack(self.ancestors_BTC)

    def bias(self, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`visible` as 0 and -inf [B, 1, T, L], for all heads; kept, as every layer asks for it."""
        key = (length, window, dtype)
        if key not in self._biases:
            hidden_B1TL = ~self.visible(length, window).unsqueeze(1)
            zeros_B1TL = torch.zeros(hidden_B1TL.shape, dtype=dtype, device=hidden_B1TL.device)
            self._biases[key] = zeros_B1TL.masked_fill(hidden_B1TL, -torch.inf)
        return self._biases[key]

    def visible(self, length: int, window: int | None = None) -> Tensor:
        """bool [B, T, L] over the first `length` cache rows."""
        T, C = self.ancestors_BTC.shape[1:]
        column_BL = torch.arange(length, device=self.prefix_B.device) - self.prefix_B.unsqueeze(1)
        node_BL = column_BL.clamp(0, C - 1)
        in_tree_BL = (column_BL >= 0) & (column_BL < C)
        seen_BTL = self.ancestors_BTC.gather(2, node_BL.unsqueeze(1).expand(-1, T, -1))
        visible_BTL = (column_BL < 0).unsqueeze(1) | (seen_BTL & in_tree_BL.unsqueeze(1))
        if window is None:
            return visible_BTL
        depth_BL = torch.where(in_tree_BL, self.depth_BC.gather(1, node_BL), column_BL)
        back_BTL = self.depth_BC[:, C - T :].unsqueeze(2) - depth_BL.unsqueeze(1)
        return visible_BTL & (back_BTL < window)
