"""Speedups and throughput on numbers computed by hand, and what a fair comparison must have."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import answer, arms, scaled

from specdec import metrics, stats
from specdec.records import RequestRecord


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


def test_later_turns_of_a_group_are_of_its_unit_though_some_conversations_are_over() -> None:
    method = [
        answer("a0", [1.0], [2], conversation="a", group=0),
        answer("b0", [2.0], [2], conversation="b", group=0),
        answer("b1", [1.0], [4], conversation="b", group=1, turn=1),
        answer("c0", [1.0], [1], conversation="c", group=2),
    ]
    baseline = [replace(r, burst_times=[t]) for r, t in zip(method, (3.0, 6.0, 6.0, 1.0), strict=True)]
    decode = stats.speedup(method, baseline)["decode"]
    # Two units: a and b with 12 s over 3 s, and c alone; three would be narrower.
    assert decode == stats.geometric_mean([12 / 3, 1.0]) | {"ratio_of_totals": 13 / 4}


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
