"""python -m specdec.train head=eagle3 [overrides]: trains a head on the target's own answers.

Stop it whenever you like: the same command with the same out= goes on where it was. In several processes:
torchrun --nproc_per_node 2 -m specdec.train head=eagle3 out=heads
"""

import ctypes
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from ._paths import conf_dir
from .config import as_target, load_conversations, load_target, make
from .data import Conversation
from .files import write_text
from .hardware import PeakMemory, environment
from .loading import Loaded
from .logger import flat
from .proposers.headfile import read_head
from .run import check_command, errors_in_one_line, target_line, use_threads
from .shards import read_shard, settings_of, shard_files
from .store import json_text
from .target import HFTarget
from .training.collect import PromptRecipe, collect
from .training.loop import best_row, differences, train
from .training.processes import lead, place, together
from .training.recipe import Recipe
from .training.screen import Screen, result_table

NOT_THE_HEADS = ("out", "logger", "threads")  # settings that change nothing about a head
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h
GIB = 2**30


def run(cfg: DictConfig, out: str | None = None, overrides: list[str] | None = None) -> Path:
    """Collect answers, train, report; returns the file of the head, in `out`, else the config's folder.

    overrides  what was asked for: for the record, and to tell a setting from a default
    """
    keep_freed_memory()
    keep_compiled_products()
    with together():
        return _run(cfg, Path(lead(lambda: out or cfg.out)), overrides or [])


def _run(cfg: DictConfig, out: Path, overrides: list[str]) -> Path:
    use_threads(cfg.threads)
    recipe, prompts, logger = (make(cfg[name], cfg.allow) for name in ("head", "prompts", "logger"))
    file, config = out / "heads.safetensors", OmegaConf.to_container(cfg, resolve=True)
    console = Console(quiet=place()[0] > 0)
    if trained_already(out, config):
        console.print(Text(f"{file} is trained already: choose another out= to train again"), soft_wrap=True)
        return file
    ready, conversations = asked_for(cfg, overrides)
    loaded = load_target(cfg)
    target = as_target(loaded)
    console.print(Text(f"target: {target_line(target, cfg)}"), soft_wrap=True)
    chat = cfg.data.chat if cfg.get("data") else None
    shards = ready or lead(lambda: answers(loaded, target, conversations, prompts, out, recipe, chat))

    def keep(record: dict[str, Any]) -> None:
        """The record comes last: the folder that has one is done with."""
        about = {"config": config, "environment": {**environment(sys.argv), "overrides": overrides}}
        logger.log_training(config, record["curve"], str(out))
        write_text(json_text(record | about, indent=1), out / "train.json")

    curve = trained(cfg, target, shards, recipe, prompts, file, console, keep)
    table = result_table(best_row(curve), read_head(file, recipe.kind)[0]["accuracy_KR"])
    console.print(table)
    console.print(Text(f"use it: {command(recipe, file, overrides)}"), soft_wrap=True)
    return file


def trained_already(out: Path, config: dict[str, Any]) -> bool:
    """ValueError: the folder holds a head that was trained with other settings."""
    if not (out / "train.json").exists():
        return False
    there, here = (
        {key: value for key, value in flat(each).items() if key.partition(".")[0] not in NOT_THE_HEADS}
        for each in (json.loads((out / "train.json").read_text("utf-8"))["config"], config)
    )
    if differing := differences(there, here):
        raise ValueError(
            f"out={out} holds a head trained with other settings: {differing}: choose another out=DIR"
        )
    return True


def asked_for(cfg: DictConfig, overrides: list[str]) -> tuple[list[Path], list[Conversation]]:
    """Shards that are there, or the prompts of data= to have answered.

    ValueError: no shards, or both; shards with overrides of prompts.* that they do not follow.
    """
    data = cfg.get("data")
    if cfg.shards is None:
        return [], load_conversations(cfg) if data else []
    if data:
        raise ValueError(f"shards={cfg.shards} holds answers, data= asks for others: leave one of them out")
    if not (files := shard_files(Path(cfg.shards))):
        raise ValueError(
            f"shards={cfg.shards} holds no answers-*.safetensors, expected the out=FOLDER of another training"
        )
    keys = [word.lstrip("+").partition("=")[0] for word in overrides]
    for key in (key for key in keys if key.startswith("prompts.") and key != "prompts.store_features"):
        expect_followed(key, OmegaConf.select(cfg, key), files)
    return files, []


def expect_followed(key: str, value: Any, files: list[Path]) -> None:
    """ValueError: the answers of some shard were not made with this setting, or know no such one."""
    for file in files:
        origin = read_shard(file).origin
        known = settings_of(origin) if origin.fingerprint else {}
        if known.get(key) != value:
            made = f"was made with {key}={known[key]}" if key in known else f"does not say its {key}"
            raise ValueError(
                f"{key}={value} is for answers that are still to be made, {file} {made}: leave it out, or "
                "leave shards= out"
            )


def answers(
    loaded: Loaded,
    target: HFTarget,
    conversations: list[Conversation],
    prompts: PromptRecipe,
    out: Path,
    recipe: Recipe,
    chat: bool | None,
) -> list[Path]:
    """The shards in `out`, with what is still to be answered."""
    return collect(
        target, target.tokenizer, conversations, prompts, out, loaded.stop_ids, recipe.taps(target), chat
    )


def trained(
    cfg: DictConfig,
    target: HFTarget,
    shards: list[Path],
    recipe: Recipe,
    prompts: PromptRecipe,
    file: Path,
    console: Console,
    keep: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Train; returns the curve. Before the training's state is given up, `keep` gets it, and what it took."""
    file.parent.mkdir(parents=True, exist_ok=True)
    memory, began = PeakMemory(target.device), time.monotonic()
    memory.reset()

    def end(curve: list[dict[str, Any]]) -> None:
        took = {"seconds": time.monotonic() - began, "resumed_at_step": show.done, "processes": place()[1]}
        keep({"curve": curve, **took, "peak_memory_mb": memory.peak_mb()})

    with Screen(console, recipe.kind) as show:
        return train(
            target,
            shards,
            recipe,
            file,
            seed=cfg.seed,
            stored=prompts.store_features,
            begin=show.begin,
            report=show.report,
            end=end,
        )


def command(recipe: Recipe, file: Path, overrides: list[str]) -> str:
    """How to decode with the head, for the same target."""
    same = [each for each in overrides if each.lstrip("+").startswith(("target", "allow"))]
    words = [*same, f"proposer={recipe.kind}", f"proposer.heads={file}"]
    return f"python -m specdec.run {shlex.join(words)}"


def keep_freed_memory() -> None:
    """Have glibc keep big blocks that were freed; otherwise each is mapped and zeroed anew by the system.

    That takes as long as the elementwise operation that writes the block. Other systems are left as they are.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, GIB)
        mallopt(TRIM_THRESHOLD, GIB)


def keep_compiled_products() -> None:
    """Have oneDNN keep what it compiled for the shapes of all batches; its 1,024 do not last an epoch."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="train")
def _main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    out = job.runtime.output_dir
    with errors_in_one_line() if job.mode == RunMode.RUN else nullcontext():
        try:
            run(cfg, out, list(job.overrides.task))
        except KeyboardInterrupt:
            sys.exit(f"specdec: interrupted; the same command with out={out} goes on where it was")


def main() -> None:
    """The entry point; unknown keys and choices are refused before Hydra meets them."""
    with errors_in_one_line():
        check_command(sys.argv[1:], "train")
    _main()


if __name__ == "__main__":
    main()
