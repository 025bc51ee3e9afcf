"""What the suite writes down: a CSV row after every check and measurement, which a killed run keeps."""

import csv
import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from time import monotonic

import torch

from .timing import Timing

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("operation", "shape", "provider", "p20_ms", "p50_ms", "p80_ms", "gb_per_s", "tflop_per_s")
COLUMNS += ("gpu", "torch", "triton", "transformers", "commit", "kind", "note")
LONGEST_NOTE = 300
Row = dict[str, str]


class Skip(Exception):
    """Something is not to be had here, and that is no failure; the message says why."""


class Record:
    """The rows of one run, in memory and on disk.

    kind  of a row: passed, failed, skipped; of one with times: measured, or dry where they mean nothing
    """

    def __init__(self, path: Path, machine: Row, dry: bool) -> None:
        self.rows: list[Row] = []
        self.machine, self._dry, self._began = machine, dry, monotonic()
        self._file = path.open("w", newline="", encoding="utf-8", buffering=1)
        self._csv = csv.DictWriter(self._file, COLUMNS)
        self._csv.writeheader()

    def add(
        self, kind: str, operation: str, shape: str, provider: str, note: str = "", **figures: str
    ) -> None:
        """A row; `figures` are columns of numbers."""
        where = {"operation": operation, "shape": shape, "provider": provider, "kind": kind}
        row = dict.fromkeys(COLUMNS, "") | self.machine | where | figures
        row["note"] = " ".join(note.split())[:LONGEST_NOTE]
        self.rows.append(row)
        self._csv.writerow(row)
        self._file.flush()
        said = (operation, shape, provider, row["p50_ms"] and f"{row['p50_ms']} ms", row["note"])
        print(f"{monotonic() - self._began:5.0f} s {kind:8}", " | ".join(filter(None, said)), flush=True)

    def timed(
        self,
        operation: str,
        shape: str,
        provider: str,
        timing: Timing,
        moved: int = 0,
        flops: int = 0,
        note: str = "",
    ) -> None:
        """A measurement. moved: useful bytes of one call; flops: its operations; 0 leaves the rate out."""
        figures = {
            "p20_ms": timing.p20_ms,
            "p50_ms": timing.p50_ms,
            "p80_ms": timing.p80_ms,
            "gb_per_s": moved / timing.p50_ms / 1e6,
            "tflop_per_s": flops / timing.p50_ms / 1e9,
        }
        known = {name: f"{value:.5g}" for name, value in figures.items() if value}
        self.add("dry" if self._dry else "measured", operation, shape, provider, note, **known)

    @contextmanager
    def attempt(self, operation: str, shape: str, provider: str) -> Iterator[None]:
        """Turn what goes wrong inside into a row that says why: the others still get their turn."""
        try:
            yield
        except Skip as reason:
            self.add("skipped", operation, shape, provider, str(reason))
        except Exception as error:
            self.add("failed", operation, shape, provider, f"{type(error).__name__}: {error}")
            release()

    def close(self) -> None:
        self._file.close()


def release() -> None:
    """Give back what is no longer used, before the next one needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(commit: str | None) -> Row:
    """The columns that say where and with what. commit: where the checkout is without its git history."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {name: _version(name) for name in ("torch", "triton", "transformers")}
    return {"gpu": gpu, **versions, "commit": commit or _commit()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit of the checkout, marked where files differ from it; "unknown" without git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
