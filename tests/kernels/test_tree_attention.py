"""Tree attention against float64 written another way: row by row, from parents. Poison is NaN everywhere."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzzed import (
    CALL,
    LONG,
    Fuzz,
    both_merges,
    check,
    finite,
    fuzz,
    fuzz_id,
    mask_of,
    parents_of,
    path,
    problem,
    reference,
    run,
)
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this system")

from specdec_kernels import TreeMask
from specdec_kernels.tree_attention import config, naive, tree_attention
from specdec_kernels.tree_attention.cases import CASES


@pytest.mark.interpret
@pytest.mark.parametrize(
    "f", [g for f in (*map(fuzz, range(60)), *LONG) for g in both_merges(f)], ids=fuzz_id
)
def test_the_kernels_are_the_reference(f: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    check(f, monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("case", [c for c in CASES if c.toy], ids=lambda c: c.name)
def test_the_listed_toys_run_as_they_are_planned(case: Any) -> None:
    given = case.inputs(torch.device("cpu"), torch.float32, 0)
    got, lse = tree_attention(**given, return_lse=True, impl="triton")
    want, want_lse = tree_attention(**finite(given), return_lse=True, impl="naive")
    assert torch.linalg.norm(got - want) <= 4e-6 * torch.linalg.norm(want)
    assert (lse - want_lse).abs().max() <= 1e-5


def with_words(mask: TreeMask, words_BTW: Tensor) -> TreeMask:
    return TreeMask(mask.prefix_B, mask.depth_BC, words_BTW=words_BTW)


SIGNED = replace(CALL, T=32, sizes=(32,), P=1, columns=32)
BUGS: dict[str, tuple[Fuzz, Callable[[TreeMask], TreeMask]]] = {
    "one bit too many": (CALL, lambda m: with_words(m, m.words_BTW | 2)),
    "children for parents": (
        CALL,
        lambda m: with_words(m, TreeMask(m.prefix_B, m.depth_BC, m.ancestors_BTC.mT).words_BTW),
    ),
    "the sign bit lost": (SIGNED, lambda m: with_words(m, m.words_BTW & 0x7FFFFFFF)),
    "a prefix one short": (CALL, lambda m: TreeMask(m.prefix_B - 1, m.depth_BC, m.ancestors_BTC)),
    "depth for row": (
        replace(CALL, window=8),
        lambda m: TreeMask(m.prefix_B, torch.arange(9).unsqueeze(0), m.ancestors_BTC),
    ),
}


@pytest.mark.interpret
@pytest.mark.parametrize("bug", BUGS)
def test_the_check_sees_seeded_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, breaks = BUGS[bug]
    check(f, monkeypatch)
    with pytest.raises(AssertionError):
        check(f, monkeypatch, breaks)


@pytest.mark.interpret
def test_a_node_depends_on_its_ancestors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    given, parents_BC = problem(CALL)
    before = run(CALL, given, monkeypatch)
    for node in (0, 4, 8):
        others = [37 + n for n in range(9) if n not in path(parents_BC[0], node)]
        k_BGLD, v_BGLD = given["k_BGLD"].clone(), given["v_BGLD"].clone()
        k_BGLD[:, :, others] += 7
        v_BGLD[:, :, others] += 7
        after = run(CALL, given | {"k_BGLD": k_BGLD, "v_BGLD": v_BGLD}, monkeypatch)
        assert torch.equal(before[:, :, node], after[:, :, node])
        assert not torch.equal(before, after)


@pytest.mark.interpret
def test_a_chain_is_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    f = replace(CALL, kind="chain")
    given, _ = problem(f)
    want = torch.nn.functional.scaled_dot_product_attention(
        given["q_BHTD"],
        given["k_BGLD"],
        given["v_BGLD"],
        torch.ones(9, 46, dtype=torch.bool).tril(37),
        scale=given["scale"],
        enable_gqa=True,
    )
    assert torch.allclose(run(f, given, monkeypatch), want, atol=2e-6)


@pytest.mark.interpret
def test_permuted_siblings_permute_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = problem(replace(CALL, kind="star"))
    order = torch.tensor([0, 5, 2, 8, 1, 7, 3, 6, 4])
    rows = torch.cat([torch.arange(37), 37 + order])
    moved = {
        "q_BHTD": given["q_BHTD"][:, :, order],
        "k_BGLD": given["k_BGLD"][:, :, rows],
        "v_BGLD": given["v_BGLD"][:, :, rows],
    }
    before, after = run(CALL, given, monkeypatch), run(CALL, given | moved, monkeypatch)
    assert torch.allclose(before[:, :, order], after, atol=1e-6)


@pytest.mark.interpret
def test_the_number_of_splits_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    f = replace(CALL, sinks=True, prefixes=(90,))
    given, _ = problem(f)
    one, one_lse = run(replace(f, splits=1), given, monkeypatch, return_lse=True)
    for splits in (3, 16):
        out, lse = run(replace(f, splits=splits), given, monkeypatch, return_lse=True)
        assert torch.allclose(out, one, atol=1e-6)
        assert torch.allclose(lse, one_lse, atol=1e-6)


@pytest.mark.interpret
def test_halves_merge_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix seen through its own logarithms: rows [0, 20) and the rest, with a tree of one node a call."""
    f = replace(CALL, T=1, sizes=(1,))
    given, _ = problem(f)
    whole, whole_lse = run(f, given, monkeypatch, return_lse=True)
    halves = []
    for start, stop in ((0, 20), (20, 38)):
        tree = mask_of((stop - start - 1,), [[-1]], 1)
        part = {"k_BGLD": given["k_BGLD"][:, :, start:stop], "v_BGLD": given["v_BGLD"][:, :, start:stop]}
        halves.append(run(f, given | part | {"tree": tree}, monkeypatch, return_lse=True))
    (a, a_lse), (b, b_lse) = halves
    share = (a_lse - b_lse).sigmoid().unsqueeze(-1)
    assert torch.allclose(share * a + (1 - share) * b, whole, atol=1e-6)
    assert torch.allclose(torch.logaddexp(a_lse, b_lse), whole_lse, atol=1e-6)


