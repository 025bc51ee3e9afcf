"""Acceptance of a batch of token trees on the device.

Every function returns (path_BA, count_B, bonus_B), int64: the accepted nodes below the root in order, padded
with -1, how many they are, and the token that follows them. Node 0 is the root; the root and pads have
parent -1. Coins and draws are keyed as in `specdec_kernels.philox`: the coin of node n by (request, step, n,
ACCEPT), the bonus by (request, step, last accepted node, RESIDUAL).
Shapes: B batch, N nodes (at most 256), W 32-bit words, V vocabulary, A = N.
"""

from torch import Tensor

from ..dispatch import choose

__all__ = ["Decided", "block", "recursive", "walk"]

Decided = tuple[Tensor, Tensor, Tensor]


def walk(
    tokens_BN: Tensor,
    parents_BN: Tensor,
    words_BNW: Tensor,
    n_B: Tensor,
    choice_BN: Tensor,
    *,
    impl: str = "auto",
) -> Decided:
    """Follow, from the root, the child that carries the token chosen at its parent, as far as there is one.

    tokens_BN, parents_BN, n_B  int64; nodes from n on are pads
    words_BNW  int32: bit j of word w of node n is set iff node 32 w + j is n or an ancestor of n
    choice_BN  int64: the token chosen at each node; the bonus is the choice at the last node reached
    """
    decide = choose(__package__, "walk", impl, tokens_BN.device)
    return decide(tokens_BN, parents_BN, words_BNW, n_B, choice_BN)


def recursive(
    tokens_BN: Tensor,
    parents_BN: Tensor,
    drawn_BN: Tensor,
    p_BNV: Tensor,
    q_BNV: Tensor | None,
    seed: int,
    request_B: Tensor,
    step_B: Tensor,
    *,
    impl: str = "auto",
) -> Decided:
    """Recursive rejection over siblings, tried in index order; on a chain this is plain rejection.

    drawn_BN   bool: the children of the node were drawn from its row of q, one after the other without
               replacement; else they are deterministic
    p_BNV      float32: the target's law at each node
    q_BNV      float32: the law that the children of each drawn node came from; None where there are none
    request_B, step_B  int64: the keys
    """
    decide = choose(__package__, "recursive", impl, tokens_BN.device)
    return decide(tokens_BN, parents_BN, drawn_BN, p_BNV, q_BNV, seed, request_B, step_B)


def block(
    tokens_BN: Tensor,
    n_B: Tensor,
    drawn_BN: Tensor,
    p_BNV: Tensor,
    q_BNV: Tensor | None,
    seed: int,
    request_B: Tensor,
    step_B: Tensor,
    *,
    impl: str = "auto",
) -> Decided:
    """Block verification of chains: node n below n_B is the child of node n - 1. Else as `recursive`."""
    decide = choose(__package__, "block", impl, tokens_BN.device)
    return decide(tokens_BN, n_B, drawn_BN, p_BNV, q_BNV, seed, request_B, step_B)
