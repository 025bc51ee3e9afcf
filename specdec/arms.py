"""What a run needs, and the ways to answer that it compares: the method, plain decoding, and others' own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from .accept import Match, Rule
from .baselines import PLAIN_DTYPES, Answer, HFGenerate, baseline
from .data import Conversation, most_turns
from .decode import Clock, Sequence, decode
from .hardware import Hardware
from .proposers.base import Proposer
from .proposers.none import NoDraft
from .records import StepRecord
from .rng import Philox
from .sampling import Sampling
from .target import HFTarget
from .text import Request
from .trees import Chain

METHOD = "method"
WARM_UP = 16  # tokens


@dataclass(frozen=True)
class Settings:
    """How a run measures; names as in conf/config.yaml."""

    max_new_tokens: int = 128
    batch_size: int = 1
    baseline: tuple[str, ...] = ("none",)
    repeats: int = 1
    warmup: int = 1
    seed: int = 0
    chat: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("repeats", 1), ("warmup", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}, expected {least} or more: {name}={max(least, 1)}")


@dataclass
class Experiment:
    """Everything a run needs, as `specdec.build` makes it. names: what the summary calls each choice."""

    target: HFTarget
    proposer: Proposer
    accept: Rule
    sampling: Sampling
    conversations: list[Conversation]
    settings: Settings = field(default_factory=Settings)
    stop_ids: tuple[int, ...] = ()
    hardware: Hardware = field(default_factory=lambda: Hardware("local"))
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timed(Answer):
    """An answer with the steps that led to it."""

    steps: list[StepRecord]


class Arm(Protocol):
    """A way to answer."""

    def __call__(self, requests: list[Request], max_new_tokens: int) -> list[Answer]:
        """Answer a batch, with up to so many tokens each."""

    def warm_up(self, requests: list[Request], longest: int) -> None:
        """Answer with a few tokens, with room for texts of that length."""


@dataclass(frozen=True)
class LoopArm:
    """Our loop with one proposer and one rule."""

    experiment: Experiment
    proposer: Proposer
    accept: Rule

    def __call__(
        self, requests: list[Request], max_new_tokens: int, clock: Clock | None = None
    ) -> list[Timed]:
        e = self.experiment
        rng, clock = Philox(e.settings.seed), clock or Clock(e.target.device)
        seqs = [Sequence(r.number, list(r.ids), max_new_tokens, rng, e.stop_ids) for r in requests]
        rows: list[list[tuple[float, StepRecord]]] = [[] for _ in seqs]
        running = decode(e.target, self.proposer, self.accept, e.sampling, seqs, clock)
        with named(requests):
            next(running)
            prefill_end = clock.now()
            for step in running:
                now = clock.now()
                for seq, row in step:
                    rows[seq.slot].append((now, row))
        return [_timed_answer(seq, prefill_end, rows[seq.slot]) for seq in seqs]

    def warm_up(self, requests: list[Request], longest: int) -> None:
        e, rng = self.experiment, Philox(self.experiment.settings.seed)
        seqs = [Sequence(r.number, list(r.ids), longest - len(r.ids), rng, e.stop_ids) for r in requests]
        with named(requests):
            for _ in islice(decode(e.target, self.proposer, self.accept, e.sampling, seqs), WARM_UP):
                pass


def _timed_answer(seq: Sequence, prefill_end: float, rows: list[tuple[float, StepRecord]]) -> Timed:
    times, steps = [now for now, _ in rows], [row for _, row in rows]
    return Timed(seq.new_tokens, seq.finish, prefill_end, times, [row.kept for row in steps], steps)


@contextmanager
def named(requests: list[Request]) -> Iterator[None]:
    """Errors of the loop, which knows requests by number, name them by id."""
    try:
        yield
    except FloatingPointError as error:
        text = str(error)
        for r in requests:
            text = text.replace(f"request {r.number},", f"request {r.id},")
        raise FloatingPointError(text) from error


@dataclass(frozen=True)
class HFArm:
    """`transformers` generate on the same model."""

    experiment: Experiment
    generate: HFGenerate

    def __call__(self, requests: list[Request], max_new_tokens: int) -> list[Answer]:
        e = self.experiment
        return self.generate(
            [r.ids for r in requests], max_new_tokens, e.stop_ids, e.sampling, e.settings.seed
        )

    def warm_up(self, requests: list[Request], longest: int) -> None:
        self(requests, min(WARM_UP, self.experiment.settings.max_new_tokens))


def arms_of(experiment: Experiment) -> dict[str, Arm]:
    """The method and its baselines by name. Plain decoding samples as `accept=match` does.

    Plain decoding runs too, unasked, where later turns need its answers.
    """
    e = experiment
    needed = ["none"] if most_turns(e.conversations) > 1 else []
    return {METHOD: LoopArm(e, e.proposer, e.accept)} | {
        name: _baseline_arm(e, name) for name in [*e.settings.baseline, *needed]
    }


def _baseline_arm(e: Experiment, name: str) -> Arm:
    if name in PLAIN_DTYPES:
        e = replace(e, target=e.target.cast(PLAIN_DTYPES[name]))
    if name == "none" or name in PLAIN_DTYPES:
        return LoopArm(e, NoDraft(e.target, Chain()), Match())
    return HFArm(e, baseline(name, e.target.model, getattr(e.proposer, "assistant", None)))
