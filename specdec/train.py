"""python -m specdec.train head=medusa [overrides]: trains heads on the target's own answers.

Stop it whenever you like: the same command with the same out= goes on where it was.
"""

import sys
from pathlib import Path

import hydra
import torch
from hydra import initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ._paths import conf_dir
from .config import as_target, check_overrides, load_conversations, load_target, make
from .proposers.medusa import MedusaInfo
from .run import errors_in_one_line
from .training import collect, train


def run(cfg: DictConfig) -> Path:
    """Collect answers, train, report; returns the file of heads."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    console = Console()
    out = Path(cfg.out)
    recipe, prompts = make(cfg.head, cfg.allow), make(cfg.prompts, cfg.allow)
    conversations = load_conversations(cfg) if cfg.get("data") else []
    loaded = load_target(cfg)
    target = as_target(loaded)
    shards = collect(target, target.tokenizer, conversations, prompts, out, loaded.stop_ids)
    file = out / "heads.safetensors"
    columns = (TextColumn("training heads, loss {task.fields[loss]:.3f}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None, loss=0.0)
        info = train(
            target,
            shards,
            recipe,
            file,
            seed=cfg.seed,
            report=lambda step, total, loss: bar.update(task, completed=step, total=total, loss=loss),
        )
    console.print(accuracy_table(info))
    console.print(f"heads: {file}\nuse them: python -m specdec.run proposer=medusa proposer.heads={file}")
    return file


def accuracy_table(info: MedusaInfo) -> Table:
    """Held-out accuracy of every head."""
    table = Table("head", "top-1", "top-5", title="held-out accuracy")
    for k, accuracy_R in enumerate(info.accuracy_KR, start=1):
        table.add_row(str(k), f"{accuracy_R[0]:.3f}", f"{sum(accuracy_R[:5]):.3f}")
    return table


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="train")
def _main(cfg: DictConfig) -> None:
    with errors_in_one_line():
        run(cfg)


def main() -> None:
    """The entry point."""
    overrides = [a for a in sys.argv[1:] if not a.startswith("-") and "=" in a]
    with errors_in_one_line(), initialize_config_dir(conf_dir(), version_base="1.3"):
        check_overrides(overrides, "train")
    _main()


if __name__ == "__main__":
    main()
