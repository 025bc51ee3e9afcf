"""Acceptance kernels decide as the naive form does, coin for coin; test_accept.py holds that to the rules."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec_kernels import tree_accept
from specdec_kernels.listing import cases
from specdec_kernels.tree_accept import Decided, block, recursive, walk
from specdec_kernels.words import ancestors, pack

KINDS = ("chain", "star", "random", "deep")
TOYS = [case for case in cases("tree_accept") if case.toy]


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, or a number that no result has."""
    new = Tensor.new_empty

    def poisoned(like: Tensor, *shape: int, **options: Any) -> Tensor:
        found = new(like, *shape, **options)
        return found.fill_(torch.nan if found.is_floating_point() else -7)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def random_parents(g: torch.Generator, B: int, N: int, kind: str) -> tuple[Tensor, Tensor]:
    """parents_BN and n_B: the first tree is full, the last is only a root where there are several."""
    n_B = torch.randint(1, N + 1, (B,), generator=g)
    n_B[-1], n_B[0] = 1, N
    back = {"chain": 1, "star": N, "random": N, "deep": 3}[kind]
    parents_BN = torch.full((B, N), -1)
    for b in range(B):
        for n in range(1, int(n_B[b])):
            low = 0 if kind == "star" else max(0, n - back)
            high = 1 if kind == "star" else n
            parents_BN[b, n] = int(torch.randint(low, high, (), generator=g))
    return parents_BN, n_B


def random_laws(g: torch.Generator, B: int, N: int, V: int) -> Tensor:
    """float32 [B, N, V], with zeros."""
    p_BNV = (3 * torch.randn(B, N, V, generator=g)).softmax(-1)
    p_BNV[torch.rand(B, N, V, generator=g) < 0.3] = 0
    p_BNV[..., 0] += 0.01
    return p_BNV / p_BNV.sum(-1, keepdim=True)


def drafted(g: torch.Generator, parents_BN: Tensor, q_BNV: Tensor) -> Tensor:
    """Tokens whose siblings are drawn without replacement, from outside of q once its support is used up."""
    tokens_BN = torch.zeros_like(parents_BN)
    for b, parents in enumerate(parents_BN.tolist()):
        for node in set(parents) - {-1}:
            children = [n for n, parent in enumerate(parents) if parent == node]
            order = (q_BNV[b, node] + 1e-9).multinomial(len(children), generator=g)
            tokens_BN[b, children] = order
    return tokens_BN


def random_call(seed: int, B: int, N: int, V: int, kind: str, drawn: float = 0.7) -> dict[str, Any]:
    """Arguments of `recursive`; p agrees with q at half of the nodes, so that long paths are accepted too."""
    g = torch.Generator().manual_seed(seed)
    parents_BN, n_B = random_parents(g, B, N, kind)
    p_BNV, q_BNV = random_laws(g, B, N, V), random_laws(g, B, N, V)
    agree_BN = torch.rand(B, N, generator=g) < 0.5
    p_BNV = torch.where(agree_BN.unsqueeze(-1), 0.1 * p_BNV + 0.9 * q_BNV, p_BNV)
    drawn_BN = torch.rand(B, N, generator=g) < drawn
    tokens_BN = drafted(g, parents_BN, q_BNV)
    real_BN = torch.arange(N) < n_B.unsqueeze(1)
    return {
        "tokens_BN": torch.where(real_BN, tokens_BN, 10**9),
        "parents_BN": parents_BN,
        "drawn_BN": drawn_BN,
        "p_BNV": torch.where(real_BN.unsqueeze(-1), p_BNV, torch.nan),
        "q_BNV": torch.where((real_BN & drawn_BN).unsqueeze(-1), q_BNV, torch.nan),
        "seed": seed,
        "request_B": 5 * torch.arange(B) + 2**32 - 7,
        "step_B": torch.arange(B) % 3,
    }


def as_chain(call: dict[str, Any]) -> dict[str, Any]:
    """The same for `block`."""
    n_B = (call["parents_BN"] >= 0).sum(dim=1) + 1
    return {name: value for name, value in call.items() if name != "parents_BN"} | {"n_B": n_B}


def tame(call: dict[str, Any]) -> dict[str, Any]:
    """For torch, which can't gather at a pad's token."""
    V = call["p_BNV"].shape[-1]
    return call | {"tokens_BN": call["tokens_BN"].clamp(max=V - 1)}


