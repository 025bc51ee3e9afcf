"""The operations of a tree step, one folder each: `naive` is the specification and the CPU path."""

from .kv_keep import kv_keep
from .tree_attention import TreeMask, tree_attention

__all__ = ["TreeMask", "kv_keep", "tree_attention"]
