"""Which tree is fastest, and at which size, from what its drafts are worth and what its steps cost.

Shapes: K depths, R ranks among siblings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .arms import Experiment
from .calibrate import (
    Acceptance,
    Size,
    draft_seconds,
    loop_tokens_per_step,
    ranks_along,
    replayed,
    sizes,
    verify_seconds,
)
from .text import Request
from .trees import BestFirst, Paths, Sequoia, TreePolicy, best_paths, expected_length


@dataclass(frozen=True)
class Search:
    """What is tried; names as in conf/tune.yaml."""

    nodes: list[int]
    depths: list[int]
    branches: int = 8
    rounds: int = 12

    def __post_init__(self) -> None:
        for name, least in (("nodes", 2), ("depths", 1)):
            values = getattr(self, name)
            if not values or any(type(value) is not int or value < least for value in values):
                raise ValueError(
                    f"search.{name} is {values}, expected counts from {least} on: search.{name}=[{least},4]"
                )
        shallowest, largest = min(self.depths), max(self.nodes)
        if shallowest >= largest:
            raise ValueError(
                f"search.nodes is {self.nodes} and search.depths is {self.depths}, expected a depth below a "
                f"number of nodes: search.nodes=[{shallowest + 1}] or search.depths=[{largest - 1}]"
            )
        for name in ("branches", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"search.{name} is {getattr(self, name)}, expected 1 or more: search.{name}=8"
                )


class StaticSizes:
    """Sizes of a static tree: one pass over the calibration answers tells what each of them would emit."""

    def __init__(self, e: Experiment, requests: list[Request], tree: Sequoia, search: Search) -> None:
        self.tree, deepest = tree, max(search.depths)
        self.ranks = ranks_along(e, requests, deepest, search.branches)
        self.acceptance = Acceptance.of(self.ranks, deepest, search.branches)
        self.rates_KR = [[round(rate, 4) for rate in rates_R] for rates_R in self.acceptance.rates_KR]

    def sized(self, nodes: int, depth: int) -> Sequoia:
        return replace(self.tree, nodes=nodes, depth=depth, acceptance=self.rates_KR[:depth])

    def tokens(self, nodes: int, depth: int) -> float:
        return replayed(self._paths(nodes, depth), self.ranks)

    def models(self, size: Size) -> dict[str, float]:
        """Tokens per step by what says so: the answers replayed, and two formulas."""
        paths = self._paths(size.nodes, size.depth)
        return {
            "replay": size.tokens,
            "depth and branch": expected_length(paths, self.rates_KR),
            "branch alone (i.i.d.)": expected_length(paths, self.acceptance.pooled_KR),
        }

    def _paths(self, nodes: int, depth: int) -> Paths:
        return best_paths(self.rates_KR[:depth], nodes)


class DynamicSizes:
    """Sizes of a dynamic tree: each of them runs on the calibration prompts."""

    acceptance = None

    def __init__(self, e: Experiment, requests: list[Request], tree: BestFirst) -> None:
        self.e, self.requests, self.tree = e, requests, tree

    def sized(self, nodes: int, depth: int) -> BestFirst:
        return replace(self.tree, nodes=nodes, depth=depth)

    def tokens(self, nodes: int, depth: int) -> float:
        return loop_tokens_per_step(self.e, self.requests, self.sized(nodes, depth))

    def models(self, size: Size) -> dict[str, float]:
        """Tokens per step on the calibration prompts."""
        return {"calibration": size.tokens}


@dataclass(frozen=True)
class Tuning:
    """What was found of one kind of tree.

    asked          the policy whose size was looked for
    plain          seconds of a step of plain decoding
    verify         seconds by nodes
    acceptance     what a static tree was made for; a dynamic one has none
    sizes          fastest first
    tree           the policy of the fastest
    tokens         its tokens per step, by what says so
    """

    asked: TreePolicy
    plain: float
    verify: dict[int, float]
    acceptance: Acceptance | None
    sizes: list[Size]
    tree: TreePolicy
    tokens: dict[str, float]

    def speedup(self, size: Size) -> float:
        """Over plain decoding, as predicted."""
        return self.plain / size.seconds_per_token


def tune(
    e: Experiment,
    requests: list[Request],
    trees: list[TreePolicy],
    search: Search,
    say: Callable[[str], None],
) -> list[Tuning]:
    """The fastest size of each tree for an experiment's target and proposer, the fastest tree first.

    `say` hears what is next.
    """
    say(f"timing steps of 1 to {max(search.nodes)} nodes")
    verify = verify_seconds(e, requests, [1, *search.nodes], search.rounds)
    plain = verify.pop(1)
    tunings = [_tune_one(e, requests, tree, search, plain, verify, say) for tree in trees]
    return sorted(tunings, key=lambda tuning: tuning.sizes[0].seconds_per_token)


def _tune_one(
    e: Experiment,
    requests: list[Request],
    tree: TreePolicy,
    search: Search,
    plain: float,
    verify: dict[int, float],
    say: Callable[[str], None],
) -> Tuning:
    name = type(tree).__name__
    if isinstance(tree, Sequoia):
        say(f"{name}: following the draft through {len(requests)} answers")
        kind = StaticSizes(e, requests, tree, search)
    else:
        kind = DynamicSizes(e, requests, tree)
    say(f"{name}: timing drafts of up to {max(search.depths)} levels")
    draft = _draft_seconds(e, requests, kind, search)
    say(f"{name}: trying {len(draft)} sizes")
    found = sizes(verify, draft, kind.tokens)
    fastest = found[0]
    chosen, tokens = kind.sized(fastest.nodes, fastest.depth), kind.models(fastest)
    return Tuning(tree, plain, verify, kind.acceptance, found, chosen, tokens)


def _draft_seconds(
    e: Experiment, requests: list[Request], kind: StaticSizes | DynamicSizes, search: Search
) -> dict[tuple[int, int], float]:
    """Seconds by (nodes, depth) of the sizes to be tried: no tree is deeper than its nodes reach.

    Of one depth they hardly depend on the nodes; a tree that looks how far to go is told how far it may.
    """
    deepest = max(search.depths)
    if kind.tree.length != "fixed":
        tried = [(n, min(deepest, n - 1)) for n in search.nodes]
        return dict(zip(tried, _timed(e, requests, kind, tried, search), strict=True))
    largest = [(max(search.nodes), d) for d in search.depths]
    by_depth = dict(zip(search.depths, _timed(e, requests, kind, largest, search), strict=True))
    return {(n, d): by_depth[d] for n in search.nodes for d in search.depths if d < n}


def _timed(
    e: Experiment,
    requests: list[Request],
    kind: StaticSizes | DynamicSizes,
    tried: list[tuple[int, int]],
    search: Search,
) -> list[float]:
    return draft_seconds(e, requests, [kind.sized(*size) for size in tried], search.rounds)
