"""Whether values of a config can be what a function takes, by its annotations."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .overrides import expect_known

LISTS = (list, tuple, Sequence)
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
WORDS |= {dict: "keys and values", type(None): "null"}


def check_arguments(function: Callable, given: dict[str, Any], at: str = "") -> None:
    """ValueError for a key that is no parameter of `function`, or a value that it can't be."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for key, value in ((k, v) for k, v in given.items() if k in parameters or not takes_any):
        expect_known(key, sorted(parameters), f"{at}{key}")
        wanted = _type(function, parameters[key].annotation)
        if not _fits(value, wanted):
            example = _example(value, wanted, parameters[key].default)
            raise ValueError(f"{at}{key} is {value!r}, expected {_words(wanted)}: {at}{key}={example}")


def _type(function: Callable, annotation: Any) -> Any:
    """What an annotation stands for; anything where only type checkers can tell."""
    places = [sys.modules[one.__module__] for one in getattr(function, "__mro__", [function])]
    names = {name: value for place in reversed(places) for name, value in vars(place).items()}
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"it": annotation}), names)["it"]
    except (NameError, AttributeError, TypeError):
        return Any


def _parts(wanted: Any) -> tuple[Any, tuple[Any, ...]]:
    """A kind, and what it is of: the kinds of a union, what all items of a list are."""
    kind, parts = get_origin(wanted) or wanted, get_args(wanted)
    if kind in LISTS:
        return list, parts[:1] if parts[1:] in ((), (...,)) else ()
    return (Union if kind is UnionType else kind), parts


def _fits(value: Any, wanted: Any) -> bool:
    """Whether it is of the kind, which can be anything where it is none of WORDS."""
    kind, parts = _parts(wanted)
    if kind is Union:
        return any(_fits(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, part) for item in value for part in parts)
    if type(value) is bool:
        return kind is bool or kind not in WORDS
    return kind not in WORDS or isinstance(value, (int, float) if kind is float else kind)


def _words(wanted: Any, many: bool = False) -> str:
    """What to expect: `a list of whole numbers or null`."""
    kind, parts = _parts(wanted)
    if kind is Union:
        return " or ".join(_words(part, many) for part in parts)
    word = WORDS.get(kind, "a thing")
    word = f"{word[2:]}s" if many and word.startswith("a ") else word
    return f"{word} of {_words(parts[0], many=True)}" if kind is list and parts else word


def _example(value: Any, wanted: Any, default: Any) -> str:
    """What to write for a value that is not of this kind: what it was meant as, else the default."""
    if _fits([value], wanted):
        return _typed([value])
    if _fits("", wanted) and type(value) in (int, float):
        return f"""'"{value}"'"""  # the shell takes the outer quotes, Hydra the inner ones
    if default is inspect.Parameter.empty:
        return "[VALUE]" if _parts(wanted)[0] is list else "VALUE"
    return _typed(default)


def _typed(value: Any) -> str:
    """A value as it is written in an override."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_typed, value))}]"
    return "null" if value is None else str(value)
