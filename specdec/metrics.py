"""From records to numbers: every word of the summary as a pure function of what a run wrote down.

Where a number can't be known (nothing to average, one unit and no interval) it is None, never 0 or NaN.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from specdec.records import RequestRecord, StepRecord
from specdec.stats import Requests, Span, speedup, tokens_per_second

SCHEMA_VERSION = 1
HEADER = ("target", "fingerprint", "dtype", "device", "proposer", "tree", "accept", "data", "batch_size")
HEADER += ("temperature", "reading", "hardware", "price_per_hour")


def tokens_per_step(steps: Sequence[StepRecord]) -> float | None:
    """Emitted tokens a step, with the bonus and tokens cut at the end, without prefill; plain decoding: 1."""
    return sum(s.emitted for s in steps) / len(steps) if steps else None


def nodes_per_step(steps: Sequence[StepRecord]) -> float | None:
    """Mean nodes verified in a step, root included."""
    return sum(s.nodes for s in steps) / len(steps) if steps else None


def acceptance_by_depth(steps: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """One row for each depth d = 1, 2, ... that any step reached with a proposal.

    reached   steps with d <= offered
    accepted  steps with d <= accepted
    rate      accepted / reached: conditional
    survival  accepted / all steps; the survivals sum to tokens_per_step - 1
    """
    rows = []
    for depth in range(1, max((s.offered for s in steps), default=0) + 1):
        reached = sum(depth <= s.offered for s in steps)
        accepted = sum(depth <= s.accepted for s in steps)
        rates = {"rate": accepted / reached, "survival": accepted / len(steps)}
        rows.append({"depth": depth, "reached": reached, "accepted": accepted, **rates})
    return rows


def acceptance_histogram(steps: Sequence[StepRecord]) -> list[int]:
    """Steps by accepted tokens: entry a counts the steps that accepted exactly a."""
    return np.bincount([s.accepted for s in steps]).tolist() if steps else []


def itl(requests: Requests) -> dict[str, dict[str, float | None]]:
    """Inter-token latency in ms, from a request's second burst on; never compare the two kinds.

    event     gap between bursts: what a streaming client sees
    smoothed  gap / burst size, weighted by burst size: what a token costs
    Percentiles are values that occurred (no interpolation), so for bursts of one token both kinds are equal.
    """
    gaps = np.array([gap for r in requests for gap in burst_gaps(r)], dtype=float).reshape(-1, 2)
    seconds, sizes = gaps.T
    return {
        "event": milliseconds(seconds, (50, 90, 99), np.ones_like(sizes)),
        "smoothed": milliseconds(seconds / sizes, (50, 90, 99), sizes),
    }


def burst_gaps(request: RequestRecord) -> list[Span]:
    """Seconds since the burst before, and size, of every burst but the first; empty bursts are no bursts."""
    bursts = [b for b in zip(request.burst_times, request.burst_sizes, strict=True) if b[1]]
    return [(now - before, size) for (before, _), (now, size) in pairwise(bursts)]


def ttft(requests: Requests) -> dict[str, float | None]:
    """Time to the first token in ms: p50 and p90 over requests and repeats."""
    return milliseconds([r.ttft for r in requests if r.burst_times], (50, 90))


def tpot(requests: Requests) -> dict[str, float | None]:
    """Time per output token, (last - first) / (n - 1), in ms: p50 and p90; answers of one token have none."""
    many = [r for r in requests if len(r.tokens) > 1]
    return milliseconds([(r.latency - r.ttft) / (len(r.tokens) - 1) for r in many], (50, 90))


def latency(requests: Requests) -> dict[str, float | None]:
    """Time to the last token in ms: p50 and p90 over requests and repeats."""
    return milliseconds([r.latency for r in requests if r.burst_times], (50, 90))


def times(requests: Requests) -> dict[str, dict[str, Any]]:
    """What a client waits for, in ms: `ttft`, `tpot`, `latency` and `itl`."""
    kinds = {"ttft_ms": ttft, "tpot_ms": tpot, "latency_ms": latency, "itl_ms": itl}
    return {name: kind(requests) for name, kind in kinds.items()}


def milliseconds(
    seconds: Collection[float], percents: Sequence[int], weights: np.ndarray | None = None
) -> dict[str, float | None]:
    """Percentiles of `seconds` in ms as {"p50": ...}: interpolated, or with weights by cumulative weight."""
    names = [f"p{p}" for p in percents]
    if not len(seconds):
        return dict.fromkeys(names)
    method = "linear" if weights is None else "inverted_cdf"
    values = np.percentile(1e3 * np.asarray(seconds), percents, weights=weights, method=method)
    return dict(zip(names, values.tolist(), strict=True))


def cost(throughput: float | None, price_per_hour: float | None) -> float | None:
    """US dollars per million tokens; None without a price or a throughput."""
    if price_per_hour is None or not throughput:
        return None
    return 1e6 * price_per_hour / (3600 * throughput)


def break_even(method: Requests, plain: Requests) -> float | None:
    """The tokens_per_step at which the method stops paying: a mean step, in decode times of one plain token.

    tokens_per_step / decode speedup over `plain` (baseline `none`) as ratio of totals, so they are equal
    exactly where that is 1. No median: of steps that draft and steps that don't it sees one kind.
    None without steps or without `plain`. ValueError where the arms can't be paired.
    """
    tau = tokens_per_step(steps_of(r for r in method if r.repeat == 0))
    ratio = speedup(method, plain)["decode"]["ratio_of_totals"] if plain else None
    return tau / ratio if tau and ratio else None


def summarise(
    method: Requests,
    baselines: dict[str, list[RequestRecord]],
    *,
    header: dict[str, Any],
    split: dict[str, float] | None,
    lossless: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of `summary.json`: plain JSON values, None for what is not known.

    Token and step statistics come from repeat 0 (repeats answer the same prompts), times from all repeats.
    `header` holds the keys of HEADER (`reading`: how heads of another project were understood); `split` and
    `lossless` are passed through.
    """
    first = [r for r in method if r.repeat == 0]
    steps = steps_of(first)
    throughput = tokens_per_second(method)
    summary = {
        "schema_version": SCHEMA_VERSION,
        **{key: header[key] for key in HEADER},
        "requests": len({r.request for r in method}),
        "tokens": sum(len(r.tokens) for r in first),
        "tokens_per_step": tokens_per_step(steps),
        "nodes_per_step": nodes_per_step(steps),
        "break_even": break_even(method, baselines.get("none", [])),
        "acceptance_by_depth": acceptance_by_depth(steps),
        "acceptance_histogram": acceptance_histogram(steps),
        "tokens_per_second": throughput,
        "speedup": {name: speedup(method, baseline) for name, baseline in baselines.items()},
        **times(method),
        "time_split_ms_per_step": split,
        "usd_per_million_tokens": cost(throughput, header["price_per_hour"]),
        "joules_per_token": joules_per_token(method),
        "peak_memory_mb": peak_memory_mb(method),
        "lossless": lossless,
        "by_category": by_category(method, baselines),
    }
    return jsonable(summary)


