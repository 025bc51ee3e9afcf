"""Kernels against slow references written another way: float64, row by row, from parents."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specdec_kernels import TreeMask, tree_attention


@dataclass
class Problem:
    """Random trees behind ragged prefixes; rows beyond each tree hold values that must not matter."""

    q_BHTD: Tensor
    k_BGLD: Tensor
    v_BGLD: Tensor
    prefix_B: list[int]
    parents_BC: list[list[int]]

    @property
    def depth_BC(self) -> list[list[int]]:
        return [[len(ancestors(parents, c)) - 1 for c in range(len(parents))] for parents in self.parents_BC]

    @property
    def mask(self) -> TreeMask:
        B, T, C = len(self.prefix_B), self.q_BHTD.shape[2], len(self.parents_BC[0])
        seen_BCC = torch.zeros(B, C, C, dtype=torch.bool)
        for b, parents in enumerate(self.parents_BC):
            for c in range(C):
                seen_BCC[b, c, ancestors(parents, c)] = True
        return TreeMask(torch.tensor(self.prefix_B), torch.tensor(self.depth_BC), seen_BCC[:, C - T :])


def ancestors(parents: list[int], node: int) -> list[int]:
    """The node and all above it."""
    chain = []
    while node >= 0:
        chain.append(node)
        node = parents[node]
    return chain


def make_problem(seed: int, B: int, G: int, group: int, C: int, T: int, D: int = 16) -> Problem:
    gen = torch.Generator().manual_seed(seed)
    prefix_B = torch.randint(0, 30, (B,), generator=gen).tolist()
    if seed % 2:
        prefix_B[0] = 0
    L = max(prefix_B) + C
    parents_BC = [
        [int(torch.randint(-1, c, (1,), generator=gen)) if c else -1 for c in range(C)] for _ in range(B)
    ]
    q_BTHD = torch.randn(B, T, G * group, D, generator=gen)
    cache_2BGLD = torch.randn(2, B, G, L + 9, D, generator=gen)
    return Problem(
        q_BTHD.transpose(1, 2), cache_2BGLD[0, :, :, :L], cache_2BGLD[1, :, :, :L], prefix_B, parents_BC
    )


def reference(
    p: Problem, scale: float, window: int | None, softcap: float | None, sinks_H: Tensor | None
) -> Tensor:
    """float64 [B, H, T, D], one row at a time."""
    (B, H, T, _), G, C = p.q_BHTD.shape, p.k_BGLD.shape[1], len(p.parents_BC[0])
    out = torch.empty(p.q_BHTD.shape, dtype=torch.float64)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        node, prefix, g = C - T + t, p.prefix_B[b], h // (H // G)
        position = prefix + p.depth_BC[b][node]
        places = {row: row for row in range(prefix)}
        places |= {prefix + n: prefix + p.depth_BC[b][n] for n in ancestors(p.parents_BC[b], node)}
        rows = [row for row, at in places.items() if window is None or position - at < window]
        scores = scale * p.k_BGLD[b, g, rows].double() @ p.q_BHTD[b, h, t].double()
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        sink = scores.new_zeros(0) if sinks_H is None else sinks_H[h : h + 1].double()
        weights = torch.cat([scores, sink]).softmax(0)[: len(rows)]
        out[b, h, t] = weights @ p.v_BGLD[b, g, rows].double()
    return out


SHAPES = [
    {"B": 1, "G": 2, "group": 1, "C": 1, "T": 1},
    {"B": 1, "G": 2, "group": 3, "C": 1, "T": 1},
    {"B": 3, "G": 3, "group": 3, "C": 1, "T": 1},
    {"B": 1, "G": 1, "group": 4, "C": 12, "T": 12},
    {"B": 3, "G": 2, "group": 3, "C": 9, "T": 9},
    {"B": 2, "G": 2, "group": 2, "C": 11, "T": 4},
    {"B": 2, "G": 2, "group": 2, "C": 7, "T": 1},
    {"B": 2, "G": 1, "group": 1, "C": 33, "T": 33},
]
FEATURES = [
    {},
    {"window": 1},
    {"window": 8},
    {"softcap": 1.5},
    {"sinks": True},
    {"window": 5, "softcap": 1.5, "sinks": True},
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tree_attention_is_the_reference(shape: dict, features: dict) -> None:
    for seed in range(2):
        p = make_problem(seed, **shape)
        sinks_H = torch.randn(p.q_BHTD.shape[1]) if "sinks" in features else None
        options = {"scale": 0.4, "window": features.get("window"), "softcap": features.get("softcap")}
        got = tree_attention(p.q_BHTD, p.k_BGLD, p.v_BGLD, p.mask, sinks_H=sinks_H, **options)
        want = reference(p, sinks_H=sinks_H, **options)
        assert got.dtype == p.q_BHTD.dtype
        assert torch.linalg.norm(got - want) <= 1e-6 * torch.linalg.norm(want)


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_tree_attention_in_16_bits(features: dict) -> None:
    p = make_problem(3, B=2, G=2, group=3, C=9, T=9)
    p.q_BHTD, p.k_BGLD, p.v_BGLD = p.q_BHTD.bfloat16(), p.k_BGLD.bfloat16(), p.v_BGLD.bfloat16()
    sinks_H = torch.randn(6).bfloat16() if "sinks" in features else None
    options = {"scale": 0.4, "window": features.get("window"), "softcap": features.get("softcap")}
    got = tree_attention(p.q_BHTD, p.k_BGLD, p.v_BGLD, p.mask, sinks_H=sinks_H, **options)
    want = reference(p, sinks_H=sinks_H, **options)
    assert got.dtype == torch.bfloat16
    assert torch.linalg.norm(got - want) <= 1e-2 * torch.linalg.norm(want)


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_a_node_depends_on_its_ancestors_and_prefix_only(features: dict) -> None:
    p = make_problem(5, B=2, G=2, group=2, C=10, T=10)
    options = {"scale": 0.4, "window": features.get("window"), "softcap": features.get("softcap")}
    before = tree_attention(p.q_BHTD, p.k_BGLD, p.v_BGLD, p.mask, **options)
    for b, prefix in enumerate(p.prefix_B):
        for node in range(10):
            others = [prefix + n for n in range(10) if n not in ancestors(p.parents_BC[b], node)]
            k_BGLD, v_BGLD = p.k_BGLD.clone(), p.v_BGLD.clone()
            k_BGLD[b, :, others] += 7
            v_BGLD[b, :, others] += 7
            k_BGLD[b, :, prefix + 10 :] += 7
            v_BGLD[b, :, prefix + 10 :] += 7
            after = tree_attention(p.q_BHTD, k_BGLD, v_BGLD, p.mask, **options)
            assert torch.equal(before[b, :, node], after[b, :, node])


def test_a_mask_is_made_once_a_step_and_window() -> None:
    mask = make_problem(0, B=1, G=1, group=1, C=5, T=5).mask
    assert mask.bias(20, 4, torch.float32) is mask.bias(20, 4, torch.float32)
    assert mask.bias(20, 4, torch.float32) is not mask.bias(20, None, torch.float32)
