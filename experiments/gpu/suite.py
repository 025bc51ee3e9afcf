"""python experiments/gpu/suite.py --out DIR: checks the kernels on this GPU, then measures them.

Takes 8 minutes and needs torch, triton, transformers and einops only. Writes DIR/suite.csv row by row, and
DIR/suite.md at the end. With --dry everything runs once at toy sizes, without a GPU in Triton's interpreter:
a test of the suite itself.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.gpu.plan import Task
    from experiments.gpu.record import Record

ROOT = Path(__file__).resolve().parents[2]
CHECKS = 0.4  # the part of the time that checks may take
LAST = 20  # seconds that a task may take: none begins with less left


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for suite.csv and suite.md")
    parser.add_argument("--dry", action="store_true", help="toy sizes, on any machine; nothing is measured")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--layers", type=int, default=32, help="depth of the 8B whose steps are measured")
    parser.add_argument("--commit", help="what is measured, where the checkout has no git history")
    return parser.parse_args(given)


def set_up(dry: bool) -> None:
    """Import paths, and the interpreter where it is needed: Triton asks for it once, when it is imported."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import torch

    if not torch.cuda.is_available():
        if not dry:
            sys.exit("suite: torch sees no CUDA GPU; to try the suite without one, add --dry")
        os.environ["TRITON_INTERPRET"] = "1"
    # Without what specdec/__init__ imports: statistics and configuration need packages that no kernel needs.
    package = ModuleType("specdec")
    package.__path__ = [str(ROOT / "specdec")]
    sys.modules.setdefault("specdec", package)


def perform(record: "Record", tasks: Iterable["Task"], until: float) -> None:
    """Do one task after the other; those that would begin too late are rows that say so."""
    for task in tasks:
        if monotonic() > until:
            record.add("skipped", task.operation, task.shape, "", "no time was left")
        else:
            task.run()


def main() -> None:
    """Check, measure, and write the table, whatever ends the run; status 1 where anything failed."""
    asked, began = arguments(), monotonic()
    set_up(asked.dry)
    import torch

    from experiments.gpu.bars import report, summary
    from experiments.gpu.plan import Plan
    from experiments.gpu.record import Record, machine

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("suite: told to stop"))
    asked.out.mkdir(parents=True, exist_ok=True)
    record = Record(asked.out / "suite.csv", machine(asked.commit), asked.dry)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, seconds = Plan(record, device, asked.layers, asked.dry), 60 * asked.minutes
    try:
        perform(record, plan.checks(), began + CHECKS * seconds)
        perform(record, chain(plan.measurements(), plan.late_checks()), began + max(0.0, seconds - LAST))
    finally:
        text = report(record.rows, record.machine, asked.dry)
        (asked.out / "suite.md").write_text(text, encoding="utf-8")
        record.close()
        print(summary(record.rows))
    sys.exit(any(row["kind"] == "failed" for row in record.rows))


if __name__ == "__main__":
    main()
