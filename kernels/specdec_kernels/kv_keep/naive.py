"""Cache compaction in plain torch: gather the survivors, write them in front."""

import torch
from torch import Tensor


def kv_keep(cache_XBGLD: Tensor, slot: int, prefix: int, rows_K: list[int]) -> None:
    """See the dispatcher. Rows that stay where they are aren't touched."""
    moved = next((i for i, row in enumerate(rows_K) if row != i), len(rows_K))
    if moved == len(rows_K):
        return
    source_K = torch.tensor(rows_K[moved:], device=cache_XBGLD.device) + prefix
    kept = cache_XBGLD[:, slot].index_select(2, source_K)
    cache_XBGLD[:, slot, :, prefix + moved : prefix + len(rows_K)] = kept
