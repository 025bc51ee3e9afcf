"""Speedup and throughput: requests that ran together share one wall time, and arms are compared in pairs."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from scipy.special import stdtrit

from specdec.records import RequestRecord

Requests = Sequence[RequestRecord]
Unit = tuple[str, ...]  # the conversations that ran together
Span = tuple[float, int]  # seconds, and the tokens that came in them
SpanOf = Callable[[RequestRecord], Span | None]


def runs(requests: Iterable[RequestRecord]) -> list[list[RequestRecord]]:
    """Requests of one arm that ran together: same (repeat, group). ValueError on a duplicate."""
    together: dict[tuple[int, int], dict[str, RequestRecord]] = defaultdict(dict)
    for r in requests:
        if r.request in together[r.repeat, r.group]:
            raise ValueError(
                f"request {r.request!r} of arm {r.arm!r} is recorded twice in repeat {r.repeat}, "
                f"group {r.group}; expected once: start afresh with out=NEW_DIR"
            )
        together[r.repeat, r.group][r.request] = r
    return [list(together[key].values()) for key in sorted(together)]


def unit_of(run: Requests) -> Unit:
    """The conversations of a run, sorted."""
    return tuple(sorted({r.conversation for r in run}))


def largest_units(runs: Iterable[Requests]) -> dict[Unit, Unit]:
    """Each run's conversations, and the most that ran together with all of them.

    In later turns of a group some conversations are over: the rest is no unit of its own.
    """
    units = {unit_of(run) for run in runs}
    return {unit: max((u for u in units if {*unit} <= {*u}), key=len) for unit in units}


def decode_span(request: RequestRecord) -> Span | None:
    """Seconds after the last prefill forward and the tokens emitted in them; None if there were none."""
    pace = request.decode_seconds_per_token
    if not pace:
        return None
    seconds = request.latency - request.prefill_end
    return seconds, round(seconds / pace)


def latency_span(request: RequestRecord) -> Span | None:
    """Seconds to the last token and all tokens; None if there is no token."""
    return (request.latency, len(request.tokens)) if request.tokens and request.latency > 0 else None


def run_span(run: Requests, span_of: SpanOf) -> Span:
    """A run's wall time, its slowest request's, counted once, and the tokens of all its requests."""
    spans = [span for r in run if (span := span_of(r))]
    return max((seconds for seconds, _ in spans), default=0.0), sum(tokens for _, tokens in spans)


def total(spans: Iterable[Span]) -> Span:
    """Sums of seconds and of tokens."""
    spans = list(spans)
    return math.fsum(seconds for seconds, _ in spans), sum(tokens for _, tokens in spans)


def tokens_per_second(requests: Requests) -> float | None:
    """Throughput: tokens over the wall time of the runs that made them, all repeats."""
    seconds, tokens = total(run_span(run, latency_span) for run in runs(requests))
    return tokens / seconds if seconds else None


def speedup(method: Requests, baseline: Requests) -> dict[str, dict[str, float | None]]:
    """How many times faster than `baseline` the method is, for "decode" and "end_to_end" time per token.

    The unit is the conversation, or the group where several conversations ran together, with all its turns.
    Its time per token is sum of wall times / sum of tokens over its runs, the median over repeats; its ratio
    is baseline / method.
    Requests for which an arm has no such time are left out of both arms.

    mean             geometric mean of the ratios
    low, high        95 % t-interval on their logs; None with fewer than 2 units
    ratio_of_totals  baseline's seconds per token over everything / the method's
    ValueError where the arms don't hold the same requests in the same groups.
    """
    check_paired(method, baseline)
    return {
        "decode": compare(method, baseline, decode_span),
        "end_to_end": compare(method, baseline, latency_span),
    }


def check_paired(method: Requests, baseline: Requests) -> None:
    """ValueError unless both arms answered the same prompts, each together with the same conversations."""
    ours, theirs = (
        {(r.request, r.prompt_hash, unit_of(run)) for run in runs(arm) for r in run}
        for arm in (method, baseline)
    )
    if ours == theirs:
        return
    arm = baseline[0].arm if baseline else "baseline"
    odd = sorted({request for request, _, _ in ours ^ theirs})
    alone = {r.request for r in method} ^ {r.request for r in baseline}
    what = "the same requests" if alone else "the same prompts in the same fixed groups"
    raise ValueError(
        f"the arms 'method' and {arm!r} can't be paired: expected {what} in both, but {len(odd)} differ, "
        f"first {odd[0]!r}: run both arms together with one data= and batch_size=, and baseline=[{arm}]"
    )


def compare(method: Requests, baseline: Requests, span_of: SpanOf) -> dict[str, float | None]:
    """`speedup` for one kind of time."""
    undefined = {r.request for r in (*method, *baseline) if span_of(r) is None}
    ours, theirs = (unit_spans(arm, span_of, undefined) for arm in (method, baseline))
    ratios = [median_pace(theirs[unit]) / median_pace(ours[unit]) for unit in ours]
    return geometric_mean(ratios) | {
        "ratio_of_totals": pace_of_all(theirs) / pace_of_all(ours) if ours else None
    }


def unit_spans(
    requests: Requests, span_of: SpanOf, leave_out: Collection[str]
) -> dict[Unit, dict[int, Span]]:
    """Total span of each unit in each repeat, without the requests to leave out."""
    spans: dict[Unit, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    together = runs(requests)
    whole = largest_units(together)
    for run in together:
        if kept := [r for r in run if r.request not in leave_out]:
            spans[whole[unit_of(run)]][run[0].repeat].append(run_span(kept, span_of))
    return {unit: {n: total(parts) for n, parts in repeats.items()} for unit, repeats in spans.items()}


def median_pace(repeats: dict[int, Span]) -> float:
    """A unit's seconds per token: the median over its repeats."""
    return float(np.median([seconds / tokens for seconds, tokens in repeats.values()]))


def pace_of_all(units: dict[Unit, dict[int, Span]]) -> float:
    """Seconds per token over all units and repeats."""
    seconds, tokens = total(span for repeats in units.values() for span in repeats.values())
    return seconds / tokens


def geometric_mean(ratios: Sequence[float]) -> dict[str, float | None]:
    """{"mean", "low", "high"}: geometric mean and 95 % t-interval on the logs.

    Of one ratio there is no interval, of none no mean: None.
    """
    logs, n = np.log(ratios), len(ratios)
    if n < 2:
        return {"mean": float(ratios[0]) if n else None, "low": None, "high": None}
    half = stdtrit(n - 1, 0.975) * logs.std(ddof=1) / math.sqrt(n)
    with np.errstate(over="ignore"):
        mean, low, high = np.exp(logs.mean() + half * np.array([0, -1, 1])).tolist()
    return {"mean": mean, "low": low, "high": high}
