"""Shards: safetensors files of texts, prompt and answer, that a target wrote and that heads are trained on.

Shapes: X tokens of all texts end to end, S texts, C taps side by side, D width.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import save_tensors
from .taps import Tap
from .target import HFTarget


@dataclass(frozen=True)
class Origin:
    """What gave the answers of a shard. The first two are empty where a shard does not say.

    longest  tokens of an answer at most
    """

    target: str = ""
    fingerprint: str = ""
    longest: int = 0
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Shard:
    """Texts end to end.

    tokens_X     int32
    lengths_S    int64: tokens of each text; of them prompts_S, at least one and not all, are its prompt's
    features_XC  bfloat16 [X - S, C]: `taps` of all tokens but each text's last; None: tokens only
    """

    tokens_X: Tensor
    lengths_S: Tensor
    prompts_S: Tensor
    features_XC: Tensor | None = None
    taps: tuple[Tap, ...] = ()
    origin: Origin = Origin()

    def texts(self) -> list[Tensor]:
        """int64 tokens of each."""
        return list(self.tokens_X.long().split(self.lengths_S.tolist()))

    def save(self, file: Path) -> None:
        tensors = {"tokens": self.tokens_X, "lengths": self.lengths_S, "prompts": self.prompts_S}
        if self.features_XC is not None:
            tensors["features"] = self.features_XC
        save_tensors(
            tensors, file, {"taps": json.dumps(self.taps), "origin": json.dumps(asdict(self.origin))}
        )


def shard_files(folder: Path) -> list[Path]:
    """The shards in a folder, in order."""
    return sorted(folder.glob("answers-*.safetensors"))


def read_shard(file: Path) -> Shard:
    """A shard, its features mapped from the disk. ValueError: damaged, or no shard."""
    try:
        shard = _read(file)
        problem = _problem(shard)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    if problem:
        raise ValueError(
            f"{file} is no sound shard of answers ({problem}): delete it and repeat the command, "
            "which answers again what is missing"
        )
    return shard


def _read(file: Path) -> Shard:
    with safe_open(file, "pt") as tensors:
        names, said = set(tensors.keys()), tensors.metadata() or {}
        return Shard(
            *(tensors.get_tensor(name) for name in ("tokens", "lengths", "prompts")),
            tensors.get_tensor("features") if "features" in names else None,
            tuple(json.loads(said.get("taps", "[]"))),
            Origin(**json.loads(said.get("origin", "{}"))),
        )


def _problem(shard: Shard) -> str | None:
    lengths_S, prompts_S, features_XC = shard.lengths_S, shard.prompts_S, shard.features_XC
    if lengths_S.shape != prompts_S.shape or int(lengths_S.sum()) != len(shard.tokens_X):
        return f"{len(lengths_S)} texts of {int(lengths_S.sum())} tokens, but it holds {len(shard.tokens_X)}"
    if not len(lengths_S):
        return "no text"
    if bool((prompts_S < 1).any()) or bool((prompts_S >= lengths_S).any()):
        return "a text without a prompt, or without an answer"
    if features_XC is None:
        return "taps without features" if shard.taps else None
    rows = len(shard.tokens_X) - len(lengths_S)
    if len(features_XC) != rows or not shard.taps or features_XC.shape[1] % len(shard.taps):
        return f"features {tuple(features_XC.shape)} of the taps {list(shard.taps)}, expected {rows} rows"
    return None


def expect_answers_of(target: HFTarget, shard: Shard, file: Path) -> None:
    """ValueError: another target gave these answers."""
    remedy = "choose the answers of this target with shards=FOLDER, or have it answer: another out=FOLDER"
    known, low, high = shard.origin, int(shard.tokens_X.min()), int(shard.tokens_X.max())
    if known.fingerprint and known.fingerprint != target.fingerprint:
        raise ValueError(
            f"{file} was written by {known.target} (fingerprint {known.fingerprint}), "
            f"this target is {target.name} ({target.fingerprint}); {remedy}"
        )
    if low < 0 or high >= target.vocab:
        raise ValueError(
            f"{file} holds token {low if low < 0 else high}, expected 0 to {target.vocab - 1}; {remedy}"
        )
    width = len(shard.taps) * target.config.hidden_size
    if shard.features_XC is not None and shard.features_XC.shape[1] != width:
        raise ValueError(
            f"{file} holds features of width {shard.features_XC.shape[1]}, expected {width}; {remedy}"
        )


def expect_features_of(taps: tuple[Tap, ...], shard: Shard, file: Path) -> None:
    """ValueError: the shard lacks some of these taps."""
    if missing := [tap for tap in taps if tap not in shard.taps]:
        raise ValueError(
            f"{file} holds the features of {list(shard.taps) or 'no layer'}, training needs {missing} too: "
            "have them computed, prompts.store_features=false, or collect anew in another out=FOLDER"
        )


def settings_of(origin: Origin) -> dict[str, Any]:
    """What of an origin is a setting, under the names of its overrides."""
    return {
        "prompts.answer_tokens": origin.longest,
        "prompts.temperature": origin.temperature,
        "prompts.seed": origin.seed,
    }
