"""What each screen says, and when; stdout is pure under ui=json."""

import io
import json
import math
import sys

import pytest
from rich.console import Console
from summaries import SUMMARY, summary

from specdec import ui

LIVE = {"tokens_per_step": 2.1, "speedup none": 1.4, "speedup hf": None, "eta_s": 95}
PATH = "outputs/2026-01-31/12-00-00/a-rather-long-folder-name-that-is-wider-than-the-screen/summary.json"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ui.Screen:
    monkeypatch.setenv("COLUMNS", "80")
    return ui.screen("plain")


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


def test_a_terminal_without_unicode_gets_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    ui.screen("plain").result(SUMMARY, ["end"])
    sys.stdout.flush()
    out = sys.stdout.buffer.getvalue().decode("ascii")
    assert "1.42x [1.31, 1.54]" in out
    assert out.endswith("end\n")
