"""Prompt lookup in plain torch: every position counts how far back it agrees with the end of the text."""

import torch
from torch import Tensor


def ngram_match(
    tokens_BL: Tensor, length_B: Tensor, *, max_n: int, min_n: int, prefer: str
) -> tuple[Tensor, Tensor]:
    """See the dispatcher. The text up to l agrees in `run` tokens; the longest run wins, then `prefer`."""
    L = tokens_BL.shape[1]
    last_B1 = length_B[:, None] - 1
    l_L = torch.arange(L, device=tokens_BL.device)
    run_BL = torch.zeros_like(tokens_BL)
    agrees_BL = l_L < last_B1
    for n in range(min(max_n, L)):
        suffix_B1 = tokens_BL.gather(1, (last_B1 - n).clamp(min=0))
        agrees_BL = agrees_BL & (l_L >= n) & (tokens_BL.roll(n, 1) == suffix_B1)
        run_BL = run_BL + agrees_BL
    order_L = l_L if prefer == "recent" else L - 1 - l_L
    best_B = (run_BL * L + order_L).argmax(1)
    n_B = run_BL.gather(1, best_B[:, None])[:, 0]
    found_B = n_B >= min_n
    return torch.where(found_B, best_B + 1, -1), torch.where(found_B, n_B, 0)
