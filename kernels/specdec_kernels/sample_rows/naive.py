"""Keyed draws in plain torch: a full sort of every row.

Shapes: X rows, V vocabulary in order of id, S the same in order of probability.
"""

import torch
from torch import Tensor

from ..philox import Purpose, race, rows


def sample_rows(
    logits_XV: Tensor,
    seed: int,
    request_X: Tensor,
    step_X: Tensor,
    node_X: Tensor,
    purpose: Purpose,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """See the dispatcher."""
    top_X1, token_X1 = logits_XV.float().max(dim=-1, keepdim=True)
    if temperature > 0:
        p_XV = torch.softmax((logits_XV.float() - top_X1) / temperature, dim=-1)
        u_XV = rows(seed, request_X, step_X, node_X, purpose, logits_XV.shape[-1])
        token_X1 = race(truncated(p_XV, top_k, top_p), u_XV).unsqueeze(-1)
    return torch.where(top_X1.isfinite(), token_X1, -1).squeeze(-1)


def truncated(p_XV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The top-k most likely tokens, of those the fewest that reach top_p of their mass; not normalised."""
    p_XS, id_XS = p_XV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        p_XS = torch.where(torch.arange(p_XS.shape[-1], device=p_XS.device) < top_k, p_XS, 0.0)
    if top_p < 1:
        above_XS = p_XS.cumsum(-1) - p_XS
        p_XS = torch.where(above_XS < top_p * p_XS.sum(-1, keepdim=True), p_XS, 0.0)
    return torch.zeros_like(p_XV).scatter(-1, id_XS, p_XS)
