"""Compaction of the cache after a verdict: accepted rows move up behind the prefix, in all layers at once."""

from torch import Tensor

from ..dispatch import choose

__all__ = ["kv_keep"]


def kv_keep(
    cache_XBGLD: Tensor,
    slots_B: Tensor,
    prefix_B: Tensor,
    path_BA: Tensor,
    count_B: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Move row prefix + path[r - 1] to row prefix + r for r = 1 .. count, in place; all other rows stay.

    cache_XBGLD  X = layers times keys and values, contiguous in D; B here are all slots of the cache
    slots_B      int64: the distinct slots that keep something; all that follows is in their order
    prefix_B     int64: committed rows, so the tree's root lies at row prefix and stays there
    path_BA      int64: accepted tree rows without the root, ascending, padded with anything
    count_B      int64: accepted rows
    """
    choose(__package__, "kv_keep", impl, cache_XBGLD.device)(cache_XBGLD, slots_B, prefix_B, path_BA, count_B)
