"""Answers every prompt with the method and its baselines, interleaved in one process, and keeps what was measured.

A conversation's later turns continue from plain decoding's answers, so that every arm reads the same prompts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from . import metrics
from .accept import Match, Rule
from .baselines import Answer, HFGenerate, baseline
from .data import Conversation, digest, render
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
            value = getattr(self, name)
            if value < least:
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


@dataclass(frozen=True)
class Request:
    """One turn of a conversation; `number` keys its randomness."""

    id: str
    number: int
    conversation: str
    turn: int
    category: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Timed(Answer):
    """An answer with the steps that led to it."""

    steps: list[StepRecord]


class Arm(Protocol):
    """Something that answers a batch of requests."""

    def __call__(self, requests: list[Request], max_new_tokens: int) -> list[Answer]: ...


@dataclass(frozen=True)
class LoopArm:
    """Our loop with one proposer and one rule."""

    experiment: Experiment
    proposer: Proposer
    accept: Rule

    def __call__(self, requests: list[Request], max_new_tokens: int, clock: Clock | None = None) -> list[Timed]:
        e = self.experiment
        seqs = [
            Sequence(r.number, list(r.ids), max_new_tokens, Philox(e.settings.seed), e.stop_ids) for r in requests
        ]
        clock = clock or Clock(e.target.device)
        times: dict[int, list[float]] = {s.request: [] for s in seqs}
        steps: dict[int, list[StepRecord]] = {s.request: [] for s in seqs}
        running = decode(e.target, self.proposer, self.accept, e.sampling, seqs, clock)
        next(running)
        prefill_end = clock.now()
        for rows in running:
            now = clock.now()
            for seq, row in rows:
                times[seq.request].append(now)
                steps[seq.request].append(row)
        return [
            Timed(
                s.new_tokens, s.finish, prefill_end, times[s.request], [r.kept for r in steps[s.request]], steps[s.request]
            )
            for s in seqs
        ]


@dataclass(frozen=True)
class HFArm:
    """`transformers` generate on the same model."""

    experiment: Experiment
    generate: HFGenerate

    def __call__(self, requests: list[Request], max_new_tokens: int) -> list[Answer]:
        e = self.experiment
        prompts = [r.ids for r in requests]
        return self.generate(prompts, max_new_tokens, e.stop_ids, e.sampling, e.settings.seed)


def arms_of(experiment: Experiment) -> dict[str, Arm]:
    """The method and its baselines by name. Plain decoding samples as `accept=match` does, at any temperature."""
    e = experiment
    plain = LoopArm(e, NoDraft(e.target, Chain()), Match())
    assistant = getattr(e.proposer, "assistant", None)
    others = {
        name: plain if name == "none" else HFArm(e, baseline(name, e.target.model, assistant))
        for name in e.settings.baseline
    }
    return {METHOD: LoopArm(e, e.proposer, e.accept), **others}


def measure(
    experiment: Experiment,
    folder: RunFolder | None = None,
    progress: Callable[[int, int, list[RequestRecord]], None] = lambda done, total, records: None,
) -> tuple[dict, list[RequestRecord]]:
    """Run every arm over every conversation; returns the summary and the records.

    With a folder, groups that it holds already are not run again, and each new one is saved when it is complete.
    """
    e = experiment
    chunks = _chunks(e.conversations, e.settings.batch_size)
    turns = max(len(c.turns) for c in e.conversations)
    if turns > 1 and "none" not in e.settings.baseline:
        raise ValueError("later turns continue from plain decoding's answers: expected baseline=[none,...]")
    arms = arms_of(e)
    records = folder.load() if folder else []
    finished = {r.group for r in records}
    total = sum(len(c.turns) for c in e.conversations)
    if len(finished) < len(chunks) * turns:
        _warm_up(e, arms)
    for chunk_index, chunk in enumerate(chunks):
        for turn in range(max(len(c.turns) for c in chunk)):
            group = chunk_index * turns + turn
            if group not in finished:
                new = list(_answer_group(e, arms, group, _requests(e, chunk, turn, records)))
                if folder:
                    folder.save_group(group, new)
                records += new
            progress(len({r.request for r in records}), total, records)
    return summarise(e, records), records


def summarise(experiment: Experiment, records: list[RequestRecord]) -> dict:
    """The run's summary; answers once more, with a profiling clock, to split the time of a step."""
    e = experiment
    by_arm = {name: [r for r in records if r.arm == name] for name in (METHOD, *e.settings.baseline)}
    method = by_arm.pop(METHOD)
    header = {**e.names, "batch_size": e.settings.batch_size, "temperature": e.sampling.temperature}
    return metrics.summarise(
        method,
        by_arm,
        header=header,
        split=profile(e),
        price_per_hour=e.hardware.price_per_hour,
        lossless=compare(e, method, by_arm.get("none"), _prompts(e, records)),
    )


