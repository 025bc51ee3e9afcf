"""python -m specdec.run [overrides]: answers a set of prompts with a method and its baselines, and says how they did."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import hydra
import torch
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ._paths import conf_dir
from .config import build, check_overrides, make
from .hardware import environment
from .measure import METHOD, Experiment, measure
from .metrics import speedup, steps_of, tokens_per_step
from .records import RequestRecord
from .store import RunFolder
from .sweep import WRONG_INPUT
from .ui import Screen, screen

FILES = ("summary.json", "requests.parquet", "steps.parquet", "config.yaml", "env.json")


def run(cfg: DictConfig, out: str, overrides: list[str]) -> dict:
    """One run: its folder, its screen, its summary."""
    show = screen(cfg.ui)
    try:
        return _run(cfg, RunFolder(out), overrides, show)
    finally:
        show.close()


def _run(cfg: DictConfig, folder: RunFolder, overrides: list[str], show: Screen) -> dict:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    config = OmegaConf.to_container(cfg, resolve=True)
    folder.open(config, {**environment(sys.argv), "overrides": overrides})
    paths = [str(folder.path / name) for name in FILES]
    if (summary := folder.summary()) is not None:
        show.start([f"{folder.path} holds this run already, finished"])
        show.result(summary, paths)
        return summary
    logger = make(cfg.logger, cfg.allow)
    experiment = build(cfg)
    show.start(header(experiment))
    summary, records = measure(
        experiment, folder, lambda done, total, rows: show.progress(done, total, live(rows))
    )
    folder.finish(summary)
    logger.log(config, summary, records, str(folder.path))
    show.result(summary, paths)
    return summary


def header(e: Experiment) -> list[str]:
    """What is about to run, in words."""
    dtype = str(e.target.dtype).removeprefix("torch.")
    where = f"{e.target.device.type} x{torch.get_num_threads()}" if e.target.device.type == "cpu" else "cuda"
    requests = sum(len(c.turns) for c in e.conversations)
    return [
        f"target: {e.target.name} ({dtype}, {where})",
        f"prompts: {len(e.conversations)} conversations, {requests} requests; "
        f"baselines: {', '.join(e.settings.baseline) or 'no'}",
    ]


def live(records: list[RequestRecord]) -> dict:
    """What the progress line shows."""
    by_arm = {arm: [r for r in records if r.arm == arm] for arm in {r.arm for r in records}}
    method = by_arm.pop(METHOD, [])
    shown: dict = {"tokens_per_step": tokens_per_step(steps_of(method))}
    for name, rows in sorted(by_arm.items()):
        shown[f"speedup {name}"] = speedup(method, rows)["decode"]["mean"]
    return shown


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _main(cfg: DictConfig) -> float | None:
    job = HydraConfig.get()
    # In a sweep the callback reports a job's error and the others run on.
    with errors_in_one_line() if job.mode == RunMode.RUN else nullcontext():
        summary = run(cfg, job.runtime.output_dir, list(job.overrides.task))
    return summary["speedup"].get("none", {}).get("decode", {}).get("mean")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Wrong input ends in one line on stderr and a non-zero exit status."""
    try:
        yield
    except WRONG_INPUT as error:
        sys.exit(f"specdec: {error}")


def main() -> None:
    """The entry point; unknown keys and choices are refused before Hydra meets them."""
    overrides = [a for a in sys.argv[1:] if not a.startswith("-") and "=" in a]
    if not any(a.startswith(("-cd", "--config")) for a in sys.argv):
        with errors_in_one_line(), initialize_config_dir(conf_dir(), version_base="1.3"):
            check_overrides(overrides)
    _main()


if __name__ == "__main__":
    main()
