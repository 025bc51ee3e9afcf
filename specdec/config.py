"""From Hydra configs to objects, with errors that name the nearest key. Imports hydra only when called."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._paths import conf_dir
from .accept import Rule
from .baselines import check_baseline
from .data import Conversation
from .loading import Loaded
from .measure import Experiment, Settings
from .proposers.base import Proposer
from .sampling import Sampling
from .target import HFTarget
from .text import Bytes
from .trees import TreePolicy

if TYPE_CHECKING:
    from omegaconf import DictConfig

SETTINGS = ("max_new_tokens", "batch_size", "baseline", "repeats", "warmup", "seed")


def load_config(overrides: list[str] | None = None, name: str = "config") -> DictConfig:
    """The config of `python -m specdec.run` with these overrides. ValueError: an unknown key or choice, with the nearest."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_dir(conf_dir(), version_base="1.3"):
        check_overrides(overrides or [], name)
        try:
            return compose(name, overrides or [])
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(str(error)) from error


def check_overrides(overrides: list[str], name: str = "config") -> None:
    """ValueError for a key or a choice that does not exist; call it inside an initialised Hydra."""
    from hydra import compose
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException
    from omegaconf import OmegaConf

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ValueError(f"{error.override!r} is no override (KEY=VALUE): {error}") from error
    chosen = []
    for one in parsed:
        choices = _choices(one.key_or_group)
        if choices and not one.is_delete():
            values = [str(v) for v in (one.sweep_iterator() if one.is_sweep_override() else [one.value()])]
            for value in values:
                _expect_known(value, choices, f"{one.key_or_group}={value}")
            chosen.append(f"{one.key_or_group}={values[0]}")
    keys = set(_dotted(OmegaConf.to_container(compose(name, chosen), resolve=False)))
    for one in parsed:
        key = one.key_or_group
        if not one.is_add() and not one.is_force_add() and not _choices(key) and not key.startswith("hydra."):
            _expect_known(key, sorted(keys), f"override {key}")


def _choices(group: str) -> list[str]:
    folder = Path(conf_dir(), group)
    if "." in group or not folder.is_dir():
        return []
    return sorted(p.stem for p in folder.glob("*.yaml")) + (["null"] if group == "experiment" else [])


def _expect_known(value: str, known: list[str], what: str) -> None:
    if value in known or value == "None" and "null" in known:
        return
    tail = [k for k in known if k.rpartition(".")[2] == value.rpartition(".")[2]]
    near = tail or difflib.get_close_matches(value, known, n=1, cutoff=0.0)
    listed = f"; there is: {', '.join(known)}" if len(known) <= 12 else ""
    raise ValueError(f"{what} is unknown; the nearest is {near[0]!r}{listed}")


def _dotted(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def build(cfg: DictConfig) -> Experiment:
    """The objects of a run. What can be refused without a model is refused before one is loaded."""
    settings = Settings(**{k: _plain(cfg[k]) for k in SETTINGS}, chat=cfg.data.chat)
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.top_k)
    tree, accept, hardware = (make(cfg[name], cfg.allow) for name in ("tree", "accept", "hardware"))
    check_combination(tree, accept, sampling)
    for baseline in settings.baseline:
        if baseline != "none":
            check_baseline(baseline, settings.batch_size)
    conversations = load_conversations(cfg)
    proposer = make(cfg.proposer, cfg.allow, partial=True)
    loaded = load_target(cfg)
    target = as_target(loaded)
    return Experiment(
        target=target,
        proposer=_proposer(proposer, target, tree),
        accept=accept,
        sampling=sampling,
        conversations=conversations,
        settings=settings,
        stop_ids=loaded.stop_ids,
        hardware=hardware,
        names={**choices_of(cfg), "target": loaded.name},
    )


def as_target(loaded: Loaded) -> HFTarget:
    """A loaded model, ready to score trees."""
    tokenizer = loaded.tokenizer or Bytes()
    return HFTarget(loaded.model, tokenizer=tokenizer, name=loaded.name, fingerprint=loaded.fingerprint)


def _proposer(make_proposer: Any, target: HFTarget, tree: TreePolicy) -> Proposer:
    proposer = make_proposer(target, tree)
    if not isinstance(proposer, Proposer):
        raise ValueError(f"proposer._target_ made a {type(proposer).__name__}, expected a specdec.Proposer")
    return proposer


def check_combination(tree: TreePolicy, accept: Rule, sampling: Sampling) -> None:
    """ValueError for a rule that can't judge what the tree policy drafts."""
    name = f"accept={accept.name}"
    if accept.greedy_only and sampling.temperature != 0:
        raise ValueError(f"{name} is for temperature=0, got temperature={sampling.temperature}; use accept=match")
    if accept.needs_q and not tree.draws:
        raise ValueError(f"{name} needs drafted tokens that are drawn: tree=sampled_chain or tree=sampled; or accept=match")
    if accept.chain_only and not tree.chain:
        raise ValueError(f"{name} judges chains, this tree branches: tree=sampled_chain, or accept=recursive")
    if accept.deterministic_only and tree.draws:
        raise ValueError(f"{name} is for deterministic drafts, this tree draws: tree=static, or accept=recursive")


def make(node: DictConfig | dict, allow: list[str] = (), *, partial: bool = False) -> Any:
    """Instantiate a node, refusing a _target_ outside specdec and the packages in `allow`."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(node, resolve=True) if not isinstance(node, dict) else node
    for target in _targets(plain):
        if target.partition(".")[0] not in ("specdec", *allow):
            raise ValueError(
                f"_target_ {target} lies outside specdec and would run code of its own; "
                f"if you trust it: allow=[{target.partition('.')[0]}]"
            )
    try:
        return instantiate(plain, _convert_="all", _partial_=partial)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | ImportError | OSError):
            raise error.__cause__ from None
        raise


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def choices_of(cfg: DictConfig) -> dict[str, str]:
    """What the summary calls target, proposer, tree, accept and data: the last part of their _target_."""
    return {name: str(cfg[name]._target_).rpartition(".")[2] for name in ("target", "proposer", "tree", "accept", "data")}


def load_conversations(cfg: DictConfig) -> list[Conversation]:
    """The prompts of `data`."""
    return make(_without(cfg.data, "chat"), cfg.allow)


def load_target(cfg: DictConfig) -> Loaded:
    """The model of `target`, loaded once a process while its config stays the same."""
    from omegaconf import OmegaConf

    return _load_once(OmegaConf.to_yaml(cfg.target, resolve=True), tuple(cfg.allow))


@functools.lru_cache(maxsize=1)
def _load_once(yaml: str, allow: tuple[str, ...]) -> Loaded:
    from omegaconf import OmegaConf

    return make(OmegaConf.create(yaml), list(allow))


def _plain(value: Any) -> Any:
    from omegaconf import ListConfig

    return tuple(value) if isinstance(value, ListConfig) else value


def _without(node: DictConfig, key: str) -> dict:
    from omegaconf import OmegaConf

    return {k: v for k, v in OmegaConf.to_container(node, resolve=True).items() if k != key}
