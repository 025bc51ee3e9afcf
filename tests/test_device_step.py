"""Steps that stay on the device give the text that steps of the host give.

Here they run on the CPU, with the cache that a GPU has and without a capture; with one on a GPU.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    VOCAB,
    cyclic,
    cyclic_heads,
    like_a_gpu,
    requests,
    run,
    save_heads,
    tiny,
    untrained_heads,
)
from on_device import (
    BUGS,
    CASES,
    CHAIN,
    TEXTS,
    TREE,
    Make,
    answers,
    built,
    draft,
    host,
    lookup,
    none,
    target_of,
)

from specdec import device_step as steps
from specdec.accept import Match, Rule
from specdec.decode import ProfilingClock, Sequence, decode
from specdec.engine import Engine
from specdec.proposers.base import Proposer
from specdec.proposers.eagle3 import Eagle3
from specdec.proposers.none import NoDraft
from specdec.rng import Philox
from specdec.sampling import LawBatch
from specdec.target import HFTarget
from specdec.trees import Chain, TreePolicy


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., HFTarget]:
    """Makes a target whose steps stay on the device."""

    def made(name: str = "llama", **engine: object) -> HFTarget:
        like_a_gpu(monkeypatch)
        return host(name, Engine(**engine))

    return made


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of random heads, by kind."""
    folder, made = tmp_path_factory.mktemp("heads"), {}
    for kind in (False, True):
        drafted = untrained_heads(tiny(), list(range(3, VOCAB)), hydra=kind)
        made["hydra" if kind else "medusa"] = save_heads(drafted, tiny(), folder / f"{kind}.safetensors")
    return made | {"cyclic": save_heads(cyclic_heads(), cyclic(), folder / "right.safetensors")}


