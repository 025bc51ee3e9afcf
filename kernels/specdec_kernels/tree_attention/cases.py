"""What tree attention is called with: toys for the interpreter, and the shapes of real models.

Shapes: B batch, G key-value heads, P query heads of each, T rows of C of the tree, L cache rows, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..listing import Case
from .mask import TreeMask

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """One call: random trees of `earlier` + T rows behind prefixes of their own lengths."""

    G: int
    P: int
    D: int
    T: int
    prefixes: tuple[int, ...]
    earlier: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    fp8: bool = False

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        """Arguments of the call. The cache is a view; rows behind each tree, in it and beyond it, are NaN."""
        gen = torch.Generator(device).manual_seed(seed)
        B, C = len(self.prefixes), self.earlier + self.T
        L = max(self.prefixes) + C
        cache = torch.randn(2, B, self.G, L + 16, self.D, generator=gen, device=device).to(dtype)
        for b, prefix in enumerate(self.prefixes):
            cache[:, b, :, prefix + C :] = torch.nan
        q_BTHD = torch.randn(B, self.T, self.G * self.P, self.D, generator=gen, device=device).to(dtype)
        k_BGLD, v_BGLD = (cache.to(FP8) if self.fp8 else cache)[..., :L, :]
        scales_2G = 0.5 + torch.rand(2, self.G, generator=gen, device=device)
        return {
            "q_BHTD": q_BTHD.transpose(1, 2),
            "k_BGLD": k_BGLD,
            "v_BGLD": v_BGLD,
            "tree": self.tree(device, seed),
            "scale": self.D**-0.5,
            "window": self.window,
            "softcap": self.softcap,
            "sinks_H": torch.randn(self.G * self.P, generator=gen, device=device) if self.sinks else None,
            "k_scale_G": scales_2G[0] if self.fp8 else None,
            "v_scale_G": scales_2G[1] if self.fp8 else None,
        }

    def tree(self, device: torch.device, seed: int) -> TreeMask:
        """Random trees, of which the last T rows ask."""
        gen, (B, C) = torch.Generator().manual_seed(seed), (len(self.prefixes), self.earlier + self.T)
        seen_BCC, depth_BC = (
            torch.eye(C, dtype=torch.bool).repeat(B, 1, 1),
            torch.zeros(B, C, dtype=torch.long),
        )
        for b in range(B):
            for node in range(1, C):
                parent = int(torch.randint(node, (), generator=gen))
                seen_BCC[b, node] |= seen_BCC[b, parent]
                depth_BC[b, node] = depth_BC[b, parent] + 1
        prefix_B = torch.tensor(self.prefixes, device=device)
        return TreeMask(prefix_B, depth_BC.to(device), seen_BCC[:, self.earlier :].to(device))

    @property
    def columns(self) -> int:
        """Cache rows that a node sees or could see, over the batch."""
        C = self.earlier + self.T
        return sum((min(p, self.window) if self.window else p) + C for p in self.prefixes)

    @property
    def bytes(self) -> int:
        """Each row of keys and values once, queries and results once."""
        rows = len(self.prefixes) * self.T * self.P
        return self.G * self.D * (self.columns * 2 * (1 if self.fp8 else 2) + rows * 2 * 2)

    @property
    def flops(self) -> int:
        return 4 * self.G * self.P * self.D * self.T * self.columns


TOYS = {
    "plain": Shape(2, 3, 16, 5, (21, 0)),
    "one row": Shape(2, 4, 64, 1, (40,)),
    "words": Shape(1, 2, 32, 34, (33,)),
    "second call": Shape(1, 2, 80, 3, (17, 30), earlier=6),
    "window": Shape(1, 2, 32, 6, (70,), window=20),
    "softcap": Shape(1, 2, 32, 6, (20,), softcap=5.0),
    "sinks": Shape(2, 2, 32, 6, (20, 3), sinks=True),
    "fp8": Shape(2, 2, 32, 6, (20,), fp8=True),
}
ROWS = (1, 8, 16, 64)
LENGTHS = {"2k": 2048, "8k": 8192, "32k": 32768, "128k": 131072}
REAL = {
    **{f"8B {L} T{T}": Shape(8, 4, 128, T, (n,)) for L, n in LENGTHS.items() for T in ROWS},
    **{f"qwen 7B 8k T{T}": Shape(4, 7, 128, T, (8192,)) for T in ROWS},
    **{f"70B 8k T{T}": Shape(8, 8, 128, T, (8192,)) for T in ROWS},
    **{f"gemma 8k T{T}": Shape(8, 2, 256, T, (8192,), window=4096, softcap=50.0) for T in ROWS},
    **{f"gpt-oss 8k T{T}": Shape(8, 8, 64, T, (8192,), window=128, sinks=True) for T in ROWS},
    **{f"gpt-oss full 8k T{T}": Shape(8, 8, 64, T, (8192,), sinks=True) for T in ROWS},
    **{f"8B fp8 32k T{T}": Shape(8, 4, 128, T, (32768,), fp8=True) for T in ROWS},
    "8B ragged T16": Shape(8, 4, 128, 16, (2048, 32768, 100, 8192)),
    "8B prefill 8k": Shape(8, 4, 128, 512, (8192,)),
}


def _cases(shapes: dict[str, Shape], toy: bool) -> list[Case]:
    return [Case(n, "tree_attention", s.inputs, s.bytes, s.flops, toy) for n, s in shapes.items()]


CASES = _cases(TOYS, True) + _cases(REAL, False)
