"""Every definition on numbers computed by hand, and the properties that a fair comparison must have."""

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import metrics, stats
from specdec.records import RequestRecord, StepRecord


def step(accepted: int, offered: int | None = None, nodes: int = 4, seconds: float = 0.03) -> StepRecord:
    """A step that accepted and kept so many drafted tokens, and was offered one more."""
    offered = accepted + 1 if offered is None else offered
    return StepRecord(0, nodes, offered, accepted, accepted + 1, accepted + 1, seconds)


def answer(name: str, times: list[float], sizes: list[int] | None = None, **fields: Any) -> RequestRecord:
    """Request `name`, by default a conversation and a group of its own, with bursts at these seconds."""
    sizes = [1] * len(times) if sizes is None else sizes
    defaults: dict[str, Any] = {
        "conversation": name,
        "turn": 0,
        "category": "coding",
        "arm": "method",
        "repeat": 0,
        "group": sum(map(ord, name)),
        "prompt_tokens": 5,
        "prompt_hash": "h",
        "tokens": list(range(sum(sizes))),
        "finish": "length",
        "prefill_end": 0.0,
    }
    return RequestRecord(request=name, burst_times=times, burst_sizes=sizes, **defaults | fields)


def scaled(requests: list[RequestRecord], c: float, arm: str = "method") -> list[RequestRecord]:
    """The same answers, taking c times as long."""
    return [
        replace(r, arm=arm, prefill_end=c * r.prefill_end, burst_times=[c * t for t in r.burst_times])
        for r in requests
    ]


@st.composite
def arms(draw: st.DrawFn) -> list[RequestRecord]:
    """One arm: conversations of one or two turns, in up to two repeats, one at a time or in pairs."""
    size = draw(st.integers(1, 2))
    seconds, sizes = st.floats(0.01, 10), st.lists(st.integers(1, 4), min_size=2, max_size=5)
    out = []
    for repeat in range(draw(st.integers(1, 2))):
        for c in range(4):
            for turn in range(1 + c // 2 % 2):
                counts = draw(sizes)
                start, gap = draw(seconds), draw(seconds)
                out.append(
                    answer(
                        f"{c}.{turn}",
                        [start + gap * (i + 1) for i in range(len(counts))],
                        counts,
                        conversation=str(c),
                        turn=turn,
                        category="ab"[c % 2],
                        repeat=repeat,
                        group=c // size * 2 + turn,
                        prefill_end=start,
                        steps=[step(n - 1) for n in counts],
                    )
                )
    return out


STEPS = [step(2, 2), step(0), step(1), step(0, 0)]
steps_lists = st.lists(
    st.tuples(st.integers(0, 5), st.booleans()).map(lambda s: step(s[0], s[0] + s[1])),
    min_size=1,
    max_size=30,
)


def test_step_statistics_by_hand() -> None:
    assert metrics.tokens_per_step(STEPS) == (3 + 1 + 2 + 1) / 4
    assert metrics.nodes_per_step([step(0, nodes=1), step(0, nodes=16)]) == 8.5
    assert metrics.acceptance_histogram(STEPS) == [2, 1, 1]
    assert metrics.acceptance_by_depth(STEPS) == [
        {"depth": 1, "reached": 3, "accepted": 2, "rate": 2 / 3, "survival": 2 / 4},
        {"depth": 2, "reached": 2, "accepted": 1, "rate": 1 / 2, "survival": 1 / 4},
    ]


def test_tokens_cut_at_the_end_count_as_emitted() -> None:
    assert metrics.tokens_per_step([replace(step(3), kept=1)]) == 4


def test_no_steps_give_none() -> None:
    assert metrics.tokens_per_step([]) is None
    assert metrics.nodes_per_step([]) is None
    assert metrics.acceptance_by_depth([]) == []
    assert metrics.acceptance_histogram([]) == []


@given(st.integers(1, 50))
def test_plain_decoding_has_one_token_per_step(n: int) -> None:
    plain = [step(0, 0, nodes=1)] * n
    assert metrics.tokens_per_step(plain) == 1.0
    assert metrics.acceptance_by_depth(plain) == []
    assert metrics.acceptance_histogram(plain) == [n]


@given(steps_lists)
def test_the_three_views_of_acceptance_agree(steps: list[StepRecord]) -> None:
    rows, histogram = metrics.acceptance_by_depth(steps), metrics.acceptance_histogram(steps)
    assert 1 + sum(row["survival"] for row in rows) == pytest.approx(metrics.tokens_per_step(steps))
    assert sum(histogram) == len(steps)
    assert all(row["accepted"] == sum(histogram[row["depth"] :]) for row in rows)
    conditional = [row["rate"] for row in rows]
    assert all(0 <= rate <= 1 for rate in conditional)


def test_itl_by_hand() -> None:
    bursts = answer("a", [1.0, 1.1, 1.5, 1.7], [2, 1, 4, 2])
    kinds = metrics.itl([bursts])
    assert kinds["event"] == pytest.approx({"p50": 200, "p90": 400, "p99": 400})
    # 1 token at 100 ms, 4 at 100 ms, 2 at 100 ms
    assert kinds["smoothed"] == pytest.approx({"p50": 100, "p90": 100, "p99": 100})
    uneven = answer("b", [0.0, 0.1, 0.3], [1, 1, 9])
    assert metrics.itl([uneven])["smoothed"] == pytest.approx({"p50": 200 / 9, "p90": 200 / 9, "p99": 100})


def test_itl_leaves_empty_bursts_out() -> None:
    assert metrics.itl([answer("a", [1.0, 1.1, 1.2], [1, 0, 2])])["event"]["p50"] == pytest.approx(200)


def test_itl_of_single_bursts_is_none() -> None:
    nothing = {"p50": None, "p90": None, "p99": None}
    assert metrics.itl([answer("a", [1.0], [3])]) == {"event": nothing, "smoothed": nothing}


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=20))
def test_both_kinds_of_itl_agree_on_bursts_of_one_token(gaps: list[float]) -> None:
    kinds = metrics.itl([answer("a", np.cumsum([1.0, *gaps]).tolist())])
    assert kinds["event"] == kinds["smoothed"]


