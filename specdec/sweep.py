"""The end of a sweep (`python -m specdec.run -m`): one table of all jobs, on the screen and as combined.csv.

hydra.callbacks.combined._target_: specdec.sweep.CombinedTable
"""

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from specdec.tables import is_lossy, main_baseline
from specdec.ui import screen

WRONG_INPUT = (ValueError, OSError, ImportError, FloatingPointError)
BEFORE_SPEEDUP = (
    "job",
    "target",
    "dtype",
    "device",
    "proposer",
    "tree",
    "accept",
    "temperature",
    "batch_size",
    "tokens_per_step",
    "nodes_per_step",
    "break_even",
    "tokens_per_second",
)


@dataclass(frozen=True)
class Job:
    """A job of this sweep. Its folder may hold the results of an earlier one, also where it failed."""

    folder: Path
    overrides: list[str]
    failed: bool


class CombinedTable(Callback):
    """Combines the summaries of a sweep's jobs. Jobs that failed are listed and make the exit status 1."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note a job of a sweep; say why it failed, and let the sweep go on."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        failed = job_return.status == JobStatus.FAILED
        folder, overrides = Path(config.hydra.runtime.output_dir), list(config.hydra.overrides.task)
        self.jobs.append(Job(folder, overrides, failed))
        if failed:
            _say_why(job_return)
            # Hydra would raise the error after the last job, and never reach on_multirun_end.
            job_return.return_value, job_return.status = None, JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and write combined.csv. SystemExit: a job failed, or none ran in this process."""
        if not self.jobs:
            sys.exit("specdec: no job ran in this process, so there is no table: hydra/launcher=basic")
        rows, failed = read_jobs(self.jobs)
        show = screen(config.ui)
        if rows:
            path = Path(config.hydra.sweep.dir) / "combined.csv"
            write_csv(rows, path)
            show.combined(rows, str(path))
        show.start([f"failed: {job}" for job in failed])
        if failed:
            raise SystemExit(1)


def read_jobs(jobs: list[Job]) -> tuple[list[dict], list[str]]:
    """The summaries of the jobs that ended well, each with its `job`, and the jobs that failed.

    A job is called by its overrides, without those that all jobs share; by its folder where nothing is left.
    """
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    rows, failed = [], []
    for job in jobs:
        name = " ".join(o for o in job.overrides if o not in shared)
        if job.failed:
            failed.append(f"{job.folder.name}: {name}" if name else job.folder.name)
        else:
            summary = json.loads((job.folder / "summary.json").read_text("utf-8"))
            rows.append(summary | {"job": name or job.folder.name})
    return rows, failed


def write_csv(rows: list[dict], path: Path) -> None:
    """A line a job, fastest over the main baseline first, lossy rules last. Whole or not at all."""
    # A single run makes this callback too, and needs no pandas.
    import pandas as pd

    base = main_baseline(rows)
    ranked = sorted(
        rows, key=lambda row: (is_lossy(row), -(_of(row, "speedup", base, "decode", "mean") or 0.0))
    )
    baselines = list(dict.fromkeys(name for row in rows for name in row.get("speedup") or {}))
    table = pd.DataFrame([csv_row(row, baselines) for row in ranked]).convert_dtypes()
    draft = path.with_name(path.name + ".tmp")
    table.to_csv(draft, index=False)
    os.replace(draft, path)


def csv_row(row: dict, baselines: list[str]) -> dict[str, Any]:
    """A summary as flat columns; None where a number is not known."""
    values = {key: row.get(key) for key in BEFORE_SPEEDUP}
    for name in baselines:
        decode, whole = (_of(row, "speedup", name, kind) or {} for kind in ("decode", "end_to_end"))
        values |= {
            f"speedup_{name}_decode": decode.get("mean"),
            f"speedup_{name}_low": decode.get("low"),
            f"speedup_{name}_high": decode.get("high"),
            f"speedup_{name}_end_to_end": whole.get("mean"),
        }
    divergences = _of(row, "lossless", "divergences")
    return values | {
        "ttft_ms_p50": _of(row, "ttft_ms", "p50"),
        "hardware": row.get("hardware"),
        "price_per_hour": row.get("price_per_hour"),
        "usd_per_million_tokens": row.get("usd_per_million_tokens"),
        "joules_per_token": row.get("joules_per_token"),
        "lossless": _of(row, "lossless", "rule"),
        "identical": _of(row, "lossless", "identical"),
        "divergences": None if divergences is None else len(divergences),
    }


def _say_why(failed: JobReturn) -> None:
    try:
        _ = failed.return_value
    except Exception as error:
        one_line = isinstance(error, WRONG_INPUT)
        sys.stderr.writelines([f"specdec: {error}\n"] if one_line else traceback.format_exception(error))


def _of(row: dict, *keys: str) -> Any:
    """row[a][b]..., None where the way ends early."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
