"""The loop. Plain decoding is the same loop with a proposer that proposes nothing.

propose -> score -> accept -> commit -> observe -> record. Only the loop changes a Sequence. All but the last
are called from here, or stay on the device (`device_step`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import torch

from .accept import Rule
from .device_step import checked, decides_on_device, device_step, verdicts_of
from .proposers.base import Proposer
from .records import StepRecord
from .rng import Rng, Stream, StreamBatch
from .sampling import Laws, Sampling
from .target import HFTarget, TargetOutput
from .tree import TokenTree, TreeBatch, Verdict

PARTS = ("propose", "score", "accept", "commit", "host")


@dataclass(slots=True)
class Sequence:
    """Decode state of one request. The target's cache holds tokens[:-1]; tokens[-1] is the next root.

    request  number that keys its randomness; the same in every batch
    slot     its place in the caches
    draft    what the proposer keeps of it
    history  (drafted depth, accepted) of every step
    coupling how the target is sampled, where the draft may know the noise of its draws
    """

    request: int
    tokens: list[int]
    max_new_tokens: int
    rng: Rng
    stop_ids: tuple[int, ...] = ()
    slot: int = 0
    draft: Any = None
    history: list[tuple[int, int]] = field(default_factory=list)
    coupling: Sampling | None = None
    prompt_len: int = field(init=False)
    done: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)
        if not self.tokens:
            raise ValueError(f"request {self.request} has an empty prompt; expected at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, expected 1 or more: max_new_tokens=128"
            )

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def room(self) -> int:
        """Tokens that may still be emitted."""
        return self.prompt_len + self.max_new_tokens - len(self.tokens)

    @property
    def finish(self) -> str:
        return "stop" if self.tokens[-1] in self.stop_ids and self.new_tokens else "length"

    @property
    def where(self) -> str:
        """The place of its next step, for errors."""
        return f"request {self.request}, step {len(self.history)}"

    @property
    def stream(self) -> Stream:
        """The randomness of its next step."""
        return Stream(self.rng, self.request, len(self.history), len(self.tokens))

    def extend(self, emitted: list[int]) -> int:
        """Append up to the first stop token or the length limit; returns how many tokens were kept."""
        stop = next((i + 1 for i, t in enumerate(emitted) if t in self.stop_ids), len(emitted))
        kept = emitted[: min(stop, self.room)]
        self.tokens += kept
        self.done = self.room == 0 or kept[-1] in self.stop_ids
        return len(kept)


Step = Callable[[list[Sequence]], tuple[list[TokenTree], list[Verdict]]]


class Clock:
    """Step totals only: what a timed run may cost."""

    splits: ClassVar[bool] = False  # whether it wants to know of the parts of a step

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, perf_counter()

    def lap(self, part: str) -> None:
        """A part of the step ended; a profiling clock writes it down."""

    def now(self) -> float:
        """Seconds since the clock was made. A step ends when its verdict has been read."""
        return perf_counter() - self.start

    def settled(self) -> float:
        """The same, when the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.now()


class ProfilingClock(Clock):
    """Seconds of each part, summed over steps. Synchronises after every part: never use it in a timed run."""

    splits = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.parts = dict.fromkeys((*PARTS, "prefill"), 0.0)
        self._last = 0.0

    def lap(self, part: str) -> None:
        now = self.settled()
        self.parts[part] += now - self._last
        self._last = now


