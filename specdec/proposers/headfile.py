"""Files of trained heads: safetensors whose metadata says what they are and for which target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import save_tensors

if TYPE_CHECKING:
    from ..target import HFTarget

Shapes = dict[str, tuple[int, ...]]


def write_head(path: Path, kind: str, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Floating-point weights in bfloat16, the others as they are, and `info` under the head's kind."""
    half = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in tensors.items()}
    save_tensors({n: t.contiguous() for n, t in half.items()}, path, {kind: json.dumps(info)})


def read_head(
    path: Path, kind: str, info_of: Callable[[dict[str, Any]], Any] = dict, key: str = "proposer.heads"
) -> tuple[Any, dict[str, Tensor]]:
    """What `write_head` wrote. ValueError: damaged, or not of this kind.

    info_of  makes the info of its fields
    key      the override that named the file, for the error
    """
    try:
        with safe_open(path, "pt") as file:
            info = info_of(json.loads((file.metadata() or {})[kind]))
            return info, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{key}={path} is no file of {kind} heads ({error}); train one: "
            f"python -m specdec.train head={kind}"
        ) from error


def check_head(
    path: Path,
    kind: str,
    info: Any,
    tensors: dict[str, Tensor],
    expected: Shapes,
    target: HFTarget,
    key: str = "proposer.heads",
) -> None:
    """ValueError unless the head was trained for this target, with the tensors expected, and is finite.

    key  as of `read_head`
    """
    if problem := _problem(info, tensors, expected, target):
        raise ValueError(
            f"{path.name} {problem}; choose heads trained for this target with {key}=FILE, "
            f"or train some: python -m specdec.train head={kind}"
        )


def _problem(info: Any, tensors: dict[str, Tensor], expected: Shapes, target: HFTarget) -> str | None:
    if info.fingerprint != target.fingerprint:
        return (
            f"was trained for {info.target} (fingerprint {info.fingerprint}), "
            f"this target is {target.name} ({target.fingerprint})"
        )
    if (found := {name: tuple(t.shape) for name, t in tensors.items()}) != expected:
        different = {n: (found.get(n), expected.get(n)) for n in found.keys() | expected.keys()}
        wrong = sorted(f"{n} {has}, not {want}" for n, (has, want) in different.items() if has != want)
        return f"holds other tensors than expected: {'; '.join(wrong[:3])}"
    if not _is_vocabulary(tensors["tokens_U"], target.vocab):
        return f"drafts from a vocabulary that is not one of different tokens of the target's {target.vocab}"
    if not all(t.isfinite().all() for t in tensors.values()):
        return "holds weights that are not finite"
    return None


def _is_vocabulary(tokens_U: Tensor, vocab: int) -> bool:
    ascending = bool((tokens_U[1:] > tokens_U[:-1]).all())
    return len(tokens_U) > 0 and ascending and int(tokens_U[0]) >= 0 and int(tokens_U[-1]) < vocab
