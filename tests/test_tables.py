"""Tables and lines of the result: every number in its place, n/a for what is unknown."""

import math

import pytest
from summaries import LOSSY, SUMMARY, interval, row, shown, summary

from specdec import tables


def test_the_result_row_at_80_columns() -> None:
    text = shown(tables.result_table(SUMMARY))
    first = ["ngram", "2.10", "▁▅█·", "61.2", "none", "1.42x", "[1.31,", "1.54]", "1.38x", "0.013"]
    assert row(text, "ngram") == first
    assert row(text, "hf") == ["hf", "0.80x", "[0.70,", "0.90]", "0.79x"]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_digit_is_lost_at_any_width(width: int) -> None:
    text = shown(
        tables.result_table(SUMMARY), tables.combined_table([summary(job="proposer=ngram")]), width=width
    )
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    characters = "".join(text.split())
    assert all(characters.count(digit) >= 2 for digit in "1.42x")
    if width >= 60:
        assert all(word in text for word in ("1.42x", "0.013", "2.10", "61.2"))


def test_unknown_values_are_never_zero() -> None:
    bare = {"proposer": "ngram"}
    text = shown(
        tables.headline(bare), tables.result_table(bare), tables.why(bare), tables.lossless_line(bare)
    )
    text += shown(tables.combined_table([bare | {"job": "a=b"}]))
    assert "n/a" in text
    assert "0" not in text
    assert tables.category_table(bare) is None


def test_sizes_keep_their_digits() -> None:
    sizes = [None, math.nan, 0.0, 0.00123, 1.234, 61.23, 12345.6]
    assert list(map(str, map(tables.size, sizes))) == [
        "n/a",
        "n/a",
        "0.00",
        "0.0012",
        "1.23",
        "61.2",
        "12346",
    ]


def test_sparkline_rises_with_the_rate_and_intervals_may_be_unknown() -> None:
    rates = [i / 7 for i in range(8)]
    assert tables.sparkline([{"rate": rate} for rate in rates]) == tables.BLOCKS
    assert tables.sparkline([]) == tables.sparkline(None) == str(tables.speedup(None)) == "n/a"
    assert str(tables.speedup(interval(1.4, None, None))) == "1.40x [n/a]"


def test_categories_take_ratios_with_and_without_interval() -> None:
    text = shown(tables.category_table(SUMMARY))
    assert row(text, "question") == ["question", "answering", "10", "1.50", "40.0", "1.11x"]


def test_why_names_the_costs() -> None:
    assert tables.why(SUMMARY) == (
        "a step costs 1.31x plain decoding's on average: it pays above 1.31 tokens a step, and it made 2.10; "
        "propose 4 %, score 88 %, accept 2 %, commit <1 %, host 6 %"
    )
    assert "made 2.10, so it does not pay; time split n/a" in tables.why(
        summary(break_even=2.4, time_split_ms_per_step=None)
    )


def test_lossless_line() -> None:
    assert tables.lossless_line(SUMMARY) == "lossless: yes, all 70 answers identical to plain decoding"
    assert "not compared" in tables.lossless_line(
        summary(lossless={"rule": True, "identical": None, "divergences": []})
    )
    assert "n/a" in tables.lossless_line(summary(lossless=None))
    found = [{"request": f"q{i}", "index": i, "top2_gap": 0.25 if i else None} for i in range(5)]
    line = tables.lossless_line(summary(lossless={"rule": True, "identical": 65, "divergences": found}))
    assert "5 of 70 answers differ" in line
    assert "q0 at token 0 (top-2 gap n/a), q1 at token 1 (top-2 gap 0.25), q2" in line
    assert "q3" not in line
    assert "and 2 more" in line
    assert "near ties" not in line
    assert line.endswith("draws are not audited: in 16 bits some differ, in float32 none may")


@pytest.mark.parametrize(
    ("beyond", "words"), [(0, "none lies beyond the noise"), (1, "1 LIE BEYOND the noise")]
)
def test_lossless_line_tells_near_ties_from_bugs(beyond: int, words: str) -> None:
    audit = {"answers": 1, "tokens": 48, "near_ties": 2, "widest": 0.25, "beyond": beyond, "bound": 0.31}
    found = {"rule": True, "identical": 69, "divergences": [{"request": "q", "index": 3, "top2_gap": 0.1}]}
    line = tables.lossless_line(summary(lossless={**found, "audit": audit}))
    assert f"of 48 tokens in 1 of them, 2 are near ties, by 0.25 at most, and {words} (0.31)" in line


def test_a_lossy_rule_is_labelled_everywhere() -> None:
    lossy = summary(lossless=LOSSY, accept="typical", job="accept=typical")
    assert "LOSSY: accept=typical" in tables.lossless_line(lossy)
    assert "LOSSY" in shown(tables.result_table(lossy))
    assert row(shown(tables.combined_table([lossy])), "accept=typical")[-1] == "LOSSY"
    assert tables.is_lossy(summary(lossless={"rule": "typical"}))


def test_a_synthetic_schedule_is_labelled_everywhere() -> None:
    made_up = summary(lossless=LOSSY | {"rule": "synthetic"}, accept="synthetic", job="accept=synthetic")
    assert tables.lossless_line(made_up).startswith("SYNTHETIC: accept=synthetic")
    assert "SYNTHETIC" in shown(tables.result_table(made_up))
    assert row(shown(tables.combined_table([made_up])), "accept=synthetic")[-1] == "SYNTHETIC"


def test_a_sweep_is_sorted_by_decode_speedup_with_lossy_rules_apart() -> None:
    def job(name: str, mean: float | None, **changes: object) -> dict:
        return summary(job=name, speedup={"none": {"decode": mean and interval(mean, 0.9, 3.0)}}, **changes)

    rows = [job("slow", 1.1), job("unknown", None), job("cheat", 2.9, lossless=LOSSY), job("fast", 1.9)]
    lines = shown(tables.combined_table(rows)).splitlines()
    order = [
        line.split()[0] for line in lines if line.split() and line.split()[0] in {r["job"] for r in rows}
    ]
    assert order == ["fast", "slow", "unknown", "cheat"]
    assert row("\n".join(lines), "fast") == [
        "fast",
        "2.10",
        "1.90x",
        "[0.90,",
        "3.00]",
        "n/a",
        "1.31",
        "61.2",
        "yes",
    ]
