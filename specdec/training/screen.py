"""What is shown of a training: what it takes, a bar, a line an epoch, and how well the head drafts."""

import time
from datetime import timedelta
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .estimate import Estimate
from .heldout import HeldOut
from .loop import Progress as Step

TIMED = 5  # steps that the time of a step is taken from


class Screen:
    """Shows what `training.loop.train` reports, as long as it is open."""

    def __init__(self, console: Console, kind: str) -> None:
        self.console, self.kind = console, kind
        self.done, self._gaps, self._last = 0, [], None
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "Screen":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, estimate: Estimate) -> None:
        self.done = estimate.done
        self._bar.update(self._task, total=estimate.steps, completed=estimate.done)
        for line in lines_of(estimate, self.kind):
            self._say(line)

    def report(self, now: Step) -> None:
        """After a step: the bar, and once what a step takes. After an epoch: how the head drafts."""
        drafts = f", {now.heldout.tokens_per_step:.2f} tokens per step held out" if now.heldout else ""
        words = f"step {now.step} of {now.total}, loss {now.loss:.3f}{drafts}"
        self._bar.update(self._task, completed=now.step, description=words)
        if now.heldout:
            self._say(f"{words}; accepted by depth: {_rates(now.heldout)}")
            self._last = None
        else:
            self._time(now)

    def _time(self, now: Step) -> None:
        """Say once what a step takes, held-out drafts between two steps aside."""
        last, self._last = self._last, time.monotonic()
        if last is None or len(self._gaps) == TIMED:
            return
        self._gaps.append(self._last - last)
        if len(self._gaps) == TIMED:
            seconds = median(self._gaps)
            rest = _duration(seconds * (now.total - now.step))
            self._say(f"a step takes {seconds:.3g} s: about {rest} to go, and the drafts after each epoch")

    def _say(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)


def lines_of(estimate: Estimate, kind: str) -> list[str]:
    """What there is to do, and the memory and time for it."""
    held = ", ".join(f"{name} {_size(size)}" for name, size in estimate.memory.items() if size)
    features = "read from the shards" if estimate.memory["features"] else "computed in every epoch"
    before = f", {estimate.done} of them made before" if estimate.done else ""
    rest = estimate.steps - estimate.done
    return [
        f"answers: {estimate.texts} texts to train on, {estimate.said} tokens of the target's; "
        f"what its layers held is {features}",
        f"head: {kind}, {estimate.parameters / 1e6:.3g} M parameters, {estimate.steps} steps{before}",
        f"memory: {_size(sum(estimate.memory.values()))} ({held})",
        f"time: about {_duration(rest * estimate.seconds)} for {rest} steps of {estimate.seconds:.3g} s, and "
        "the drafts after each epoch; judged by a forward of the longest texts, a backward counted as two",
    ]


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _rates(heldout: HeldOut) -> str:
    return " ".join(f"{rate:.2f}" for rate in heldout.acceptance_by_depth)


def result_table(best: dict, accuracy_KR: list[list[float]]) -> Table:
    """By depth: acceptance in the loop at the best epoch, and how often the ranks were right on its texts."""
    title = f"held out, step {best['step']}: {best['tokens_per_step']:.2f} tokens per step"
    table = Table("depth", "accepted in the loop", "top-1", "top-5", title=title)
    rates = best["acceptance_by_depth"]
    for depth in range(max(len(rates), len(accuracy_KR))):
        accepted = f"{rates[depth]:.3f}" if depth < len(rates) else ""
        ranks_R = accuracy_KR[depth] if depth < len(accuracy_KR) else None
        ranks = (f"{ranks_R[0]:.3f}", f"{sum(ranks_R[:5]):.3f}") if ranks_R else ("", "")
        table.add_row(str(depth + 1), accepted, *ranks)
    return table
