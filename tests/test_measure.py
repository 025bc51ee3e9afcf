"""How a run measures: all arms read the same prompts, in an order that rotates; only answers are recorded."""

import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import Uncaptured, like_a_gpu, tiny

from specdec.accept import Match
from specdec.arms import METHOD, Experiment, LoopArm, Settings, arms_of
from specdec.cache import DeviceCache
from specdec.data import Conversation
from specdec.decode import PARTS, Clock, ProfilingClock
from specdec.hardware import EnergyMeter, PeakMemory
from specdec.measure import measure, profile
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.ngram import NGram
from specdec.records import RequestRecord
from specdec.sampling import Sampling
from specdec.store import RunFolder
from specdec.target import HFTarget
from specdec.trees import Chain

measurement = sys.modules["specdec.measure"]  # `specdec.measure` is the function
TALKS = [Conversation(f"c{i}", "x", tuple(f"turn {t} of {i}" for t in range(1 + i % 2))) for i in range(5)]


class Letters:
    """A tokenizer of 32 tokens."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [byte % 32 for byte in text.encode()]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(64 + i for i in ids).decode()


def experiment(talks: list[Conversation] = TALKS, **settings: object) -> Experiment:
    target = tiny()
    target.tokenizer = Letters()
    names = dict.fromkeys(("target", "proposer", "tree", "accept", "data"), "x")
    chosen = Settings(**{"max_new_tokens": 6, "warmup": 0, **settings})
    return Experiment(target, NGram(target, Chain()), Match(), Sampling(), talks, chosen, names=names)


def test_the_summary_says_how_heads_of_another_project_were_read() -> None:
    e = experiment(TALKS[:1])
    assert measure(e)[0]["reading"] is None
    e.proposer.reading = "official, layers [2, 4, 5]"
    assert measure(e)[0]["reading"] == e.proposer.reading


def order(records: list[RequestRecord]) -> dict[tuple[int, int], list[str]]:
    """The arms of every (group, repeat), in the order in which they ran."""
    arms = defaultdict(list)
    for r in records:
        if r.arm not in arms[r.group, r.repeat]:
            arms[r.group, r.repeat].append(r.arm)
    return arms


def test_no_arm_always_runs_first() -> None:
    _, records = measure(experiment(TALKS[1::2], repeats=2))
    first = {key: arms[0] for key, arms in order(records).items()}
    turns = {(r.group, r.repeat): r.turn for r in records}
    for turn in (0, 1):
        of_turn = Counter(arm for key, arm in first.items() if turns[key] == turn)
        assert of_turn == {METHOD: 2, "none": 2}, turn


def test_three_arms_rotate() -> None:
    single = [c for c in TALKS if len(c.turns) == 1]
    _, records = measure(experiment(single, baseline=("none", "hf")))
    assert Counter(arms[0] for arms in order(records).values()) == {METHOD: 1, "none": 1, "hf": 1}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_are_the_same_for_every_arm_and_every_turn_has_its_own(size: int) -> None:
    _, records = measure(experiment(batch_size=size, repeats=2))
    members = defaultdict(set)
    for r in records:
        members[r.group, r.arm, r.repeat].add((r.conversation, r.turn))
    for (group, _, _), found in members.items():
        assert found == members[group, METHOD, 0]
        assert len({turn for _, turn in found}) == 1
        assert len(found) <= size
    everyone = [
        m for (_, arm, repeat), found in members.items() if (arm, repeat) == (METHOD, 0) for m in found
    ]
    assert sorted(everyone) == sorted((c.id, t) for c in TALKS for t in range(len(c.turns)))


def test_later_turns_continue_from_plain_decodings_answers_for_every_arm() -> None:
    e = experiment(baseline=("none", "hf"))
    e.sampling = Sampling(temperature=1.0)
    _, records = measure(e)
    hashes = defaultdict(set)
    for r in records:
        hashes[r.request].add((r.prompt_hash, r.prompt_tokens))
    assert all(len(found) == 1 for found in hashes.values())
    plain = {r.request: r.tokens for r in records if r.arm == "none"}
    other = {r.request: r.tokens for r in records if r.arm == "hf"}
    assert (
        plain != other
    )  # sampled from other randomness: the prompts would differ if each arm went on by itself
    second = next(r for r in records if r.request == "c1/1")
    text = f"{TALKS[1].turns[0]}\n\n{Letters().decode(plain['c1/0'])}\n\n{TALKS[1].turns[1]}"
    assert second.prompt_tokens == len(text)


@pytest.mark.parametrize("baseline", [(), ("hf",)])
def test_plain_decoding_runs_unasked_where_a_later_turn_needs_it(baseline: tuple[str, ...]) -> None:
    summary, records = measure(experiment(TALKS[:2], baseline=baseline))
    assert {r.arm for r in records} == {METHOD, "none", *baseline}
    assert list(summary["speedup"]) == list(baseline)
    _, alone = measure(experiment(TALKS[:1], baseline=baseline))
    assert {r.arm for r in alone} == {METHOD, *baseline}


@pytest.mark.parametrize("size", [1, 3])
def test_answers_do_not_depend_on_the_batch(size: int) -> None:
    e = experiment(batch_size=size)
    e.sampling = Sampling(temperature=1.0, top_p=0.9)
    _, records = measure(e)
    e.settings = Settings(max_new_tokens=6, batch_size=2)
    _, others = measure(e)
    assert {(r.request, r.arm): r.tokens for r in records} == {(r.request, r.arm): r.tokens for r in others}


def test_warming_up_and_profiling_leave_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, warmed = [], []
    answer, warm_up = LoopArm.__call__, LoopArm.warm_up

    def spy(self: LoopArm, requests: list, longest: int, clock: Clock | None = None) -> list:
        clocks.append(type(clock))
        return answer(self, requests, longest, clock)

    def warm(self: LoopArm, requests: list, longest: int) -> None:
        warmed.append((len(requests), longest))
        warm_up(self, requests, longest)

    monkeypatch.setattr(LoopArm, "__call__", spy)
    monkeypatch.setattr(LoopArm, "warm_up", warm)
    _, records = measure(experiment(TALKS[:2], warmup=3))
    assert len(records) == 2 * 3
    assert len(warmed) == 2 * 3
    (warm_batch,) = set(warmed)
    assert warm_batch == (1, max(r.prompt_tokens for r in records) + 6), "room for the longest text"
    # 3 requests by 2 arms, then the first turns again for the time split.
    assert clocks == [type(None)] * 6 + [ProfilingClock] * 2


def test_nothing_is_captured_and_no_cache_moves_once_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts of all lengths, in batches of two sizes."""
    like_a_gpu(monkeypatch)
    events, capture, make, timed = [], Uncaptured.capture, DeviceCache.__init__, measurement._timed
    monkeypatch.setattr(Uncaptured, "capture", lambda *a: events.append("capture") or capture(*a))
    monkeypatch.setattr(DeviceCache, "__init__", lambda *a: events.append("cache") or make(*a))
    monkeypatch.setattr(measurement, "_timed", lambda *a: events.append("timed") or timed(*a))
    talks = [Conversation(f"c{i}", "x", ("word " * (1 + 7 * i),)) for i in range(3)]
    e = experiment(talks, batch_size=2, warmup=1)
    e.target = HFTarget(tiny().model, tokenizer=Letters(), fingerprint=tiny().fingerprint)
    e.proposer = DraftLM(e.target, Chain(depth=2), layers=1)
    measure(e)
    first = events.index("timed")
    last = len(events) - events[::-1].index("timed")
    assert events[:first].count("capture") >= 2 * 2, "two arms, two sizes"
    assert set(events[first:last]) == {"timed"}


