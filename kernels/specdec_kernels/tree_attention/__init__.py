"""Attention of a token tree over a cached prefix. This is the one place where an implementation is chosen."""

from torch import Tensor

from . import naive
from .mask import TreeMask

__all__ = ["TreeMask", "tree_attention"]

IMPLEMENTATIONS = {"naive": naive.tree_attention}


def tree_attention(
    q_BHTD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    tree: TreeMask,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    impl: str = "naive",
) -> Tensor:
    """What T tree rows read from the cache: [B, H, T, D] in the dtype of q.

    q_BHTD   queries of the rows of `tree`
    k_BGLD, v_BGLD  the cache with the tree's rows already written behind each prefix; H is a multiple of G
    window   a query sees keys less than `window` positions back
    softcap  scores become softcap * tanh(scores / softcap)
    sinks_H  one extra logit a head that takes part in the softmax and reads nothing
    """
    return IMPLEMENTATIONS[impl](
        q_BHTD, k_BGLD, v_BGLD, tree, scale=scale, window=window, softcap=softcap, sinks_H=sinks_H
    )
