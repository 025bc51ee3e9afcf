"""What every proposer owes, with every tree: a YAML in conf/proposer or conf/tree enrols itself.

A proposer whose YAML does not build as it stands needs its arguments for the tiny targets in `arguments`.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from models import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    VOCAB,
    cyclic,
    cyclic_eagle,
    cyclic_heads,
    like_a_gpu,
    plain,
    requests,
    run,
    save_eagle,
    save_heads,
    tiny,
    tiny_model,
    tokens_per_step,
    untrained_eagle,
    untrained_heads,
)
from omegaconf import OmegaConf
from torch import Tensor

from specdec._paths import conf_dir
from specdec.accept import Match, Rule
from specdec.config import check_combination, load_config, make
from specdec.decode import Sequence
from specdec.proposers.base import Grown, Proposer
from specdec.records import StepRecord
from specdec.rng import Key, Philox, Purpose
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.tree import TokenTree
from specdec.trees import DraftLaw, TreePolicy

LIMITS = [24, 9, 17, 12]


def named(group: str) -> dict[str, dict]:
    return {p.stem: chosen(f"{group}={p.stem}") for p in sorted(Path(conf_dir(), group).glob("*.yaml"))}


def chosen(*overrides: str) -> dict:
    group = overrides[0].partition("=")[0]
    return OmegaConf.to_container(load_config(list(overrides))[group], resolve=True)


PROPOSERS, TREES, RULES = named("proposer"), named("tree"), named("accept")
for second in ("draft_lm", "eagle3"):
    PROPOSERS[f"with_lookup {second}"] = chosen("proposer=with_lookup", f"proposer@proposer.draft={second}")
FEW = "medusa of few tokens"  # which its trees draw from, and others don't mind
PROPOSERS[FEW] = PROPOSERS["medusa"] | {"top_k": 3}
TREES["drawn_sequoia"] = TREES["sequoia"] | {"draws": True}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[HFTarget, dict[str, str]]:
    """Files of heads: untrained ones that draft half of the vocabulary, and ones that are always right."""
    folder, half = tmp_path_factory.mktemp("heads"), list(range(0, VOCAB, 2))
    return {
        tiny(): {
            "Medusa": save_heads(untrained_heads(tiny(), half), tiny(), folder / "medusa.safetensors"),
            "Eagle3": save_eagle(untrained_eagle(tiny(), half), tiny(), folder / "eagle3.safetensors"),
        },
        cyclic(): {
            "Medusa": save_heads(cyclic_heads(), cyclic(), folder / "right_medusa.safetensors"),
            "Eagle3": save_eagle(cyclic_eagle(), cyclic(), folder / "right_eagle3.safetensors"),
        },
    }


def build(name: str, tree: str, target: HFTarget, heads: dict[HFTarget, dict[str, str]]) -> Proposer:
    arguments = {"DraftLM": {"layers": 1}}
    arguments |= {kind: {"heads": file} for kind, file in heads[target].items()}
    return make(with_arguments(PROPOSERS[name], arguments), partial=True)(target, policy(tree))


def with_arguments(node: dict, arguments: dict[str, dict]) -> dict:
    """The node, and those inside it, with what these tests pass to each class."""
    inside = {k: with_arguments(v, arguments) if isinstance(v, dict) else v for k, v in node.items()}
    return inside | arguments.get(node["_target_"].rpartition(".")[2], {})


@cache
def policy(tree: str) -> TreePolicy:
    return make(TREES[tree])


def allowed(rule: Rule, tree: str, sampling: Sampling = SAMPLED) -> bool:
    try:
        check_combination(policy(tree), rule, sampling)
    except ValueError:
        return False
    return True


def answers(
    proposer: Proposer,
    sampling: Sampling,
    groups: list[list[int]],
    rule: Rule | None = None,
    stop_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """What the ragged requests are answered when they run in these batches."""
    seqs = requests(PROMPTS, LIMITS, stop_ids)
    for group in groups:
        run(proposer, [seqs[i] for i in group], sampling, rule)
    return [seq.new_tokens for seq in seqs]


@cache
def plain_answers(sampling: Sampling) -> tuple[list[list[int]], tuple[int, ...]]:
    """Plain decoding's answers, and a stop token that ends the first of them halfway."""
    stop_ids = (plain(tiny(), requests(PROMPTS, LIMITS), sampling)[0][12],)
    return plain(tiny(), requests(PROMPTS, LIMITS, stop_ids), sampling), stop_ids


PAIRS = [(p, t) for p in PROPOSERS for t in TREES if p != FEW or policy(t).draws]
every_pair = pytest.mark.parametrize(("name", "tree"), PAIRS)
ALONE, TOGETHER, BACKWARDS = [[0], [1], [2], [3]], [[0, 1, 2, 3]], [[3, 2], [1, 0]]


def test_plain_decoding_is_what_transformers_generates() -> None:
    want, stop_ids = plain_answers(GREEDY)
    model = tiny_model()
    for prompt, limit, tokens in zip(PROMPTS, LIMITS, want, strict=True):
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=0,
        )
        assert generated[0, len(prompt) :].tolist() == tokens
    assert [len(tokens) for tokens in want] != LIMITS, "the stop token ended nothing"
    assert sum(map(len, want)) > 30


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@every_pair
def test_the_text_is_that_of_plain_decoding(
    name: str, tree: str, sampling: Sampling, heads: dict[HFTarget, dict[str, str]]
) -> None:
    want, stop_ids = plain_answers(sampling)
    proposer = build(name, tree, tiny(), heads)
    assert answers(proposer, sampling, ALONE, stop_ids=stop_ids) == want
    assert answers(proposer, sampling, TOGETHER, stop_ids=stop_ids) == want


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tree", "rule"),
    [(p, t, r) for p, t in PAIRS for r in RULES if r != "match" and allowed(make(RULES[r]), t)],
)
def test_neighbours_change_nothing(
    name: str, tree: str, rule: str, heads: dict[HFTarget, dict[str, str]]
) -> None:
    proposer, judge = build(name, tree, tiny(), heads), make(RULES[rule])
    alone = answers(proposer, SAMPLED, ALONE, judge)
    assert answers(proposer, SAMPLED, TOGETHER, judge) == alone
    assert answers(proposer, SAMPLED, BACKWARDS, judge) == alone
    if isinstance(judge, Match):
        want, stop_ids = plain_answers(SAMPLED)
        assert answers(proposer, SAMPLED, TOGETHER, judge, stop_ids) == want