def test_the_time_split_is_of_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def lap(self: ProfilingClock, part: str) -> None:
        self.parts[part] += 1.0

    monkeypatch.setattr(ProfilingClock, "lap", lap)
    for size in (1, 2):
        split = profile(experiment(batch_size=size))
        assert set(split) == set(PARTS)
        assert split["score"] == split["accept"] == split["commit"] == 1000.0  # one a step, in milliseconds
        assert split["propose"] == 2000.0


def test_energy_that_cannot_be_read_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EnergyMeter, "for_device", lambda device: EnergyMeter([]))
    summary, records = measure(experiment(TALKS[:1]))
    assert summary["joules_per_token"] is None
    assert {r.energy_joules for r in records} == {None}


def test_a_batchs_energy_is_divided_among_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EnergyMeter, "stop", lambda self: 6.0)
    monkeypatch.setattr(PeakMemory, "peak_mb", lambda self: 7.0)
    summary, records = measure(experiment(TALKS[:3:2], batch_size=2))
    assert {r.energy_joules for r in records} == {3.0}
    assert summary["joules_per_token"] == 6.0 / summary["tokens"]
    assert summary["peak_memory_mb"] == 7.0


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run that a power cut ended before the third conversation."""
    answer = LoopArm.__call__

    def fails_at_the_third(self: LoopArm, requests: list, *rest: object) -> list:
        if requests[0].id == "c2/0":
            raise RuntimeError("power cut")
        return answer(self, requests, *rest)

    folder = RunFolder(tmp_path)
    folder.open({}, {})
    with monkeypatch.context() as patched:
        patched.setattr(LoopArm, "__call__", fails_at_the_third)
        with pytest.raises(RuntimeError):
            measure(experiment(), folder)
    return folder


def test_finished_groups_are_not_run_again(cut: RunFolder) -> None:
    before = cut.load()
    assert {r.request for r in before} == {"c0/0", "c1/0", "c1/1"}
    done: list[int] = []
    _, records = measure(experiment(), cut, lambda so_far, total, rows: done.append(so_far))
    assert records[: len(before)] == before
    assert done == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("talks", "differing"),
    [
        ([replace(TALKS[0], turns=("edited",)), *TALKS[1:]], "c0/0"),
        ([TALKS[0], replace(TALKS[1], turns=(TALKS[1].turns[0], "edited")), *TALKS[2:]], "c1/1"),
        ([TALKS[0], replace(TALKS[1], id="new"), *TALKS[1:]], "c1/0"),
        (TALKS[:1], "c1/0"),
    ],
    ids=["first turn", "second turn", "one more", "fewer"],
)
def test_a_run_does_not_go_on_with_other_prompts(
    cut: RunFolder, talks: list[Conversation], differing: str
) -> None:
    before = cut.load()
    with pytest.raises(ValueError, match=rf"^request {differing}: the prompts changed .*another out=DIR$"):
        measure(experiment(talks), cut, lambda *_: pytest.fail("too late"))
    assert cut.load() == before


def test_nothing_is_answered_if_a_prompt_does_not_fit() -> None:
    long = Conversation("long", "x", ("a", "b" * tiny().max_length))
    with pytest.raises(
        ValueError, match=r"request long/1: 205\d tokens of prompt and 12 of answers exceed the 2048"
    ):
        measure(experiment([*TALKS, long]), progress=lambda *_: pytest.fail("too late"))


def test_plain_decoding_in_another_dtype_is_a_baseline() -> None:
    e = experiment(baseline=("none", "none_bfloat16"))
    summary, _ = measure(e)
    assert set(summary["speedup"]) == {"none", "none_bfloat16"}
    twin = arms_of(e)["none_bfloat16"].experiment.target
    assert (e.target.dtype, twin.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(twin.lm_head, e.target.lm_head.bfloat16())


@pytest.mark.parametrize(("baseline", "peak"), [("none", 7.0), ("none_bfloat16", None)])
def test_a_peak_with_a_second_target_in_memory_is_unknown(
    baseline: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeakMemory, "peak_mb", lambda self: 7.0)
    summary, records = measure(experiment(TALKS[:1], baseline=(baseline,)))
    assert summary["peak_memory_mb"] == peak
    assert {r.peak_memory_mb for r in records} == {peak}


def test_settings_below_the_least() -> None:
    for name in ("max_new_tokens", "batch_size", "repeats"):
        with pytest.raises(ValueError, match=rf"^{name} is 0, expected 1 or more: {name}=1$"):
            Settings(**{name: 0})
