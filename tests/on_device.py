"""Proposers whose steps stay on the device, beside the same on the host; and seeded bugs of such steps."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
from models import GREEDY, PROMPTS, SAMPLED, cyclic, requests, run, tiny

from specdec.accept import Block, Greedy, Match, Recursive, Rejection, Rule, Synthetic, Typical
from specdec.cache import DeviceCache
from specdec.device_texts import DeviceTexts
from specdec.engine import Engine
from specdec.proposers.base import Proposer
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.medusa import Medusa
from specdec.proposers.ngram import NGram
from specdec.proposers.none import NoDraft
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.tree import TreeBatch
from specdec.trees import Chain, Eagle2, Sampled, Static, TopK, TreePolicy

TREE, DRAWN = TopK(depth=3, widths=(2, 2, 1)), Sampled(depth=3, widths=(3, 2, 1))
CHAIN, DRAWN_CHAIN = Chain(depth=4), Sampled(depth=3, widths=(1, 1, 1))
TEXTS = [p for p in PROMPTS if len(p) > 1]  # of one token, neither heads nor a draft have anything to read
Make = Callable[[HFTarget, TreePolicy], Proposer]


def host(name: str = "llama", engine: Engine | None = None) -> HFTarget:
    """A target of its own, of an architecture or the one that speaks in cycles; the host takes its steps."""
    twin = cyclic() if name == "cyclic" else tiny(name)
    return HFTarget(
        copy.deepcopy(twin.model), fingerprint=twin.fingerprint, engine=engine or Engine(graphs=False)
    )


def none(target: HFTarget, tree: TreePolicy) -> Proposer:
    return NoDraft(target, tree)


def lookup(target: HFTarget, tree: TreePolicy) -> Proposer:
    return NGram(target, tree, matches=3)


def draft(target: HFTarget, tree: TreePolicy) -> Proposer:
    return DraftLM(target, tree, layers=1)


CASES = {
    "none": (none, CHAIN, Greedy(), GREEDY),
    "none, sampled": (none, CHAIN, Match(), SAMPLED),
    "lookup": (lookup, CHAIN, Match(), GREEDY),
    "lookup, sampled": (lookup, CHAIN, Match(), SAMPLED),
    "lookup, typical": (lookup, CHAIN, Typical(), SAMPLED),
    "lookup, synthetic": (lookup, CHAIN, Synthetic(), GREEDY),
    "draft": (draft, CHAIN, Match(), SAMPLED),
    "draft, rejection": (draft, DRAWN_CHAIN, Rejection(), SAMPLED),
    "draft, block": (draft, DRAWN_CHAIN, Block(), SAMPLED),
    "medusa": ("medusa", TREE, Greedy(), GREEDY),
    "medusa, static": ("medusa", Static(depth=5, nodes=12), Match(), SAMPLED),
    "medusa, drawn": ("medusa", DRAWN, Recursive(), SAMPLED),
    "medusa, eagle2": ("medusa", Eagle2(depth=4, nodes=10, width=3), Match(), SAMPLED),
    "medusa, too deep a chain": ("medusa", Chain(depth=9), Match(), SAMPLED),
    "medusa, always right": ("cyclic", CHAIN, Match(), GREEDY),
    "medusa, mostly right": ("cyclic", TREE, Match(), SAMPLED),
    "medusa, right and drawn": ("cyclic", DRAWN, Recursive(), SAMPLED),
    "hydra": ("hydra", TREE, Match(), SAMPLED),
    "hydra, eagle2": ("hydra", Eagle2(depth=4, nodes=10, width=3), Match(), SAMPLED),
    "hydra, drawn": ("hydra", DRAWN, Recursive(), SAMPLED),
}


def built(make: Make | str, target: HFTarget, tree: TreePolicy, heads: dict[str, str]) -> Proposer:
    return Medusa(target, tree, heads=heads[make]) if isinstance(make, str) else make(target, tree)


def target_of(make: Make | str) -> str:
    return "cyclic" if make == "cyclic" else "llama"


def answers(proposer: Proposer, rule: Rule, sampling: Sampling, longest: list[int] | int = 24) -> list:
    """Texts, and what was recorded of each step but its time."""
    seqs = requests(TEXTS, longest, stop_ids=(7,))
    records = run(proposer, seqs, sampling, rule)
    return [[s.new_tokens for s in seqs], [replace(record, seconds=0.0) for record in records]]


def length_counts_the_bonus_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = DeviceTexts.advance

    def wrong(texts: DeviceTexts, *step: object) -> None:
        advance(texts, *step)
        texts.length_B.add_(1)

    monkeypatch.setattr(DeviceTexts, "advance", wrong)


def steps_share_their_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = DeviceTexts.advance

    def wrong(texts: DeviceTexts, *step: object) -> None:
        advance(texts, *step)
        texts.step_B.zero_()

    monkeypatch.setattr(DeviceTexts, "advance", wrong)


def rows_stay_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceCache, "keep_device", lambda *_: None)


def trees_are_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeBatch, "cut", lambda trees, levels_B: trees)


def warming_up_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, calls = DeviceTexts.copy_, []

    def once(texts: DeviceTexts, other: DeviceTexts) -> None:
        calls.append(1)
        if len(calls) == 1:
            copy(texts, other)

    monkeypatch.setattr(DeviceTexts, "copy_", once)


def heads_read_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Medusa, texts: DeviceTexts, verdicts: object, out: object) -> None:
        texts.draft["hidden_BD"].copy_(out.hidden["final"][:, 0])

    monkeypatch.setattr(Medusa, "observe_device", wrong)


BUGS = {
    length_counts_the_bonus_twice: "lookup",
    steps_share_their_coins: "medusa, drawn",
    rows_stay_where_they_were: "medusa",
    trees_are_never_cut: "medusa, static",
    warming_up_is_not_undone: "lookup",
    heads_read_the_root: "medusa, always right",
}
