"""The sampling kernel draws the naive form's tokens, and that form draws from the laws of `Sampling`.

The keyed randomness inside kernels is that of torch.
"""

from importlib import import_module
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from specdec.sampling import Sampling
from specdec_kernels.listing import cases
from specdec_kernels.philox import Purpose, coins, race, rows
from specdec_kernels.sample_rows import sample_rows

TOYS = [case for case in cases("sample_rows") if case.toy]
SETTINGS = [
    Sampling(0.0),
    Sampling(0.7),
    Sampling(1.0, top_k=1),
    Sampling(1.3, top_k=20),
    Sampling(1.0, top_k=10_000),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_p=0.5),
    Sampling(1.0, top_p=0.9999),
    Sampling(0.9, top_k=30, top_p=0.6),
    Sampling(1e-30, top_k=3, top_p=0.9),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold what is no token."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(-7))


def keys(X: int) -> dict[str, Any]:
    row_X = torch.arange(X)
    return {
        "seed": 2**33 + 1,
        "request_X": row_X + 2**32 - 2,
        "step_X": 9 * row_X,
        "node_X": row_X % 5,
        "purpose": Purpose.TARGET,
    }


def draw(logits_XV: Tensor, settings: Sampling, impl: str) -> Tensor:
    options = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
    return sample_rows(logits_XV, **keys(len(logits_XV)), **options, impl=impl)


def drawn_from_the_laws(logits_XV: Tensor, settings: Sampling) -> Tensor:
    k = keys(len(logits_XV))
    fields = (k["seed"], k["request_X"], k["step_X"], k["node_X"], k["purpose"])
    return race(settings.laws(logits_XV), rows(*fields, logits_XV.shape[-1]))


def random_logits(X: int, V: int, kind: str, seed: int = 0) -> Tensor:
    logits_XV = 2 * torch.randn(X, V, generator=torch.Generator().manual_seed(seed))
    if kind == "tied":
        return logits_XV.round()
    if kind == "banned":
        logits_XV[:, 1::2] = -torch.inf
    return logits_XV.half() if kind == "half" else logits_XV


KINDS = ("float", "half", "tied", "banned")


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_drawn_from_the_laws(settings: Sampling, kind: str) -> None:
    logits_XV = random_logits(200, 301, kind)
    assert torch.equal(draw(logits_XV, settings, "naive"), drawn_from_the_laws(logits_XV, settings))


@pytest.mark.interpret
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_draws_the_same_tokens(settings: Sampling, kind: str) -> None:
    logits_XV = random_logits(3, 301, kind)
    assert torch.equal(draw(logits_XV, settings, "triton"), draw(logits_XV, settings, "naive"))


@pytest.mark.interpret
@pytest.mark.parametrize(("X", "V"), [(3, 1), (3, 2), (3, 255), (3, 257), (2, 4097)])
def test_vocabularies_of_any_size(X: int, V: int) -> None:
    for settings in (Sampling(0), Sampling(1), Sampling(1, top_k=7, top_p=0.8)):
        logits_XV = random_logits(X, V, "tied")
        assert torch.equal(draw(logits_XV, settings, "triton"), draw(logits_XV, settings, "naive"))


@pytest.mark.interpret
@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.name)
def test_listed_calls_draw_the_same_tokens(case: Any) -> None:
    inputs = case.inputs(torch.device("cpu"), torch.float16, 3)
    assert torch.equal(sample_rows(**inputs, impl="triton"), sample_rows(**inputs, impl="naive"))


EDGES = [  # settings, what is kept of ten equal logits and of (2, 1, 1, 1, 0)
    (Sampling(1, top_k=4), {0, 1, 2, 3}, {0, 1, 2, 3}),
    (Sampling(1, top_k=2), {0, 1}, {0, 1}),
    (Sampling(1, top_p=0.35), {0, 1, 2, 3}, {0}),
    (Sampling(1, top_p=0.55), {0, 1, 2, 3, 4, 5}, {0, 1}),
    (Sampling(1, top_k=5, top_p=0.5), {0, 1, 2}, {0, 1}),
]


@pytest.mark.parametrize(("settings", "flat", "stepped"), EDGES)
def test_the_lowest_ids_win_at_the_edge(settings: Sampling, flat: set, stepped: set, impl: str) -> None:
    X = 150 if impl == "naive" else 6
    for logits_V, kept in ((torch.ones(10), flat), (torch.tensor([2.0, 1, 1, 1, 0]), stepped)):
        tokens_X = draw(logits_V.expand(X, -1), settings, impl)
        assert set(tokens_X.tolist()) <= kept
        assert impl == "triton" or set(tokens_X.tolist()) == kept
        assert torch.equal(tokens_X, draw(logits_V.expand(X, -1), settings, "naive"))