def test_keys_and_values_must_lie_alike() -> None:
    given, _ = problem(CALL)
    with pytest.raises(ValueError, match="expected the same"):
        tree_attention(**given | {"v_BGLD": torch.cat([given["v_BGLD"]] * 2, 3)[..., :16]}, impl="triton")
    with pytest.raises(ValueError, match="along D"):
        tree_attention(**given | {"q_BHTD": given["q_BHTD"].mT.contiguous().mT}, impl="triton")


@pytest.mark.parametrize("f", [*map(fuzz, range(30))], ids=fuzz_id)
def test_naive_is_the_reference(f: Fuzz) -> None:
    given, parents_BC = problem(replace(f, dtype=torch.float32))
    want, want_lse = reference(given, parents_BC)
    got, lse = naive.tree_attention(**finite(given), return_lse=True)
    fast = naive.tree_attention(**finite(given))
    for out in (got, fast):
        assert torch.linalg.norm(out - want) <= 2e-6 * torch.linalg.norm(want)
    assert (lse - want_lse).abs().max() <= 1e-5


@pytest.mark.parametrize("nodes", [1, 31, 32, 33, 64, 65])
def test_words_and_ancestors_say_the_same(nodes: int) -> None:
    parents = parents_of("random", nodes, nodes, random.Random(nodes))
    mask = mask_of((3,), [parents], nodes)
    words = mask.words_BTW
    assert words.dtype == torch.int32
    assert mask.words_BTW is words
    for node in range(nodes):
        line = [
            w * 32 + j for w, word in enumerate(words[0, node].tolist()) for j in range(32) if word >> j & 1
        ]
        assert line == path(parents, node)
    back = TreeMask(mask.prefix_B, mask.depth_BC, words_BTW=words)
    assert torch.equal(back.ancestors_BTC, mask.ancestors_BTC)


def test_a_mask_needs_words_or_ancestors() -> None:
    with pytest.raises(ValueError, match="neither"):
        TreeMask(torch.zeros(1), torch.zeros(1, 1))


def test_splits_fill_the_gpu_and_no_more() -> None:
    def splits(B: int, T: int, L: int, merge: str = "kernel") -> int:
        tile = config.tile(T * 4, 128, torch.bfloat16)
        return config.splits(tile, B, 32, 8, T, L, 128, 2, 132, merge)

    assert splits(1, 1, 256) == 1
    assert splits(1, 1, 32768) >= 16
    assert splits(1, 64, 8192) <= splits(1, 1, 8192)
    assert splits(33, 1, 8192) == 1
    assert splits(1, 16, 8192, "last") < splits(1, 16, 8192)  # one multiprocessor reads them all
