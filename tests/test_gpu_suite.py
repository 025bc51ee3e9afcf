"""The GPU suite: run dry as its user runs it, killed halfway, and its arithmetic."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import like_a_gpu

from experiments.gpu import bars, plan, suite
from experiments.gpu.bars import BARS, Bar, Figures, report
from experiments.gpu.record import COLUMNS, Record, Skip
from experiments.gpu.steps import CAPTURED, Cell, Steps
from experiments.gpu.timing import Timing, union
from specdec_kernels.listing import OPERATIONS, cases

SUITE = Path(suite.__file__)
PROMISED = ["operation", "shape", "provider", "p20_ms", "p50_ms", "p80_ms", "gb_per_s", "tflop_per_s"]
PROMISED += ["gpu", "torch", "triton", "transformers", "commit", "kind"]
UNWANTED = ("hydra", "omegaconf", "wandb", "pandas", "rich", "gguf")
MACHINE = {"gpu": "a GPU", "torch": "2", "triton": "3", "transformers": "5", "commit": "abc"}


def started(out: Path) -> subprocess.Popen:
    """A dry run where importing what the suite must not need fails."""
    blocked = out.parent / "blocked"
    blocked.mkdir()
    for name in UNWANTED:
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUITE), "--dry", "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=out.parent, env=env, **pipes)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished dry run."""
    pytest.importorskip("triton", reason="there is no Triton for this system")
    out = tmp_path_factory.mktemp("suite") / "out"
    run = started(out)
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    return out


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    record = Record(tmp_path / "suite.csv", MACHINE, dry=False)
    yield record
    record.close()


@pytest.mark.slow
def test_a_dry_run_covers_the_listing(dry: Path) -> None:
    rows = read(dry / "suite.csv")
    assert list(rows[0])[: len(PROMISED)] == PROMISED
    for operation in OPERATIONS:
        toys = {case.name for case in cases(operation) if case.toy}
        for name, kind in ((operation, "dry"), (f"check {operation}", "passed")):
            found = {r["shape"] for r in rows if r["operation"] == name and r["kind"] == kind}
            assert found >= toys, (name, kind)
    providers = {r["provider"] for r in rows if r["operation"] == "tree_attention"}
    ours = {"triton", "triton, last-block merge"}
    assert providers == ours | {"sdpa, transformers", "sdpa, packed", "flex", "flashinfer"}
    assert {"copy", "gemm", "step", "check loop", "check determinism"} <= {r["operation"] for r in rows}


@pytest.mark.slow
def test_no_figure_of_a_dry_run_is_measured(dry: Path) -> None:
    rows, text = read(dry / "suite.csv"), (dry / "suite.md").read_text(encoding="utf-8")
    assert not [row for row in rows if row["kind"] == "measured"]
    assert all(row["kind"] == "dry" for row in rows if row["p50_ms"])
    assert "| measured |" not in text
    assert "No time here is a performance figure" in text
    for bar in BARS:
        assert f"| {bar.text} | not measured |  |" in text


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_has(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="there is no Triton for this system")
    path, run = tmp_path / "out" / "suite.csv", started(tmp_path / "out")
    try:
        while run.poll() is None and not (path.exists() and len(read(path)) >= 5):
            time.sleep(0.05)
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert run.returncode == -signal.SIGKILL
    rows = read(path)
    assert len(rows) >= 5
    assert all(row["operation"] and row["kind"] and row["commit"] for row in rows)
    assert not (path.parent / "suite.md").exists()


def test_a_machine_without_a_gpu_is_told_of_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit, match=r"no CUDA GPU.*--dry"):
        suite.set_up(dry=False)


def test_percentiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Timing(2.0, 3.5, 5.0)


def test_rates(record: Record) -> None:
    record.timed("op", "s", "p", Timing(1.0, 2.0, 3.0), moved=6 * 10**9, flops=8 * 10**12)
    record.timed("op", "s", "none", Timing(1.0, 2.0, 3.0))
    with_rates, without = record.rows
    assert (with_rates["gb_per_s"], with_rates["tflop_per_s"]) == ("3000", "4000")
    assert (without["gb_per_s"], without["tflop_per_s"], without["p50_ms"]) == ("", "", "2")


def test_time_covered_by_overlapping_spans() -> None:
    assert union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0
    assert union([]) == 0.0


def test_what_goes_wrong_becomes_a_row(record: Record) -> None:
    with record.attempt("op", "s", "a"):
        raise RuntimeError("out of\nmemory")
    with record.attempt("op", "s", "b"):
        raise Skip("not installed")
    with pytest.raises(SystemExit), record.attempt("op", "s", "c"):
        sys.exit()
    record.close()
    rows = read(Path(record._file.name))
    assert [list(row) for row in rows] == [list(COLUMNS)] * 2
    assert [(r["kind"], r["note"]) for r in rows] == [
        ("failed", "RuntimeError: out of memory"),
        ("skipped", "not installed"),
    ]


def test_tasks_that_would_begin_too_late_are_named(record: Record) -> None:
    done: list[str] = []
    tasks = [plan.Task("op", name, lambda name=name: done.append(name)) for name in ("x", "y")]
    suite.perform(record, tasks[:1], time.monotonic() + 60)
    suite.perform(record, tasks[1:], time.monotonic() - 1)
    assert done == ["x"]
    assert [(row["kind"], row["shape"]) for row in record.rows] == [("skipped", "y")]


