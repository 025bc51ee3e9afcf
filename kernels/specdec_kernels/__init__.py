"""The operations of a tree step, one folder each: `naive` is the specification and the CPU path."""

from .kv_keep import kv_keep
from .ngram_match import ngram_match
from .sample_rows import sample_rows
from .tree_accept import block, recursive, walk
from .tree_attention import TreeMask, tree_attention
from .tree_build import top_tokens, tree_build

__all__ = [
    "TreeMask",
    "block",
    "kv_keep",
    "ngram_match",
    "recursive",
    "sample_rows",
    "top_tokens",
    "tree_attention",
    "tree_build",
    "walk",
]
