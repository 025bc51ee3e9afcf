"""Answers every prompt with the method and its baselines, interleaved in one process, and keeps the record.

A conversation's later turns continue from plain decoding's answers, so that every arm reads the same prompts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from . import metrics
from .accept import Match, Rule
from .baselines import PLAIN_DTYPES, Answer, HFGenerate, baseline
from .data import Conversation, digest, most_turns
from .decode import PARTS, Clock, ProfilingClock, Sequence, decode
from .hardware import EnergyMeter, Hardware, PeakMemory
from .lossless import compare
from .proposers.base import Proposer
from .proposers.none import NoDraft
from .records import RequestRecord, StepRecord
from .rng import Philox
from .sampling import Sampling
from .store import RunFolder
from .target import HFTarget
from .text import Request, turn_of
from .trees import Chain

PROFILED = 4  # requests that the profiling pass answers
METHOD = "method"


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


Arm = Callable[[list[Request], int], list[Answer]]  # answers a batch, with up to so many tokens each


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


def measure(
    experiment: Experiment,
    folder: RunFolder | None = None,
    progress: Callable[[int, int, list[RequestRecord]], None] = lambda done, total, records: None,
) -> tuple[dict, list[RequestRecord]]:
    """Run every arm over every conversation; returns the summary and the records.

    With a folder, groups that it holds are not run again, and each new one is saved when it is complete.
    ValueError, before anything is answered: a prompt that does not fit the model.
    """
    e = experiment
    check_lengths(e)
    arms = arms_of(e)
    records = folder.load() if folder else []
    finished = {r.group for r in records}
    total = sum(len(c.turns) for c in e.conversations)
    progress(len({r.request for r in records}), total, records)
    _warm_up(e, arms)
    for group, turn, chunk in _groups(e):
        if group in finished:
            continue
        new = list(_answer_group(e, arms, group, _requests(e, chunk, turn, _said_plainly(records))))
        if folder:
            folder.save_group(group, new)
        records += new
        progress(len({r.request for r in records}), total, records)
    return summarise(e, records), records


def check_lengths(experiment: Experiment) -> None:
    """ValueError unless every turn fits the model, behind answers of full length."""
    e = experiment
    for _, turn, chunk in _groups(e):
        for r in _requests(e, chunk, turn, defaultdict(list)):
            answers = (turn + 1) * e.settings.max_new_tokens
            if len(r.ids) + answers > e.target.max_length:
                raise ValueError(
                    f"request {r.id}: {len(r.ids)} tokens of prompt and {answers} of answers exceed the "
                    f"{e.target.max_length} that {e.target.name} can read: lower max_new_tokens=, "
                    "or choose shorter prompts (data.limit=, data.categories=)"
                )


def summarise(experiment: Experiment, records: list[RequestRecord]) -> dict:
    """The run's summary; answers once more, with a profiling clock, to split the time of a step."""
    e = experiment
    by_arm = {name: [r for r in records if r.arm == name] for name in (METHOD, "none", *e.settings.baseline)}
    method = by_arm[METHOD]
    header = {**e.names, "batch_size": e.settings.batch_size, "temperature": e.sampling.temperature}
    return metrics.summarise(
        method,
        {name: by_arm[name] for name in e.settings.baseline},
        header=header,
        split=profile(e),
        price_per_hour=e.hardware.price_per_hour,
        lossless=compare(e, method, by_arm["none"], _prompts(e, records)),
    )


def profile(experiment: Experiment) -> dict[str, float]:
    """Milliseconds of each part of a step, from a pass of its own that synchronises after every part."""
    e = experiment
    arm = LoopArm(e, e.proposer, e.accept)
    clock, steps = ProfilingClock(e.target.device), 0
    first_turns = [chunk for _, turn, chunk in _groups(e) if turn == 0]
    for chunk in first_turns[: -(-PROFILED // e.settings.batch_size)]:
        answers = arm(_requests(e, chunk, 0, {}), e.settings.max_new_tokens, clock)
        steps += max(len(answer.steps) for answer in answers)
    return {part: 1e3 * clock.parts[part] / steps for part in PARTS}


def _prompts(e: Experiment, records: list[RequestRecord]) -> dict[str, list[int]]:
    """Token ids of every request's prompt."""
    said = _said_plainly(records)
    return {r.id: r.ids for _, turn, chunk in _groups(e) for r in _requests(e, chunk, turn, said)}


def _groups(e: Experiment) -> Iterator[tuple[int, int, list[Conversation]]]:
    """(number, turn, conversations) of all that run together; the same in every run of these prompts."""
    turns, size = most_turns(e.conversations), e.settings.batch_size
    for index in range(-(-len(e.conversations) // size)):
        chunk = e.conversations[index * size : (index + 1) * size]
        for turn in range(most_turns(chunk)):
            yield index * turns + turn, turn, chunk


def _said_plainly(records: list[RequestRecord]) -> dict[str, list[int]]:
    return {r.request: r.tokens for r in records if r.arm == "none" and r.repeat == 0}


def _requests(
    e: Experiment, chunk: list[Conversation], turn: int, said: Mapping[str, list[int]]
) -> list[Request]:
    """The chunk's requests of one turn, behind plain decoding's answers to the turns before."""
    return [turn_of(e.target.tokenizer, c, turn, said, e.settings.chat) for c in chunk if turn < len(c.turns)]


def _warm_up(e: Experiment, arms: dict[str, Arm]) -> None:
    """Let every arm meet the shapes it will run, outside the measurement."""
    first = _requests(e, e.conversations[: e.settings.batch_size], 0, {})
    for _ in range(e.settings.warmup):
        for arm in arms.values():
            arm(first, min(16, e.settings.max_new_tokens))


def _answer_group(
    e: Experiment, arms: dict[str, Arm], group: int, requests: list[Request]
) -> Iterator[RequestRecord]:
    """Every arm on one group, in an order that rotates so that none always runs first."""
    names = list(arms)
    for repeat in range(e.settings.repeats):
        # Not by the group alone: of two arms over two turns, one would always answer the first turns first.
        shift = (group // most_turns(e.conversations) + requests[0].turn + repeat) % len(names)
        for name in names[shift:] + names[:shift]:
            yield from _timed(e, name, arms[name], group, repeat, requests)


def _timed(
    e: Experiment, name: str, arm: Arm, group: int, repeat: int, requests: list[Request]
) -> Iterator[RequestRecord]:
    memory, energy = PeakMemory(e.target.device), EnergyMeter.for_device(e.target.device)
    memory.reset()
    energy.start()
    answers = arm(requests, e.settings.max_new_tokens)
    joules, peak = energy.stop(), memory.peak_mb()
    for r, answer in zip(requests, answers, strict=True):
        yield RequestRecord(
            request=r.id,
            conversation=r.conversation,
            turn=r.turn,
            category=r.category,
            arm=name,
            repeat=repeat,
            group=group,
            prompt_tokens=len(r.ids),
            prompt_hash=digest(r.ids),
            tokens=answer.tokens,
            finish=answer.finish,
            prefill_end=answer.prefill_end,
            burst_times=answer.burst_times,
            burst_sizes=answer.burst_sizes,
            steps=getattr(answer, "steps", []),
            peak_memory_mb=peak,
            energy_joules=None if joules is None else joules / len(requests),
        )
