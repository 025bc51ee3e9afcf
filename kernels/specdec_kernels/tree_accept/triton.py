"""Acceptance in Triton: what launches the kernels.

They are compiled without fusing products with sums, so that coins fall as in `naive`; what is left is the
order of sums over the vocabulary, which decides only near ties.
"""

import torch
import triton
from torch import Tensor

from ..listing import Compiled
from . import kernels

Decided = tuple[Tensor, Tensor, Tensor]

MAX_NODES = 256
WARPS = 16
EXACT = {"enable_fp_fusion": False}


def walk(tokens_BN: Tensor, parents_BN: Tensor, words_BNW: Tensor, n_B: Tensor, choice_BN: Tensor) -> Decided:
    """See the dispatcher."""
    B, N, W = words_BNW.shape
    decided = _empty(tokens_BN)
    given = (tokens_BN, parents_BN, words_BNW, n_B, choice_BN)
    kernels.walk[(B,)](*(x.contiguous() for x in given), *decided, N, W, BLOCK=_lanes(N))
    return decided


def recursive(
    tokens_BN: Tensor,
    parents_BN: Tensor,
    drawn_BN: Tensor,
    p_BNV: Tensor,
    q_BNV: Tensor | None,
    seed: int,
    request_B: Tensor,
    step_B: Tensor,
) -> Decided:
    """See the dispatcher."""
    B, N, V = p_BNV.shape
    decided = _empty(tokens_BN)
    laws = _laws(p_BNV, q_BNV)
    given = (tokens_BN, parents_BN, drawn_BN, *laws, request_B, step_B)
    kernels.recursive[(B,)](
        *(x.contiguous() for x in given),
        p_BNV.new_empty(B, 3, V, dtype=torch.float32),
        *decided,
        seed,
        N,
        V,
        HAS_Q=q_BNV is not None,
        BLOCK=_lanes(N),
        **_tile(V),
    )
    return decided


def block(
    tokens_BN: Tensor,
    n_B: Tensor,
    drawn_BN: Tensor,
    p_BNV: Tensor,
    q_BNV: Tensor | None,
    seed: int,
    request_B: Tensor,
    step_B: Tensor,
) -> Decided:
    """See the dispatcher. First the gains of all nodes at once, then the coins and the draw."""
    B, N, V = p_BNV.shape
    decided = _empty(tokens_BN)
    nodes = [x.contiguous() for x in (tokens_BN, n_B, drawn_BN, *_laws(p_BNV, q_BNV))]
    sums = [p_BNV.new_empty(B, N, dtype=torch.float64) for _ in ("weight", "gain")]
    constants = {"HAS_Q": q_BNV is not None, **_tile(V)}
    kernels.gains[(B, N)](*nodes, *sums, N, V, **constants)
    keys = (request_B.contiguous(), step_B.contiguous())
    kernels.block[(B,)](*nodes, *keys, *sums, *decided, seed, N, V, BLOCK=_lanes(N), **constants)
    return decided


def _empty(tokens_BN: Tensor) -> Decided:
    B, N = tokens_BN.shape
    return tokens_BN.new_empty(B, N), tokens_BN.new_empty(B), tokens_BN.new_empty(B)


def _laws(p_BNV: Tensor, q_BNV: Tensor | None) -> tuple[Tensor, Tensor]:
    """p and q; without q its place is taken by p, which the kernel doesn't read."""
    return p_BNV.float(), p_BNV.float() if q_BNV is None else q_BNV.float()


def _lanes(nodes: int) -> int:
    if nodes > MAX_NODES:
        raise ValueError(f"the tree has {nodes} nodes, expected at most {MAX_NODES}: try tree.depth=3")
    return triton.next_power_of_2(max(nodes, 2))


def _tile(vocab: int) -> dict[str, int | bool]:
    return {"TILE": min(4096, max(256, triton.next_power_of_2(vocab))), "num_warps": WARPS, **EXACT}


_POINTERS = {
    "TOKENS": "*i64",
    "PARENTS": "*i64",
    "WORDS": "*i32",
    "NODES": "*i64",
    "CHOICE": "*i64",
    "DRAWN": "*i1",
    "P": "*fp32",
    "Q": "*fp32",
    "REQUEST": "*i64",
    "STEP": "*i64",
    "SCRATCH": "*fp32",
    "WEIGHT": "*fp64",
    "GAIN": "*fp64",
    "PATH": "*i64",
    "COUNT": "*i64",
    "BONUS": "*i64",
    "seed": "i64",
}


def _compiled(name: str, kernel: triton.JITFunction, warps: int, **constants: int | bool) -> Compiled:
    types = {arg: kind for arg, kind in _POINTERS.items() if arg in kernel.arg_names}
    return Compiled(
        name, kernel, types, constants, aligned=("V",) * ("V" in kernel.arg_names), warps=warps, options=EXACT
    )


COMPILED = [
    _compiled("recursive", kernels.recursive, WARPS, HAS_Q=True, BLOCK=64, TILE=4096),
    _compiled("recursive, 256 nodes", kernels.recursive, WARPS, HAS_Q=True, BLOCK=256, TILE=4096),
    _compiled("recursive, nothing drawn", kernels.recursive, WARPS, HAS_Q=False, BLOCK=64, TILE=4096),
    _compiled("gains", kernels.gains, WARPS, HAS_Q=True, TILE=4096),
    _compiled("block", kernels.block, WARPS, HAS_Q=True, BLOCK=16, TILE=4096),
    _compiled("walk, 64 nodes", kernels.walk, 4, BLOCK=64),
    _compiled("walk, 256 nodes", kernels.walk, 4, BLOCK=256),
]
