"""From a draft's logits to a tree on the device: top tokens of its laws, best nodes of what it drafted."""

from typing import NamedTuple

from torch import Tensor

from ..dispatch import choose

__all__ = ["BuiltTree", "top_tokens", "tree_build"]


class BuiltTree(NamedTuple):
    """Trees of N rows: node 0 is the root, a parent has a smaller index. Pads: token 0, parent -1, depth 0.

    tokens_BN, parents_BN, depth_BN  int64
    words_BNW                        int32: bit j of word w of row n: node 32 w + j is n or above n
    n_B                              int64: nodes that are real
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    depth_BN: Tensor
    words_BNW: Tensor
    n_B: Tensor


def tree_build(
    tokens_BM: Tensor,
    parents_BM: Tensor,
    scores_BM: Tensor,
    root_B: Tensor,
    nodes: int,
    *,
    impl: str = "auto",
) -> BuiltTree:
    """The tree of the root and the `nodes` - 1 best of M drafted candidates, in the candidates' order.

    tokens_BM   int64
    parents_BM  int64: index of a candidate before it, or -1 below the root
    scores_BM   float32: summed log-probability from the root down, so never above the parent's; -inf: no
                candidate. Ties go to the lowest index, hence no node is chosen without its parent
    root_B      int64: the root's token
    """
    build = choose(__package__, "tree_build", impl, tokens_BM.device)
    return build(tokens_BM, parents_BM, scores_BM, root_B, nodes)


def top_tokens(logits_XV: Tensor, k: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, lowest token first among ties: (log-probabilities, tokens) [X, k].

    logits_XV  any float dtype; the log-probabilities are float32, normalised over the whole row
    k          at most V; meant for up to 16, as the cost grows with it
    """
    return choose(__package__, "top_tokens", impl, logits_XV.device)(logits_XV, k)
