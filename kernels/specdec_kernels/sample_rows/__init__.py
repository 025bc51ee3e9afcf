"""Keyed draws from the laws of many rows of logits, in one pass over the device."""

from torch import Tensor

from ..dispatch import choose
from ..philox import Purpose

__all__ = ["sample_rows"]


def sample_rows(
    logits_XV: Tensor,
    seed: int,
    request_X: Tensor,
    step_X: Tensor,
    node_X: Tensor,
    purpose: Purpose,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """int64 [X]: a token of each row, drawn after temperature, then top-k, then top-p; -1 for a bad row.

    Of equally likely tokens at an edge the lowest ids are kept; temperature 0 takes the lowest of the
    likeliest. The draw is the race over the uniforms of the row's key (request, step, node, purpose), see
    `specdec_kernels.philox`. A row is bad where its largest logit is NaN or infinite.

    logits_XV  float32, float16 or bfloat16
    request_X, step_X, node_X  int64
    top_k, top_p  0 and 1 keep every token
    """
    draw = choose(__package__, "sample_rows", impl, logits_XV.device)
    keys = (seed, request_X, step_X, node_X, purpose)
    return draw(logits_XV, *keys, temperature=temperature, top_k=top_k, top_p=top_p)
