"""Calls of the acceptance kernels: k-ary trees and chains whose tokens are really drawn from q."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..listing import Case
from ..words import ancestors, pack

Inputs = dict[str, Any]


def trees(B: int, N: int, width: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """parents_BN and n_B of trees whose nodes have `width` children; all but the first tree are ragged."""
    g = torch.Generator(device).manual_seed(seed)
    node_N = torch.arange(N, device=device)
    n_B = torch.randint(1, N + 1, (B,), generator=g, device=device)
    n_B[0] = N
    parent_N = torch.where(node_N > 0, (node_N - 1).div(width, rounding_mode="floor"), -1)
    return torch.where(node_N < n_B.unsqueeze(1), parent_N, -1), n_B


def laws(
    B: int, N: int, V: int, width: int, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Inputs, Tensor]:
    """What `recursive` and `block` both take, and n_B. p and q are near, the children of every fourth node
    aren't drawn. Laws are float32 in every dtype. Rows of pads, and of q where nothing was drawn, are NaN.
    """
    g = torch.Generator(device).manual_seed(seed)
    parents_BN, n_B = trees(B, N, width, device, seed)
    node_N = torch.arange(N, device=device)
    logits_BNV = 3 * torch.randn(B, N, V, generator=g, device=device)
    p_BNV = logits_BNV.softmax(-1)
    logq_BNV = (logits_BNV + 0.5 * torch.randn(B, N, V, generator=g, device=device)).log_softmax(-1)
    clock_BNV = torch.empty_like(logq_BNV).exponential_(generator=g)
    drafted_BNC = (
        (logq_BNV - clock_BNV.log()).topk(width, dim=-1).indices
    )  # Gumbel top-k: without replacement
    tokens_BN = drafted_BNC.flatten(1).roll(1, dims=1)[:, :N].contiguous()
    drawn_BN = (node_N % 4 != 3).expand(B, N).contiguous()
    real_BN = node_N < n_B.unsqueeze(1)
    p_BNV[~real_BN] = torch.nan
    q_BNV = logq_BNV.exp()
    q_BNV[~(real_BN & drawn_BN)] = torch.nan
    keys = {"seed": seed, "request_B": torch.arange(B, device=device), "step_B": n_B * 3}
    nodes = {"tokens_BN": tokens_BN, "parents_BN": parents_BN, "drawn_BN": drawn_BN}
    return nodes | {"p_BNV": p_BNV, "q_BNV": q_BNV} | keys, n_B


def recursive_inputs(B: int, N: int, V: int, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    return laws(B, N, V, 4, device, dtype, seed)[0]


def block_inputs(B: int, N: int, V: int, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    inputs, n_B = laws(B, N, V, 1, device, dtype, seed)
    del inputs["parents_BN"]
    return inputs | {"n_B": n_B}


def walk_inputs(B: int, N: int, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Over three tokens, so that choices agree often. Siblings may repeat."""
    g = torch.Generator(device).manual_seed(seed)
    parents_BN, n_B = trees(B, N, 3, device, seed)
    tokens_2BN = torch.randint(3, (2, B, N), generator=g, device=device)
    return {
        "tokens_BN": tokens_2BN[0],
        "parents_BN": parents_BN,
        "words_BNW": pack(ancestors(parents_BN)),
        "n_B": n_B,
        "choice_BN": tokens_2BN[1],
    }


def _recursive(B: int, N: int, V: int, toy: bool) -> Case:
    """Bytes: p and q of the one node a sequence at which a child is rejected and the bonus drawn."""
    name = f"recursive B{B} N{N} V{V}"
    return Case(name, "recursive", partial(recursive_inputs, B, N, V), bytes=8 * B * V, toy=toy)


def _block(B: int, N: int, V: int, toy: bool) -> Case:
    """Bytes: p and q of every node, and once more of the last."""
    name = f"block B{B} N{N} V{V}"
    return Case(name, "block", partial(block_inputs, B, N, V), bytes=8 * B * (N + 1) * V, toy=toy)


def _walk(B: int, N: int, toy: bool) -> Case:
    """Bytes: tokens, parents, choices, the path, and the words."""
    moved = B * N * (4 * 8 + 4 * -(-N // 32))
    return Case(f"walk B{B} N{N}", "walk", partial(walk_inputs, B, N), bytes=moved, toy=toy)


BATCHES, VOCABS = (1, 8, 32), (32_000, 128_256)

CASES = [
    *(_walk(B, N, True) for B, N in ((1, 1), (3, 33), (2, 200))),
    *(_recursive(B, N, V, True) for B, N, V in ((1, 1, 11), (3, 22, 300), (2, 40, 5000))),
    *(_block(B, N, V, True) for B, N, V in ((1, 1, 11), (3, 8, 300), (2, 6, 5000))),
    *(_walk(B, N, False) for B in BATCHES for N in (16, 64)),
    *(_recursive(B, N, V, False) for B in BATCHES for N in (16, 64) for V in VOCABS),
    *(_block(B, 16, V, False) for B in BATCHES for V in VOCABS),
]
