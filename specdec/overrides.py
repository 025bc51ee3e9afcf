"""What is asked for on the command line: composed by Hydra, and refused with the nearest that exists.

Imports hydra only when called.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ._paths import conf_dir

if TYPE_CHECKING:
    from omegaconf import DictConfig


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The config `name` with these overrides, inside an initialised Hydra. ValueError: no such one."""
    from hydra import compose as composed
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return composed(name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error


def check_overrides(overrides: list[str], name: str = "config") -> None:
    """ValueError for a key or a choice that does not exist; call it inside an initialised Hydra."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException
    from omegaconf import OmegaConf

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        reason = str(error).splitlines()[1]
        raise ValueError(f"{error.override!r} is no override, expected KEY=VALUE: {reason}") from error
    chosen = []
    for one in parsed:
        choices = _choices(one.key_or_group)
        if choices and not one.is_delete():
            values = [str(v) for v in (one.sweep_iterator() if one.is_sweep_override() else [one.value()])]
            for value in values:
                expect_known(value, choices, f"{one.key_or_group}={value}")
            chosen.append(f"{one.get_key_element()}={values[0]}")
    keys = sorted(_dotted(OmegaConf.to_container(compose(name, chosen), resolve=False)))
    ours = [key for key in keys if not key.startswith("hydra.")]
    for key in (one.key_or_group for one in parsed if not one.is_add() and not one.is_force_add()):
        if not _choices(key) and not key.startswith("hydra."):
            expect_known(key, ours, f"override {key}")


def _choices(group: str) -> list[str]:
    folder = Path(conf_dir(), group)
    return sorted(p.stem for p in folder.glob("*.yaml")) + (["null"] if group == "experiment" else [])


def expect_known(value: str, known: list[str], what: str) -> None:
    """ValueError that names the nearest, unless `value` is one of `known`."""
    if value in known or (value == "None" and "null" in known):
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
