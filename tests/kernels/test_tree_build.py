"""Trees built on the device against a reference that chooses and walks node by node."""

import pytest
import torch
from torch import Tensor

from specdec_kernels.listing import Case
from specdec_kernels.tree_build import BuiltTree, top_tokens, tree_build
from specdec_kernels.tree_build.cases import CASES

TOYS = [case for case in CASES if case.toy]


def reference(
    tokens_M: list[int], parents_M: list[int], scores_M: list[float], root: int, nodes: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """Tokens, parents and ancestors (itself included) of each real node."""
    order = sorted((-score, m) for m, score in enumerate(scores_M) if score > -torch.inf)
    chosen = sorted(m for _, m in order[: nodes - 1])
    place = {-1: 0} | {m: n for n, m in enumerate(chosen, start=1)}
    parents = [-1, *(place[parents_M[m]] for m in chosen)]
    above = [[0]]
    for n in range(1, len(parents)):
        above.append([*above[parents[n]], n])
    return [root, *(tokens_M[m] for m in chosen)], parents, above


def check(inputs: dict, built: BuiltTree) -> None:
    nodes = inputs["nodes"]
    drafts = [inputs[name].tolist() for name in ("tokens_BM", "parents_BM", "scores_BM", "root_B")]
    for b, draft in enumerate(zip(*drafts, strict=True)):
        tokens, parents, above = reference(*draft, nodes)
        n, pads = len(tokens), nodes - len(tokens)
        assert built.n_B[b] == n
        assert built.tokens_BN[b].tolist() == tokens + [0] * pads
        assert built.parents_BN[b].tolist() == parents + [-1] * pads
        assert built.depth_BN[b].tolist() == [len(a) - 1 for a in above] + [0] * pads
        assert members(built.words_BNW[b]) == above + [[row] for row in range(n, nodes)]


def members(words_NW: Tensor) -> list[list[int]]:
    """The nodes whose bits are set in each row."""
    return [
        [32 * w + j for w, word in enumerate(row) for j in range(32) if word >> j & 1]
        for row in words_NW.tolist()
    ]


def random_draft(seed: int, B: int, M: int, nodes: int, step: float) -> dict:
    """Candidates with any earlier parent, some of them dead; log-probabilities are multiples of `step`."""
    gen = torch.Generator().manual_seed(seed)
    parents_BM = (torch.rand(B, M, generator=gen) * (torch.arange(M) + 1)).long() - 1
    scores_BM = (-3 * torch.rand(B, M, generator=gen) / step).ceil() * step
    scores_BM[torch.rand(B, M, generator=gen) < 0.1] = -torch.inf
    for m in range(M):
        above_B = scores_BM.gather(1, parents_BM[:, m : m + 1].clamp(min=0))[:, 0]
        scores_BM[:, m] += torch.where(parents_BM[:, m] < 0, 0.0, above_B)
    tokens_BM = torch.randint(0, 50, (B, M), generator=gen)
    return {
        "tokens_BM": tokens_BM,
        "parents_BM": parents_BM,
        "scores_BM": scores_BM,
        "root_B": torch.randint(0, 50, (B, 2), generator=gen)[:, 0],
        "nodes": nodes,
    }


@pytest.mark.parametrize("step", [1.0, 0.25, 1e-6])
@pytest.mark.parametrize(
    ("M", "nodes"), [(1, 1), (1, 2), (5, 2), (5, 9), (40, 33), (63, 64), (90, 70), (140, 130)], ids=str
)
def test_random_drafts(M: int, nodes: int, step: float, impl: str) -> None:
    for seed in range(3):
        inputs = random_draft(seed, B=2, M=M, nodes=nodes, step=step)
        check(inputs, tree_build(**inputs, impl=impl))


@pytest.mark.parametrize("case", [c for c in TOYS if c.call == "tree_build"], ids=lambda case: case.name)
def test_listed_trees(case: Case, impl: str) -> None:
    for seed in range(3):
        inputs = case.inputs(torch.device("cpu"), torch.float32, seed)
        check(inputs, tree_build(**inputs, impl=impl))


def test_a_chain_a_star_and_nothing_at_all(impl: str) -> None:
    M = 40
    one = {"tokens_BM": torch.arange(M)[None], "root_B": torch.tensor([7]), "nodes": M + 1}
    for parents_M, score in ((range(-1, M - 1), 0.0), ([-1] * M, -0.5), ([-1] * M, -torch.inf)):
        inputs = one | {"parents_BM": torch.tensor([[*parents_M]]), "scores_BM": torch.full((1, M), score)}
        check(inputs, tree_build(**inputs, impl=impl))


def test_both_zeros_are_one_score(impl: str) -> None:
    inputs = {
        "tokens_BM": torch.arange(4)[None],
        "parents_BM": torch.tensor([[-1, 0, 1, 2]]),
        "scores_BM": torch.tensor([[-0.0, 0.0, -0.0, 0.0]]),
        "root_B": torch.tensor([9]),
        "nodes": 3,
    }
    assert tree_build(**inputs, impl=impl).tokens_BN.tolist() == [[9, 0, 1]]


def by_sorting(logits_V: Tensor, k: int) -> list[int]:
    return sorted(range(len(logits_V)), key=lambda v: (-logits_V[v].item(), v))[:k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (16, 16), (2048, 5), (2049, 10), (4500, 3)])
def test_top_tokens(vocab: int, k: int, dtype: torch.dtype, impl: str) -> None:
    gen = torch.Generator().manual_seed(vocab)
    logits_XV = 2 * torch.randn(3, vocab, generator=gen)
    logits_XV[1] = logits_XV[1].round()  # ties, and both zeros
    logits_XV[2, : vocab // 2] = -torch.inf
    padded_XV = torch.full((3, vocab + 5), torch.nan, dtype=dtype)
    padded_XV[:, :vocab] = logits_XV
    logp_Xk, tokens_Xk = top_tokens(padded_XV[:, :vocab], k, impl=impl)
    assert tokens_Xk.tolist() == [by_sorting(row_V, k) for row_V in padded_XV[:, :vocab]]
    want_XV = padded_XV[:, :vocab].double().log_softmax(-1)
    assert logp_Xk.dtype == torch.float32
    torch.testing.assert_close(logp_Xk.double(), want_XV.gather(1, tokens_Xk), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in TOYS if c.call == "top_tokens"], ids=lambda case: case.name)
def test_listed_rows(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.device("cpu"), torch.float32, 0)
    _, tokens_Xk = top_tokens(**inputs, impl=impl)
    assert tokens_Xk.tolist() == [by_sorting(row_V, inputs["k"]) for row_V in inputs["logits_XV"]]
