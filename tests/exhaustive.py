"""An Rng that visits every outcome with its weight, and the exact law of what two steps on toys emit.

Each key owns one uniform u in [0, 1). An outcome narrows the interval in which u is known to lie, so a key
that is used again conditions what follows, as a reused coin does.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from specdec.accept import Rule
from specdec.rng import Key, Rng, Stream
from specdec.tree import TokenTree
from specdec.trees import DraftLaw, TreePolicy

Text = tuple[int, ...]
START: Text = (0, 1)
Outcome = TypeVar("Outcome", bound=Hashable)
Known = dict[Key, tuple[float, float]]
DUST = 1e-15  # intervals this short come from rounding


class Exhaustive(Rng):
    """`law(f)` is the distribution of f(rng). `reused` holds the keys that a run asked for twice."""

    def __init__(self) -> None:
        self.reused: set[Key] = set()

    def law(self, f: Callable[[Rng], Outcome]) -> dict[Outcome, float]:
        """The probability of each outcome of f."""
        law: dict[Outcome, float] = {}
        for outcome, weight, _ in self.runs(f, {}):
            law[outcome] = law.get(outcome, 0.0) + weight
        return law

    def runs(self, f: Callable[[Rng], Outcome], known: Known) -> list[tuple[Outcome, float, Known]]:
        """Every run of f from what is known of the keys: its outcome, weight, and what is known after it."""
        found, scripts = [], [[]]
        while scripts:
            self._script, self._trace = scripts.pop(), []
            self._known, self._weight = dict(known), 1.0
            outcome = f(self)
            found.append((outcome, self._weight, self._known))
            taken = [choice for choice, _ in self._trace]
            for at in range(len(self._script), len(taken)):
                scripts += [[*taken[:at], other] for other in range(1, self._trace[at][1])]
        return found

    def coin(self, num: float, den: float, key: Key) -> bool:
        heads = 1.0 if den <= num else max(0.0, num / den)
        return self._choose([0.0, heads if num > 0 else 0.0, 1.0], key) == 0

    def draw(self, weights_V: Tensor, key: Key) -> int:
        cumulative_V = (weights_V.double() / weights_V.double().sum()).cumsum(0)
        last = int(weights_V.nonzero().max())
        cumulative_V[last:] = 1.0
        return self._choose([0.0, *cumulative_V.tolist()], key)

    def _choose(self, edges: list[float], key: Key) -> int:
        """The cell of [0, 1) that u falls in, by the script while there is one, else the first."""
        low, high = self._known.get(key, (0.0, 1.0))
        cells = [(i, max(a, low), min(b, high)) for i, (a, b) in enumerate(pairwise(edges))]
        cells = [(i, a, b) for i, a, b in cells if b - a > DUST]
        at = len(self._trace)
        choice = self._script[at] if at < len(self._script) else 0
        i, a, b = cells[choice]
        if key in self._known:
            self.reused.add(key)
        self._trace.append((choice, len(cells)))
        self._weight *= (b - a) / (high - low)
        self._known[key] = (a, b)
        return i

    def uniform(self, key: Key) -> float:
        raise NotImplementedError("an outcome has a weight here, not a number")

    def uniforms(self, key: Key, support_S: Tensor) -> Tensor:
        raise NotImplementedError("an outcome has a weight here, not a number")


@dataclass
class Toy:
    """A language model that is a table: a law for each text, on `support` of its tokens (0: all)."""

    seed: int
    vocab: int = 3
    support: int = 0
    banned: tuple[int, ...] = ()
    _rows: dict[Text, Tensor] = field(default_factory=dict)

    def law(self, text: Text) -> Tensor:
        """float64 [V]"""
        if text not in self._rows:
            g = np.random.default_rng((self.seed, *text))
            p_V = g.dirichlet(np.ones(self.vocab))
            p_V[list(self.banned)] = 0
            if self.support:
                p_V[g.permutation(self.vocab)[self.support :]] = 0
            self._rows[text] = torch.tensor(p_V / p_V.sum())
        return self._rows[text]


@dataclass(frozen=True)
class Step:
    """One step of the loop on toys: grow, score, accept, emit. Wrong parts can be swapped in."""

    rule: Rule
    policy: TreePolicy
    target: Toy
    draft: Toy
    stream: Callable[[Rng, int, int, int], Stream] = Stream
    tamper: Callable[[TokenTree], TokenTree] = lambda tree: tree

    def __call__(self, text: Text, number: int, rng: Rng) -> Text:
        stream = self.stream(rng, 0, number, len(text))
        tree = self.tamper(self._grow(text, self._levels(number), stream))
        p = [self.target.law(self._text_to(text, tree, n)) for n in range(len(tree))]
        return text + tuple(self.rule(tree, p, stream).emitted(tree))

    def _levels(self, number: int) -> int:
        """A wide second tree would cost minutes; one level is what an adaptive policy may ask for."""
        return self.policy.depth if self.policy.chain or number == 0 else 1

    def _grow(self, text: Text, levels: int, stream: Stream) -> TokenTree:
        growth = self.policy.grow(text[-1], levels, stream)
        try:
            tree, frontier = next(growth)
            while True:
                laws = [self.draft.law(self._text_to(text, tree, n)).log() for n in frontier]
                tree, frontier = growth.send([DraftLaw(logq_V, self.draft.vocab) for logq_V in laws])
        except StopIteration as end:
            return end.value

    def _text_to(self, text: Text, tree: TokenTree, node: int) -> Text:
        below = []
        while node:
            below.append(tree.tokens_N[node])
            node = tree.parents_N[node]
        return text + tuple(reversed(below))


def two_steps(step: Step, rng: Exhaustive) -> dict[Text, float]:
    """The law of the text after two steps.

    The second step is worked out once for each text and for what is known of those keys that it asks for
    again: nothing, if every key is used once.
    """
    asked: dict[Text, set[Key]] = {}
    laws: dict[tuple, dict[Text, float]] = {}
    total: dict[Text, float] = {}
    for text, weight, known in rng.runs(partial(step, START, 0), {}):
        if text not in asked:
            asked[text] = set().union(*(keys for _, _, keys in rng.runs(partial(step, text, 1), {})))
        again: Known = {key: known[key] for key in sorted(known.keys() & asked[text])}
        memo = (text, *again.items())
        if memo not in laws:
            laws[memo] = summed(rng.runs(partial(step, text, 1), again))
        for longer, share in laws[memo].items():
            total[longer] = total.get(longer, 0.0) + weight * share
    return total


def summed(runs: list[tuple[Text, float, Known]]) -> dict[Text, float]:
    law: dict[Text, float] = {}
    for text, weight, _ in runs:
        law[text] = law.get(text, 0.0) + weight
    return law


def completed(law: dict[Text, float], target: Toy, length: int) -> dict[Text, float]:
    """The law of texts of `length` tokens, the target going on where a text is shorter."""
    for n in range(len(START), length):
        grown: dict[Text, float] = {}
        for text, weight in law.items():
            tails = enumerate(target.law(text).tolist()) if len(text) == n else [(None, 1.0)]
            for x, share in tails:
                longer = text if x is None else (*text, x)
                grown[longer] = grown.get(longer, 0.0) + weight * share
        law = grown
    return law


def distance(step: Step, rng: Exhaustive | None = None) -> float:
    """Total variation between what two steps emit and the target's law of as many tokens."""
    emitted = two_steps(step, rng or Exhaustive())
    length = max(map(len, emitted))
    want = completed({START: 1.0}, step.target, length)
    return total_variation(completed(emitted, step.target, length), want)


def total_variation(a: dict[Outcome, float], b: dict[Outcome, float]) -> float:
    return 0.5 * sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in a.keys() | b.keys())
