"""What is measured of a draft against slow references and the loop; the tuned tree as a run takes it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    cyclic,
    cyclic_heads,
    save_heads,
    tiny,
    tiny_model,
    untrained_heads,
)

from specdec.accept import Match
from specdec.arms import Experiment, LoopArm, Settings
from specdec.calibrate import (
    MISS,
    WARM_UP,
    Acceptance,
    Padding,
    Ranks,
    draft_seconds,
    loop_tokens_per_step,
    ranks_along,
    replayed,
    sizes,
    verify_seconds,
)
from specdec.proposers.base import Proposer
from specdec.proposers.draft_lm import DraftLM, first_layers
from specdec.proposers.medusa import Medusa
from specdec.proposers.ngram import NGram
from specdec.proposers.none import NoDraft
from specdec.sampling import Sampling
from specdec.text import Request
from specdec.trees import BestFirst, Chain, Eagle2, Sequoia, Static, TopK, best_paths, expected_length
from specdec.tuning import Search, tune

REQUESTS = [Request(f"{n}/0", n, str(n), 0, "", ids) for n, ids in enumerate(PROMPTS)]
IN_CYCLE = [Request("a/0", 0, "a", 0, "", [1, 2, 3]), Request("b/0", 1, "b", 0, "", [6, 7, 0])]
SHAPES = {
    "chain": ((0, 0, 0),),
    "wide": ((0, 0), (1, 0), (2,), (3,)),
    "skips a rank": ((1, 0), (0, 2, 1)),
    "root": (),
}


def experiment(proposer: Proposer, sampling: Sampling = GREEDY, longest: int = 24) -> Experiment:
    return Experiment(proposer.target, proposer, Match(), sampling, [], Settings(max_new_tokens=longest))


@pytest.fixture(scope="module")
def proposers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proposer]:
    folder = tmp_path_factory.mktemp("heads")
    heads = save_heads(untrained_heads(tiny(), list(range(32))), tiny(), folder / "tiny.safetensors")
    right = save_heads(cyclic_heads(), cyclic(), folder / "right.safetensors")
    return {
        "draft_lm": DraftLM(tiny(), Chain(), layers=1),
        "medusa": Medusa(tiny(), Chain(), heads=heads),
        "ngram": NGram(tiny(), Chain()),
        "always right": Medusa(cyclic(), Chain(), heads=right),
    }


NAMES = ("draft_lm", "medusa", "ngram", "always right")


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_a_replay_says_what_the_loop_emits(
    name: str, sampling: Sampling, proposers: dict[str, Proposer]
) -> None:
    """To the token: no answer ends at a stop token here."""
    e = experiment(proposers[name], sampling)
    ranks = ranks_along(e, REQUESTS, depth=3, branches=4)
    for paths in SHAPES.values():
        want = loop_tokens_per_step(e, REQUESTS, Static(depth=3, paths=paths))
        assert replayed(paths, ranks) == pytest.approx(want)
    assert isinstance(e.proposer.tree, Chain | TopK), "the proposer has its own tree again"


def test_a_draft_that_is_always_right_has_rank_0_everywhere(proposers: dict[str, Proposer]) -> None:
    ranks = ranks_along(experiment(proposers["always right"]), IN_CYCLE, depth=3, branches=2)
    acceptance = Acceptance.of(ranks, 3, 2)
    assert acceptance.rates_KR == [[1.0, 0.0]] * 3
    assert acceptance.reached_K == [2 * 23, 2 * 22, 2 * 21], "a bonus token needs room too"
    assert replayed(((0, 0, 0),), ranks) == 4


def test_ranks_are_those_of_the_text_in_the_laws_of_a_plain_forward(proposers: dict[str, Proposer]) -> None:
    e = experiment(proposers["draft_lm"], SAMPLED, longest=10)
    reference, branches, depth = first_layers(tiny_model(), 1), 5, 3
    plain = LoopArm(e, NoDraft(e.target, Chain()), Match())
    ranks = ranks_along(e, REQUESTS, depth, branches)
    for r in REQUESTS:
        text = r.ids + plain([r], 10)[0].tokens
        logits_LV = reference(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        order_LV = logits_LV.argsort(descending=True).tolist()
        for at, row in enumerate(ranks[r.number], start=len(r.ids)):
            want = [order_LV[i - 1].index(text[i]) for i in range(at, min(at + depth, len(text) - 1))]
            missed = next((d for d, rank in enumerate(want) if rank >= branches), None)
            assert row == (want if missed is None else [*want[:missed], MISS])
        assert len(ranks[r.number]) == 10


def test_acceptance_counts_what_was_reached() -> None:
    ranks: Ranks = {0: [[0, 1], [1, MISS], [MISS], []], 7: [[0, 0], [0, MISS]]}
    acceptance = Acceptance.of(ranks, depth=3, branches=2)
    assert acceptance == Acceptance([[3, 1], [1, 1], [0, 0]], [5, 4, 0])
    assert acceptance.rates_KR == [[0.6, 0.2], [0.25, 0.25], [0.0, 0.0]]
    assert acceptance.pooled_KR == [[4 / 9, 2 / 9]] * 3
    assert Acceptance.of({}, 1, 1).rates_KR == Acceptance.of({}, 1, 1).pooled_KR == [[0.0]]


def test_the_formula_holds_where_its_assumption_does() -> None:
    """Chances by depth and branch alone: the formula, and the counts, find them again."""
    chances_KR, generator = [[0.6, 0.2, 0.05], [0.5, 0.1, 0.1], [0.3, 0.3, 0.1]], np.random.default_rng(0)
    ranks: Ranks = {0: []}
    for _ in range(30_000):
        row: list[int] = []
        while len(row) < 3 and MISS not in row:
            chances = chances_KR[len(row)]
            row.append(int(generator.choice([0, 1, 2, MISS], p=[*chances, 1 - sum(chances)])))
        ranks[0].append(row)
    acceptance = Acceptance.of(ranks, 3, 3)
    assert np.allclose(acceptance.rates_KR, chances_KR, atol=0.02)
    for nodes in (2, 5, 9):
        paths = best_paths(acceptance.rates_KR, nodes)
        assert replayed(paths, ranks) == pytest.approx(expected_length(paths, chances_KR), rel=0.02)


def test_padding_has_the_sizes_asked_for_and_changes_no_text() -> None:
    e = experiment(NGram(tiny(), Chain()))
    answer = LoopArm(e, Padding(tiny(), [1, 3, 70]), Match())([REQUESTS[0]], 24)[0]
    assert [s.nodes for s in answer.steps[:6]] == [1, 3, 70, 1, 3, 70]
    assert answer.tokens == LoopArm(e, NoDraft(tiny(), Chain()), Match())([REQUESTS[0]], 24)[0].tokens


@pytest.mark.parametrize("longest", [2, 24])
def test_every_size_and_depth_is_timed(longest: int, proposers: dict[str, Proposer]) -> None:
    """Also where no answer is as long as the deepest tree."""
    e = experiment(proposers["draft_lm"], longest=longest)
    seconds = verify_seconds(e, REQUESTS, [1, 2, 9], rounds=3)
    assert list(seconds) == [1, 2, 9]
    trees = [Eagle2(depth=depth, nodes=9) for depth in (1, 2, 4)]
    drafts = draft_seconds(e, REQUESTS, trees, rounds=3)
    assert len(drafts) == len(trees)
    assert all(each > 0 for each in [*seconds.values(), *drafts])


def test_the_first_drafts_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowAtFirst:
        """Steps read it twice to propose and twice to observe; the first take 100 seconds, others 6."""

        def __init__(self, device: object) -> None:
            self.reads = -1

        def settled(self) -> float:
            self.reads += 1
            step, phase = divmod(self.reads, 4)
            return 1000 * step + (100 if step < WARM_UP else 6) * (phase > 0)

    monkeypatch.setattr("specdec.calibrate.Clock", SlowAtFirst)
    e = experiment(DraftLM(tiny(), Chain(), layers=1), longest=3)
    assert draft_seconds(e, REQUESTS, [Chain(depth=1)], rounds=1) == [6]


costs = st.dictionaries(st.integers(2, 9), st.floats(0.1, 9), min_size=1)


@given(costs, st.floats(0, 3), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_the_first_size_has_the_least_time_per_token(
    verify: dict[int, float], level: float, chances: list[float]
) -> None:
    accuracy_KR = [[c] for c in chances]
    draft = {(n, d): d * level for n in verify for d in range(1, len(chances) + 1) if d < n}
    found = sizes(verify, draft, lambda n, d: expected_length(best_paths(accuracy_KR[:d], n), accuracy_KR))
    assert {(s.nodes, s.depth) for s in found} == draft.keys()
    for s in found:
        tokens = sum(np.prod(chances[:d]) for d in range(s.depth + 1))
        assert s.tokens == pytest.approx(tokens)
        assert s.seconds == pytest.approx(verify[s.nodes] + s.depth * level)
        assert found[0].seconds_per_token <= s.seconds_per_token


SMALL = Search(nodes=[2, 4, 6], depths=[1, 2, 3], branches=4, rounds=2)


@pytest.mark.parametrize("tree", [Sequoia(), Eagle2(width=3), BestFirst()], ids=lambda t: type(t).__name__)
def test_the_tree_that_is_found_is_of_the_fastest_size(
    tree: Sequoia | BestFirst, proposers: dict[str, Proposer]
) -> None:
    e, said = experiment(proposers["draft_lm"]), []
    [tuning] = tune(e, REQUESTS, [tree], SMALL, said.append)
    fastest = tuning.sizes[0]
    assert (tuning.tree.nodes, tuning.tree.depth) == (fastest.nodes, fastest.depth)
    assert fastest.tokens == pytest.approx(loop_tokens_per_step(e, REQUESTS, tuning.tree))
    assert tuning.speedup(fastest) == pytest.approx(tuning.plain * fastest.tokens / fastest.seconds)
    assert next(iter(tuning.tokens.values())) == fastest.tokens
    assert list(tuning.verify) == SMALL.nodes
    assert {(s.nodes, s.depth) for s in tuning.sizes} == {
        (2, 1),
        *((n, d) for n in (4, 6) for d in (1, 2, 3)),
    }
    assert said


def test_a_deep_tree_is_found_for_a_draft_that_is_always_right(proposers: dict[str, Proposer]) -> None:
    kind = {"nodes": [4], "depths": [1, 3], "branches": 2, "rounds": 1}
    e = experiment(proposers["always right"])
    [tuning] = tune(e, IN_CYCLE, [Sequoia()], Search(**kind), lambda _: None)
    assert {(s.nodes, s.depth): s.tokens for s in tuning.sizes} == {(4, 1): 2, (4, 3): 4}
    assert tuning.tokens == pytest.approx(dict.fromkeys(tuning.tokens, tuning.sizes[0].tokens))


def test_the_fastest_of_several_trees_comes_first(proposers: dict[str, Proposer]) -> None:
    trees = [Sequoia(), BestFirst(length="confidence")]
    tunings = tune(experiment(proposers["always right"]), IN_CYCLE, trees, SMALL, lambda _: None)
    assert sorted(type(tuning.asked).__name__ for tuning in tunings) == ["BestFirst", "Sequoia"]
    each = [tuning.sizes[0].seconds_per_token for tuning in tunings]
    assert each == sorted(each)
    by_confidence = next(tuning for tuning in tunings if isinstance(tuning.asked, BestFirst))
    assert {(size.nodes, size.depth) for size in by_confidence.sizes} == {(2, 1), (4, 3), (6, 3)}
    assert by_confidence.tree.length == "confidence"