def test_first_per_token_and_last_by_hand() -> None:
    requests = [answer("a", [0.1, 0.4, 0.7], [1, 1, 2]), answer("b", [0.3]), answer("c", [0.5, 1.5])]
    assert metrics.ttft(requests) == pytest.approx({"p50": 300, "p90": 460})
    # a: 600 ms over 3 tokens, b: one token has none, c: 1000 ms over 1
    assert metrics.tpot(requests) == pytest.approx({"p50": 600, "p90": 920})
    assert metrics.latency(requests) == pytest.approx({"p50": 700, "p90": 1340})
    assert metrics.tpot(requests[1:2]) == {"p50": None, "p90": None}


def test_throughput_counts_the_time_of_a_group_once() -> None:
    together = [answer("a", [1.0, 2.0], group=0), answer("b", [1.0, 4.0], group=0)]
    assert metrics.tokens_per_second(together) == 4 / 4
    apart = [replace(r, group=i) for i, r in enumerate(together)]
    assert metrics.tokens_per_second(apart) == 4 / 6
    again = [replace(r, repeat=1) for r in together]
    assert metrics.tokens_per_second(together + again) == 8 / 8
    assert metrics.tokens_per_second([]) is None


def test_speedup_by_hand() -> None:
    method = [answer("a", [0.5, 1.5], [1, 1], prefill_end=0.5), answer("b", [2.0], [4], prefill_end=1.0)]
    baseline = [answer("a", [2.5], [2], prefill_end=0.5), answer("b", [9.0], [4], prefill_end=1.0)]
    # decode s/token, method: a 1/1 (its first token came with the prefill), b 1/4; baseline: a 2/2, b 8/4
    decode = stats.speedup(method, baseline)["decode"]
    assert decode["mean"] == pytest.approx((1 * 8) ** 0.5)
    # t(1 degree) = 12.7062; standard error of the logs {0, ln 8} is ln(8)/2
    assert decode["low"] == pytest.approx(8**0.5 * 8 ** (-12.7062047 / 2))
    assert decode["high"] == pytest.approx(8**0.5 * 8 ** (12.7062047 / 2))
    assert decode["ratio_of_totals"] == pytest.approx((10 / 6) / (2 / 5))
    # end to end s/token, method: 1.5/2, 2/4; baseline: 2.5/2, 9/4
    whole = stats.speedup(method, baseline)["end_to_end"]
    assert whole["mean"] == pytest.approx(((2.5 / 1.5) * (9 / 2)) ** 0.5)
    assert whole["ratio_of_totals"] == pytest.approx((11.5 / 6) / (3.5 / 6))


