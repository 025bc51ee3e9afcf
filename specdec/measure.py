"""Answers every prompt with the method and its baselines, interleaved in one process, and keeps the record.

A conversation's later turns continue from plain decoding's answers, so that every arm reads the same prompts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import product

from . import metrics
from .arms import METHOD, Arm, Experiment, LoopArm, arms_of
from .baselines import PLAIN_DTYPES
from .data import Conversation, digest, most_turns
from .decode import PARTS, Clock, ProfilingClock
from .hardware import EnergyMeter, PeakMemory
from .lossless import compare
from .records import RequestRecord
from .store import RunFolder
from .text import Request, turn_of

PROFILED = 4  # requests that the profiling pass answers


def measure(
    experiment: Experiment,
    folder: RunFolder | None = None,
    progress: Callable[[int, int, list[RequestRecord]], None] = lambda done, total, records: None,
) -> tuple[dict, list[RequestRecord]]:
    """Run every arm over every conversation; returns the summary and the records.

    With a folder, groups that it holds are not run again, and each new one is saved when it is complete.
    ValueError, before anything is answered: a prompt that does not fit the model, or is not what the folder's
    groups were asked.
    """
    e = experiment
    check_prompts(e)
    arms = arms_of(e)
    records = folder.load() if folder else []
    check_same_prompts(e, records)
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


def check_prompts(experiment: Experiment) -> None:
    """ValueError unless every turn is of known tokens, and fits the model behind answers of full length."""
    e = experiment
    for r, answers in _lengths(e):
        if (token := max(r.ids, default=0)) >= e.target.vocab:
            raise ValueError(
                f"request {r.id}: token {token} of its prompt is beyond the {e.target.vocab} tokens that "
                f"{e.target.name} knows: give it a vocab_size of {token + 1} or more in target.config=, "
                "or a target.path= whose tokenizer fits its model"
            )
        if len(r.ids) + answers > e.target.max_length:
            raise ValueError(
                f"request {r.id}: {len(r.ids)} tokens of prompt and {answers} of answers exceed the "
                f"{e.target.max_length} that {e.target.name} can read: lower max_new_tokens=, "
                "or choose shorter prompts (data.limit=, data.categories=)"
            )


def check_same_prompts(experiment: Experiment, records: list[RequestRecord]) -> None:
    """ValueError unless the records' groups would be asked the same now, token for token."""
    e, said = experiment, defaultdict(list, _said_plainly(records))
    there, here = defaultdict(dict), {}
    for r in records:
        there[r.group][r.request] = r.prompt_hash
    for group, turn, chunk in _groups(e):
        here[group] = {r.id: digest(r.ids) for r in _requests(e, chunk, turn, said)}
    for group, asked in there.items():
        now = here.get(group, {})
        if differing := [key for key in {**asked, **now} if asked.get(key) != now.get(key)]:
            raise ValueError(
                f"request {differing[0]}: the prompts changed since this run began, expected those that "
                "its finished answers are of: restore them, or choose another out=DIR"
            )


def _lengths(e: Experiment) -> Iterator[tuple[Request, int]]:
    """Every request without the answers that its prompt will hold, and the tokens of these and of its own."""
    for batch in _unanswered(e):
        yield from ((r, (r.turn + 1) * e.settings.max_new_tokens) for r in batch)


def _unanswered(e: Experiment) -> list[list[Request]]:
    """The requests of every group, without the answers that their prompts will hold."""
    return [_requests(e, chunk, turn, defaultdict(list)) for _, turn, chunk in _groups(e)]


def summarise(experiment: Experiment, records: list[RequestRecord]) -> dict:
    """The run's summary; answers once more, with a profiling clock, to split the time of a step."""
    e = experiment
    by_arm = {name: [r for r in records if r.arm == name] for name in (METHOD, "none", *e.settings.baseline)}
    method = by_arm[METHOD]
    return metrics.summarise(
        method,
        {name: by_arm[name] for name in e.settings.baseline},
        header=_header(e),
        split=profile(e),
        lossless=compare(e, method, by_arm["none"], _asked(e, records)),
    )


def _header(e: Experiment) -> dict:
    """What was run on what, as it came out where the settings said auto."""
    return {
        **e.names,
        "fingerprint": e.target.fingerprint,
        "dtype": e.target.dtype_name,
        "device": str(e.target.device),
        "batch_size": e.settings.batch_size,
        "temperature": e.sampling.temperature,
        "reading": e.proposer.reading,
        "hardware": e.hardware.name,
        "price_per_hour": e.hardware.price_per_hour,
    }


def profile(experiment: Experiment) -> dict[str, float]:
    """Milliseconds of each part of a step, from a pass of its own that synchronises after every part.

    There the host takes every step, also where the timed ones stay on the device.
    """
    e = experiment
    arm = LoopArm(e, e.proposer, e.accept)
    clock, steps = ProfilingClock(e.target.device), 0
    first_turns = [chunk for _, turn, chunk in _groups(e) if turn == 0]
    for chunk in first_turns[: -(-PROFILED // e.settings.batch_size)]:
        answers = arm(_requests(e, chunk, 0, {}), e.settings.max_new_tokens, clock)
        steps += max(len(answer.steps) for answer in answers)
    return {part: 1e3 * clock.parts[part] / steps for part in PARTS}


def _asked(e: Experiment, records: list[RequestRecord]) -> dict[str, Request]:
    """Every request by its id."""
    said = _said_plainly(records)
    return {r.id: r for _, turn, chunk in _groups(e) for r in _requests(e, chunk, turn, said)}


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
    """Let every arm meet the shapes it will run, outside the measurement: batches and the longest text.

    The largest batch first: caches that are made for it serve the others where they are.
    """
    longest = max(len(r.ids) + answers for r, answers in _lengths(e))
    by_size = {len(batch): batch for batch in reversed(_unanswered(e))}
    sizes = sorted(by_size, reverse=True)
    for _, size, arm in product(range(e.settings.warmup), sizes, arms.values()):
        arm.warm_up(by_size[size], longest)


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
    clock = Clock(e.target.device)
    memory.reset()
    clock.settled()  # the arm before may have left a step that nobody waits for
    energy.start()
    answers = arm(requests, e.settings.max_new_tokens)
    clock.settled()
    joules, peak = energy.stop(), None if _has_twin(e) else memory.peak_mb()
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


def _has_twin(e: Experiment) -> bool:
    """Whether a copy of the target in another dtype lies in memory all the while, which is no arm's need."""
    return not PLAIN_DTYPES.keys().isdisjoint(e.settings.baseline)
