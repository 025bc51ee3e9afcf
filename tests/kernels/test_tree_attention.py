"""Tree attention against float64 written another way: row by row, from parents. Poison is NaN everywhere."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this system")

from specdec_kernels import TreeMask
from specdec_kernels.tree_attention import config, naive, tree_attention
from specdec_kernels.tree_attention import triton as kernels
from specdec_kernels.tree_attention.cases import CASES
from specdec_kernels.tree_attention.counts import counts

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Fuzz:
    """One random call and the tiles it runs in. `sizes` nodes of each tree are alive, the others padding."""

    seed: int
    dtype: torch.dtype
    P: int
    D: int
    T: int
    earlier: int
    prefixes: tuple[int, ...]
    sizes: tuple[int, ...]
    kind: str
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    fp8: bool = False
    G: int = 1
    rows: int = 16
    columns: int = 16
    splits: int = 1
    merge: str = "kernel"

    @property
    def C(self) -> int:
        return self.earlier + self.T


def parents_of(kind: str, nodes: int, size: int, rng: random.Random) -> list[int]:
    """Parents of a tree of `size` nodes, then padding, whose parent is -1 too."""
    choose: dict[str, Callable[[int], int]] = {
        "chain": lambda n: n - 1,
        "star": lambda n: 0,
        "binary": lambda n: (n - 1) // 2,
        "random": lambda n: rng.randrange(n),
        "forest": lambda n: rng.randrange(-1, n),
    }
    return [-1 if n in (0, *range(size, nodes)) else choose[kind](n) for n in range(nodes)]


def path(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*path(parents, parents[node]), node]


def mask_of(prefixes: tuple[int, ...], parents_BC: list[list[int]], T: int) -> TreeMask:
    B, C = len(parents_BC), len(parents_BC[0])
    seen_BCC, depth_BC = torch.zeros(B, C, C, dtype=torch.bool), torch.zeros(B, C, dtype=torch.long)
    for b, parents in enumerate(parents_BC):
        for node in range(C):
            seen_BCC[b, node, path(parents, node)] = True
            depth_BC[b, node] = len(path(parents, node)) - 1
    return TreeMask(torch.tensor(prefixes), depth_BC, seen_BCC[:, C - T :])


def problem(f: Fuzz) -> tuple[dict[str, Any], list[list[int]]]:
    """Arguments of the call, strided as models and the cache have them, and the parents behind its mask."""
    gen, rng, B = torch.Generator().manual_seed(f.seed), random.Random(f.seed), len(f.prefixes)
    parents_BC = [parents_of(f.kind, f.C, size, rng) for size in f.sizes]
    L = max(f.prefixes) + f.C
    cache = torch.full((2, B, f.G, L + 5, f.D), torch.nan)
    for b, prefix in enumerate(f.prefixes):
        cache[:, b, :, : prefix + f.C] = torch.randn(2, f.G, prefix + f.C, f.D, generator=gen)
    k_BGLD, v_BGLD = cache.to(FP8 if f.fp8 else f.dtype)[..., :L, :]
    q_BTHD = torch.randn(B, f.T, f.G * f.P, f.D, generator=gen).to(f.dtype)
    scale_2G = 0.5 + torch.rand(2, f.G, generator=gen)
    sinks_H = torch.randn(f.G * f.P, generator=gen)
    given = {
        "q_BHTD": q_BTHD.transpose(1, 2),
        "k_BGLD": k_BGLD,
        "v_BGLD": v_BGLD,
        "tree": mask_of(f.prefixes, parents_BC, f.T),
        "scale": f.D**-0.5,
        "window": f.window,
        "softcap": f.softcap,
        "sinks_H": sinks_H if f.sinks else None,
        "k_scale_G": scale_2G[0] if f.fp8 else None,
        "v_scale_G": scale_2G[1] if f.fp8 else None,
    }
    return given, parents_BC


def reference(given: dict[str, Any], parents_BC: list[list[int]]) -> tuple[Tensor, Tensor]:
    """float64 output [B, H, T, D] and logarithms [B, H, T], from parents and without the mask."""
    q, k, v = (given[name].to(torch.float64) for name in ("q_BHTD", "k_BGLD", "v_BGLD"))
    if given["k_scale_G"] is not None:
        k, v = k * given["k_scale_G"].view(-1, 1, 1), v * given["v_scale_G"].view(-1, 1, 1)
    (B, H, T, _), G, C = q.shape, k.shape[1], len(parents_BC[0])
    out, lse = torch.empty_like(q), torch.empty(B, H, T, dtype=torch.float64)
    for b, (prefix, parents) in enumerate(zip(given["tree"].prefix_B.tolist(), parents_BC, strict=True)):
        for t in range(T):
            line = path(parents, C - T + t)
            position = {row: row for row in range(prefix)} | {
                prefix + n: prefix + i for i, n in enumerate(line)
            }
            last, window = prefix + len(line) - 1, given["window"] or 10**9
            rows = [row for row, at in position.items() if last - at < window]
            keys, values = (x[b][:, rows].repeat_interleave(H // G, 0) for x in (k, v))
            scores = torch.einsum("hd,hld->hl", q[b, :, t], keys) * given["scale"]
            if (cap := given["softcap"]) is not None:
                scores = cap * (scores / cap).tanh()
            sinks = scores.new_zeros(H, 0) if given["sinks_H"] is None else given["sinks_H"].double()[:, None]
            scores = torch.cat([scores, sinks], 1)
            lse[b, :, t] = scores.logsumexp(1)
            out[b, :, t] = torch.einsum("hl,hld->hd", scores.softmax(1)[:, : len(rows)], values)
    return out, lse


def finite(given: dict[str, Any]) -> dict[str, Any]:
    """As naive needs it: what is hidden must be finite."""
    caches = {name: given[name] for name in ("k_BGLD", "v_BGLD")}
    return given | {name: x.float().nan_to_num(0.0).to(x.dtype) for name, x in caches.items()}


def run(f: Fuzz, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The Triton kernels in the tiles that f asks for, with NaN in all memory that they get."""
    tile = config.Tile(f.rows, f.columns, 4, 2, 1)
    empty = torch.empty
    monkeypatch.setattr(kernels, "plan", lambda *_: (tile, f.splits))
    monkeypatch.setattr(kernels, "merge_rows", lambda *_: 16)
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    out = kernels.tree_attention(**given, merge=f.merge, **options)
    monkeypatch.undo()
    return out


