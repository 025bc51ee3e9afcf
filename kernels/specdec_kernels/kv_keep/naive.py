"""Cache compaction in plain torch: gather the survivors, write them in front."""

import torch
from torch import Tensor


def kv_keep(cache_XBGLD: Tensor, slots_B: Tensor, prefix_B: Tensor, path_BA: Tensor, count_B: Tensor) -> None:
    """See the dispatcher. What isn't accepted copies the root onto itself, so that shapes never vary.

    Or the last row, where a full cache has no root and nothing can have been accepted.
    """
    prefix_B1 = prefix_B[:, None].clamp(max=cache_XBGLD.shape[3] - 1)
    rank_A = torch.arange(1, path_BA.shape[1] + 1, device=path_BA.device)
    live_BA = rank_A <= count_B[:, None]
    source_BA = prefix_B1 + torch.where(live_BA, path_BA, 0)
    target_BA = prefix_B1 + torch.where(live_BA, rank_A, 0)
    cache_XBGLD[:, slots_B[:, None], :, target_BA] = cache_XBGLD[:, slots_B[:, None], :, source_BA]
