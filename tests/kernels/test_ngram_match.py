"""Prompt lookup on the device finds what the proposer finds, and what a slow search finds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specdec.proposers.ngram import NGram
from specdec_kernels.listing import Case
from specdec_kernels.ngram_match import ngram_match
from specdec_kernels.ngram_match.cases import CASES

TOYS = [case for case in CASES if case.toy]


def reference(tokens: list[int], max_n: int, min_n: int, prefer: str, matches: int) -> tuple[list[int], int]:
    """Try every suffix, longest first, at every place."""
    L = len(tokens)
    for n in range(min(max_n, L - 1), min_n - 1, -1):
        ends = [e for e in range(n, L) if tokens[e - n : e] == tokens[L - n :]]
        if ends:
            ends = ends[::-1] if prefer == "recent" else ends
            return filled(ends, matches), n
    return filled([], matches), 0


def filled(ends: list[int], matches: int) -> list[int]:
    return (ends + [-1] * matches)[:matches]


def by_proposer(tokens: list[int], **options: int | str) -> list[int]:
    """The continuations that the proposer would copy."""
    return filled(NGram.occurrences(SimpleNamespace(**options), np.asarray(tokens)), options["matches"])


def check(start_BM: torch.Tensor, n_B: torch.Tensor, want: list[tuple[list[int], int]]) -> None:
    assert list(zip(start_BM.tolist(), n_B.tolist(), strict=True)) == want


def packed(texts: list[list[int]], rows: int) -> dict[str, torch.Tensor]:
    """Texts in one buffer; what stands behind each would lengthen its match."""
    tokens_BL = torch.tensor([text + text[-1:] * (rows - len(text)) for text in texts])
    return {"tokens_BL": tokens_BL, "length_B": torch.tensor([[len(text), 99] for text in texts])[:, 0]}


@pytest.mark.parametrize("matches", [1, 3])
@pytest.mark.parametrize("prefer", ["recent", "first"])
@pytest.mark.parametrize(("max_n", "min_n"), [(1, 1), (3, 1), (3, 2), (5, 3), (8, 8)], ids=str)
def test_random_texts(max_n: int, min_n: int, prefer: str, matches: int, impl: str) -> None:
    options = {"max_n": max_n, "min_n": min_n, "prefer": prefer, "matches": matches}
    gen = torch.Generator().manual_seed(max_n)
    for vocab in (1, 2, 4, 30):
        lengths = [1, 2, 3, 4, 17, 40]
        texts = [torch.randint(0, vocab, (n,), generator=gen).tolist() for n in lengths]
        start_BM, n_B = ngram_match(**packed(texts, 40), **options, impl=impl)
        check(start_BM, n_B, [reference(text, **options) for text in texts])
        assert start_BM.tolist() == [by_proposer(text, **options) for text in texts]


@pytest.mark.parametrize("prefer", ["recent", "first"])
def test_matches_in_any_tile(prefer: str, impl: str) -> None:
    options = {"max_n": 3, "min_n": 1, "prefer": prefer, "matches": 2}
    text = list(range(100, 9100))
    for places in ([0], [4094], [4095, 8190], [10, 8192], [8990]):
        for place in places:
            text[place : place + 3] = [1, 2, 3]
    for end in ([1, 2, 3], [9, 2, 3], [9, 9, 3], [9, 9, 9]):
        whole = text + end
        check(*ngram_match(**packed([whole], 9100), **options, impl=impl), [reference(whole, **options)])


@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.name)
def test_listed_calls(case: Case, impl: str) -> None:
    for seed in range(3):
        inputs = case.inputs(torch.device("cpu"), torch.float32, seed)
        start_BM, n_B = ngram_match(**inputs, impl=impl)
        texts = [
            row[:n] for row, n in zip(inputs["tokens_BL"].tolist(), inputs["length_B"].tolist(), strict=True)
        ]
        how = [inputs[name] for name in ("prefer", "matches")]
        check(start_BM, n_B, [reference(text, inputs["max_n"], 1, *how) for text in texts])


@pytest.mark.parametrize("wrong", [{"min_n": 0}, {"min_n": 4}, {"prefer": "last"}, {"matches": 0}], ids=str)
def test_bad_options_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ngram_match(torch.zeros(1, 4, dtype=torch.long), torch.tensor([4]), **wrong)
