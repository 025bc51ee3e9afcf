"""Training data from the target itself: the answers it gives, and what its layers held.

Shapes: B batch, N nodes, C taps side by side, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from .accept import Match
from .data import digest
from .decode import Sequence, decode
from .proposers.none import NoDraft
from .rng import Philox
from .sampling import Sampling
from .shards import Origin, Shard, expect_answers_of, expect_features_of, read_shard, settings_of, shard_files
from .taps import Tap
from .target import HFTarget, TargetOutput
from .tree import TokenTree, Verdict
from .trees import Chain

GREEDY = Sampling()
Advance = Callable[[int, int], None]  # texts and tokens that came to be


class Recorder(NoDraft):
    """Plain decoding that keeps the taps of every token but the last: rows of [C * D] in `seq.draft`."""

    def __init__(self, target: HFTarget, taps: tuple[Tap, ...]) -> None:
        super().__init__(target, Chain())
        self.needs_hidden = taps

    def start(self, seqs: list[Sequence], hidden: list[dict[Tap, Tensor]]) -> None:
        for seq, taps in zip(seqs, hidden, strict=True):
            seq.draft = [self._rows(taps)]

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        rows_BC = self._rows({tap: h_BND[:, 0] for tap, h_BND in out.hidden.items()})
        for b, seq in enumerate(seqs):
            seq.draft.append(rows_BC[b : b + 1])

    def _rows(self, taps: dict[Tap, Tensor]) -> Tensor:
        return torch.cat([taps[tap] for tap in self.needs_hidden], dim=-1).to("cpu", torch.bfloat16)


def write_answers(
    target: HFTarget,
    prompts: list[list[int]],
    folder: Path,
    *,
    stop_ids: tuple[int, ...],
    longest: int,
    batch: int = 32,
    taps: tuple[Tap, ...] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[Path]:
    """Have the target answer what `folder` has no answer to yet, a shard a batch; returns all shards there.

    With `taps`, shards hold what those layers held. A prompt is answered once, however often it is given, and
    not where it leaves no room for `longest` tokens.
    ValueError: shards there are damaged, of other settings or another target.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = Origin(target.name, target.fingerprint, longest, sampling.temperature, seed)
    different = dict.fromkeys(map(tuple, prompts))
    fitting = [p for p in different if len(p) + longest <= target.max_length]
    there = _answered(target, folder, origin, taps)
    missing = sorted((p for p in fitting if p not in there), key=len)
    say(
        f"answers: {len(prompts)} prompts, {len(prompts) - len(different)} of them repeated, "
        f"{len(different) - len(fitting)} too long, {len(fitting) - len(missing)} answered already"
    )
    names = _free_names(folder)
    proposer = Recorder(target, taps) if taps else NoDraft(target, Chain())
    with bar("answers of the target", len(missing)) as advance:
        for first in range(0, len(missing), batch):
            # Numbered by what they are asked: a sampled answer depends on nothing else that is.
            seqs = [
                Sequence(int(digest(p), 16) & 0x7FFFFFFF, list(p), longest, Philox(seed), stop_ids)
                for p in missing[first : first + batch]
            ]
            _answer(target, proposer, seqs, taps, sampling, origin, advance).save(next(names))
    return shard_files(folder)


def _free_names(folder: Path) -> Iterator[Path]:
    there = set(shard_files(folder))
    names = (folder / f"answers-{i:05d}.safetensors" for i in range(10**5))
    return (name for name in names if name not in there)


def _answered(target: HFTarget, folder: Path, origin: Origin, taps: tuple[Tap, ...]) -> set[tuple[int, ...]]:
    """The prompts of the shards in a folder."""
    prompts = set()
    for file in shard_files(folder):
        shard = read_shard(file)
        expect_answers_of(target, shard, file)
        expect_features_of(taps, shard, file)
        _expect_same_settings(origin, shard.origin, file)
        texts = zip(shard.texts(), shard.prompts_S.tolist(), strict=True)
        prompts |= {tuple(text[:prompt].tolist()) for text, prompt in texts}
    return prompts


def _expect_same_settings(origin: Origin, there: Origin, file: Path) -> None:
    pairs = zip(settings_of(there).items(), settings_of(origin).values(), strict=True)
    differing = [f"{name}={old}, not {new}" for (name, old), new in pairs if old != new]
    if there.fingerprint and differing:
        raise ValueError(
            f"{file} was written with {' and '.join(differing)}: give the same, or another out=FOLDER"
        )


def _answer(
    target: HFTarget,
    proposer: NoDraft,
    seqs: list[Sequence],
    taps: tuple[Tap, ...],
    sampling: Sampling,
    origin: Origin,
    advance: Advance,
) -> Shard:
    run(target, proposer, sampling, seqs, advance)
    return Shard(
        torch.tensor([t for s in seqs for t in s.tokens], dtype=torch.int32),
        torch.tensor([len(s.tokens) for s in seqs]),
        torch.tensor([s.prompt_len for s in seqs]),
        torch.cat([row for s in seqs for row in s.draft]) if taps else None,
        taps,
        origin,
    )


def run(
    target: HFTarget,
    proposer: NoDraft,
    sampling: Sampling,
    seqs: list[Sequence],
    advance: Advance,
) -> None:
    """Decode the sequences to their ends."""
    for rows in decode(target, proposer, Match(), sampling, seqs):
        advance(sum(seq.done for seq, _ in rows), sum(record.kept for _, record in rows))


@contextmanager
def bar(description: str, total: int) -> Iterator[Advance]:
    """Shows how many of `total` texts there are, as long as it is open; nothing where there are none."""
    columns = TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[speed]}"), disable=not total) as bar:
        bar.add_task("", total=total, speed="")
        (task,), tokens = bar.tasks, 0

        def advance(texts: int, more: int) -> None:
            nonlocal tokens
            tokens += more
            speed = f"{tokens / task.elapsed:.0f} tokens/s" if task.elapsed else ""
            bar.update(task.id, advance=texts, speed=speed)

        yield advance


def say(line: str) -> None:
    """Print a line as it is."""
    Console().print(Text(line), soft_wrap=True)
