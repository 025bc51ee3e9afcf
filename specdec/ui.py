"""What the screen says: ui=rich (live bar, tables), plain (lines, tables), json (the summary) or none."""

import difflib
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from specdec import tables
from specdec.store import json_text

SECONDS_BETWEEN_LINES = 5.0


class Screen:
    """ui=none: says nothing. The other screens override what they show."""

    def start(self, lines: list[str]) -> None:
        """Header lines, such as "target: smollm2-135m-instruct (float32, cpu x2)"."""

    def progress(self, done: int, total: int, live: dict) -> None:
        """Prompts done; `live`: tokens_per_step, "speedup <baseline>", eta_s, others; None where unknown."""

    def result(self, summary: dict, paths: list[str]) -> None:
        """The end of a run: its summary (keys as in summary.json) and the files that it wrote."""

    def combined(self, rows: list[dict], path: str) -> None:
        """The end of a sweep: a summary a job, its overrides as row["job"], and the file that holds them."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class JsonScreen(Screen):
    """ui=json: one line on stdout for a run, its summary."""

    def result(self, summary: dict, paths: list[str]) -> None:
        print(json_text(summary), flush=True)


class PlainScreen(Screen):
    """ui=plain: lines without colour or cursor movement, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.next_line = 0.0

    def start(self, lines: list[str]) -> None:
        self._lines(lines)

    def progress(self, done: int, total: int, live: dict) -> None:
        now = time.monotonic()
        if done < total and now < self.next_line:
            return
        self.next_line = now + SECONDS_BETWEEN_LINES
        self._lines([", ".join([f"{done}/{total} prompts", *_live_words(live)])])

    def result(self, summary: dict, paths: list[str]) -> None:
        self.close()
        self.console.print(Text(f"\n{tables.headline(summary)}"))
        self.console.print(tables.result_table(summary))
        if categories := tables.category_table(summary):
            self.console.print(categories)
        self.console.print(Text(f"why: {tables.why(summary)}"))
        self.console.print(Text(tables.lossless_line(summary)))
        self._lines(paths)

    def combined(self, rows: list[dict], path: str) -> None:
        self.close()
        self.console.print(tables.combined_table(rows))
        self._lines([path])

    def _lines(self, lines: list[str]) -> None:
        # Never wrapped: a path cut in two can't be copied.
        for line in lines:
            self.console.print(Text(line), soft_wrap=True)


class RichScreen(PlainScreen):
    """ui=rich on a terminal: a bar that updates in place while the run lasts."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.bar: Progress | None = None

    def progress(self, done: int, total: int, live: dict) -> None:
        if self.bar is None:
            self.bar = _bar(self.console)
            self.bar.add_task("", total=total)
            self.bar.start()
        words = ", ".join(_live_words(live))
        self.bar.update(self.bar.task_ids[0], completed=done, total=total, description=words)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def screen(kind: str) -> Screen:
    """The screen of ui=`kind`; rich becomes plain where stdout is no terminal. ValueError if unknown."""
    kinds = {"rich": _rich, "plain": _plain, "json": JsonScreen, "none": Screen}
    if kind not in kinds:
        nearest = difflib.get_close_matches(str(kind).lower(), kinds, n=1, cutoff=0)
        raise ValueError(f"ui={kind}: expected one of {', '.join(kinds)}; the nearest is ui={nearest[0]}")
    return kinds[kind]()


def _rich() -> Screen:
    console = Console()
    return RichScreen(console) if console.is_interactive else _plain()


def _plain() -> Screen:
    console = Console(color_system=None, force_terminal=False, force_jupyter=False)
    if not console.encoding.startswith("utf"):
        # The sparkline must not end a long run with an encoding error.
        sys.stdout.reconfigure(errors="replace")
    return PlainScreen(console)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.completed}/{task.total} prompts", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        expand=True,
    )


def _live_words(live: dict) -> list[str]:
    return [_live_word(key, value) for key, value in live.items()]


def _live_word(key: str, value: float | None) -> str:
    if key == "eta_s":
        return "eta n/a" if value is None else f"eta {int(value) // 60}:{int(value) % 60:02d}"
    if key == "tokens_per_step":
        return f"{tables.number(value)} tokens/step"
    if key.startswith("speedup "):
        return f"{tables.number(value, 'x')} vs {key.removeprefix('speedup ')}"
    return f"{key} {tables.number(value)}"
