"""The self-test finds how a checkpoint is to be read, and tells heads from chance."""

from math import inf, log
from pathlib import Path

import pytest
import torch
from foreign import (
    IDS,
    TAPS,
    VOCAB,
    config,
    official,
    random_state,
    right_state,
    shifting,
    specforge,
    speculators,
)
from models import cyclic, requests, run, tokens_per_step

from specdec import checkpoints
from specdec.checkpoints import open_eagle3
from specdec.checkpoints.files import Reading
from specdec.checkpoints.selftest import Judged, Told, Trial, fit, questions
from specdec.proposers.eagle3 import Eagle3
from specdec.proposers.ngram import NGram
from specdec.rng import Philox, Stream
from specdec.trees import Chain, DraftLaw, Static


@pytest.fixture
def two_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """And short answers: enough to tell heads apart that are always right or always wrong."""
    monkeypatch.setattr(checkpoints, "questions", lambda target: questions(target)[:2])
    monkeypatch.setattr("specdec.checkpoints.selftest.TOKENS", 24)


MISREAD = {
    "as documented": (official, {}, {}, "ids [2, 4, 5] as inputs), residual before"),
    "normed residual": (speculators, {"norm_before_residual": True}, {}, "as inputs), residual after"),
    "ids of outputs, said to be inputs": (
        speculators,
        {},
        {IDS: [tap - 1 for tap in TAPS]},
        "layers [2, 4, 5] (ids [1, 3, 4] as outputs)",
    ),
    "ids of inputs, said to be outputs": (
        specforge,
        {},
        {"eagle_config": {IDS: list(TAPS)}},
        "layers [2, 4, 5] (ids [2, 4, 5] as inputs)",
    ),
    "residual said to be normed": (speculators, {}, {"norm_before_residual": True}, "residual before"),
    "residual not said to be normed": (official, {"norm_before_residual": True}, {}, "residual after"),
    "SpecForge before September 2026": (specforge, {}, {"norm_output": True}, "raw feedback"),
    "SpecForge since": (specforge, {"post_norm": True}, {}, "normed feedback"),
}


@pytest.mark.usefixtures("two_questions")
@pytest.mark.parametrize("case", MISREAD)
def test_the_self_test_finds_the_reading_that_the_head_was_trained_with(case: str, tmp_path: Path) -> None:
    to, truth, said, words = MISREAD[case]
    c = config(draft_vocab=VOCAB, **truth)
    head, info, found = open_eagle3(to(tmp_path, c, right_state(c), **said), shifting())
    assert head.config == info.config == c
    assert words in found.partition(";")[0]
    assert (info.fingerprint, info.accuracy_KR) == (shifting().fingerprint, [])


@pytest.mark.usefixtures("two_questions")
def test_a_folder_drafts_as_the_head_in_it_does(tmp_path: Path) -> None:
    """A chain of four is right whenever what stands before the root is what the target said."""
    c = config(draft_vocab=VOCAB)
    proposer = Eagle3(shifting(), Chain(depth=4), heads=official(tmp_path, c, right_state(c)))
    assert proposer.reading.startswith("official, layers [2, 4, 5]")
    assert tokens_per_step(run(proposer, requests([[2, 7], [30, 3, 8]], 20))) == 5
    assert Eagle3(shifting(), Static(nodes=6), heads=str(tmp_path)).tree == Static(nodes=6)


@pytest.mark.usefixtures("two_questions")
def test_a_head_that_fits_in_no_reading_is_refused_with_what_each_did(tmp_path: Path) -> None:
    c = config()
    with pytest.raises(ValueError, match=r"drafts no better than chance for random-llama") as error:
        open_eagle3(official(tmp_path, c, random_state(c)), shifting())
    assert len(str(error.value).split(";")) >= 5
    assert "proposer.heads=FOLDER_OR_HUB_ID" in str(error.value)


def trial(logq: list[float], first: list[bool] | None = None, floor: float = 0.1) -> Trial:
    """A reading that gave these log-probabilities to what was said, one after the other, at depth 1."""
    chosen = first or [False] * len(logq)
    judged = {(0, i): Judged(1, f, q) for i, (q, f) in enumerate(zip(logq, chosen, strict=True))}
    return Trial(Reading("", None, {}), judged, floor)


def test_neither_a_few_lucky_drafts_nor_a_lead_by_chance_decide() -> None:
    def drafts(right: int, of: int, floor: float) -> bool:
        return trial([0.0] * of, [i < right for i in range(of)], floor).drafts

    assert drafts(20, 100, 0.05)
    assert not drafts(9, 100, 0.05)
    assert not drafts(2, 3, 0.3)
    assert not drafts(0, 50, 0.0)
    some = [-1.0, -3.0, -0.5, -4.0] * 10
    assert trial([q + 0.1 for q in some]).clearly_better(trial(some))
    assert not trial(some).clearly_better(trial([q + 0.1 for q in some]))
    mixed = [q + gain for q, gain in zip(some, [1.0, -0.9] * 20, strict=True)]
    assert not trial(mixed).clearly_better(trial(some))
    assert trial([*(q + 0.1 for q in some), -inf]).clearly_better(trial([*some, -inf]))


def test_every_law_is_judged_by_what_the_target_said_next() -> None:
    texts, policy = ((7, 8, 9, 4, 5),), Told(texts=((7, 8, 9, 4, 5),))
    growth = policy.grow(8, 3, Stream(Philox(0), 0, 0, 2))
    assert next(growth)[1] == [0]
    growth.send([DraftLaw(torch.tensor([0.2, 0.8]).log(), 10, torch.tensor([3, 9]))])
    growth.send([DraftLaw(torch.full((10,), 0.1).log(), 10)])
    with pytest.raises(StopIteration) as done:
        growth.send([DraftLaw(torch.tensor([1.0]).log(), 10, torch.tensor([6]))])
    assert done.value.value.tokens_N == [8, 9, 4, 5]
    assert policy.judged[0, 3] == Judged(1, True, pytest.approx(log(0.8)))
    assert policy.judged[0, 4] == Judged(2, False, pytest.approx(log(0.1)))
    assert policy.judged[0, 5] == Judged(3, False, -inf)
    with pytest.raises(StopIteration):
        next(Told(texts=texts).grow(6, 3, Stream(Philox(0), 0, 0, 2)))


def test_where_a_target_repeats_itself_no_head_can_be_told_from_chance() -> None:
    lookup = [Reading("lookup", None, {})]
    with pytest.raises(ValueError, match=r"lookup: 1.00 .*commonest token gives 1.00"):
        fit(cyclic(), lookup, [[9, 9, 9]], lambda _, tree: NGram(cyclic(), tree))
    assert fit(cyclic(), lookup, [[1, 2, 3, 4, 5, 6, 7, 0, 1]], lambda _, tree: NGram(cyclic(), tree))
