"""Other projects' checkpoints as they lie in a folder or on the hub: a config and tensors, and no code."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CONFIG = "config.json"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PADDING = 0.01  # of a vocabulary: by so much two models with one tokenizer may differ


class Unusable(ValueError):
    """What is wrong with a checkpoint, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Reading:
    """One way to understand a checkpoint.

    name    in words
    config  the head's own: an Eagle3Config, or a MedusaInfo
    state   tensors in native names, in the file's dtypes
    """

    name: str
    config: Any
    state: dict[str, Tensor]


def is_checkpoint(heads: str) -> bool:
    """Whether `proposer.heads` names a folder, or could be a hub id: no file, and no head of the zoo."""
    path = Path(heads).expanduser()
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", heads) and path.suffix != ".safetensors"
    return path.is_dir() or bool(is_id and not path.exists())


def refused(heads: str, problem: str, kind: str) -> ValueError:
    """The error for a checkpoint that can't be used as heads of this kind, and what to do."""
    return ValueError(
        f"proposer.heads={heads} {problem}; choose heads trained for this target with "
        f"proposer.heads=FOLDER_OR_HUB_ID, or train some: python -m specdec.train head={kind}"
    )


def same_tokenizer(one: int, other: int) -> bool:
    """Whether vocabularies of these sizes could be one tokenizer's, padded differently."""
    return abs(one - other) <= PADDING * max(one, other)


def read(heads: str, weights: tuple[str, ...], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder, or of a hub id (downloaded, or in the hub's cache).

    weights  names that the file of weights may have, the first that is there is read
    ValueError: no such folder or id, a file is missing or damaged, weights quantised or not finite
    """
    folder = _folder(heads, weights, kind)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refused(heads, f"has no readable {CONFIG} ({error})", kind) from error
    file = next((folder / name for name in weights if (folder / name).is_file()), None)
    if file is None or not isinstance(config, dict):
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise refused(heads, f"holds {there}, expected {CONFIG} and one of {', '.join(weights)}", kind)
    tensors = _tensors(heads, file, kind)
    _check(heads, tensors, kind)
    return config, tensors


def _folder(heads: str, weights: tuple[str, ...], kind: str) -> Path:
    if (local := Path(heads).expanduser()).is_dir():
        return local
    try:
        return Path(snapshot_download(heads, allow_patterns=[CONFIG, *weights]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise refused(heads, f"is no folder, nor a hub id that can be reached ({reason})", kind) from error


def _tensors(heads: str, file: Path, kind: str) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise refused(heads, f"has a damaged or unsafe {file.name} ({reason})", kind) from error
    if isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values()):
        return dict(tensors)
    raise refused(heads, f"has a {file.name} that is no dict of tensors", kind)


def _check(heads: str, tensors: dict[str, Tensor], kind: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in DTYPES:
            raise refused(heads, f"is quantised: {name} is {tensor.dtype}, expected 16 or 32 bits", kind)
        if not tensor.isfinite().all():
            raise refused(heads, f"holds weights that are not finite: {name}", kind)
