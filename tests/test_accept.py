"""Acceptance rules: batched forms equal the per-sequence ones coin for coin, and the randomised PIT catches a
rejection verifier that is slightly wrong. That the rules are lossless is proved in test_lossless_law.py.
"""

import dataclasses
import itertools

import pytest
import torch
from pit import randomised_pit, uniformity
from torch import Tensor

from specdec.accept import (
    Block,
    Greedy,
    Match,
    Recursive,
    Rejection,
    Rule,
    Synthetic,
    Typical,
    residual,
    strike,
)
from specdec.rng import Key, Philox, Purpose, Replay, Stream, StreamBatch
from specdec.sampling import LawBatch, Laws, Sampling
from specdec.tree import TokenTree, TreeBatch, Verdict, VerdictBatch
from specdec_kernels.philox import coins, race, rows

RULES: list[Rule] = [
    Greedy(),
    Match(),
    Rejection(),
    Recursive(),
    Block(),
    Typical(),
    Typical(epsilon=0.02, delta=0.5),
    Synthetic(),
    Synthetic((0.5, 0.9)),
]
PHILOX = Philox(seed=7)
VOCAB = 11


def random_tree(g: torch.Generator, nodes: int, chain: bool, drawn: float) -> TokenTree:
    """A ragged tree; each node's children are drawn with probability `drawn`, else deterministic."""
    tree = TokenTree([int(torch.randint(VOCAB, (), generator=g))])
    parents = (
        range(nodes - 1)
        if chain
        else sorted(int(torch.randint(n + 1, (), generator=g)) for n in range(nodes - 1))
    )
    left: dict[int, Tensor] = {}
    for parent in parents:
        if parent not in left:
            q_V = random_law(g)
            if float(torch.rand((), generator=g)) < drawn:
                tree.draw_children_from(parent, q_V)
            left[parent] = q_V.clone()
        if left[parent].any():
            token = int(left[parent].multinomial(1, generator=g))
            left[parent][token] = 0
            tree.add(token, parent)
    return tree


def random_law(g: torch.Generator) -> Tensor:
    """float32 [V], with zeros."""
    p_V = torch.softmax(2 * torch.randn(VOCAB, generator=g), 0)
    p_V[torch.rand(VOCAB, generator=g) < 0.3] = 0
    p_V[int(torch.randint(VOCAB, (), generator=g))] += 0.1
    return p_V / p_V.sum()


def random_batch(rule: Rule, seed: int) -> tuple[list[TokenTree], Tensor, list[Stream]]:
    """Trees of 1 to 9 nodes, laws [B, 10, V], and streams of different requests and steps."""
    g = torch.Generator().manual_seed(seed)
    chain, drawn = rule.chain_only, 0.0 if rule.deterministic_only else 0.7
    trees = [random_tree(g, 1 + b % 9, chain, drawn) for b in range(18)]
    if isinstance(rule, Block):
        trees = [tree if tree.is_chain else TokenTree.chain(tree.tokens_N) for tree in trees]
    p_BNV = torch.stack([torch.stack([random_law(g) for _ in range(10)]) for _ in trees])
    agree = torch.rand(p_BNV.shape[:2], generator=g) < 0.5  # so that long paths are accepted too
    for b, tree in enumerate(trees):
        for n in range(len(tree)):
            if agree[b, n] and tree.q(n) is not None:
                p_BNV[b, n] = 0.5 * (p_BNV[b, n] + tree.q(n))
    streams = [Stream(PHILOX, request=3 * b, step=b % 4, position=5 + b) for b in range(len(trees))]
    return trees, p_BNV, streams


@dataclasses.dataclass(frozen=True)
class Given:
    """Laws that are given, where `LawBatch` makes them of logits."""

    p_BNV: Tensor

    def best(self) -> Tensor:
        return self.p_BNV.argmax(-1)

    def draw(self, streams: StreamBatch, depth_BN: Tensor) -> Tensor:
        position_BN = streams.position_B[:, None] + depth_BN
        keys = (streams.request_B[:, None], position_BN, torch.zeros_like(depth_BN), Purpose.TARGET)
        return race(self.p_BNV, rows(streams.rng.seed, *keys, self.p_BNV.shape[-1]))


def batched(
    rule: Rule, trees: list[TokenTree], p: Tensor | LawBatch, streams: list[Stream], nodes: int = 10
) -> VerdictBatch:
    laws = p if isinstance(p, LawBatch) else Given(p)
    return rule.batch(TreeBatch.pack(trees, nodes), laws, StreamBatch.pack(streams))