CHAINS = {"chain", "sampled_chain"}
DRAFT_ON_DEVICE = {
    "none": TREES,
    "medusa": TREES,
    FEW: TREES,
    "ngram": {"chain"},
    "draft_lm": CHAINS,
}


def drafts_on_device(name: str, tree: str) -> bool:
    return tree in DRAFT_ON_DEVICE.get(name, ())


@pytest.mark.parametrize(
    ("name", "tree"),
    [pytest.param(*pair, marks=[] if drafts_on_device(*pair) else pytest.mark.slow) for pair in PAIRS],
)
def test_drafts_on_the_device_are_those_of_the_host(
    name: str, tree: str, heads: dict[HFTarget, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For those that can: the same text, and as many nodes and accepted ones in every step."""
    want = records(build(name, tree, tiny(), heads))
    like_a_gpu(monkeypatch)
    target = HFTarget(tiny().model, fingerprint=tiny().fingerprint)
    proposer = build(name, tree, target, heads | {target: heads[tiny()]})
    assert records(proposer) == want
    assert bool(proposer.steps) == drafts_on_device(name, tree)


def records(proposer: Proposer) -> list[StepRecord]:
    seqs = requests([prompt for prompt in PROMPTS if len(prompt) > 1], [24, 9, 17])
    return [replace(record, seconds=0.0) for record in run(proposer, seqs, SAMPLED)]


def test_each_rule_that_samples_is_among_those() -> None:
    judged = {r for r in RULES for t in TREES if allowed(make(RULES[r]), t)}
    assert judged == RULES.keys() - {"greedy"}


@every_pair
def test_it_really_speculates(name: str, tree: str, heads: dict[HFTarget, dict[str, str]]) -> None:
    proposer = build(name, tree, cyclic(), heads)
    rate = tokens_per_step(run(proposer, requests([[1, 2], [6, 7, 0], [3, 4, 5, 6, 7, 0, 1, 2, 3]], 40)))
    assert rate == 1 if name == "none" else rate > 1.5


@every_pair
def test_proposals_fit_the_room(name: str, tree: str, heads: dict[HFTarget, dict[str, str]]) -> None:
    """No deeper than what can still be emitted, well formed, and made without touching the text."""
    proposer = build(name, tree, cyclic(), heads)
    propose, deepest = proposer.propose, []

    def watched(seqs: list[Sequence]) -> list[TokenTree]:
        before = [list(s.tokens) for s in seqs]
        trees = propose(seqs)
        assert [s.tokens for s in seqs] == before
        for seq, grown in zip(seqs, trees, strict=True):
            assert max(grown.depth_N) < seq.room
            grown.check(seq.tokens[-1])
            deepest.append(max(grown.depth_N))
        return trees

    proposer.propose = watched
    run(proposer, requests(PROMPTS, [1, 2, 3, 12]))
    assert max(deepest) > 1 or name == "none"


class Watched(Match):
    """Match, keeping the trees it judges, with the stream of each."""

    def __init__(self) -> None:
        self.judged = []

    def __call__(self, tree: TokenTree, p: Tensor, stream: object) -> object:
        self.judged.append((tree, stream))
        return super().__call__(tree, p, stream)


@pytest.mark.parametrize("tree", [t for t in TREES if policy(t).draws])
@pytest.mark.parametrize("name", [p for p in PROPOSERS if p != "none"])
def test_q_is_the_law_that_the_tokens_were_drawn_from(
    name: str, tree: str, heads: dict[HFTarget, dict[str, str]]
) -> None:
    proposer, rule, laws = build(name, tree, tiny(), heads), Watched(), {}
    if isinstance(proposer, Grown):
        remember_laws(proposer, laws)
    run(proposer, requests(PROMPTS, 16), SAMPLED, rule)
    drawn = 0
    for grown, stream in rule.judged:
        for node in (n for n, row in enumerate(grown.q_row_N) if row >= 0):
            q_V = grown.q(node)
            if laws:
                assert torch.equal(q_V, laws[id(grown), node].q())
            for child in grown.children(node):
                key = Key(stream.request, stream.step, child, Purpose.DRAFT)
                assert grown.tokens_N[child] == Philox(3).draw(q_V, key)
                q_V = q_V.scatter(0, torch.tensor(grown.tokens_N[child]), 0.0)
                drawn += 1
    if not (drawn or isinstance(proposer, Grown)):
        pytest.skip("its trees claim no law")
    assert drawn > 20


def remember_laws(proposer: Grown, laws: dict[tuple[int, int], DraftLaw]) -> None:
    """Keep every law that the proposer gives, by tree and node."""
    expand = proposer.expand

    def watched(
        seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        given = expand(seqs, trees, frontiers)
        for tree, frontier, some in zip(trees, frontiers, given, strict=True):
            laws.update({(id(tree), node): law for node, law in zip(frontier, some, strict=True)})
        return given

    proposer.expand = watched