def profile(experiment: Experiment) -> dict[str, float]:
    """Milliseconds of each part of a step, from a pass of its own that synchronises after every part."""
    e = experiment
    arm = LoopArm(e, e.proposer, e.accept)
    clock, steps = ProfilingClock(e.target.device), 0
    for conversation in e.conversations[:PROFILED]:
        (answer,) = arm([_request(e, conversation, 0, {})], e.settings.max_new_tokens, clock)
        steps += len(answer.steps)
    return {part: 1e3 * clock.parts[part] / steps for part in PARTS}


def _prompts(e: Experiment, records: list[RequestRecord]) -> dict[str, list[int]]:
    """Token ids of every request's prompt."""
    requests = [r for c in e.conversations for turn in range(len(c.turns)) for r in _requests(e, [c], turn, records)]
    return {r.id: r.ids for r in requests}


def _chunks(conversations: list[Conversation], size: int) -> list[list[Conversation]]:
    return [conversations[i : i + size] for i in range(0, len(conversations), size)]


def _requests(e: Experiment, chunk: list[Conversation], turn: int, records: list[RequestRecord]) -> list[Request]:
    """The chunk's requests of one turn, behind plain decoding's answers to the turns before."""
    said = {r.request: r.tokens for r in records if r.arm == "none" and r.repeat == 0}
    return [_request(e, c, turn, said) for c in chunk if turn < len(c.turns)]


def _request(e: Experiment, conversation: Conversation, turn: int, said: dict[str, list[int]]) -> Request:
    tokenizer = e.target.tokenizer
    messages = []
    for t, text in enumerate(conversation.turns[: turn + 1]):
        messages.append({"role": "user", "content": text})
        if t < turn:
            answer = tokenizer.decode(said[f"{conversation.id}/{t}"], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
    ids = render(tokenizer, messages, e.settings.chat)
    number = int(digest([*conversation.id.encode(), turn]), 16) & 0x7FFFFFFF
    return Request(f"{conversation.id}/{turn}", number, conversation.id, turn, conversation.category, ids)


def _warm_up(e: Experiment, arms: dict[str, Arm]) -> None:
    """Let every arm meet the shapes it will run, outside the measurement."""
    first = [_request(e, c, 0, {}) for c in e.conversations[: e.settings.batch_size]]
    for _ in range(e.settings.warmup):
        for arm in arms.values():
            arm(first, min(16, e.settings.max_new_tokens))


def _answer_group(
    e: Experiment, arms: dict[str, Arm], group: int, requests: list[Request]
) -> Iterator[RequestRecord]:
    """Every arm on one group, in an order that rotates so that none always runs first."""
    names = list(arms)
    for repeat in range(e.settings.repeats):
        shift = (group + repeat) % len(names)
        for name in names[shift:] + names[:shift]:
            yield from _timed(e, name, arms[name], group, repeat, requests)


def _timed(
    e: Experiment, name: str, arm: Arm, group: int, repeat: int, requests: list[Request]
) -> Iterator[RequestRecord]:
    memory, energy = PeakMemory(e.target.device), EnergyMeter.for_device(e.target.device)
    memory.reset()
    energy.start()
    answers = arm(requests, e.settings.max_new_tokens)
    joules = energy.stop()
    peak = memory.peak_mb()
    for request, answer in zip(requests, answers, strict=True):
        yield RequestRecord(
            request=request.id,
            conversation=request.conversation,
            turn=request.turn,
            category=request.category,
            arm=name,
            repeat=repeat,
            group=group,
            prompt_tokens=len(request.ids),
            prompt_hash=digest(request.ids),
            tokens=answer.tokens,
            finish=answer.finish,
            prefill_end=answer.prefill_end,
            burst_times=answer.burst_times,
            burst_sizes=answer.burst_sizes,
            steps=getattr(answer, "steps", []),
            peak_memory_mb=peak,
            energy_joules=None if joules is None else joules / len(requests),
        )
