"""Losslessness of a run, judged from outside: identical answers, near ties, transforms that are uniform."""

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from models import VOCAB, requests, run, tiny
from pit import randomised_pit, uniformity

from specdec import lossless
from specdec.accept import Block, Match, Recursive, Rejection, Rule
from specdec.arms import Experiment, Settings
from specdec.config import as_target, check_combination
from specdec.data import Conversation
from specdec.loading import random_model
from specdec.lossless import (
    Decoding,
    Text,
    audit,
    compare,
    decode_logits,
    first_difference,
    noise_bound,
    verify_logits,
)
from specdec.measure import measure
from specdec.proposers.draft_lm import DraftLM
from specdec.proposers.ngram import NGram
from specdec.records import RequestRecord
from specdec.rng import Philox, Stream
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.text import turn_of
from specdec.tree import TokenTree
from specdec.trees import Chain, Sampled, Static, TopK, TreePolicy

TALKS = [Conversation(f"c{i}", "x", (f"say {i}",)) for i in range(3)]
SAMPLING = Sampling(temperature=1.0, top_p=0.9)
PROMPT, LENGTH, ROWS = [5, 6, 7, 8], 128, 34  # 34 texts of 128 tokens: 4,352
ALPHA = 1e-3


def bytes_target(dtype: str = "float32") -> HFTarget:
    return as_target(random_model(dtype=dtype, device="cpu"))


def experiment(rule: Rule, sampling: Sampling) -> Experiment:
    target = bytes_target()
    names = dict.fromkeys(("target", "proposer", "tree", "accept", "data"), "x")
    settings = Settings(max_new_tokens=12, warmup=0)
    return Experiment(target, NGram(target, Chain()), rule, sampling, TALKS, settings, names=names)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLING])
def test_answers_in_float32_are_identical(sampling: Sampling) -> None:
    summary, _ = measure(experiment(Match(), sampling))
    assert summary["lossless"] == {"rule": True, "identical": len(TALKS), "divergences": [], "audit": None}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_token_is_reported_with_its_place_and_gap(temperature: float) -> None:
    e = experiment(Match(), Sampling(temperature))
    _, records = measure(e)
    method, plain = ([r for r in records if r.arm == arm] for arm in ("method", "none"))
    asked = {r.id: r for r in (turn_of(e.target.tokenizer, c, 0, {}) for c in TALKS)}
    wrong = [changed(r, 7) if r.request == "c1/0" else r for r in method]
    found = compare(e, wrong, plain, asked)
    logits_V = list(decode_logits(e.target, asked["c1/0"].ids, plain[1].tokens))[7]
    position = len(asked["c1/0"].ids) + 7
    noise_V = Stream(Philox(e.settings.seed), asked["c1/0"].number, 0, position).noise_at(
        torch.arange(256), 0
    )
    best, second = (logits_V + temperature * noise_V).topk(2).values.tolist()
    assert plain[1].request == "c1/0"
    assert found["identical"] == 2
    assert found["divergences"] == [
        {"request": "c1/0", "index": 7, "top2_gap": pytest.approx(best - second, abs=1e-4)}
    ]
    # What follows the wrong token was decoded after another text, so it is as wrong.
    assert found["audit"]["tokens"] == 12
    assert found["audit"]["answers"] == 1
    assert found["audit"]["beyond"] >= 1


def test_draws_pass_the_audit_that_are_plain_decodings() -> None:
    e = experiment(Match(), Sampling(temperature=0.8))
    _, records = measure(e)
    said = {r.request: r.tokens for r in records if r.arm == "method"}
    for request in (turn_of(e.target.tokenizer, c, 0, {}) for c in TALKS):
        audited = audit(Decoding.of(e.target, Text.of(e, request, said[request.id])), bound=1e-4)
        assert (audited.tokens, audited.near_ties, audited.beyond) == (12, 0, [])
        greedy = audit(Decoding.of(e.target, Text(request.ids, said[request.id])), bound=1e-4)
        assert greedy.beyond  # by the logits alone other tokens would have been said


def changed(record: RequestRecord, index: int) -> RequestRecord:
    tokens = list(record.tokens)
    tokens[index] = (tokens[index] + 1) % 256
    return replace(record, tokens=tokens)


@pytest.mark.parametrize(("rule", "plain"), [(Recursive(), [1]), (Match(), None)])
def test_nothing_is_compared_that_need_not_be_equal(rule: Rule, plain: list | None) -> None:
    e = experiment(rule, SAMPLING)
    assert compare(e, [], plain, {}) == {"rule": True, "identical": None, "divergences": [], "audit": None}


