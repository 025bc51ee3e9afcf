"""python -m specdec.tune data=... proposer=... [overrides]: the fastest tree on this machine.

It measures how often the draft is right and what a step costs, says which tree of which size should be
fastest, and checks that on prompts it has not looked at. Take prompts that no run will report.
"""

import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ._paths import conf_dir
from .accept import Greedy, Match
from .arms import Experiment
from .calibrate import Size, growing
from .config import Plan, make, prepare
from .data import Conversation
from .files import write_text
from .measure import check_prompts, measure
from .proposers.base import Grown
from .run import check_command, errors_in_one_line, use_threads
from .store import json_text
from .text import turn_of
from .trees import BestFirst, Sequoia, TreePolicy
from .tuning import Tuning, tune
from .ui import screen

OURS = ("data", "tree", "tree@beside", "beside", "skip", "prompts", "search", "out", "ui")


def run(cfg: DictConfig, overrides: list[str]) -> Path:
    """Tune, check, report; returns the file of the tree. `overrides`: what was asked for."""
    use_threads(cfg.threads)
    screen(cfg.ui)  # ValueError: there is no such one
    console = Console(quiet=cfg.ui == "none")
    search, plan = make(cfg.search, cfg.allow), prepare(cfg)
    check_tunable(plan)
    trees = [plan.tree, *beside(cfg, plan.tree)]
    calibration, held_back = halves(plan.conversations, cfg.skip, cfg.prompts)
    e = replace(plan.load(), conversations=calibration + held_back)
    check_prompts(e)
    requests = [turn_of(e.target.tokenizer, c, 0, {}, e.settings.chat) for c in calibration]
    tunings = tune(e, requests, trees, search, lambda line: console.print(f"{line} ...", highlight=False))
    tuning = tunings[0]
    for each in tunings:
        console.print(table(each, each is tuning))
    console.print(f"checking it on {len(held_back)} other prompts ...", highlight=False)
    summary = check(e, held_back, tuning.tree)
    console.print("\n".join(verdict(tuning, summary)), highlight=False)
    node = dict(cfg.tree if tuning.asked is plan.tree else cfg.beside)
    node |= {key: getattr(tuning.tree, key) for key in node if hasattr(tuning.tree, key)}
    file = write(Path(cfg.out), node, tunings, summary)
    command = shlex.join(["python", "-m", "specdec.run", *words(cfg.out, overrides, node)])
    console.print(f"tree: {file}\nuse it: {command}", highlight=False, soft_wrap=True)
    return file


def words(out: str, overrides: list[str], node: dict[str, Any]) -> list[str]:
    """What a run is told to take the tuned tree, of these keys, and all else that was asked for."""
    kept = [word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in OURS]
    told = ["--config-dir", str(out), *kept, "tree=tuned"]
    if any(word.startswith("experiment=") for word in kept):  # it may set keys of whatever tree there is
        told += [f"tree.{key}={value}" for key, value in node.items() if _is_plain(key, value)]
    return told


def _is_plain(key: str, value: Any) -> bool:
    return not key.startswith("_") and isinstance(value, int | float | str)


def beside(cfg: DictConfig, asked: TreePolicy) -> list[TreePolicy]:
    """The tree that is tried beside tree=, unless beside=null, or both are the same but for their size.

    ValueError: it can't be tuned.
    """
    if not cfg.beside:
        return []
    try:
        tree = make(cfg.beside, cfg.allow)
    except ValueError as error:  # a tree knows its options as those of the run's tree
        raise ValueError(str(error).replace("tree.", "beside.")) from error
    check_tree(tree, type(tree).__name__, "tree@beside")
    return [] if replace(tree, nodes=asked.nodes, depth=asked.depth) == asked else [tree]


def check_tunable(plan: Plan) -> None:
    """ValueError for what has no size to tune, or what the prediction does not hold for."""
    names = plan.names
    check_tree(plan.tree, names["tree"], "tree")
    if not issubclass(plan.make_proposer.func, Grown):
        raise ValueError(
            f"proposer={names['proposer']} leaves no tree to a policy: proposer=medusa, or ngram, draft_lm"
        )
    if not isinstance(plan.accept, Match | Greedy):
        raise ValueError(f"accept={names['accept']} is not predicted: accept=match, coupled or greedy")
    if plan.settings.batch_size != 1:
        raise ValueError(f"batch_size is {plan.settings.batch_size}, tuning takes one sequence: batch_size=1")