@pytest.mark.parametrize("settings", [Sampling(0), Sampling(1), Sampling(1, top_k=2, top_p=0.5)], ids=repr)
def test_bad_rows_are_named(settings: Sampling, impl: str) -> None:
    logits_XV = torch.zeros(6, 300)
    logits_XV[1, 299], logits_XV[2, 0], logits_XV[3, 77] = torch.nan, torch.inf, -torch.inf
    logits_XV[4] = -torch.inf
    bad_X = draw(logits_XV, settings, impl) == -1
    assert bad_X.tolist() == [False, True, True, False, True, False]


def test_temperature_0_takes_the_lowest_of_the_likeliest(impl: str) -> None:
    logits_XV = torch.zeros(2, 9000)
    logits_XV[0, [17, 5000, 8999]] = 1.0
    logits_XV[1, [4097, 8999]] = 1.0
    assert draw(logits_XV, Sampling(0), impl).tolist() == [17, 4097]


CHI = [Sampling(0.8), Sampling(1, top_k=4), Sampling(1.5, top_p=0.8), Sampling(1, top_k=5, top_p=0.95)]
TOY_V = torch.tensor([0.3, 1.0, -1.0, 0.0, 2.0, -0.5, 1.0])


def fit(tokens_X: Tensor, settings: Sampling) -> float:
    """p-value of the chi-square test that the tokens follow the law of TOY_V; 0 if one is impossible."""
    found_V, law_V = tokens_X.bincount(minlength=len(TOY_V)).double(), settings.law(TOY_V).double()
    kept_V = law_V > 0
    want = len(tokens_X) * law_V[kept_V] / law_V.sum()
    return 0.0 if found_V[~kept_V].any() else float(stats.chisquare(found_V[kept_V], want).pvalue)


@pytest.mark.parametrize("settings", CHI, ids=repr)
def test_tokens_follow_their_law(settings: Sampling) -> None:
    """False alarms had odds of 1 in 1000, and the keys are fixed."""
    tokens_X = draw(TOY_V.expand(20_000, -1), settings, "naive")
    assert fit(tokens_X, settings) > 1e-3
    assert max(fit(tokens_X, other) for other in CHI if other != settings) < 1e-9


@pytest.mark.interpret
def test_the_kernels_tokens_follow_their_law() -> None:
    tokens_X = draw(TOY_V.expand(100, -1), Sampling(0.8), "triton")
    assert fit(tokens_X, Sampling(0.8)) > 1e-3
    assert fit(tokens_X, Sampling(3.0)) < 1e-3


@pytest.mark.interpret
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 5, 2**63 + 9, 2**64 - 1])
def test_kernels_and_torch_have_the_same_coins_and_clocks(seed: int) -> None:
    draw_both = import_module("probes").draw_both
    for request, step, node in ((0, 0, 0), (2**31, 2**32 - 1, 7), (2**32 - 1, 3, 2**24 - 257)):
        u_X, clock_X = torch.full((256,), torch.nan, dtype=torch.float64), torch.full((256,), torch.nan)
        c1, c2 = (c - 2**32 if c >= 2**31 else c for c in (request, step))
        draw_both[(1,)](u_X, clock_X, seed, c1, c2, node | Purpose.TARGET << 24, TILE=256)
        key = [torch.tensor(c) for c in (request, step, node)]
        assert torch.equal(u_X, coins(seed, *key[:2], node + torch.arange(256), Purpose.TARGET))
        want_X = -torch.log1p(-rows(seed, *key, Purpose.TARGET, 320)[64:])
        torch.testing.assert_close(clock_X, want_X, rtol=5e-7, atol=0)


@pytest.mark.interpret
def test_the_shortest_clocks_are_not_rounded() -> None:
    """log(1 - u) alone is off by 2^-24: too much beside a u of 1 / V, and such clocks decide the races."""
    u_X = torch.cat([2.0 ** -torch.linspace(0.01, 33, 1020), torch.tensor([2**-33, 2**-24, 0.5, 1 - 2**-24])])
    clock_X = torch.full_like(u_X, torch.nan)
    import_module("probes").ring[(1,)](u_X, clock_X, TILE=1024)
    torch.testing.assert_close(clock_X.double(), -torch.log1p(-u_X.double()), rtol=5e-7, atol=0)
