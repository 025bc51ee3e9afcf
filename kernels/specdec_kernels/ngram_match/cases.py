"""The calls of ngram_match that are tested and measured."""

from functools import partial
from typing import Any

import torch

from ..listing import Case


def make_text(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    lengths_B: list[int],
    rows: int,
    vocab: int,
    max_n: int,
    prefer: str,
    matches: int,
) -> dict[str, Any]:
    """Random texts that say things again; behind each stands what would be a longer match."""
    gen = torch.Generator(device).manual_seed(seed)
    tokens_BL = torch.randint(0, vocab, (len(lengths_B), rows), generator=gen, device=device)
    for tokens_L, length in zip(tokens_BL, lengths_B, strict=True):
        tokens_L[length:] = tokens_L[max(length - 1, 0)]
    length_B = torch.tensor(lengths_B, device=device)
    how = {"max_n": max_n, "prefer": prefer, "matches": matches}
    return {"tokens_BL": tokens_BL, "length_B": length_B} | how


def _case(
    name: str,
    lengths_B: list[int],
    rows: int,
    vocab: int,
    max_n: int = 3,
    prefer: str = "recent",
    matches: int = 1,
    toy: bool = False,
) -> Case:
    text = {"lengths_B": lengths_B, "rows": rows, "vocab": vocab}
    inputs = partial(make_text, **text, max_n=max_n, prefer=prefer, matches=matches)
    return Case(name, "ngram_match", inputs, bytes=8 * sum(lengths_B), toy=toy)


CASES = [
    _case("ragged, 5 words", [60, 1, 0, 33, 2], 60, 5, toy=True),
    _case("first of 3 words", [60, 40], 64, 3, max_n=5, prefer="first", toy=True),
    _case("nothing again", [9], 20, 10**9, toy=True),
    _case("8 matches", [40, 6, 60], 64, 4, matches=8, toy=True),
    _case("4k", [4000], 4096, 32000),
    _case("4k, 8 matches", [4000], 4096, 32000, matches=8),
    _case("32k, 8 sequences", [32000 - 999 * b for b in range(8)], 32768, 32000),
    _case("128k", [131072], 131072, 32000),
]
