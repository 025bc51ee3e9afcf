"""The end of a sweep (`python -m specdec.run -m`): one table of all jobs, on the screen and as combined.csv.

hydra.callbacks.combined._target_: specdec.sweep.CombinedTable
"""

import json
import os
import sys
import traceback
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


class CombinedTable(Callback):
    """Combines the summaries of a sweep's jobs. Jobs that failed are listed and make the exit status 1."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Say why a job of a sweep failed, and let the sweep go on."""
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        try:
            _ = job_return.return_value
        except Exception as error:
            lines = (
                [f"specdec: {error}\n"]
                if isinstance(error, WRONG_INPUT)
                else traceback.format_exception(error)
            )
            sys.stderr.writelines(lines)
        # Hydra would raise the error after the last job, and never reach on_multirun_end.
        job_return.return_value, job_return.status = None, JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and write combined.csv. SystemExit(1) if a job failed."""
        folder = Path(config.hydra.sweep.dir)
        rows, failed = read_jobs(folder)
        show = screen(config.ui)
        if rows:
            path = folder / "combined.csv"
            write_csv(rows, path)
            show.combined(rows, str(path))
        show.start([f"failed: {job}" for job in failed])
        if failed:
            raise SystemExit(1)


def read_jobs(sweep: Path) -> tuple[list[dict], list[str]]:
    """The summaries of the finished jobs, each with its `job`, and the jobs that left no summary.

    A job is called by its overrides, without those that all jobs share; by its folder where nothing is left.
    """
    folders = sorted((f for f in sweep.glob("[!.]*") if f.is_dir()), key=lambda f: (len(f.name), f.name))
    overrides = {folder: _overrides(folder) for folder in folders}
    written = [set(own) for own in overrides.values() if own]
    shared = set.intersection(*written) if len(written) > 1 else set()
    rows, failed = [], []
    for folder, own in overrides.items():
        job = " ".join(o for o in own if o not in shared) or folder.name
        if (summary := _read(folder / "summary.json")) is None:
            failed.append(job if job == folder.name else f"{folder.name}: {job}")
        else:
            rows.append(summary | {"job": job})
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


def _overrides(folder: Path) -> list[str]:
    return (_read(folder / "env.json") or {}).get("overrides") or []


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _of(row: dict, *keys: str) -> Any:
    """row[a][b]..., None where the way ends early."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