def test_turns_of_a_conversation_are_one_unit() -> None:
    method = [answer("a1", [1.0], [1], conversation="a"), answer("a2", [3.0], [3], conversation="a", turn=1)]
    baseline = [replace(method[0], burst_times=[8.0]), replace(method[1], burst_times=[4.0])]
    decode = stats.speedup(method, baseline)["decode"]
    assert decode == {"mean": 12 / 4, "low": None, "high": None, "ratio_of_totals": 12 / 4}


def test_a_group_of_conversations_is_one_unit_with_one_wall_time() -> None:
    method = [answer("a", [1.0], [2], group=0), answer("b", [2.0], [2], group=0)]
    baseline = [answer("a", [6.0], [2], group=0), answer("b", [3.0], [2], group=0)]
    decode = stats.speedup(method, baseline)["decode"]
    assert decode == {"mean": 6 / 2, "low": None, "high": None, "ratio_of_totals": 6 / 2}


def test_a_slow_outlier_among_repeats_moves_only_the_totals() -> None:
    baseline = [answer("a", [2.0], repeat=i) for i in range(3)]
    method = [answer("a", [t], repeat=i) for i, t in enumerate((1.0, 100.0, 1.0))]
    decode = stats.speedup(method, baseline)["decode"]
    assert decode["mean"] == 2.0
    assert decode["ratio_of_totals"] == pytest.approx(6 / 102)


def test_requests_without_a_decode_time_leave_both_arms() -> None:
    pair = [answer("a", [1.0]), answer("b", [1.0])]
    method = [pair[0], replace(pair[1], prefill_end=1.0)]
    decode = stats.speedup(method, scaled(pair, 2.0))["decode"]
    assert decode == {"mean": 2.0, "low": None, "high": None, "ratio_of_totals": 2.0}
    reverse = stats.speedup(scaled(pair, 2.0), method)["decode"]
    assert reverse == {"mean": 0.5, "low": None, "high": None, "ratio_of_totals": 0.5}
    nobody = stats.speedup(method[1:], pair[1:])["decode"]
    assert nobody == {"mean": None, "low": None, "high": None, "ratio_of_totals": None}


def test_unpaired_arms_are_refused() -> None:
    pair = [answer("a", [1.0]), answer("b", [1.0])]
    hf = scaled(pair, 1.0, arm="hf")
    with pytest.raises(
        ValueError, match=r"'hf' can't be paired: expected the same requests.*'b'.*baseline=\[hf\]"
    ):
        stats.speedup(pair[:1], hf)
    with pytest.raises(ValueError, match="the same fixed groups"):
        stats.speedup([replace(r, group=0) for r in pair], hf)
    with pytest.raises(ValueError, match="the same prompts"):
        stats.speedup(pair, [hf[0], replace(hf[1], prompt_hash="other")])


def test_a_request_recorded_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a'.*recorded twice.*out="):
        stats.tokens_per_second([answer("a", [1.0])] * 2)


@settings(max_examples=30, deadline=None)
@given(arms())
def test_identical_arms_give_exactly_one(requests: list[RequestRecord]) -> None:
    for numbers in stats.speedup(requests, scaled(requests, 1.0, arm="none")).values():
        assert numbers["mean"] == numbers["ratio_of_totals"] == 1.0
        assert numbers["low"] is None or numbers["low"] <= 1.0 <= numbers["high"]


