"""Training data from the target itself: prompts it writes, answers it gives, and what its LM head read.

Shapes: X answer tokens of a shard, D width.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .accept import Match
from .decode import Sequence, decode
from .proposers.none import NoDraft
from .rng import Philox
from .sampling import Sampling
from .target import HFTarget, TargetOutput
from .tree import TokenTree, Verdict
from .trees import Chain

MARK = "\x1fwrite here\x1f"


class Recorder(NoDraft):
    """Plain decoding that keeps what the LM head read at every step, a list of [D] in `seq.draft`."""

    needs_hidden = ("final",)

    def start(self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]) -> None:
        for seq in seqs:
            seq.draft = []

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        for b, seq in enumerate(seqs):
            seq.draft.append(out.hidden["final"][b, 0].to(torch.bfloat16))


@dataclass
class Answers:
    """Answers of many requests end to end. features_XD[i] is what the LM head read when it said tokens_X[i].

    tokens_X    int64
    end_X       int64: index behind the last token of the answer that token i belongs to
    features_XD bfloat16
    """

    tokens_X: Tensor
    end_X: Tensor
    features_XD: Tensor

    @classmethod
    def load(cls, files: list[Path]) -> "Answers":
        shards = [load_file(f) for f in files]
        lengths = torch.cat([s["lengths"] for s in shards])
        end_X = lengths.cumsum(0).repeat_interleave(lengths)
        joined = (torch.cat([s[name] for s in shards]) for name in ("tokens", "features"))
        tokens_X, features_XD = joined
        return cls(tokens_X.long(), end_X, features_XD)


def write_prompts(
    target: HFTarget,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    count: int,
    *,
    beginnings: list[str],
    batch: int = 32,
    longest: int = 96,
    seed: int = 0,
) -> list[str]:
    """User messages that the target writes itself, sampled from its chat template's opening; no two alike.

    beginnings  first words of the messages, taken in turn; "" leaves them to the target

    Messages that do not end within `longest` tokens are dropped, so somewhat fewer than `count` come back.
    Each batch is kept in `folder`, and not written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"prompts-{first:06d}.json" for first in range(0, count, batch)]
    for first, file in track(
        list(zip(range(0, count, batch), files, strict=True)), description="prompts by the target"
    ):
        if not file.exists():
            starts = [beginnings[(first + i) % len(beginnings)] for i in range(min(batch, count - first))]
            texts = _write_batch(target, tokenizer, starts, first, longest, seed)
            write_text_atomically(json.dumps(texts, ensure_ascii=False, indent=0), file)
    return list(
        dict.fromkeys(text for file in files for text in json.loads(file.read_text(encoding="utf-8")))
    )


def _write_batch(
    target: HFTarget,
    tokenizer: PreTrainedTokenizerBase,
    starts: list[str],
    first: int,
    longest: int,
    seed: int,
) -> list[str]:
    stop_ids = (tokenizer.eos_token_id,)
    seqs = [
        Sequence(first + i, chat_opening(tokenizer, words), longest, Philox(seed), stop_ids)
        for i, words in enumerate(starts)
    ]
    for _ in decode(target, NoDraft(target, Chain()), Match(), Sampling(temperature=1.0, top_k=64), seqs):
        pass
    texts = [
        words + tokenizer.decode(s.new_tokens, skip_special_tokens=True)
        for s, words in zip(seqs, starts, strict=True)
        if s.finish == "stop"
    ]
    return [text.strip() for text in texts if text.strip()]


def chat_opening(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    """Token ids of the chat template up to the first user message, and its first words."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the target has no chat template to write prompts from; expected written=0 and data="
        )
    text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    return tokenizer.encode(text.partition(MARK)[0] + words, add_special_tokens=False)


def write_answers(
    target: HFTarget,
    prompts: list[list[int]],
    folder: Path,
    *,
    stop_ids: tuple[int, ...],
    longest: int,
    batch: int = 32,
) -> list[Path]:
    """The target's greedy answers, one safetensors shard a batch; shards that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    by_length = sorted(prompts, key=len)
    groups = [by_length[i : i + batch] for i in range(0, len(by_length), batch)]
    files = [folder / f"answers-{i:05d}.safetensors" for i in range(len(groups))]
    for file, group in track(list(zip(files, groups, strict=True)), description="answers of the target"):
        if not file.exists():
            save_atomically(_answer(target, group, stop_ids, longest), file)
    return files


def _answer(
    target: HFTarget, prompts: list[list[int]], stop_ids: tuple[int, ...], longest: int
) -> dict[str, Tensor]:
    seqs = [Sequence(i, list(p), longest, Philox(0), stop_ids) for i, p in enumerate(prompts)]
    for _ in decode(target, Recorder(target, Chain()), Match(), Sampling(), seqs):
        pass
    return {
        "tokens": torch.tensor([t for s in seqs for t in s.new_tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(s.new_tokens) for s in seqs]),
        "features": torch.stack([h_D for s in seqs for h_D in s.draft]).cpu(),
    }


def save_atomically(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears whole or not at all."""
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata=metadata)
    part.replace(file)


def write_text_atomically(text: str, file: Path) -> None:
    """A text file that appears whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def split(files: list[Path], held_out: int) -> tuple[list[Path], list[Path]]:
    """Training shards and `held_out` others, spread evenly over the prompt lengths."""
    chosen = set(files[:: max(1, len(files) // held_out)][:held_out])
    return [f for f in files if f not in chosen], sorted(chosen)


def batches(answers: Answers, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every position once, as runs of `rows` neighbours in random order."""
    starts = torch.arange(0, len(answers.tokens_X), rows)
    for start in starts[torch.randperm(len(starts), generator=generator)].tolist():
        yield torch.arange(start, min(start + rows, len(answers.tokens_X)))