def test_where_two_texts_part() -> None:
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_the_audit_tells_near_ties_from_wrong_tokens() -> None:
    target = tiny()
    seqs = requests([PROMPT], 12)
    run(NGram(target, Chain()), seqs)
    said = seqs[0].new_tokens
    clean = audit(Decoding.of(target, Text(PROMPT, said)), bound=1e-4)
    assert (clean.tokens, clean.near_ties, clean.beyond) == (12, 0, [])
    *_, last_V = decode_logits(target, PROMPT, said)
    second, gap = int(last_V.topk(2).indices[1]), float(last_V.topk(2).values.diff().abs())
    wrong = Decoding.of(target, Text(PROMPT, [*said[:11], second]))
    near = audit(wrong, bound=2 * gap)
    assert (near.near_ties, near.widest, near.beyond) == (1, pytest.approx(gap, abs=1e-4), [])
    beyond = audit(wrong, bound=gap / 2)
    assert beyond.near_ties == 0
    assert beyond.beyond == [(11, pytest.approx(gap, abs=1e-4))]


def test_verify_and_decode_logits_have_one_row_a_token() -> None:
    target, tokens = tiny(), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    one = list(decode_logits(target, PROMPT, tokens))
    several = list(verify_logits(target, PROMPT, tokens, nodes=4))
    assert torch.allclose(torch.stack(one), torch.stack(several), atol=1e-4)
    for i, logits_V in enumerate(one):
        with torch.inference_mode():
            text = torch.tensor([PROMPT + tokens[:i]])
            want_V = reference().model(text).logits[0, -1]
        assert torch.allclose(logits_V, want_V, atol=1e-4)


def reference() -> HFTarget:
    """The target's twin, whose model attends as `transformers` does."""
    twin = HFTarget(random_model(config={"vocab_size": VOCAB}, device="cpu").model)
    twin.model.set_attn_implementation("eager")
    return twin


def test_noise_is_next_to_nothing_in_float32_and_more_in_bfloat16() -> None:
    text = Text([7, 8, 9], list(range(10, 40)))
    exact, rough = (noise_of(bytes_target(dtype), text) for dtype in ("float32", "bfloat16"))
    assert 0 <= exact < 1e-3
    assert rough > 10 * exact
    assert rough > 1e-3


def noise_of(target: HFTarget, text: Text) -> float:
    return noise_bound(target, [Decoding.of(target, text)])


@pytest.mark.parametrize(("passes", "most"), [("decode_logits", 2), ("verify_logits", 9)])
def test_an_audit_reads_an_answer_once_and_holds_few_rows_of_it(
    passes: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of a long answer, 2,048 by a vocabulary of 151,936, would take 1.2 GB."""
    rows_of, seen = getattr(lossless, passes), []

    def watched(*args: object) -> Iterator[torch.Tensor]:
        for row_V in rows_of(*args):
            seen.append(weakref.ref(row_V))
            assert sum(row() is not None for row in seen) <= most
            yield row_V

    monkeypatch.setattr(lossless, passes, watched)
    audited = lossless.audit_answers(bytes_target(), [Text([7, 8, 9], list(range(10, 42)))] * 2)
    assert audited["tokens"] == len(seen) == 64


TREES = {
    "chain": Chain(depth=3),
    "topk": TopK(depth=2, widths=(3, 2)),
    "static": Static(depth=3, nodes=8),
    "sampled_chain": Sampled(depth=3, widths=(1, 1, 1)),
    "sampled": Sampled(depth=2, widths=(2, 2)),
}


def allowed(rule: Rule, tree: TreePolicy) -> bool:
    try:
        check_combination(tree, rule, SAMPLING)
    except ValueError:
        return False
    return True


CASES = [
    (rule, tree)
    for rule in (Match(), Recursive(), Rejection(), Block())
    for tree in TREES
    if allowed(rule, TREES[tree])
]


def transforms(rule: Rule, tree: TreePolicy, rows: int = ROWS, layers: int = 1) -> tuple[int, float]:
    """Tokens of the real loop, and the p-value of their randomised transforms under the target's own laws."""
    seqs = requests([PROMPT] * rows, LENGTH)
    run(DraftLM(tiny(), tree, layers=layers), seqs, SAMPLING, rule)
    with torch.inference_mode():
        logits_BNV = reference().model(torch.tensor([s.tokens for s in seqs])).logits
    start = len(PROMPT) - 1
    laws = [law_V for row in SAMPLING.laws(logits_BNV[:, start:-1]) for law_V in row]
    tokens = [t for s in seqs for t in s.new_tokens]
    return len(tokens), uniformity(randomised_pit(tokens, laws))


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "tree"), CASES, ids=lambda v: v if isinstance(v, str) else v.name)
def test_sampled_text_has_the_targets_law(rule: Rule, tree: str) -> None:
    tokens, p_value = transforms(rule, TREES[tree])
    assert tokens >= 4000
    assert p_value > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "tree"),
    [(Rejection(), "sampled_chain"), (Block(), "sampled_chain"), (Recursive(), "sampled")],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_a_tenth_too_much_in_the_exponent_of_q_is_noticed(
    rule: Rule, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TokenTree.draw_children_from

    def sharpened(self: TokenTree, node: int, q_V: torch.Tensor) -> None:
        wrong_V = q_V**1.1
        honest(self, node, wrong_V / wrong_V.sum())

    monkeypatch.setattr(TokenTree, "draw_children_from", sharpened)
    _, p_value = transforms(rule, TREES[tree], rows=2 * ROWS, layers=2)
    assert p_value < ALPHA