def check_tree(tree: TreePolicy, name: str, group: str) -> None:
    """ValueError for a tree without a size to tune, or whose tokens can't be predicted."""
    if not isinstance(tree, Sequoia | BestFirst) or tree.draws:
        drawn = " that draws" if tree.draws else ""
        raise ValueError(
            f"{group}={name}{drawn} is not tuned: {group}=sequoia, {group}=eagle2 or {group}=best_first"
        )
    if isinstance(tree, Sequoia) and tree.length != "fixed":
        raise ValueError(
            f"{group}={name} with length={tree.length} is not predicted, a static tree has one length: "
            f"{group.rpartition('@')[2]}.length=fixed, or {group}=best_first"
        )


def halves(
    conversations: list[Conversation], skip: int, prompts: int
) -> tuple[list[Conversation], list[Conversation]]:
    """First turns to measure with, and as many to check with, of all kinds alike."""
    chosen = [replace(c, turns=c.turns[:1]) for c in conversations[skip : skip + prompts]]
    if skip < 0 or len(chosen) < 2:
        raise ValueError(
            f"skip={skip} and prompts={prompts} leave {len(chosen)} of {len(conversations)} conversations, "
            "expected 2 or more: skip=0 prompts=16"
        )
    return chosen[::2], chosen[1::2]


def check(e: Experiment, conversations: list[Conversation], tree: TreePolicy) -> dict:
    """The summary of a short run with this tree, against plain decoding."""
    settings = replace(e.settings, baseline=("none",))
    with growing(e.proposer, tree):
        return measure(replace(e, conversations=conversations, settings=settings))[0]


def table(tuning: Tuning, best_of_all: bool) -> Table:
    """The best depth for every number of nodes; the fastest size is marked where the tree is the fastest."""
    title = f"{type(tuning.asked).__name__}, length={tuning.asked.length}: predicted"
    shown = Table("nodes", "depth", "tokens\n/step", "ms\n/step", "speedup", "", title=title)
    best: dict[int, Size] = {}
    for size in tuning.sizes:
        best.setdefault(size.nodes, size)
    for size in sorted(best.values(), key=lambda size: size.nodes):
        numbers = f"{size.tokens:.2f}", f"{1e3 * size.seconds:.1f}", f"{tuning.speedup(size):.2f}x"
        mark = "fastest" if best_of_all and size is tuning.sizes[0] else ""
        shown.add_row(str(size.nodes), str(size.depth), *numbers, mark)
    return shown


def verdict(tuning: Tuning, summary: dict) -> list[str]:
    """What was predicted of the fastest tree, and what came out on other prompts."""
    measured, fastest = summary["tokens_per_step"], tuning.sizes[0]
    lines = [f"tokens per step: measured {measured:.2f}"]
    for model, tokens in tuning.tokens.items():
        lines.append(f"  predicted, {model}: {tokens:.2f} ({tokens / measured - 1:+.0%})")
    ratio, predicted = summary["speedup"]["none"]["decode"]["mean"], tuning.speedup(fastest)
    lines.append(f"decode speedup: predicted {predicted:.2f}x, measured {_times(ratio)}")
    if predicted <= 1:
        lines.append("plain decoding is faster here than any tree that was tried: proposer=none")
    return lines


def _times(ratio: float | None) -> str:
    return "n/a" if ratio is None else f"{ratio:.2f}x"


def write(out: Path, node: dict[str, Any], tunings: list[Tuning], summary: dict) -> Path:
    """OUT/tree/tuned.yaml, a choice of the group `tree`, and OUT/tuning.json with everything measured."""
    file = out / "tree" / "tuned.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(yaml.safe_dump(node, sort_keys=False, default_flow_style=None), file)
    measured = {
        "plain_seconds": tunings[0].plain,
        "verify_seconds": tunings[0].verify,
        "trees": [_measured(tuning) for tuning in tunings],
        "check": summary,
    }
    write_text(json_text(measured, indent=1) + "\n", out / "tuning.json")
    return file


def _measured(tuning: Tuning) -> dict[str, Any]:
    return {
        "tree": type(tuning.asked).__name__,
        "length": tuning.asked.length,
        "acceptance": tuning.acceptance and asdict(tuning.acceptance),
        "sizes": [asdict(size) for size in tuning.sizes],
        "tokens_per_step": tuning.tokens,
    }


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="tune")
def _main(cfg: DictConfig) -> None:
    with errors_in_one_line():
        run(cfg, list(HydraConfig.get().overrides.task))


def main() -> None:
    """The entry point."""
    with errors_in_one_line():
        check_command(sys.argv[1:], "tune")
    _main()


if __name__ == "__main__":
    main()
