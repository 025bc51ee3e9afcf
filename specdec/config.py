"""From Hydra configs to objects, with errors that name the nearest key. Imports hydra only when called."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._paths import conf_dir
from .accept import Rule
from .arguments import check_arguments
from .arms import Experiment, Settings
from .baselines import NAMES, PLAIN_DTYPES, check_baseline
from .data import Conversation
from .engine import Engine
from .hardware import Hardware
from .loading import Loaded, choose_device
from .overrides import check_overrides, compose, expect_known
from .proposers.base import Proposer
from .sampling import Sampling
from .target import HFTarget
from .text import Bytes
from .trees import TreePolicy

if TYPE_CHECKING:
    from omegaconf import DictConfig

NAMED = ("proposer", "tree", "accept", "data")


def load_config(overrides: list[str] | None = None, name: str = "config") -> DictConfig:
    """The config of `python -m specdec.run` with these overrides. ValueError: an unknown key or choice."""
    from hydra import initialize_config_dir
    from omegaconf import open_dict

    with initialize_config_dir(conf_dir(), version_base="1.3"):
        check_overrides(overrides or [], name)
        cfg = compose(name, overrides or [])
    with open_dict(cfg):
        return with_names(cfg, cfg.pop("hydra").runtime.choices)


def with_names(cfg: DictConfig, choices: dict[str, str]) -> DictConfig:
    """The config, with what was chosen in each group as `names`."""
    from omegaconf import open_dict

    with open_dict(cfg):
        cfg.names = {group: choices[group] for group in NAMED if choices.get(group)}
    return cfg


@dataclass(frozen=True)
class Plan:
    """A run that waits for its model: all that can be refused without one has been checked."""

    settings: Settings
    sampling: Sampling
    tree: TreePolicy
    accept: Rule
    hardware: Hardware
    conversations: list[Conversation]
    names: dict[str, str]
    make_proposer: Callable[[HFTarget, TreePolicy], Proposer]
    load_target: Callable[[], Loaded]
    engine: Engine

    def load(self) -> Experiment:
        """With the model, and the proposer that needs it."""
        loaded = self.load_target()
        target = as_target(loaded, self.engine)
        proposer = self.make_proposer(target, self.tree)
        if not isinstance(proposer, Proposer):
            raise ValueError(
                f"proposer._target_ made a {type(proposer).__name__}, expected a specdec.Proposer"
            )
        return Experiment(
            target=target,
            proposer=proposer,
            accept=self.accept,
            sampling=self.sampling,
            conversations=self.conversations,
            settings=self.settings,
            stop_ids=loaded.stop_ids,
            hardware=self.hardware,
            names={**self.names, "target": loaded.name},
        )


def prepare(cfg: DictConfig) -> Plan:
    """Everything of a run but its model. ValueError for what can be refused without one."""
    settings = Settings(**_checked(Settings, cfg), chat=cfg.data.chat)
    sampling = Sampling(**_checked(Sampling, cfg))
    tree, accept, hardware = (make(cfg[name], cfg.allow) for name in ("tree", "accept", "hardware"))
    check_combination(tree, accept, sampling)
    if hardware.device and (device := cfg.target.get("device")):
        hardware.check_prices(choose_device(device))
    make_proposer = make(cfg.proposer, cfg.allow, partial=True)
    check_baselines(settings, make_proposer.func)
    conversations = load_conversations(cfg)
    check_batch(settings.batch_size, len(conversations))
    rest = conversations, names_of(cfg), make_proposer, functools.partial(load_target, cfg)
    return Plan(settings, sampling, tree, accept, hardware, *rest, Engine(**cfg.engine))


def build(cfg: DictConfig) -> Experiment:
    """The objects of a run. What can be refused without a model is refused before one is loaded."""
    return prepare(cfg).load()


def as_target(loaded: Loaded, engine: Engine | None = None) -> HFTarget:
    """A loaded model, ready to score trees."""
    known = {"tokenizer": loaded.tokenizer or Bytes(), "name": loaded.name, "fingerprint": loaded.fingerprint}
    return HFTarget(loaded.model, engine=engine or Engine(), **known)


def check_combination(tree: TreePolicy, accept: Rule, sampling: Sampling) -> None:
    """ValueError for a rule that can't judge what the tree policy drafts."""
    name = f"accept={accept.name}"
    if accept.greedy_only and sampling.temperature != 0:
        raise ValueError(
            f"{name} is for temperature=0, got temperature={sampling.temperature}; use accept=match"
        )
    if accept.needs_q and not tree.draws:
        raise ValueError(
            f"{name} needs drafted tokens that are drawn: tree=sampled_chain or tree=sampled; or accept=match"
        )
    if accept.chain_only and not tree.chain:
        raise ValueError(f"{name} judges chains, this tree branches: tree=sampled_chain, or accept=recursive")
    if accept.deterministic_only and tree.draws:
        raise ValueError(
            f"{name} is for deterministic drafts, this tree draws: tree=static, or accept=recursive"
        )


