"""Tree attention in plain torch.

Shapes: B batch, H query heads, G key-value heads, P of H a G, T tree rows, L cache rows.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .mask import TreeMask


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
) -> Tensor | tuple[Tensor, Tensor]:
    """See the dispatcher. SDPA with a mask, or the same written out where scores are changed on the way.

    Rows that a mask hides must be finite: zero times NaN is NaN.
    """
    if k_BGLD.dtype != q_BHTD.dtype or k_scale_G is not None or v_scale_G is not None:
        k_BGLD = _dequantised(k_BGLD, k_scale_G, q_BHTD.dtype)
        v_BGLD = _dequantised(v_BGLD, v_scale_G, q_BHTD.dtype)
    bias_B1TL = tree.bias(k_BGLD.shape[2], window, q_BHTD.dtype)
    if return_lse or softcap is not None or sinks_H is not None:
        out_BHTD, scores_BGPTL = _written_out(q_BHTD, k_BGLD, v_BGLD, bias_B1TL, scale, softcap, sinks_H)
        return (out_BHTD, scores_BGPTL.logsumexp(-1).flatten(1, 2)) if return_lse else out_BHTD
    if q_BHTD.shape[2] > 1:
        return F.scaled_dot_product_attention(q_BHTD, k_BGLD, v_BGLD, bias_B1TL, scale=scale, enable_gqa=True)
    # The heads of a group as rows: with single rows, SDPA is up to 8 times slower on the CPU in bfloat16.
    q_BGPD = rearrange(q_BHTD, "b (g p) 1 d -> b g p d", g=k_BGLD.shape[1])
    out_BGPD = F.scaled_dot_product_attention(q_BGPD, k_BGLD, v_BGLD, bias_B1TL, scale=scale)
    return rearrange(out_BGPD, "b g p d -> b (g p) 1 d")


def _dequantised(x_BGLD: Tensor, scale_G: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale_G is None:
        return x_BGLD.to(dtype)
    return (x_BGLD.float() * scale_G.view(1, -1, 1, 1)).to(dtype)


def _written_out(
    q_BHTD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    bias_B1TL: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the scores [B, G, P, T, L], or one more with sinks."""
    G = k_BGLD.shape[1]
    q_BGPTD = rearrange(q_BHTD, "b (g p) t d -> b g p t d", g=G)
    scores = torch.einsum("bgptd,bgld->bgptl", q_BGPTD, k_BGLD).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias_B1TL.unsqueeze(1)
    if sinks_H is not None:
        sink = rearrange(sinks_H.float(), "(g p) -> 1 g p 1 1", g=G).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k_BGLD.shape[2]].to(v_BGLD.dtype)
    out_BGPTD = torch.einsum("bgptl,bgld->bgptd", weights, v_BGLD)
    return rearrange(out_BGPTD, "b g p t d -> b (g p) t d"), scores
