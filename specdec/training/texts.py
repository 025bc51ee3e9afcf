"""Shards of the target's answers as padded batches.

Shapes: S texts, T tokens, X tokens of all texts end to end, C taps side by side, D width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..shards import Shard, expect_features_of, read_shard
from ..taps import Tap
from ..target import HFTarget

GRANULE = 16  # not too many lengths: on a CPU oneDNN compiles for every shape


@dataclass
class TextBatch:
    """Texts side by side; what lies behind a text's end is 0 or False.

    tokens_ST  int64
    next_ST    int64: the token that follows each
    said_ST    bool: the target said what follows, so its law there is on its own text
    hidden     each tap [S, T, D], bfloat16
    """

    tokens_ST: Tensor
    next_ST: Tensor
    said_ST: Tensor
    hidden: dict[Tap, Tensor]


@dataclass
class Texts:
    """Texts, prompt and answer.

    tokens    int64 [T + 1] of each text; the target did not read the last one
    prompts   tokens of each prompt
    features  bfloat16 [T, C] of each text; none where shards hold tokens only
    """

    tokens: list[Tensor]
    prompts: list[int]
    features: list[Tensor]
    taps: tuple[Tap, ...]

    @classmethod
    def load(cls, files: list[Path], taps: tuple[Tap, ...], stored: bool = True) -> "Texts":
        """Texts of shards, with the features that they hold; not `stored`: without.

        ValueError: a damaged shard, or one that lacks some of the features while others hold any.
        """
        shards = {file: read_shard(file) for file in files}
        texts = cls([], [], [], taps)
        stored = stored and any(shard.taps for shard in shards.values())
        for file, shard in shards.items():
            texts.tokens += shard.texts()
            texts.prompts += shard.prompts_S.tolist()
            if stored and taps:
                texts.features += _chosen(shard, taps, file).split((shard.lengths_S - 1).tolist())
        return texts

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def said(self) -> int:
        """Tokens that the target said."""
        return sum(map(len, self.tokens)) - sum(self.prompts)

    @property
    def digest(self) -> str:
        """Tells other texts, or an other order of them, apart."""
        digest = hashlib.sha256(repr(self.prompts).encode())
        for text in self.tokens:
            digest.update(text.numpy().tobytes())
        return digest.hexdigest()[:16]

    def most_said(self, vocab: int, most: int, before: Tensor | None = None) -> Tensor:
        """int64, ascending: the `most` tokens that the target says most often, or all that it says.

        before  other tokens, which come behind those it says, and before others that it says as often
        """
        said = [text[prompt:] for text, prompt in zip(self.tokens, self.prompts, strict=True)]
        counts_V = 2 * torch.bincount(torch.cat(said), minlength=vocab)
        if before is not None:
            counts_V[before.long().cpu()] += 1
        known = min(most, int((counts_V > 0).sum()))
        return counts_V.argsort(descending=True, stable=True)[:known].sort().values

    def apart_from(self, others: "Texts") -> "Texts":
        """The texts of other conversations: a later turn's text begins with what was asked before."""
        theirs = list(zip(*others._as_bytes(), strict=True))
        kept = [
            i
            for i, (text, prompt) in enumerate(zip(*self._as_bytes(), strict=True))
            if not any(text.startswith(asked) or other.startswith(prompt) for other, asked in theirs)
        ]
        features = [self.features[i] for i in kept] if self.features else []
        return Texts([self.tokens[i] for i in kept], [self.prompts[i] for i in kept], features, self.taps)

    def _as_bytes(self) -> tuple[list[bytes], list[bytes]]:
        """Texts, and their prompts, to be compared."""
        prompts = [text[:prompt] for text, prompt in zip(self.tokens, self.prompts, strict=True)]
        return [t.numpy().tobytes() for t in self.tokens], [p.numpy().tobytes() for p in prompts]

    def groups(self, rows: int, generator: torch.Generator) -> list[list[int]]:
        """Every text once: like lengths together, about `rows` padded tokens a group, in random order."""
        shuffled = torch.randperm(len(self), generator=generator).tolist()
        alike = sorted(shuffled, key=lambda i: (_padded(len(self.tokens[i]) - 1), _padded(self.prompts[i])))
        groups: list[list[int]] = []
        for text in alike:
            longest = _padded(len(self.tokens[text]) - 1)
            if not groups or (len(groups[-1]) + 1) * longest > rows:
                groups.append([])
            groups[-1].append(text)
        return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]

    def batches(self, target: HFTarget, rows: int, generator: torch.Generator) -> Iterator[TextBatch]:
        """The groups as batches on the target's device; features that aren't stored are computed."""
        for group in self.groups(rows, generator):
            yield self.batch(target, group)

    def batch(self, target: HFTarget, group: list[int]) -> TextBatch:
        """These texts side by side."""
        tokens = [self.tokens[i][:-1] for i in group]
        features = [self.features[i] for i in group] if self.features else read(target, tokens, self.taps)
        following = [self.tokens[i][1:] for i in group]
        T = _padded(max(map(len, tokens)))
        lengths_S1 = torch.tensor([[len(text)] for text in tokens])
        prompts_S1 = torch.tensor([[self.prompts[i]] for i in group])
        at_T = torch.arange(T)
        real_ST = at_T < lengths_S1
        features_STC = _side_by_side(features, T).to(target.device)
        by_tap = features_STC.chunk(len(self.taps), dim=-1) if self.taps else ()
        return TextBatch(
            _side_by_side(tokens, T).to(target.device),
            _side_by_side(following, T).to(target.device),
            (real_ST & (at_T >= prompts_S1 - 1)).to(target.device),
            dict(zip(self.taps, by_tap, strict=True)),
        )


def _chosen(shard: Shard, taps: tuple[Tap, ...], file: Path) -> Tensor:
    """[X - S, C] of these taps; where they are all that is stored, in this order, it stays on the disk."""
    expect_features_of(taps, shard, file)
    if taps == shard.taps:
        return shard.features_XC
    by_tap = dict(zip(shard.taps, shard.features_XC.chunk(len(shard.taps), dim=-1), strict=True))
    return torch.cat([by_tap[tap] for tap in taps], dim=-1)


def _padded(length: int) -> int:
    return -(-length // GRANULE) * GRANULE


def _side_by_side(rows: list[Tensor], length: int) -> Tensor:
    joined = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for row, filled in zip(rows, joined, strict=True):
        filled[: len(row)] = row
    return joined


@torch.inference_mode()
def read(target: HFTarget, texts: list[Tensor], taps: tuple[Tap, ...]) -> list[Tensor]:
    """[T, C] of each text: what the target's taps hold when it reads them."""
    if not taps:
        return [torch.zeros(len(text), 0) for text in texts]
    target.needs_hidden = taps
    target.reserve(1, max(map(len, texts)))
    return [_read_one(target, text.tolist()) for text in texts]


def _read_one(target: HFTarget, tokens: list[int]) -> Tensor:
    target.cache.clear()
    hidden = target.prefill(0, tokens)
    return torch.cat([hidden[tap] for tap in target.needs_hidden], dim=-1).to("cpu", torch.bfloat16)


def split(files: list[Path], held_out: int) -> tuple[list[Path], list[Path]]:
    """Training shards and `held_out` others, spread evenly: neighbours hold prompts of like lengths."""
    chosen = {files[int((i + 0.5) * len(files) / held_out)] for i in range(min(held_out, len(files)))}
    return [f for f in files if f not in chosen], sorted(chosen)