def one_by_one(rule: Rule, trees: list[TokenTree], p_BNV: Tensor, streams: list[Stream]) -> list[Verdict]:
    return [rule(*row) for row in zip(trees, p_BNV, streams, strict=True)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_batched_form_equals_the_one_to_read(rule: Rule, seed: int) -> None:
    case = random_batch(rule, seed)
    verdicts = one_by_one(rule, *case)
    assert batched(rule, *case).unpack() == verdicts
    assert len({len(v.path_A) for v in verdicts}) > 1, "every verdict is as long: the test sees too little"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_pads_never_matter(rule: Rule) -> None:
    trees, p_BNV, streams = random_batch(rule, 0)
    real_BN = torch.arange(10) < torch.tensor([len(t) for t in trees]).unsqueeze(1)
    packed = TreeBatch.pack(trees, 10)
    want = rule.batch(packed, Given(p_BNV), StreamBatch.pack(streams)).unpack()
    q_BNV = None if packed.q_BNV is None else torch.where(real_BN.unsqueeze(-1), packed.q_BNV, torch.nan)
    noisy = dataclasses.replace(packed, tokens_BN=torch.where(real_BN, packed.tokens_BN, 3), q_BNV=q_BNV)
    p_BNV = torch.where(real_BN.unsqueeze(-1), p_BNV, torch.nan)
    assert rule.batch(noisy, Given(p_BNV), StreamBatch.pack(streams)).unpack() == want
    wider = torch.cat([p_BNV, p_BNV], dim=1)
    assert batched(rule, trees, wider, streams, 20).unpack() == want


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_sequence_is_decided_the_same_in_every_batch(rule: Rule) -> None:
    trees, p_BNV, streams = random_batch(rule, 1)
    want = batched(rule, trees, p_BNV, streams).unpack()
    for b in range(0, len(trees), 5):
        assert (
            batched(rule, trees[b : b + 1], p_BNV[b : b + 1], streams[b : b + 1]).unpack() == want[b : b + 1]
        )
    assert batched(rule, trees[::-1], p_BNV.flip(0), streams[::-1]).unpack() == want[::-1]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_written_down_uniforms_replay_the_verdict(rule: Rule) -> None:
    trees, p_BNV, streams = random_batch(rule, 2)
    want = one_by_one(rule, trees, p_BNV, streams)
    replayed = [
        dataclasses.replace(s, rng=written_down(s, len(t))) for s, t in zip(streams, trees, strict=True)
    ]
    assert one_by_one(rule, trees, p_BNV, replayed) == want


def written_down(stream: Stream, nodes: int) -> Replay:
    """Every coin and draw that a tree of so many nodes can ask for."""
    node_N = torch.arange(nodes)
    fields = (torch.full_like(node_N, stream.request), torch.full_like(node_N, stream.step), node_N)
    u_N = coins(PHILOX.seed, *fields, Purpose.ACCEPT)
    residual_NV = rows(PHILOX.seed, *fields, Purpose.RESIDUAL, VOCAB)
    at_N = stream.position + node_N
    target_NV = rows(PHILOX.seed, fields[0], at_N, torch.zeros_like(node_N), Purpose.TARGET, VOCAB)
    draws = {Key(stream.request, stream.step, n, Purpose.RESIDUAL): residual_NV[n] for n in range(nodes)}
    draws |= {Key(stream.request, int(at_N[n]), 0, Purpose.TARGET): target_NV[n] for n in range(nodes)}
    return Replay(
        {Key(stream.request, stream.step, n, Purpose.ACCEPT): u for n, u in enumerate(u_N.tolist())}, draws
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_laws_computed_on_demand_are_as_good_as_a_table(rule: Rule) -> None:
    trees, p_BNV, streams = random_batch(rule, 3)
    logits_BNV, sampling = (5 * p_BNV).exp(), Sampling(temperature=0.8, top_k=6, top_p=0.95)
    lazy = [rule(t, Laws(x, sampling), s) for t, x, s in zip(trees, logits_BNV, streams, strict=True)]
    assert lazy == batched(rule, trees, LawBatch(logits_BNV, sampling), streams).unpack()


@pytest.mark.parametrize(
    "rule", [Match(), Rejection(), Recursive(), Block(), Typical()], ids=lambda rule: rule.name
)
def test_at_temperature_0_every_rule_is_greedy(rule: Rule) -> None:
    trees, p_BNV, streams = random_batch(rule, 4)
    p_BNV = Sampling(temperature=0).laws(p_BNV)
    assert one_by_one(rule, trees, p_BNV, streams) == one_by_one(Greedy(), trees, p_BNV, streams)


def test_a_perfect_draft_is_accepted_whole() -> None:
    for rule in (Rejection(), Block()):
        trees, p_BNV, streams = random_batch(rule, 5)
        for tree, p_NV in zip(trees, p_BNV, strict=True):
            for n in range(len(tree) - 1):
                if tree.q(n) is None:
                    tree.draw_children_from(n, p_NV[n])
                p_NV[n] = tree.q(n)
        drawable = [
            b
            for b, t in enumerate(trees)
            if all(p_BNV[b, n][t.tokens_N[n + 1]] > 0 for n in range(len(t) - 1))
        ]
        verdicts = batched(rule, trees, p_BNV, streams).unpack()
        assert all(len(verdicts[b].path_A) == len(trees[b]) - 1 for b in drawable)
        assert len(drawable) > 9


def test_block_refuses_a_tree_that_branches() -> None:
    tree = TokenTree([0])
    tree.add(1, 0)
    tree.add(2, 0)
    with pytest.raises(ValueError, match="accept=block verifies chains"):
        Block()(tree, torch.ones(3, 4) / 4, Stream(PHILOX, 0, 0, 1))


def test_residual_and_strike() -> None:
    p_V, q_V = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.3, 0.5])
    assert torch.allclose(residual(p_V, q_V), torch.tensor([0.6, 0.4, 0.0]))
    assert torch.equal(residual(p_V, p_V), p_V)
    assert torch.allclose(strike(q_V, torch.tensor([2])), torch.tensor([0.4, 0.6, 0.0]))
    assert not strike(torch.tensor([0.0, 1.0]), torch.tensor([1])).any()


