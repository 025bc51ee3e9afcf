"""Random problems of tree attention, and float64 written another way: row by row, from parents."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this system")

from specdec_kernels import TreeMask
from specdec_kernels.tree_attention import config, naive
from specdec_kernels.tree_attention import triton as kernels
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
