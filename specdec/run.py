"""python -m specdec.run [overrides]: answers prompts with a method and its baselines, says how they did."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hydra
import torch
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ._paths import conf_dir
from .arms import METHOD
from .config import Plan, load_config, make, prepare, with_names
from .data import most_turns
from .hardware import environment
from .measure import measure
from .metrics import speedup, steps_of, tokens_per_step
from .overrides import check_overrides
from .records import RequestRecord
from .store import RunFolder
from .sweep import WRONG_INPUT
from .target import HFTarget
from .ui import Screen, screen

FILES = ("summary.json", "requests.parquet", "steps.parquet", "config.yaml", "env.json")


def run(cfg: DictConfig, out: str | None = None, overrides: list[str] | None = None) -> dict:
    """One run: its folder (`out`, else that of the config), its screen, its summary.

    overrides  what was asked for, for the record
    """
    show = screen(cfg.ui)
    try:
        return _run(cfg, RunFolder(out or cfg.out), overrides or [], show)
    finally:
        show.close()


def _run(cfg: DictConfig, folder: RunFolder, overrides: list[str], show: Screen) -> dict:
    use_threads(cfg.threads)
    config = OmegaConf.to_container(cfg, resolve=True)
    plan = prepare(cfg) if folder.summary() is None else None
    logger = make(cfg.logger, cfg.allow)
    folder.open(config, {**environment(sys.argv), "overrides": overrides})
    paths = [str(folder.path / name) for name in FILES]
    if plan is None:
        show.start([f"{folder.path} holds this run already, finished: choose another out= to run it again"])
        summary = folder.summary()
    else:
        summary = _answered(plan, cfg, folder, show)
    show.result(summary, paths)
    logger.log(config, summary, folder.load, str(folder.path))
    return summary


def _answered(plan: Plan, cfg: DictConfig, folder: RunFolder, show: Screen) -> dict:
    with forgotten_if_nothing_was_answered(folder):
        show.start(header(plan, folder))
        experiment = plan.load()
        show.start([f"target: {target_line(experiment.target, cfg)}"])
        if reading := experiment.proposer.reading:
            show.start([f"heads of another project, read as: {reading}"])
        summary, _ = measure(experiment, folder, Progress(show))
    folder.finish(summary)
    return summary


def use_threads(threads: int | None) -> None:
    """Set torch's threads; null leaves its choice. ValueError: no such number."""
    if threads is None:
        return
    if type(threads) is not int or threads < 1:
        raise ValueError(f"threads is {threads!r}, expected 1 or more, or null for torch's choice: threads=2")
    torch.set_num_threads(threads)


@contextmanager
def forgotten_if_nothing_was_answered(folder: RunFolder) -> Iterator[None]:
    """Settings that never worked must not bind the folder: the corrected command may have the same out=."""
    try:
        yield
    finally:
        if not folder.finished():
            (folder.path / "config.yaml").unlink(missing_ok=True)


def header(plan: Plan, folder: RunFolder) -> list[str]:
    """What is about to run, in words."""
    s, names = plan.settings, plan.names
    requests = sum(len(c.turns) for c in plan.conversations)
    extra = most_turns(plan.conversations) > 1 and "none" not in s.baseline
    there = len({r.request for r in folder.load()})
    return [
        f"method: proposer={names['proposer']} tree={names['tree']} accept={names['accept']} "
        f"temperature={plan.sampling.temperature:g} batch_size={s.batch_size}",
        f"prompts: data={names['data']}, {len(plan.conversations)} conversations, {requests} requests, "
        f"up to {s.max_new_tokens} tokens each",
        f"baselines: {', '.join(s.baseline) or 'no'}"
        + ("; plain decoding runs too, later turns continue from its answers" if extra else ""),
        f"out: {folder.path}" + (f", {there} of {requests} requests are there already" if there else ""),
    ]


def target_line(target: HFTarget, cfg: DictConfig) -> str:
    """The model, its dtype and device, and why those where they were left to specdec."""
    dtype, device = target.dtype_name, target.device.type
    threads = torch.get_num_threads()
    where = f"cpu, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else device
    if cfg.target.get("dtype") == "auto":
        native = "multiplied" if dtype == "bfloat16" else "bfloat16 is not multiplied"
        dtype += f" (target.dtype=auto: {native} natively here)"
    if cfg.target.get("device") == "auto":
        where += f" (target.device=auto: {'a' if device == 'cuda' else 'no'} CUDA device)"
    return f"{target.name}, {dtype}, {where}"


class Progress:
    """Tells the screen how far a run is, and when it will be over."""

    def __init__(self, show: Screen) -> None:
        self.show, self.first = show, None

    def __call__(self, done: int, total: int, records: list[RequestRecord]) -> None:
        self.first = self.first or (time.monotonic(), done)
        start, before = self.first
        seconds = (time.monotonic() - start) / (done - before) * (total - done) if done > before else None
        if records:
            self.show.progress(done, total, live(records) | ({"eta_s": seconds} if done < total else {}))


def live(records: list[RequestRecord]) -> dict:
    """What the progress line shows."""
    by_arm: dict[str, list[RequestRecord]] = {METHOD: []}
    for r in records:
        by_arm.setdefault(r.arm, []).append(r)
    method = by_arm.pop(METHOD)
    speedups = {f"speedup {name}": speedup(method, rows)["decode"]["mean"] for name, rows in by_arm.items()}
    return {"tokens_per_step": tokens_per_step(steps_of(method)), **speedups}


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _main(cfg: DictConfig) -> float | None:
    job = HydraConfig.get()
    # In a sweep the callback reports a job's error and the others run on.
    with errors_in_one_line() if job.mode == RunMode.RUN else nullcontext():
        out = job.runtime.output_dir
        try:
            summary = run(with_names(cfg, job.runtime.choices), out, list(job.overrides.task))
        except KeyboardInterrupt:
            sys.exit(f"specdec: interrupted; the same command with out={out} goes on where it was")
    return summary["speedup"].get("none", {}).get("decode", {}).get("mean")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Wrong input ends in one line on stderr and a non-zero exit status."""
    try:
        yield
    except WRONG_INPUT as error:
        sys.exit(f"specdec: {error}")


def check_command(words: list[str], name: str = "config") -> None:
    """ValueError for what Hydra would refuse at length; commands with options of Hydra's are left to it."""
    overrides = [word for word in words if word not in ("-m", "--multirun")]
    if any(word.startswith("-") for word in overrides):
        return
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        check_overrides(overrides, name)
    if not {"-m", "--multirun"} & set(words):
        check_out(Path(load_config(overrides, name).out))


def check_out(folder: Path) -> None:
    """ValueError unless a folder can be made there. Hydra makes it, and would say so with a traceback."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "can't be written" if there.is_dir() else f"a file is in the way ({there})"
        raise ValueError(f"out={folder}: {reason}, expected a folder to write in: choose another out=DIR")


def main() -> None:
    """The entry point; unknown keys and choices are refused before Hydra meets them."""
    with errors_in_one_line():
        check_command(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