def emit(exponent: float, steps: int = 2000) -> tuple[list[int], list[Tensor]]:
    """4,000 tokens that rejection emits from drawn chains, verified with q^exponent, and their laws."""
    g = torch.Generator().manual_seed(11)
    logits_BNV = 2 * torch.randn(steps, 3, 500, generator=g)
    p_BNV = torch.softmax(logits_BNV, -1)
    logq_BNV = torch.log_softmax(logits_BNV + torch.randn(logits_BNV.shape, generator=g), -1)
    streams = StreamBatch.pack([Stream(PHILOX, 0, step, 0) for step in range(steps)])
    children = [torch.full((steps,), n) for n in (1, 2)]
    drafts = [
        race(
            logq_BNV[:, n - 1].exp(),
            rows(PHILOX.seed, streams.request_B, streams.step_B, child_B, Purpose.DRAFT, 500),
        )
        for n, child_B in enumerate(children, 1)
    ]
    chains = TreeBatch.pack(
        [TokenTree.chain([0, *pair]) for pair in zip(*map(Tensor.tolist, drafts), strict=True)], 3
    )
    claimed_BNV, drawn_BN = (
        torch.softmax(exponent * logq_BNV, -1),
        torch.tensor([True, True, False]).expand(steps, 3),
    )
    chains = dataclasses.replace(chains, q_BNV=claimed_BNV, drawn_BN=drawn_BN)
    verdicts = Rejection().batch(chains, Given(p_BNV), streams).unpack()
    emitted = [[int(chains.tokens_BN[b, n]) for n in v.path_A] + [v.bonus] for b, v in enumerate(verdicts)]
    laws = [p_BNV[b, n] for b, tokens in enumerate(emitted) for n in range(len(tokens))]
    return list(itertools.chain(*emitted))[:4000], laws[:4000]


def test_the_pit_is_uniform_when_the_tokens_follow_their_laws() -> None:
    """A false alarm had odds of 1 in 100; the seed is fixed."""
    assert uniformity(randomised_pit(*emit(exponent=1.0))) > 0.01


def test_the_pit_sees_a_q_that_is_off_by_a_tenth_in_its_exponent() -> None:
    assert uniformity(randomised_pit(*emit(exponent=1.1))) < 1e-4


def test_the_synthetic_schedule_is_followed() -> None:
    """On a chain of three the accepted lengths have the law of the rates, and nothing else is looked at."""
    rates, tree, p_NV = (0.75, 0.5, 0.25), TokenTree.chain([1, 2, 3, 0]), torch.full((4, 5), 0.2)
    rule = Synthetic(rates)
    lengths = [len(rule(tree, p_NV, Stream(Philox(0), request, 0, 7)).path_A) for request in range(4000)]
    shares = [lengths.count(n) / len(lengths) for n in range(4)]
    assert shares == pytest.approx([0.25, 0.375, 0.28125, 0.09375], abs=0.03)
    assert not rule.lossless
    assert rule.synthetic


@pytest.mark.parametrize("rates", [(), (1.5,), (-0.1, 0.5)])
def test_wrong_rates_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"accept.rates is \[.*expected numbers in \[0, 1\]"):
        Synthetic(rates)


@pytest.mark.parametrize(
    ("wrong", "usual"), [({"epsilon": -1}, 0.09), ({"epsilon": 1.5}, 0.09), ({"delta": 0}, 0.3)], ids=str
)
def test_a_typical_threshold_that_takes_all_or_nothing_is_refused(wrong: dict, usual: float) -> None:
    ((name, value),) = wrong.items()
    expected = rf"accept.{name} is {value}, expected a number in \(0, 1\]: accept.{name}={usual}"
    with pytest.raises(ValueError, match=expected):
        Typical(**wrong)
