"""What a model makes of its "final" tap: the product with the LM head, and what it does to that.

Shapes: X any leading shape, D width, V vocabulary, U some of its tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class LMHead(nn.Module):
    """Rows of a target's LM head: logits = cap tanh(scale (h W + b) / cap) of what the "final" tap holds.

    Cohere, Granite and HyperCLOVA X scale, Gemma 2 caps (2408.00118), Phi has a bias b; most do nothing of
    it. Called as a module this is h W + b alone, so that it can stand in the model, which does the rest
    itself. The weights are the target's: they are not trained, and no state_dict has them.
    """

    def __init__(
        self, weight_UD: Tensor, bias_U: Tensor | None = None, scale: float = 1.0, cap: float | None = None
    ) -> None:
        super().__init__()
        self.scale, self.cap = scale, cap
        self.register_buffer("weight", weight_UD, persistent=False)
        self.register_buffer("bias", bias_U, persistent=False)

    def forward(self, read_XD: Tensor) -> Tensor:
        """The product [X, U]."""
        return F.linear(read_XD, self.weight, self.bias)

    def logits(self, read_XD: Tensor) -> Tensor:
        """[X, U]: what the target says."""
        return self.scaled(self(read_XD))

    def scaled(self, product_XU: Tensor) -> Tensor:
        """The logits of a product that was found elsewhere."""
        logits_XU = product_XU if self.scale == 1 else product_XU * self.scale
        return logits_XU if self.cap is None else self.cap * torch.tanh(logits_XU / self.cap)

    def rows(self, tokens_U: Tensor | slice) -> LMHead:
        """The same for some of its tokens. A slice shares the weights."""
        bias_U = None if self.bias is None else self.bias[tokens_U]
        return LMHead(self.weight[tokens_U], bias_U, self.scale, self.cap)

    @property
    def plain(self) -> bool:
        """Whether logits are the product with the weights and nothing else."""
        return self.bias is None and self.scale == 1 and self.cap is None


def probed(model: PreTrainedModel, final_XD: Tensor, logits_XV: Tensor) -> LMHead | None:
    """A model's LM head, which shares its weights; None if it does not turn the one into the other.

    The model's config says how logits are scaled and capped, what a forward gave whether that is all, and
    which way: Granite divides by the `logits_scaling` that HyperCLOVA X multiplies by.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    shape = (logits_XV.shape[-1], final_XD.shape[-1])
    if not isinstance(head, nn.Linear | LMHead) or head.weight.shape != shape:
        return None
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    bias_V = None if head.bias is None else head.bias.detach()
    heads = [LMHead(head.weight.detach(), bias_V, each, cap) for each in (scale, 1 / scale)]
    return next((one for one in heads if alike(one.logits(final_XD), logits_XV, final_XD.dtype)), None)


def alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether both can be the same logits, computed in this dtype. So are those that are no numbers."""
    gap, largest = (one.float() - other.float()).abs().max(), one.float().abs().max()
    return not gap > largest * torch.finfo(dtype).eps ** 0.5