def same(a: Decided, b: Decided) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def slow_walk(tokens: list[int], parents: list[int], choice: list[int]) -> tuple[list[int], int]:
    """One sequence, from parents: the longest path, the lowest end among equals."""
    paths = {0: []}
    for n, parent in enumerate(parents):
        if parent in paths and tokens[n] == choice[parent]:
            paths[n] = [*paths[parent], n]
    end = max(paths, key=lambda n: (len(paths[n]), -n))
    return paths[end], choice[end]


def walk_call(seed: int, N: int, kind: str, vocab: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    parents_BN, n_B = random_parents(g, 3, N, kind)
    tokens_BN, choice_BN = torch.randint(vocab, (2, 3, N), generator=g)
    return {
        "tokens_BN": tokens_BN,
        "parents_BN": parents_BN,
        "words_BNW": pack(ancestors(parents_BN)),
        "n_B": n_B,
        "choice_BN": choice_BN,
    }


SIZES = (1, 2, 31, 32, 33, 64, 65, 130, 256)
WALKS = [(N, kind, vocab) for N in SIZES for kind, vocab in zip(KINDS, (1, 9, 2, 2), strict=True)]


@pytest.mark.parametrize(("N", "kind", "vocab"), WALKS)
def test_walking_follows_the_chosen_children(N: int, kind: str, vocab: int) -> None:
    call = walk_call(N, N, kind, vocab)
    path_BA, count_B, bonus_B = walk(**call, impl="naive")
    for b in range(3):
        n = int(call["n_B"][b])
        lists = (call[name][b, :n].tolist() for name in ("tokens_BN", "parents_BN", "choice_BN"))
        path, bonus = slow_walk(*lists)
        assert path_BA[b].tolist() == path + [-1] * (N - len(path))
        assert (int(count_B[b]), int(bonus_B[b])) == (len(path), bonus)


def test_some_walks_are_long() -> None:
    assert int(walk(**walk_call(0, 256, "chain", 1), impl="naive")[1].max()) == 255
    assert int(walk(**walk_call(2, 256, "deep", 2), impl="naive")[1].max()) > 2


@pytest.mark.interpret
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("N", "kind", "vocab"), WALKS)
def test_the_walk_kernel_equals_naive(N: int, kind: str, vocab: int) -> None:
    call = walk_call(N, N, kind, vocab)
    assert same(walk(**call, impl="triton"), walk(**call, impl="naive"))


CALLS = [  # B, N, V, kind, drawn
    (4, 1, 5, "chain", 0.7),
    (4, 9, 300, "chain", 1.0),
    (4, 40, 300, "star", 1.0),
    (4, 40, 37, "deep", 0.0),
    (6, 24, 31, "random", 0.5),
    (6, 70, 90, "random", 0.7),
    (3, 130, 160, "deep", 0.7),
    (3, 12, 4099, "random", 0.7),
    (2, 7, 9001, "star", 0.7),
]


@pytest.mark.interpret
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("seed", [1, 2**40 + 3])
@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_the_recursive_kernel_equals_naive(shape: tuple, seed: int) -> None:
    call = random_call(seed, *shape)
    assert same(recursive(**call, impl="triton"), recursive(**tame(call), impl="naive"))


@pytest.mark.interpret
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("N", "V", "drawn"), [(1, 5, 0.7), (9, 300, 1.0), (9, 37, 0.5), (5, 4099, 0.7)])
def test_the_block_kernel_equals_naive(N: int, V: int, drawn: float) -> None:
    for seed in (1, 2**40 + 3):
        call = as_chain(random_call(seed, 3, N, V, "chain", drawn))
        assert same(block(**call, impl="triton"), block(**tame(call), impl="naive"))


@pytest.mark.interpret
@pytest.mark.usefixtures("_poisoned")
def test_without_a_recorded_q_all_is_deterministic() -> None:
    call = random_call(3, 4, 20, 50, "deep", drawn=0.0) | {"q_BNV": None}
    assert same(recursive(**call, impl="triton"), recursive(**tame(call), impl="naive"))
    call = as_chain(random_call(3, 4, 6, 50, "chain", drawn=0.0) | {"q_BNV": None})
    assert same(block(**call, impl="triton"), block(**tame(call), impl="naive"))