@settings(max_examples=30, deadline=None)
@given(arms(), st.floats(0.1, 10))
def test_speedup_scales_inversely_with_the_methods_times(requests: list[RequestRecord], c: float) -> None:
    baseline = [replace(r, burst_times=[t**1.1 + r.prefill_end for t in r.burst_times]) for r in requests]
    before, after = stats.speedup(requests, baseline), stats.speedup(scaled(requests, c), baseline)
    for kind, numbers in before.items():
        expected = {name: x / c for name, x in numbers.items() if x is not None}
        assert {name: x for name, x in after[kind].items() if x is not None} == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(arms())
def test_end_to_end_ratio_of_totals_is_the_ratio_of_throughputs(requests: list[RequestRecord]) -> None:
    baseline = [replace(r, burst_times=[t + r.turn + 1 for t in r.burst_times]) for r in requests]
    ratio = stats.tokens_per_second(requests) / stats.tokens_per_second(baseline)
    assert stats.speedup(requests, baseline)["end_to_end"]["ratio_of_totals"] == pytest.approx(ratio)


@settings(max_examples=30, deadline=None)
@given(arms())
def test_decode_span_is_the_records_own_definition(requests: list[RequestRecord]) -> None:
    for r in requests:
        seconds, tokens = stats.decode_span(r)
        assert seconds / tokens == r.decode_seconds_per_token
        assert tokens == len(r.tokens)


def test_interval_covers_the_true_mean() -> None:
    rng, hits, trials = np.random.default_rng(0), 0, 4000
    for ratios in np.exp(rng.normal(0.5, 0.3, (trials, 10))):
        numbers = stats.geometric_mean(ratios)
        hits += numbers["low"] <= np.exp(0.5) <= numbers["high"]
    # four standard errors; an interval with the normal quantile covers 0.92 and fails
    assert abs(hits / trials - 0.95) < 4 * (0.95 * 0.05 / trials) ** 0.5


def test_cost_by_hand() -> None:
    assert metrics.cost(1000.0, 3.6) == pytest.approx(1.0)
    assert metrics.cost(1000.0, None) is None
    assert metrics.cost(None, 3.6) is None


def test_break_even_by_hand() -> None:
    method = [answer("a", [1.0], steps=[step(1, seconds=s) for s in (0.06, 0.05, 9.0)])]
    plain = [answer("a", [0.4], [10], arm="none"), answer("b", [0.2], [5], arm="none")]
    assert metrics.break_even(method, plain) == pytest.approx(0.06 / 0.04)
    assert metrics.break_even(method, []) is None
    assert metrics.break_even(plain, plain) is None


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 6), st.integers(1, 9))
def test_break_even_is_where_decode_speedup_is_one(ours: float, theirs: float, tau: int, n: int) -> None:
    steps = [step(tau - 1, seconds=ours)] * n
    method = [answer("a", [ours * (i + 1) for i in range(n)], [tau] * n, steps=steps)]
    plain = [answer("a", [theirs * (i + 1) for i in range(n)], arm="none")]
    speedup = stats.speedup(method, plain)["decode"]["mean"]
    assert speedup == pytest.approx(metrics.tokens_per_step(steps) / metrics.break_even(method, plain))


HEADER: dict[str, Any] = {
    "target": "t",
    "proposer": "ngram",
    "tree": "chain",
    "accept": "greedy",
    "data": "demo",
    "batch_size": 1,
    "temperature": 0.0,
    "reading": None,
}
KEYS = [
    "schema_version",
    *HEADER,
    "requests",
    "tokens",
    "tokens_per_step",
    "nodes_per_step",
    "break_even",
    "acceptance_by_depth",
    "acceptance_histogram",
    "tokens_per_second",
    "speedup",
    "ttft_ms",
    "tpot_ms",
    "latency_ms",
    "itl_ms",
    "time_split_ms_per_step",
    "usd_per_million_tokens",
    "joules_per_token",
    "peak_memory_mb",
    "lossless",
    "by_category",
]


