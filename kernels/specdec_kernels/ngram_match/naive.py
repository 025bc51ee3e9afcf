"""Prompt lookup in plain torch: every position counts how far back it agrees with the end of the text."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ngram_match(
    tokens_BL: Tensor, length_B: Tensor, *, max_n: int, min_n: int, prefer: str, matches: int
) -> tuple[Tensor, Tensor]:
    """See the dispatcher. The text up to l agrees in `run` tokens; the longest runs win, then `prefer`."""
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
    best_BM = (run_BL * L + order_L).topk(min(matches, L)).indices
    run_BM = run_BL.gather(1, best_BM)
    n_B = torch.where(run_BM[:, 0] >= min_n, run_BM[:, 0], 0)
    found_BM = (run_BM == n_B[:, None]) & (run_BM > 0)
    start_BM = torch.where(found_BM, best_BM + 1, -1)
    return F.pad(start_BM, (0, matches - start_BM.shape[1]), value=-1), n_B
