"""Every definition on numbers computed by hand, and the properties that a fair comparison must have."""

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import answer, arms, scaled, step

from specdec import metrics, stats
from specdec.records import RequestRecord, StepRecord

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


def test_cost_by_hand() -> None:
    assert metrics.cost(1000.0, 3.6) == pytest.approx(1.0)
    assert metrics.cost(1000.0, None) is None
    assert metrics.cost(None, 3.6) is None


def decoded(steps: list[StepRecord], **fields: Any) -> RequestRecord:
    """An answer that these steps made, one after the other."""
    times = np.cumsum([s.seconds for s in steps]).tolist()
    return answer("a", times, [s.kept for s in steps], **{"steps": steps, **fields})


def test_break_even_by_hand() -> None:
    # 6 tokens in 0.40 s: of the steps, one drafted and two did not
    method = [decoded([step(3, seconds=0.32), step(0, seconds=0.04), step(0, seconds=0.04)])]
    plain = [answer("a", [0.6], [6], arm="none")]
    assert metrics.break_even(method, plain) == pytest.approx((0.40 / 3) / (0.6 / 6))
    assert metrics.break_even(method, []) is None
    assert metrics.break_even(plain, plain) is None


two_kinds = st.lists(st.sampled_from([step(0, nodes=1, seconds=0.04), step(4, nodes=8, seconds=0.09)]))


@given(two_kinds.filter(bool), st.floats(0.01, 1), st.integers(0, 3))
def test_break_even_is_where_decode_speedup_is_one(steps: list[StepRecord], theirs: float, cut: int) -> None:
    """Also of steps that cost one thing or another, and whose last tokens were cut."""
    last = steps[-1]
    method = decoded([*steps[:-1], replace(last, kept=max(1, last.kept - cut))])
    plain = replace(method, arm="none", burst_times=[theirs], burst_sizes=[len(method.tokens)])
    ratio = stats.speedup([method], [plain])["decode"]["mean"]
    found = metrics.tokens_per_step(steps) / metrics.break_even([method], [plain])
    assert found == pytest.approx(ratio)


def test_break_even_of_a_batch_is_where_decode_speedup_is_one() -> None:
    method = [
        answer("a", [0.1, 0.2], [2, 2], steps=[step(1, seconds=0.1)] * 2, group=0),
        answer("b", [0.1, 0.2, 0.25], steps=[step(0, seconds=s) for s in (0.1, 0.1, 0.05)], group=0),
    ]
    plain = scaled(method, 7 / 5, arm="none")
    assert metrics.break_even(method, plain) == pytest.approx(1.0)


HEADER: dict[str, Any] = {
    "target": "t",
    "fingerprint": "0123456789abcdef",
    "dtype": "float32",
    "device": "cpu",
    "proposer": "ngram",
    "tree": "chain",
    "accept": "greedy",
    "data": "demo",
    "batch_size": 1,
    "temperature": 0.0,
    "reading": None,
    "hardware": "local",
    "price_per_hour": None,
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
    header = HEADER | {"price_per_hour": price}
    return metrics.summarise(method, baselines, header=header, split=None, lossless=None)


def test_summary_by_hand() -> None:
    method = [
        answer("a", [1.0, 2.0], [1, 3], steps=[step(0), step(2)], energy_joules=6.0, peak_memory_mb=7.0),
        answer("b", [2.0], [2], category="maths", steps=[step(1)], energy_joules=3.0),
    ]
    again = [replace(r, repeat=1, steps=[step(4)] * 9) for r in method]
    got = summary(method + again, price=3.6, none=scaled(method, 3.0, arm="none"))
    assert list(got) == KEYS
    assert {key: got[key] for key in HEADER} == HEADER | {"price_per_hour": 3.6}
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
    got = metrics.summarise([], {}, header=HEADER, **given_values)
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
