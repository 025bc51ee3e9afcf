"""Where the text went on after earlier occurrences of its own end: prompt lookup on the device."""

from torch import Tensor

from ..dispatch import choose

__all__ = ["ngram_match"]


def ngram_match(
    tokens_BL: Tensor,
    length_B: Tensor,
    *,
    max_n: int = 3,
    min_n: int = 1,
    prefer: str = "recent",
    matches: int = 1,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The longest suffix of max_n down to min_n tokens that occurs before: int64 (start_BM, n_B).

    tokens_BL  int64; only the first length_B tokens of a row count, an occurrence may overlap the suffix
    length_B   int64, 0 .. L
    start_BM   indices of the tokens that followed M occurrences, preferred ones first; filled up with -1
    n_B        tokens that agree; 0 where nothing occurs before
    prefer     "recent" or "first": which of several occurrences of that length
    matches    M
    """
    if not 1 <= min_n <= max_n:
        raise ValueError(f"min_n={min_n}, max_n={max_n}: expected 1 <= min_n <= max_n: proposer.min_n=1")
    if prefer not in ("recent", "first"):
        raise ValueError(f"prefer is {prefer!r}, expected recent or first: proposer.prefer=recent")
    if matches < 1:
        raise ValueError(f"matches is {matches}, expected 1 or more: proposer.matches=8")
    match = choose(__package__, "ngram_match", impl, tokens_BL.device)
    return match(tokens_BL, length_B, max_n=max_n, min_n=min_n, prefer=prefer, matches=matches)