def by_category(method: Requests, baselines: dict[str, list[RequestRecord]]) -> dict[str, dict[str, Any]]:
    """The main numbers of each category; of a mixed group only the category's requests count."""
    rows = {}
    for category in sorted({r.category for r in method}):
        ours = of_category(method, category)
        theirs = {name: of_category(baseline, category) for name, baseline in baselines.items()}
        steps = steps_of(r for r in ours if r.repeat == 0)
        rows[category] = {
            "requests": len({r.request for r in ours}),
            "tokens_per_step": tokens_per_step(steps),
            "acceptance_by_depth": [row["rate"] for row in acceptance_by_depth(steps)],
            "tokens_per_second": tokens_per_second(ours),
            "speedup": {name: mean_speedup(ours, baseline) for name, baseline in theirs.items()},
        }
    return rows


def of_category(requests: Requests, category: str) -> list[RequestRecord]:
    """The requests of one category."""
    return [r for r in requests if r.category == category]


def mean_speedup(method: Requests, baseline: Requests) -> dict[str, float | None]:
    """`speedup` without intervals: {"decode", "end_to_end"}."""
    return {kind: numbers["mean"] for kind, numbers in speedup(method, baseline).items()}


def joules_per_token(requests: Requests) -> float | None:
    """Energy over tokens, all repeats; None where any request lacks it. A batch's energy comes divided."""
    joules = [r.energy_joules for r in requests if r.energy_joules is not None]
    tokens = sum(len(r.tokens) for r in requests)
    return math.fsum(joules) / tokens if tokens and len(joules) == len(requests) else None


def peak_memory_mb(requests: Requests) -> float | None:
    """The highest of all requests; None where none knows it, as with a baseline none_DTYPE."""
    return max((r.peak_memory_mb for r in requests if r.peak_memory_mb is not None), default=None)


def steps_of(requests: Iterable[RequestRecord]) -> list[StepRecord]:
    """All steps of the requests."""
    return [s for r in requests for s in r.steps]


def jsonable(value: Any) -> Any:
    """The value with numpy scalars as Python's, and NaN and infinities as None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
