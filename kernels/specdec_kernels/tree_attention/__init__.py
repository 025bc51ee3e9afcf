"""Attention of a token tree over a cached prefix."""

from torch import Tensor

from ..dispatch import choose
from .mask import TreeMask

__all__ = ["TreeMask", "tree_attention"]


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
    k_scale_G: Tensor | None = None,
    v_scale_G: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """What T tree rows read from the cache: [B, H, T, D] in the dtype of q.

    q_BHTD   queries of the rows of `tree`, strided at will but for the last axis
    k_BGLD, v_BGLD  the cache with the tree's rows already written behind each prefix; H is a multiple of G.
             Triton wants both strided alike, as views of one cache are
    scale    positive; scores are scale * q k
    window   a query sees keys less than `window` positions back
    softcap  scores become softcap * tanh(scores / softcap)
    sinks_H  one extra logit a head that takes part in the softmax and reads nothing
    k_scale_G, v_scale_G  fp32: what each head's rows are multiplied by, for a cache in float8_e4m3fn
    return_lse  also return the log of each row's sum of exponentials, sink included: fp32 [B, H, T]
    """
    return choose(__package__, "tree_attention", impl, q_BHTD.device)(
        q_BHTD,
        k_BGLD,
        v_BGLD,
        tree,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks_H=sinks_H,
        k_scale_G=k_scale_G,
        v_scale_G=v_scale_G,
        return_lse=return_lse,
    )