def judged(record: Record, bar: Bar, times: dict[str, float]) -> tuple[str, str]:
    """The verdict where `slow` takes 6 ms everywhere, and `fast` these."""
    for shape, ms in times.items():
        record.timed("op", shape, "slow", Timing(6.0, 6.0, 6.0))
        record.timed("op", shape, "fast", Timing(ms, ms, ms))
    return bar.judge(Figures.of(record.rows))


@pytest.mark.parametrize(
    ("times", "limit", "expected"),
    [
        ({"x": 1.0, "y": 2.0}, False, ("met", "3 (y; 2 of 2 shapes)")),
        ({"x": 1.0, "y": 2.1}, False, ("missed", "2.86 (y; 2 of 2 shapes)")),
        ({"x": 1.0}, False, ("not measured", "6 (x; 1 of 2 shapes)")),
        ({"y": 4.0}, False, ("missed", "1.5 (y; 1 of 2 shapes)")),
        ({}, False, ("not measured", "")),
        ({"x": 2.0, "y": 4.0}, True, ("met", "3 (x; 2 of 2 shapes)")),
        ({"x": 1.0, "y": 4.0}, True, ("missed", "6 (x; 2 of 2 shapes)")),
    ],
)
def test_verdicts(record: Record, times: dict[str, float], limit: bool, expected: tuple[str, str]) -> None:
    bar = Bar("a bar", 3.0, lambda figures, s: figures.times("op", s, "slow", "fast"), ("x", "y"), limit)
    assert judged(record, bar, times) == expected


def test_dry_figures_are_not_judged(tmp_path: Path) -> None:
    record = Record(tmp_path / "suite.csv", MACHINE, dry=True)
    bar = Bar("a bar", 3.0, lambda figures, s: figures.times("op", s, "slow", "fast"), ("x",))
    assert judged(record, bar, {"x": 1.0}) == ("not measured", "")
    record.close()


def test_bars_that_a_fast_machine_meets(record: Record) -> None:
    """Bars read rows that the suite writes."""

    def took(operation: str, shape: str, provider: str, ms: float, **work: int) -> None:
        record.timed(operation, shape, provider, Timing(ms, ms, ms), **work)

    took("copy", "memory", "torch", 1.0, moved=4 * 10**9)
    for shape in (*bars.LONG, *bars.MIDDLE, *bars.WIDE, bars.RAGGED, bars.UNIFORM):
        took("tree_attention", shape, "triton", 1.0, moved=3_500_000_000, flops=400 * 10**9)
        for other in ("sdpa, transformers", "sdpa, packed", "flex"):
            took("tree_attention", shape, other, 10.0)
    for shape in (bars.ONE_TOKEN, bars.SIXTEEN):
        took("step", shape, "triton, whole step", 4.0)
        took("step", shape, "triton, graphs", 5.0)
        took("step", shape, "triton, no graphs", 9.0)
        took("step, device busy", shape, "triton, whole step", 3.9)
    assert [bar.judge(Figures.of(record.rows))[0] for bar in BARS] == ["met"] * len(BARS)
    for row in record.rows:
        row["kind"] = "failed"
    assert {bar.judge(Figures.of(record.rows))[0] for bar in BARS} == {"not measured"}


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("graphs", CAPTURED, ids=CAPTURED.get)
def test_steps_of_every_kind(
    graphs: bool | str, nodes: int, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but that nothing is captured."""
    monkeypatch.setattr(Steps, "_possible", lambda steps, graphs: graphs)
    like_a_gpu(monkeypatch)
    steps = Steps(record, torch.device("cpu"), 2, dry=True)
    steps.measure(Cell("24", 24, 2, nodes), "sdpa", graphs)
    (row,) = record.rows
    assert (row["kind"], row["provider"]) == ("measured", f"sdpa, {CAPTURED[graphs]}"), row["note"]


def test_the_plan_measures_every_shape_that_a_bar_names(record: Record) -> None:
    real = plan.Plan(record, torch.device("cuda"), 32, dry=False)
    planned = {task.shape for task in real.measurements()}
    assert {shape for bar in BARS for shape in bar.shapes} <= planned
    assert bars.ONE_TOKEN in planned
    everything = {case.name for operation in OPERATIONS for case in cases(operation) if not case.toy}
    assert everything <= planned
    for tasks in (real.checks(), real.late_checks()):
        assert {c.name for c in cases("tree_attention") if not c.toy} <= {task.shape for task in tasks}
    assert sum(plan.RAGGED_PREFIXES) == 8 * plan.PREFIX
    assert len(plan.RAGGED_PREFIXES) == 8


def test_the_table_names_every_bar_and_every_failure(record: Record) -> None:
    record.add("failed", "tree_attention", "x | y", "flex", "too old")
    text = report(record.rows, record.machine, dry=False)
    assert all(bar.text in text for bar in BARS)
    assert r"| failed | tree_attention | x \| y | flex | too old |" in text
    assert "a GPU" in text