def decode(
    target: HFTarget,
    proposer: Proposer,
    accept: Rule,
    sampling: Sampling,
    seqs: list[Sequence],
    clock: Clock | None = None,
) -> Iterator[list[tuple[Sequence, StepRecord]]]:
    """Extend the sequences in place; yields an empty list when prefill is done, then each step's records.

    What the caller does between two steps counts as part of the second.
    """
    clock = clock or Clock(target.device)
    clock.lap("host")
    for seq in seqs:
        seq.coupling = sampling if accept.coupled and sampling.temperature else None
        seq.rng = seq.rng.kept() if seq.coupling else seq.rng
    prefill(target, proposer, seqs)
    clock.lap("prefill")
    step: Step = partial(host_step, target, proposer, accept, sampling, clock)
    if not clock.splits:
        step = device_step(target, proposer, accept, sampling, seqs) or step
    began = clock.settled()
    yield []
    while live := [s for s in seqs if not s.done]:
        trees, verdicts = step(live)
        for seq, tree in zip(live, trees, strict=True):
            tree.check(seq.tokens[-1])
        kept = [advance(seq, tree, verdict) for seq, tree, verdict in zip(live, trees, verdicts, strict=True)]
        began, ended = clock.now(), began
        rows = [record(*row, began - ended) for row in zip(live, trees, verdicts, kept, strict=True)]
        clock.lap("host")
        yield list(zip(live, rows, strict=True))


def host_step(
    target: HFTarget,
    proposer: Proposer,
    accept: Rule,
    sampling: Sampling,
    clock: Clock,
    live: list[Sequence],
) -> tuple[list[TokenTree], list[Verdict]]:
    """One step, call by call."""
    trees = proposer.propose(live)
    clock.lap("propose")
    out = target.score(live, trees)
    clock.lap("score")
    verdicts = judge(accept, sampling, live, trees, out)
    clock.lap("accept")
    target.commit(live, verdicts)
    clock.lap("commit")
    proposer.observe(live, trees, verdicts, out)
    clock.lap("propose")
    return trees, verdicts


def prefill(target: HFTarget, proposer: Proposer, seqs: list[Sequence]) -> None:
    """Cache tokens[:-1] of every sequence and let the proposer see what the target made of them."""
    target.needs_hidden = proposer.needs_hidden
    target.reserve(len(seqs), max(len(s.tokens) + s.max_new_tokens for s in seqs))
    for slot, seq in enumerate(seqs):
        seq.slot = slot
    hidden = [target.prefill(seq.slot, seq.tokens[:-1]) for seq in seqs]
    proposer.start(seqs, hidden)


def judge(
    accept: Rule, sampling: Sampling, seqs: list[Sequence], trees: list[TokenTree], out: TargetOutput
) -> list[Verdict]:
    """The rule's verdict on every sequence: the one place where per-sequence rules meet the batch."""
    if out.logits_BNV.is_cuda and decides_on_device(accept):
        return judge_on_device(accept, sampling, seqs, trees, out)
    return [
        accept(tree, Laws(logits_NV, sampling, seq.where), seq.stream)
        for seq, tree, logits_NV in zip(seqs, trees, out.logits_BNV, strict=True)
    ]


def judge_on_device(
    accept: Rule, sampling: Sampling, seqs: list[Sequence], trees: list[TokenTree], out: TargetOutput
) -> list[Verdict]:
    """The same verdicts, with one device-to-host copy for all of them."""
    logits_BNV = out.logits_BNV
    batch = TreeBatch.pack(trees, logits_BNV.shape[1], logits_BNV.device)
    streams = StreamBatch.pack([seq.stream for seq in seqs], logits_BNV.device)
    return checked(seqs, verdicts_of(accept, sampling, batch, logits_BNV, streams).unpack())


def advance(seq: Sequence, tree: TokenTree, verdict: Verdict) -> int:
    """Append what was emitted; returns how many tokens were kept."""
    seq.history.append((max(tree.depth_N), len(verdict.path_A)))
    return seq.extend(verdict.emitted(tree))


def record(seq: Sequence, tree: TokenTree, verdict: Verdict, kept: int, seconds: float) -> StepRecord:
    accepted = len(verdict.path_A)
    end = verdict.path_A[-1] if verdict.path_A else 0
    offered = accepted + bool(tree.children(end))
    return StepRecord(len(seq.history) - 1, len(tree), offered, accepted, accepted + 1, kept, seconds)