def check(
    f: Fuzz, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[TreeMask], TreeMask] = lambda m: m
) -> None:
    """At most twice the error of plain torch in the same precision, and a floor."""
    given, parents_BC = problem(f)
    want, want_lse = reference(given, parents_BC)
    plain = naive.tree_attention(**finite(given)).double()
    got, lse = run(f, given | {"tree": breaks(given["tree"])}, monkeypatch, return_lse=True)
    assert got.dtype == f.dtype
    assert not counts(1, got.device).any()
    floor = 2e-6 if f.dtype == torch.float32 else 2e-4
    limit = 2 * torch.linalg.norm(plain - want) + floor * torch.linalg.norm(want)
    assert torch.linalg.norm(got.double() - want) <= limit
    assert (lse.double() - want_lse).abs().max() <= (1e-5 if f.dtype == torch.float32 else 2e-3)


def fuzz(seed: int) -> Fuzz:
    """A random point on the axes; long trees come alone, as the interpreter is slow."""
    rng = random.Random(seed)
    columns = rng.choice([16, 32, 64])
    B = rng.choice([1, 1, 2, 3])
    T = rng.choice([1, 2, 5, 9, 31, 32, 33, 63, 64, 65] if B == 1 else [1, 2, 5, 9])
    P = rng.choice([1, 2, 3, 4, 6, 7, 8, 16] if T < 10 else [1, 2, 3, 4])
    earlier = rng.choice([0, 0, 1, 7, 30])
    lengths = [0, 1, columns - 1, columns, columns + 1, rng.randrange(2, 100)]
    return Fuzz(
        seed=seed,
        dtype=rng.choice([torch.float16, torch.float32]),
        P=P,
        D=rng.choice([8, 16, 64, 80, 96, 128, 256] if T < 10 else [16, 32, 64]),
        T=T,
        earlier=earlier,
        prefixes=tuple(rng.choice(lengths) for _ in range(B)),
        sizes=tuple(rng.choice([earlier + T, rng.randint(1, earlier + T)]) for _ in range(B)),
        kind=rng.choice(["chain", "star", "binary", "random", "forest"]),
        window=rng.choice([None, None, 1, 8, columns + 1]),
        softcap=rng.choice([None, None, 2.0]),
        sinks=rng.random() < 0.3,
        fp8=rng.random() < 0.15,
        G=rng.choice([1, 2]) if B * T < 6 else 1,
        rows=64 if P * T > 32 else rng.choice([16, 32]),
        columns=columns,
        splits=rng.choice([1, 1, 2, 3, 16]) if B * T < 10 else rng.choice([1, 2, 3]),
    )


CALL = Fuzz(1, torch.float32, 2, 16, 9, 0, (37,), (9,), "random", rows=32, splits=2)
LONG = [
    replace(CALL, T=64, sizes=(64,), P=1, rows=64, columns=32),
    replace(CALL, T=129, sizes=(120,), P=1, rows=64, columns=64, splits=3, kind="chain"),
    replace(CALL, dtype=torch.float16, T=128, sizes=(128,), P=1, rows=128, columns=64, kind="forest"),
    replace(CALL, T=256, sizes=(256,), P=1, rows=128, columns=64, splits=1, window=5),
]


def fuzz_id(f: Fuzz) -> str:
    return f"{f.seed}-{str(f.dtype)[6:]}-T{f.T}-P{f.P}-D{f.D}-S{f.splits}-w{f.window}-{f.merge}"


def both_merges(f: Fuzz) -> list[Fuzz]:
    return [replace(f, merge=merge) for merge in config.MERGES] if f.splits > 1 else [f]


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