@pytest.mark.parametrize("longest", [24, [9, 1, 2]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_texts_and_steps_are_the_hosts(
    case: str, longest: list[int] | int, device: Callable, heads: dict[str, str]
) -> None:
    make, tree, rule, sampling = CASES[case]
    want = answers(built(make, host(target_of(make)), tree, heads), rule, sampling, longest)
    proposer = built(make, device(target_of(make), graphs="step"), tree, heads)
    assert answers(proposer, rule, sampling, longest) == want
    assert len(proposer.steps) == 1
    assert answers(proposer, rule, sampling, longest) == want, "a second batch at the same addresses"
    assert len(proposer.steps) == 1, "it is captured once"


def test_windows_too(device: Callable) -> None:
    want = answers(lookup(host("mistral"), CHAIN), Match(), SAMPLED)
    assert answers(lookup(device("mistral", graphs="step"), CHAIN), Match(), SAMPLED) == want


def test_what_moved_is_captured_anew(device: Callable) -> None:
    proposer, rule = lookup(device(graphs="step"), CHAIN), Match()
    for prompts, longest in ((TEXTS, 24), ([TEXTS[0] * 9], 200), (TEXTS, 24)):
        seqs, same = (requests(prompts, longest) for _ in range(2))
        run(proposer, seqs, rule=rule)
        run(lookup(host(), CHAIN), same)
        assert [s.tokens for s in seqs] == [s.tokens for s in same]
    assert len(proposer.steps) == 1, "what does not fit any more is forgotten"


def test_another_seed_is_captured_anew(device: Callable) -> None:
    proposer, rule = lookup(device(graphs="step"), CHAIN), Match()
    for seed in (1, 2):
        seqs, same = (
            [Sequence(r.request, r.tokens, 12, Philox(seed)) for r in requests(TEXTS)] for _ in range(2)
        )
        run(proposer, seqs, SAMPLED, rule)
        run(lookup(host(), CHAIN), same, SAMPLED)
        assert [s.tokens for s in seqs] == [s.tokens for s in same]


def test_a_verdict_is_read_while_the_next_step_runs(
    device: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, receive = [], steps.Results.receive
    monkeypatch.setattr(
        steps.Results, "receive", lambda results: seen.append(len(results)) or receive(results)
    )
    records = run(none(device(graphs="step"), CHAIN), requests(TEXTS[:1], 8))
    assert seen == [2] * len(records), "of two that were launched the first is read"


def test_a_profile_takes_steps_apart(device: Callable) -> None:
    proposer = none(device(), CHAIN)
    clock = ProfilingClock(proposer.target.device)
    for _ in decode(proposer.target, proposer, Match(), GREEDY, requests(TEXTS, 4), clock):
        pass
    assert not proposer.steps
    assert clock.parts["score"] > 0


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_changes_what_comes_out(
    bug: Callable, device: Callable, heads: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, tree, rule, sampling = CASES[BUGS[bug]]
    want = answers(built(make, host(target_of(make)), tree, heads), rule, sampling)
    proposer = built(make, device(target_of(make), graphs="step"), tree, heads)
    bug(monkeypatch)
    try:
        got = answers(proposer, rule, sampling)
    except (ValueError, RuntimeError) as error:
        got = error
    assert got != want


def test_logits_that_are_not_numbers_name_the_request(
    device: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = device(graphs="step")
    score = target.score_device

    def poisoned(*args: object) -> object:
        out = score(*args)
        row_B11 = torch.arange(2).view(-1, 1, 1)
        return replace(out, logits_BNV=torch.where(row_B11 == 1, torch.nan, out.logits_BNV))

    monkeypatch.setattr(target, "score_device", poisoned)
    with pytest.raises(FloatingPointError, match=r"^request 1, step 0: .*target.dtype=float32$"):
        run(none(target, CHAIN), requests(TEXTS[:2], 8))


class Watched(NoDraft):
    """Looks at every step, which its drafts on the device would not."""

    def observe(self, *_: object) -> None:
        """See above."""


class Pruned(Chain):
    """Other trees, of which only the host knows."""

    def grow(self, root: int, levels: int, stream: object) -> None:
        """Never asked here."""


class Own(Match):
    """Another rule, of which only the form to read is written."""

    def __call__(self, *_: object) -> None:
        """Never asked here."""


@pytest.mark.parametrize(
    ("make", "tree", "rule", "prompts", "reason"),
    [
        (Watched, CHAIN, Match(), TEXTS, "Watched changes what its drafts on the device leave as it was"),
        (none, CHAIN, Own(), TEXTS, "Own decides on the host"),
        (lookup, Pruned(), Match(), TEXTS, "Pruned changes what its growth on the device leaves as it was"),
        (lookup, TREE, Match(), TEXTS, "tree=chain"),
        (draft, TREE, Match(), TEXTS, "tree=chain"),
        (draft, CHAIN, Match(), PROMPTS, "a prompt of one token leaves its draft model nothing to read"),
        ("medusa", TREE, Match(), PROMPTS, "a prompt of one token leaves its heads nothing to read"),
        ("medusa", Chain(length="heuristic"), Match(), TEXTS, "tree.length=heuristic is decided by the host"),
    ],
)
def test_what_the_host_must_do_is_said(
    make: Make | str,
    tree: TreePolicy,
    rule: Rule,
    prompts: list[list[int]],
    reason: str,
    device: Callable,
    heads: dict[str, str],
) -> None:
    with pytest.raises(ValueError, match=rf"^engine.graphs=step, but .*{reason}.*: engine.graphs=null$"):
        run(
            built(make, device(target_of(make), graphs="step"), tree, heads),
            requests(prompts, 4),
            GREEDY,
            rule,
        )
    if not isinstance(rule, Own) and not isinstance(tree, Pruned):
        proposer = built(make, device(), tree, heads)
        run(proposer, requests(prompts, 4), GREEDY, rule)
        assert not proposer.steps, "unasked, it is left to the host"


def test_others_draft_on_the_host(device: Callable) -> None:
    assert Proposer.obstacle(object.__new__(Eagle3), []) == "Eagle3 drafts on the host"


@pytest.mark.parametrize("case", [case for case in CASES if "drawn" not in case or "medusa" in case])
def test_a_whole_step_reads_nothing_back(case: str, device: Callable, heads: dict[str, str]) -> None:
    """It runs on tensors without data, from which nothing can be read."""
    make, tree, rule, sampling = CASES[case]
    proposer = built(make, device(target_of(make), graphs="step"), tree, heads)
    answers(proposer, rule, sampling)
    (step,) = proposer.steps.values()
    without_data(step)
    assert step.run().device.type == "meta"


def without_data(step: steps.DeviceStep) -> None:
    """Move all that a step reads to the meta device."""
    for target in filter(None, (step.target, getattr(step.proposer, "draft", None))):
        target.model.to("meta")
        target.device, target._forwards = torch.device("meta"), {}
        target.cache._stacks = {key: stack.to("meta") for key, stack in target.cache._stacks.items()}
    for module in (m for m in vars(step.proposer).values() if isinstance(m, torch.nn.Module)):
        module.to("meta").pack()
    if (named := getattr(step.proposer, "_named", None)) is not None:
        step.proposer._named = named.to("meta")
    texts = step.texts
    for name, value in vars(texts).items():
        if isinstance(value, torch.Tensor):
            setattr(texts, name, value.to("meta"))
    texts.draft = {name: tensor.to("meta") for name, tensor in texts.draft.items()}


def test_waiting_would_be_noticed(device: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = none(device(graphs="step"), CHAIN)
    answers(proposer, Match(), GREEDY)
    (step,) = proposer.steps.values()
    without_data(step)
    monkeypatch.setattr(LawBatch, "draw", lambda laws, *_: laws.logits_BNV.argmax(-1).cpu())
    with pytest.raises((RuntimeError, NotImplementedError)):
        step.run()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_texts_are_the_hosts_on_a_gpu(case: str, heads: dict[str, str]) -> None:
    make, tree, rule, sampling = CASES[case]
    want = answers(built(make, host(target_of(make)), tree, heads), rule, sampling)
    there = host(target_of(make))
    target = HFTarget(there.model.cuda(), fingerprint=there.fingerprint, engine=Engine(graphs="step"))
    proposer = built(make, target, tree, heads)
    assert answers(proposer, rule, sampling) == want
    assert proposer.steps
