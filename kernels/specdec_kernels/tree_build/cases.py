"""The calls of tree_build and top_tokens that are tested and measured."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..listing import Case


def make_draft(
    device: torch.device, dtype: torch.dtype, seed: int, *, B: int, depth: int, width: int, nodes: int
) -> dict[str, Any]:
    """What a draft expands: on each level, `width` children below each of the `width` best of the last."""
    gen = torch.Generator(device).manual_seed(seed)
    scores, parents = [_laws(gen, B, 1, width)], [torch.full((B, width), -1, device=device)]
    for _ in range(depth - 1):
        first = sum(level.shape[1] for level in scores[:-1])
        best_BK = scores[-1].topk(width).indices
        above_BK1 = scores[-1].gather(1, best_BK)[:, :, None]
        scores.append((above_BK1 + _laws(gen, B, width, width).view(B, width, width)).flatten(1))
        parents.append((first + best_BK).repeat_interleave(width, dim=1))
    scores_BM = torch.cat(scores, 1)
    random_token = partial(torch.randint, 0, 32000, generator=gen, device=device)
    return {
        "tokens_BM": random_token(scores_BM.shape),
        "parents_BM": torch.cat(parents, 1),
        "scores_BM": scores_BM,
        "root_B": random_token((B,)),
        "nodes": nodes,
    }


def _laws(gen: torch.Generator, B: int, laws: int, width: int) -> Tensor:
    """Log-probabilities of the best tokens of some laws, coarse so that there are ties: [B, laws * width]."""
    logits = 3 * torch.randn(B, laws, 2 * width, generator=gen, device=gen.device)
    return (logits.log_softmax(-1).topk(width).values * 4).round().div(4).clamp(max=0).flatten(1)


def make_logits(
    device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, vocab: int, k: int
) -> dict[str, Any]:
    gen = torch.Generator(device).manual_seed(seed)
    return {"logits_XV": torch.randn(rows, vocab, generator=gen, device=device, dtype=dtype), "k": k}


def _build(name: str, B: int, depth: int, width: int, nodes: int, toy: bool = False) -> Case:
    candidates = width + (depth - 1) * width * width
    moved = B * (20 * candidates + nodes * (24 + 4 * -(-nodes // 32)))
    inputs = partial(make_draft, B=B, depth=depth, width=width, nodes=nodes)
    return Case(name, "tree_build", inputs, bytes=moved, toy=toy)


def _top(name: str, rows: int, vocab: int, k: int, toy: bool = False) -> Case:
    inputs = partial(make_logits, rows=rows, vocab=vocab, k=k)
    return Case(name, "top_tokens", inputs, bytes=rows * (2 * vocab + 12 * k), toy=toy)


CASES = [
    _build("8 of 21, 3 sequences", 3, depth=3, width=3, nodes=8, toy=True),
    _build("40 of 52, more words than one", 2, depth=4, width=4, nodes=40, toy=True),
    _build("30 of 12, pads", 1, depth=2, width=3, nodes=30, toy=True),
    _top("3 rows of 5000, top 4", 3, 5000, 4, toy=True),
    _top("1 row of 100, top 16", 1, 100, 16, toy=True),
    _build("EAGLE, 64 of 510", 1, depth=6, width=10, nodes=64),
    _build("EAGLE, 64 of 510, 8 sequences", 8, depth=6, width=10, nodes=64),
    _build("EAGLE, 256 of 1040", 1, depth=5, width=16, nodes=256),
    _top("10 rows of 32000, top 10", 10, 32000, 10),
    _top("10 rows of 128256, top 10", 10, 128256, 10),
]