def summary(
    method: list[RequestRecord], price: float | None = None, **baselines: list[RequestRecord]
) -> dict[str, Any]:
    """`summarise` with a fixed header, without split and losslessness."""
    fixed: dict[str, Any] = {"header": HEADER, "split": None, "lossless": None}
    return metrics.summarise(method, baselines, price_per_hour=price, **fixed)


def test_summary_by_hand() -> None:
    method = [
        answer("a", [1.0, 2.0], [1, 3], steps=[step(0), step(2)], energy_joules=6.0, peak_memory_mb=7.0),
        answer("b", [2.0], [2], category="maths", steps=[step(1)], energy_joules=3.0),
    ]
    again = [replace(r, repeat=1, steps=[step(4)] * 9) for r in method]
    got = summary(method + again, price=3.6, none=scaled(method, 3.0, arm="none"))
    assert list(got) == KEYS
    assert {key: got[key] for key in HEADER} == HEADER
    assert (got["schema_version"], got["requests"], got["tokens"]) == (1, 2, 6)
    assert got["tokens_per_step"] == 2.0
    assert got["acceptance_histogram"] == [1, 1, 1]
    assert got["tokens_per_second"] == 12 / 8
    assert got["usd_per_million_tokens"] == pytest.approx(1000 / 1.5)
    assert got["joules_per_token"] == 18 / 12
    assert got["peak_memory_mb"] == 7.0
    assert got["speedup"]["none"]["decode"]["mean"] == pytest.approx(3.0)
    assert list(got["by_category"]) == ["coding", "maths"]
    assert got["by_category"]["coding"] == {
        "requests": 1,
        "tokens_per_step": 2.0,
        "acceptance_by_depth": [1 / 2, 1.0, 0.0],
        "tokens_per_second": 2.0,
        "speedup": {"none": {"decode": pytest.approx(3.0), "end_to_end": pytest.approx(3.0)}},
    }


def test_what_is_not_known_is_none() -> None:
    got = summary([answer("a", [1.0], energy_joules=1.0), answer("b", [1.0])])
    unknown = [
        "tokens_per_step",
        "break_even",
        "usd_per_million_tokens",
        "joules_per_token",
        "peak_memory_mb",
    ]
    assert {key: got[key] for key in unknown} == dict.fromkeys(unknown)
    assert got["speedup"] == {}
    assert summary([])["tokens_per_second"] is None


def test_summary_passes_split_and_losslessness_through_without_nan() -> None:
    given_values = {
        "split": {"score": np.float32(1.5), "propose": float("nan")},
        "lossless": {"ties": np.int64(2)},
    }
    got = metrics.summarise([], {}, header=HEADER, price_per_hour=None, **given_values)
    assert got["time_split_ms_per_step"] == {"score": 1.5, "propose": None}
    assert json.loads(json.dumps(got, allow_nan=False))["lossless"] == {"ties": 2}


@settings(max_examples=30, deadline=None)
@given(arms(), st.randoms(use_true_random=False))
def test_order_of_records_is_irrelevant_and_the_summary_is_json(
    requests: list[RequestRecord], shuffler: random.Random
) -> None:
    baseline = [replace(r, arm="none", burst_times=[t + 1 for t in r.burst_times]) for r in requests]
    ordered = summary(requests, none=baseline)
    mixed = [shuffler.sample(arm, len(arm)) for arm in (requests, baseline)]
    assert json.dumps(summary(mixed[0], none=mixed[1]), allow_nan=False) == json.dumps(
        ordered, allow_nan=False
    )


def test_an_interval_too_wide_for_a_float_is_none() -> None:
    pair = [answer("a", [1.0]), answer("b", [1.0])]
    baseline = [pair[0], *scaled(pair[1:], 1e60)]
    numbers = summary(pair, none=baseline)["speedup"]["none"]["decode"]
    assert numbers["high"] is None
    assert numbers["mean"] == pytest.approx(1e30)
