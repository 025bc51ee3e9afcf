"""Compaction of the cache after a verdict. This is the one place where an implementation is chosen."""

from torch import Tensor

from . import naive

__all__ = ["kv_keep"]

IMPLEMENTATIONS = {"naive": naive.kv_keep}


def kv_keep(cache_XBGLD: Tensor, slot: int, prefix: int, rows_K: list[int], *, impl: str = "naive") -> None:
    """Move rows prefix + rows_K of one slot, in order, to prefix, prefix + 1, ...: in place, in all layers.

    cache_XBGLD  X = layers times keys and values
    rows_K       ascending tree rows that survive; row i of the result never lies behind its source
    """
    IMPLEMENTATIONS[impl](cache_XBGLD, slot, prefix, rows_K)
