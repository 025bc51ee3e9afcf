"""What the screen says: every number in its place, n/a for what is unknown, stdout pure under ui=json."""

import copy
import io
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from specdec import tables, ui

LIVE = {"tokens_per_step": 2.1, "speedup none": 1.4, "speedup hf": None, "eta_s": 95}
PATH = "outputs/2026-01-31/12-00-00/a-rather-long-folder-name-that-is-wider-than-the-screen/summary.json"


def interval(mean: float, low: float | None, high: float | None) -> dict:
    return {"mean": mean, "low": low, "high": high, "ratio_of_totals": mean}


SUMMARY = {
    "schema_version": 1,
    "target": "smollm2-135m-instruct",
    "proposer": "ngram",
    "tree": "chain",
    "accept": "greedy",
    "data": "demo",
    "batch_size": 1,
    "temperature": 0.0,
    "requests": 70,
    "tokens": 8960,
    "tokens_per_step": 2.1,
    "break_even": 1.31,
    "acceptance_by_depth": [{"depth": d + 1, "rate": rate} for d, rate in enumerate([0.0, 0.5, 1.0, None])],
    "tokens_per_second": 61.234,
    "speedup": {
        "none": {"decode": interval(1.42, 1.31, 1.54), "end_to_end": interval(1.38, 1.25, 1.5)},
        "hf": {"decode": interval(0.8, 0.7, 0.9), "end_to_end": interval(0.79, 0.7, 0.9)},
    },
    "time_split_ms_per_step": {"propose": 4.0, "score": 88.0, "accept": 1.6, "commit": 0.4, "host": 6.0},
    "usd_per_million_tokens": None,
    "joules_per_token": 0.0134,
    "lossless": {"rule": True, "identical": 70, "divergences": []},
    "by_category": {
        "question answering": {
            "requests": 10,
            "tokens_per_step": 1.5,
            "tokens_per_second": 40.0,
            "speedup": {"none": {"decode": 1.11, "end_to_end": interval(1.07, 1.0, 1.1)}},
        },
    },
}
LOSSY = {"rule": False, "identical": None, "divergences": []}


def summary(**changes: object) -> dict:
    return copy.deepcopy(SUMMARY) | changes


def shown(*renderables: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


def row(text: str, word: str) -> list[str]:
    """The words of the first line that has `word`."""
    return next(line.split() for line in text.splitlines() if word in line.split())


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ui.Screen:
    monkeypatch.setenv("COLUMNS", "80")
    return ui.screen("plain")


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
        "a step costs 1.31x plain decoding's: it pays above 1.31 tokens a step, and it made 2.10; "
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


def test_overrides_are_not_markup(plain: ui.PlainScreen, capsys: pytest.CaptureFixture[str]) -> None:
    plain.start(["target: [bold]x[/bold] :smile:"])
    plain.combined([summary(job="data.categories=[red]")], PATH)
    out = capsys.readouterr().out
    assert "target: [bold]x[/bold] :smile:" in out
    assert "data.categories=[red]" in out
    assert PATH in out.splitlines()


def test_plain_shows_everything_without_escapes(
    plain: ui.PlainScreen, capsys: pytest.CaptureFixture[str]
) -> None:
    plain.result(SUMMARY, [PATH])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for words in (
        "smollm2-135m-instruct",
        "1.42x [1.31, 1.54]",
        "question answering",
        "why: a step",
        "lossless: yes",
    ):
        assert words in out
    assert PATH in out.splitlines()
    assert out.index("why:") < out.index("lossless:") < out.index(PATH)


def test_plain_progress_speaks_every_five_seconds_and_at_the_end(
    plain: ui.PlainScreen, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for second in range(11):
        monkeypatch.setattr(ui.time, "monotonic", lambda now=100.0 + second: now)
        plain.progress(second, 12, LIVE)
    plain.progress(12, 12, LIVE)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0/12", "5/12", "10/12", "12/12"]
    assert lines[0] == "0/12 prompts, 2.10 tokens/step, 1.40x vs none, n/a vs hf, eta 1:35"


def everything(screen: ui.Screen) -> None:
    screen.start(["target: x"])
    screen.progress(1, 2, LIVE)
    screen.result(summary(tokens_per_step=math.inf), [PATH])
    screen.combined([summary(job="a=b")], PATH)
    screen.close()


def test_json_is_one_line_that_parses_strictly(capsys: pytest.CaptureFixture[str]) -> None:
    everything(ui.screen("json"))
    out = capsys.readouterr().out

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert out.count("\n") == 1
    assert json.loads(out, parse_constant=refuse) == summary(tokens_per_step=None)


def test_none_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    everything(ui.screen("none"))
    assert capsys.readouterr() == ("", "")


def test_rich_updates_in_place_and_cleans_up() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="standard")
    screen = ui.RichScreen(console)
    screen.progress(1, 2, LIVE)
    screen.progress(2, 2, LIVE)
    screen.result(SUMMARY, [PATH])
    out = console.file.getvalue()
    assert "2.10 tokens/step, 1.40x vs none" in out
    assert "\x1b[2K" in out
    assert out.rindex("\x1b[?25h") < out.index("why:")
    assert "\x1b[32m1.42x [1.31, 1.54]" in out
    assert "\x1b[31m0.80x [0.70, 0.90]" in out
    screen.progress(0, 5, LIVE)
    screen.close()
    screen.close()
    assert "0/5" in console.file.getvalue()


def test_rich_without_a_terminal_is_plain() -> None:
    assert type(ui.screen("rich")) is ui.PlainScreen


@pytest.mark.parametrize(("kind", "nearest"), [("ritch", "rich"), ("JSON", "json"), (None, "none")])
def test_an_unknown_ui_names_the_nearest(kind: str, nearest: str) -> None:
    with pytest.raises(
        ValueError, match=f"expected one of rich, plain, json, none; the nearest is ui={nearest}"
    ):
        ui.screen(kind)


def test_a_terminal_without_unicode_gets_its_table() -> None:
    code = "import test_ui; from specdec import ui; ui.screen('plain').result(test_ui.SUMMARY, ['end'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1.42x [1.31, 1.54]" in done.stdout
    assert done.stdout.endswith("end\n")