def equal_laws(call: dict[str, Any]) -> dict[str, Any]:
    """Nothing is ever left of p."""
    return call | {"q_BNV": call["p_BNV"], "drawn_BN": torch.ones_like(call["drawn_BN"])}


def nothing_left(call: dict[str, Any]) -> dict[str, Any]:
    """p lies below q everywhere, but coins may fail: p stays what it is, and q loses what was tried."""
    return equal_laws(call) | {"p_BNV": 0.5 * call["p_BNV"]}


def one_token(call: dict[str, Any]) -> dict[str, Any]:
    """q has a single token: siblings beyond the first come from nowhere."""
    q_BNV = torch.zeros_like(call["p_BNV"])
    q_BNV[..., 0] = 1.0
    return call | {"q_BNV": q_BNV, "drawn_BN": torch.ones_like(call["drawn_BN"])}


def disjoint(call: dict[str, Any]) -> dict[str, Any]:
    """Every drawn token is impossible under p."""
    even_V = torch.arange(call["p_BNV"].shape[-1]) % 2 == 0
    p_BNV, q_BNV = (torch.where(half_V, call["p_BNV"], 0.0) for half_V in (even_V, ~even_V))
    return equal_laws(call) | {"p_BNV": p_BNV, "q_BNV": q_BNV}


@pytest.mark.interpret
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("degenerate", [equal_laws, nothing_left, one_token, disjoint])
def test_degenerate_laws_are_decided_alike(degenerate: Any) -> None:
    for seed, kind in enumerate(("random", "star")):
        call = degenerate(random_call(seed, 5, 14, 19, kind))
        assert same(recursive(**call, impl="triton"), recursive(**tame(call), impl="naive"))
    if degenerate is not one_token:  # a chain's token has a positive q, or there is no weight
        call = as_chain(degenerate(random_call(4, 4, 6, 19, "chain")))
        assert same(block(**call, impl="triton"), block(**tame(call), impl="naive"))


@pytest.mark.interpret
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.name)
def test_listed_calls_are_decided_alike(case: Any) -> None:
    inputs = case.inputs(torch.device("cpu"), torch.float32, 5)
    function = getattr(tree_accept, case.call)
    assert same(function(**inputs, impl="triton"), function(**inputs, impl="naive"))


def test_listed_calls_accept_and_reject() -> None:
    for case in TOYS:
        inputs = case.inputs(torch.device("cpu"), torch.float32, 5)
        path_BA, count_B, _ = getattr(tree_accept, case.call)(**inputs, impl="naive")
        assert path_BA.shape[1] == 1 or 0 < int(count_B.sum()) < path_BA.numel() - len(count_B)


def test_a_tree_too_large_for_the_kernels_is_named() -> None:
    pytest.importorskip("triton")
    call = walk_call(0, 257, "deep", 2)
    with pytest.raises(ValueError, match="tree has 257 nodes, expected at most 256"):
        walk(**call, impl="triton")


def call_recursive(seed: int, impl: str) -> Decided:
    return recursive(**tame(random_call(seed, 4, 12, 19, "star", drawn=1.0)), impl=impl)


def call_block(seed: int, impl: str) -> Decided:
    return block(**tame(as_chain(random_call(seed, 4, 6, 19, "chain"))), impl=impl)


BUGS = [
    ("coin", "one_coin_for_all", call_recursive),
    ("coin", "one_coin_for_all", call_block),
    ("clocks", "one_key_for_all", call_recursive),
    ("clocks", "one_key_for_all", call_block),
    ("_spend", "p_not_renormalised", call_recursive),
    ("_spend", "q_not_renormalised", call_recursive),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "wrong", "call"), BUGS)
def test_a_kernel_that_is_wrong_is_seen(
    name: str, wrong: str, call: Callable[[int, str], Decided], monkeypatch: pytest.MonkeyPatch
) -> None:
    def equals_naive() -> bool:
        return all(same(call(seed, "triton"), call(seed, "naive")) for seed in range(5))

    assert equals_naive()
    kernels = import_module("specdec_kernels.tree_accept.kernels")
    monkeypatch.setattr(kernels, name, getattr(import_module("probes"), wrong))
    assert not equals_naive()
