"""Tree attention as the models find it: an entry of the attention registry of `transformers`.

Shapes: B batch, T rows of a chunk, H heads, D width.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from specdec_kernels import TreeMask, tree_attention

ATTENTION = "specdec"


@torch.compiler.disable  # its kernels are chosen and launched by ordinary code
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree_mask: TreeMask | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    readers: dict[nn.Module, int | None] | None = None,
    kernel: str = "auto",
    **_: object,
) -> tuple[Tensor, None]:
    """What the models call for attention, by way of the attention registry: [B, T, H, D].

    readers  collects who called, and with which window
    """
    causal = getattr(module, "is_causal", True)
    if tree_mask is None or attention_mask is not None or position_bias is not None or not causal:
        raise ValueError(
            f"{type(module).__name__} calls attention in a way that a token tree does not support "
            "(its own mask, a position bias, both directions, or no tree); choose another target.path"
        )
    if readers is not None:
        readers[module] = sliding_window
    out_BHTD = tree_attention(
        query,
        key,
        value,
        tree_mask,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
        impl=kernel,
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
