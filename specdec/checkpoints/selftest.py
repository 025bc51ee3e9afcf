"""A self-test for heads of others: one that is read wrongly drafts badly, and nothing else shows it.

The target answers a few questions. Then every reading goes through the real loop, but what is proposed is
what the target will say: so all readings are asked for the same laws, and a difference of one layer shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import TYPE_CHECKING

from ..accept import Match
from ..data import render
from ..decode import Sequence, decode
from ..proposers.none import NoDraft
from ..rng import Philox, Stream
from ..sampling import Sampling
from ..tree import TokenTree
from ..trees import Chain, DraftLaw, TreePolicy
from ..trees.base import Growth
from .files import Reading, Unusable

if TYPE_CHECKING:
    from ..proposers.base import Proposer
    from ..target import HFTarget

DEPTH, TOKENS = 3, 96
ERRORS = 3.0  # standard errors that tell two readings apart, or a head from chance
QUESTIONS = (
    "Explain to a child why the moon seems to follow a moving car.",
    "Write a Python function that returns the median of a list of numbers, with a docstring.",
    "What should I check before I buy a used piano?",
    "A tram leaves every 12 minutes from 6:05. Which is the first after 7 o'clock? Show each step.",
    "Describe a rainy harbour at night in a few sentences.",
    "List the steps for repotting a cactus without getting hurt.",
    "Why do old windows look wavy? Answer in a short paragraph.",
    "Write a polite message to a neighbour whose dog digs up my tulips.",
)


@dataclass(frozen=True)
class Judged:
    """What a law made of the token that the target said: whether it was its first choice, and its log."""

    depth: int
    first: bool
    logq: float


@dataclass(frozen=True)
class Told(TreePolicy):
    """A chain of what the target will say. Keeps what the draft's law was there, by (request, position).

    texts  prompt and answer of each request
    """

    texts: tuple[tuple[int, ...], ...] = ()
    depth: int = DEPTH
    judged: dict[tuple[int, int], Judged] = field(default_factory=dict, compare=False)

    @property
    def chain(self) -> bool:
        return True

    def grow(self, root: int, levels: int, stream: Stream) -> Growth:
        tree, text, node = TokenTree([root]), self.texts[stream.request], 0
        said = text[stream.position : stream.position + levels] if text[stream.position - 1] == root else ()
        for depth, token in enumerate(said, start=1):
            (law,) = yield tree, [node]
            self.judged[stream.request, stream.position + depth] = judge(law, token, depth)
            node = tree.add(token, node)
        return tree


def judge(law: DraftLaw, token: int, depth: int) -> Judged:
    """How a law does on what was said."""
    logq_X = law.logq_K[token : token + 1] if law.tokens_K is None else law.logq_K[law.tokens_K == token]
    first = [top for top, _ in law.top(1)] == [token]
    return Judged(depth, first, float(logq_X[0]) if len(logq_X) else -math.inf)


@dataclass(frozen=True)
class Trial:
    """What a reading did.

    floor  how often one would be right who knows only which token is the commonest of the answers
    """

    reading: Reading
    judged: dict[tuple[int, int], Judged]
    floor: float

    def rate(self, depth: int) -> float:
        """How often the draft's first choice was right: at depth 1 the acceptance, below it told the way."""
        hits = [j.first for j in self.judged.values() if j.depth == depth]
        return fmean(hits) if hits else 0.0

    @property
    def nats(self) -> float:
        """Mean log-probability of what was said, where it can be drafted."""
        return fmean([j.logq for j in self.judged.values() if j.logq > -math.inf] or [-math.inf])

    @property
    def drafts(self) -> bool:
        """Whether drafts are accepted clearly more often than chance allows."""
        asked = sum(j.depth == 1 for j in self.judged.values())
        return self.rate(1) > self.floor + ERRORS * math.sqrt(self.floor * (1 - self.floor) / max(1, asked))

    def clearly_better(self, other: Trial) -> bool:
        """Whether this reading gives what was said more probability than the other, by more than chance."""
        pairs = [(j.logq, other.judged[at].logq) for at, j in self.judged.items() if at in other.judged]
        gains = [mine - theirs for mine, theirs in pairs if math.isfinite(mine) and math.isfinite(theirs)]
        return len(gains) > 1 and fmean(gains) > ERRORS * math.sqrt(variance(gains) / len(gains))

    def __str__(self) -> str:
        rates = " ".join(f"{self.rate(depth):.2f}" for depth in range(1, DEPTH + 1))
        return f"{self.reading.name}: {rates}, {self.nats:.2f} nats"


def fit(
    target: HFTarget,
    readings: Many[Reading],
    prompts: Many[list[int]],
    proposer: Callable[[Reading, TreePolicy], Proposer],
) -> tuple[Reading, str]:
    """The reading that the target bears out, and what was measured, in words.

    The first reading is what the checkpoint documents: another must draft clearly better to be preferred.
    Unusable, a ValueError: no reading drafts clearly better than always saying the same token
    """
    texts = _answers(target, prompts)
    said = Counter(
        token for text, prompt in zip(texts, prompts, strict=True) for token in text[len(prompt) :]
    )
    floor = max(said.values()) / said.total()
    trials = [Trial(r, _judged(target, texts, prompts, r, proposer), floor) for r in readings]
    able = [trial for trial in trials if trial.drafts]
    if not able:
        raise Unusable(
            f"drafts no better than chance for {target.name}: right at depths 1 to {DEPTH} in "
            f"{'; '.join(map(str, trials))}; always saying the commonest token gives {floor:.2f}"
        )
    best = max(able, key=lambda trial: trial.nats)
    chosen = next(trial for trial in able if not best.clearly_better(trial))
    others = "; ".join(str(trial) for trial in trials if trial is not chosen)
    words = f"{chosen} (right at depths 1 to {DEPTH}, {floor:.2f} by chance"
    return chosen.reading, f"{words}; tried too: {others})" if others else f"{words})"


def _answers(target: HFTarget, prompts: Many[list[int]]) -> tuple[tuple[int, ...], ...]:
    seqs = _requests(prompts)
    for _ in decode(target, NoDraft(target, Chain()), Match(), Sampling(), seqs):
        pass
    return tuple(tuple(seq.tokens) for seq in seqs)


def _judged(
    target: HFTarget,
    texts: tuple[tuple[int, ...], ...],
    prompts: Many[list[int]],
    reading: Reading,
    proposer: Callable[[Reading, TreePolicy], Proposer],
) -> dict[tuple[int, int], Judged]:
    tree = Told(texts=texts)
    for _ in decode(target, proposer(reading, tree), Match(), Sampling(), _requests(prompts)):
        pass
    return tree.judged


def _requests(prompts: Many[list[int]]) -> list[Sequence]:
    return [Sequence(i, list(prompt), TOKENS, Philox(0)) for i, prompt in enumerate(prompts)]


def questions(target: HFTarget) -> list[list[int]]:
    """Prompts of all kinds for any target."""
    return [render(target.tokenizer, [{"role": "user", "content": text}], None) for text in QUESTIONS]