def check_baselines(settings: Settings, proposer: type) -> None:
    """ValueError for a baseline that does not exist, or can't run with these settings or this proposer."""
    for name in settings.baseline:
        expect_known(str(name), ["none", *PLAIN_DTYPES, *NAMES], f"baseline=[{name}]")
        if name in NAMES:
            check_baseline(name, settings.batch_size)
    if "hf_assisted" in settings.baseline and not hasattr(proposer, "assistant"):
        raise ValueError(
            f"baseline=[hf_assisted] needs a draft model, {proposer.__name__} has none: "
            "proposer=draft_lm, or baseline=[none,hf]"
        )


def check_batch(size: int, conversations: int) -> None:
    """ValueError for a batch that no group would fill: its speed would be a smaller batch's."""
    if size > conversations:
        raise ValueError(
            f"batch_size is {size}, expected at most the {conversations} conversations that there are: "
            f"batch_size={conversations}, or choose more prompts (data.limit=, data.categories=)"
        )


def make(node: DictConfig | dict, allow: Sequence[str] = (), *, partial: bool = False) -> Any:
    """Instantiate a node of a config, with `partial` all but call it.

    ValueError: a _target_ outside specdec and the packages in `allow`, or one that does not take these keys.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import get_object, instantiate
    from omegaconf import OmegaConf

    at = "" if isinstance(node, dict) else f"{node._get_full_key(None)}."
    plain = node if isinstance(node, dict) else OmegaConf.to_container(node, resolve=True)
    nodes = list(_nodes(plain, at))
    for place, one in nodes:
        package = str(one["_target_"]).partition(".")[0]
        if package not in ("specdec", *allow):
            raise ValueError(
                f"{place}_target_ {one['_target_']} lies outside specdec and would run code of its own; "
                f"if you trust it: allow=[{package}]"
            )
    try:
        for place, one in nodes:
            given = {k: v for k, v in one.items() if k[0] != "_"}
            check_arguments(get_object(one["_target_"]), given, place)
        return instantiate(plain, _convert_="all", _partial_=partial)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{at}_target_={plain['_target_']} can't be imported: {reason}") from error
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | ImportError | OSError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError):
            others = " ".join(f"{at}{key}=VALUE" for key in plain if key[0] != "_")
            reason = f"{at}_target_={plain['_target_']} can't be made of its values ({error.__cause__})"
            raise ValueError(f"{reason}, expected others: {others}") from error
        raise


def _checked(function: Callable, cfg: DictConfig) -> dict[str, Any]:
    """What the config's top level has for the parameters of `function`."""
    from omegaconf import OmegaConf

    keys = [key for key in inspect.signature(function).parameters if key in cfg]
    given = OmegaConf.to_container(OmegaConf.masked_copy(cfg, keys), resolve=True)
    check_arguments(function, given)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _nodes(node: Any, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node that has a _target_, with the keys that lead to it."""
    if isinstance(node, dict) and "_target_" in node:
        yield at, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in items:
        yield from _nodes(item, f"{at}{key}.")


def names_of(cfg: DictConfig) -> dict[str, str]:
    """What the summary calls each of NAMED: the choice made, else the last part of its _target_."""
    return {g: str(cfg[g]._target_).rpartition(".")[2] for g in NAMED} | dict(cfg.get("names", {}))


def load_conversations(cfg: DictConfig) -> list[Conversation]:
    """The prompts of `data`."""
    from omegaconf import open_dict

    check_arguments(Settings, {"chat": cfg.data.chat}, "data.")
    node = copy.deepcopy(cfg.data)
    with open_dict(node):
        node.pop("chat")
    return make(node, cfg.allow)


def load_target(cfg: DictConfig) -> Loaded:
    """The model of `target`, loaded once a process while its config stays the same."""
    from omegaconf import OmegaConf

    return _load_once(OmegaConf.to_yaml(cfg.target, resolve=True), tuple(cfg.allow))


@functools.lru_cache(maxsize=1)
def _load_once(yaml: str, allow: tuple[str, ...]) -> Loaded:
    from omegaconf import OmegaConf

    return make(OmegaConf.create({"target": OmegaConf.create(yaml)}).target, allow)
