"""Whether an arm said what plain decoding says, and how near a tie it was where it did not.

In fp32 answers are identical. In 16 bits the last bits of a verify and of a one-token forward differ, so a
near tie may fall the other way: it is counted, while anything beyond the measured noise is a bug. At a
temperature the tie is one of logits and the draw's noise together. Of a position only what is needed stays:
logits of a long answer over a large vocabulary take gigabytes. Shapes: T tokens, K top logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .accept import Match
from .decode import Sequence
from .records import RequestRecord
from .rng import Philox, Stream
from .text import Request
from .tree import TokenTree

if TYPE_CHECKING:
    from .arms import Experiment
    from .target import HFTarget

NOISE_FACTOR = 4.0
NOISE_QUANTILE = 0.999
TOP = 10  # logits of a position that enter the noise
AUDITED = 8  # answers that differ, at most, whose tokens are audited

Scores = Callable[[Tensor, int], Tensor]  # of logits [V] and a position: [V], of which the largest is said


def compare(
    e: Experiment,
    method: list[RequestRecord],
    plain: list[RequestRecord] | None,
    requests: dict[str, Request],
) -> dict:
    """The `lossless` entry of a summary.

    rule         whether the rule is lossless, or "synthetic"
    identical    answers equal to plain decoding's; None where they need not be (a rule with coins of its own
                 at a temperature, a lossy rule, no plain decoding)
    divergences  request, index of the first other token, gap between the two best of the target's logits
                 there, or of what its draw compares; None where top_p or top_k decides, too
    audit        of the answers that differ, the first few: `audit_answers`; None where none do, or so
    """
    same_text = e.accept.lossless and (e.sampling.temperature == 0 or isinstance(e.accept, Match))
    if not same_text or not plain:
        rule = "synthetic" if e.accept.synthetic else e.accept.lossless
        return {"rule": rule, "identical": None, "divergences": [], "audit": None}
    said = {r.request: r.tokens for r in plain if r.repeat == 0}
    answers = {r.request: r.tokens for r in method if r.repeat == 0}
    differ = {q: first_difference(tokens, said[q]) for q, tokens in answers.items() if tokens != said[q]}
    texts = {q: Text.of(e, requests[q], answers[q]) for q in differ}
    whole = e.sampling.temperature == 0 or (e.sampling.top_p == 1 and e.sampling.top_k == 0)
    divergences = [
        {"request": q, "index": i, "top2_gap": top2_gap(e.target, texts[q], said[q][:i]) if whole else None}
        for q, i in differ.items()
    ]
    audited = list(texts.values())[:AUDITED] if whole else []
    return {
        "rule": True,
        "identical": len(answers) - len(differ),
        "divergences": divergences,
        "audit": audit_answers(e.target, audited) if audited else None,
    }


@dataclass(frozen=True)
class Text:
    """An answer, and what its tokens must be the largest of."""

    prompt: list[int]
    tokens: list[int]
    scores: Scores = lambda logits_V, position: logits_V

    @classmethod
    def of(cls, e: Experiment, request: Request, tokens: list[int]) -> Text:
        temperature, rng = e.sampling.temperature, Philox(e.settings.seed)
        if temperature == 0:
            return cls(request.ids, tokens)

        def drawn(logits_V: Tensor, position: int) -> Tensor:
            every_V = torch.arange(len(logits_V), device=logits_V.device)
            noise_V = Stream(rng, request.number, 0, position).noise_at(every_V, depth=0)
            return logits_V + temperature * noise_V

        return cls(request.ids, tokens, drawn)


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def top2_gap(target: HFTarget, text: Text, before: list[int]) -> float:
    """Gap between the two largest scores that one-token decoding gives behind the prompt and `before`."""
    tokens = text.prompt + before
    logits_V = _decode_one(target, _begin(target, tokens, len(tokens) - 1), tokens[-1])
    best, second = text.scores(logits_V, len(tokens)).topk(2).values.tolist()
    return best - second


@dataclass(frozen=True)
class Audit:
    """Emitted tokens against one-token decoding: those tied away within the noise, and those not.

    widest  gap of the near ties
    """

    tokens: int
    near_ties: int
    widest: float
    beyond: list[tuple[int, float]]
    bound: float


@dataclass(frozen=True)
class Decoding:
    """What one-token decoding makes of a text: before each token the largest logits, and that token's gap.

    top_TK     ids of the largest logits
    logits_TK  these logits, float32
    gaps       from the largest score to the token's
    """

    text: Text
    top_TK: Tensor
    logits_TK: Tensor
    gaps: list[float]

    @classmethod
    def of(cls, target: HFTarget, text: Text) -> Decoding:
        """Teacher-force the text, one forward a token."""
        ids, logits, gaps = [], [], []
        for i, logits_V in enumerate(decode_logits(target, text.prompt, text.tokens)):
            scores_V = text.scores(logits_V, len(text.prompt) + i)
            gaps.append(float(scores_V.max() - scores_V[text.tokens[i]]))
            top = logits_V.topk(min(TOP, len(logits_V)))
            ids.append(top.indices)
            logits.append(top.values)
        return cls(text, torch.stack(ids), torch.stack(logits), gaps)


def audit(decoding: Decoding, bound: float) -> Audit:
    """Every gap to the largest must lie within `bound`."""
    gaps = decoding.gaps
    beyond = [(i, gap) for i, gap in enumerate(gaps) if gap > bound]
    ties = [gap for gap in gaps if 0 < gap <= bound]
    return Audit(len(gaps), len(ties), max(ties, default=0.0), beyond, bound)


def audit_answers(target: HFTarget, texts: list[Text]) -> dict:
    """Answers against one-token decoding, with the noise measured on the same texts.

    near_ties  tokens that are not what it would say, yet within `bound` of it; `widest`, how far at most
    beyond     tokens that no noise explains: the loop, the cache or the kernel is wrong
    """
    decodings = [Decoding.of(target, text) for text in texts]
    bound = noise_bound(target, decodings)
    audits = [audit(decoding, bound) for decoding in decodings]
    return {
        "answers": len(audits),
        "tokens": sum(a.tokens for a in audits),
        "near_ties": sum(a.near_ties for a in audits),
        "widest": max(a.widest for a in audits),
        "beyond": sum(len(a.beyond) for a in audits),
        "bound": bound,
    }


def noise_bound(target: HFTarget, decodings: list[Decoding], nodes: int = 8) -> float:
    """4 times the 99.9th percentile of |verify - decode| over the top logits at each token of the answers."""
    differences = []
    for d in decodings:
        verified = verify_logits(target, d.text.prompt, d.text.tokens, nodes)
        for top_K, logits_K, tree_V in zip(d.top_TK, d.logits_TK, verified, strict=True):
            differences.append((logits_K - tree_V[top_K]).abs())
    return NOISE_FACTOR * float(torch.cat(differences).quantile(NOISE_QUANTILE))


def decode_logits(target: HFTarget, prompt: list[int], tokens: list[int]) -> Iterator[Tensor]:
    """float32 [V] before each of `tokens`, one forward a token. Finish it before another: all use slot 0."""
    seq = _begin(target, prompt, len(prompt) - 1 + len(tokens))
    for root in [prompt[-1], *tokens[:-1]]:
        yield _decode_one(target, seq, root)


def verify_logits(target: HFTarget, prompt: list[int], tokens: list[int], nodes: int) -> Iterator[Tensor]:
    """The same, with chains of `nodes` nodes verified at once."""
    seq = _begin(target, prompt, len(prompt) - 1 + len(tokens))
    roots = [prompt[-1], *tokens[:-1]]
    for i in range(0, len(roots), nodes):
        chain = roots[i : i + nodes]
        logits_NV = target.score([seq], [TokenTree.chain(chain)]).logits_BNV[0, : len(chain)]
        target.keep([0], [list(range(len(chain)))])
        yield from logits_NV.float()


def _begin(target: HFTarget, prompt: list[int], length: int) -> Sequence:
    target.needs_hidden = ()
    target.reserve(1, max(length, len(prompt)))
    target.prefill(0, prompt[:-1])
    return Sequence(0, list(prompt), 1, Philox())


def _decode_one(target: HFTarget, seq: Sequence, root: int) -> Tensor:
    logits_V = target.score([seq], [TokenTree([root])]).logits_BNV[0, 0].float()
    target.keep([0], [[0]])
    return logits_V
