"""Laws and randomness: temperature, top-k, top-p as in transformers; Philox as published; keys never meet."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdec import sampling
from specdec.rng import Key, Philox, Purpose, Stream, StreamBatch
from specdec.sampling import LawBatch, Laws, Sampling
from specdec_kernels.philox import coins, philox, race, rows

SETTINGS = [
    Sampling(t, p, k) for t, p, k in itertools.product((0.3, 1.0, 1.7), (0.1, 0.9, 0.999, 1.0), (0, 1, 40))
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_laws_are_those_of_transformers(settings: Sampling) -> None:
    logits_XV = 3 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    scores_XV = TemperatureLogitsWarper(settings.temperature)(None, logits_XV)
    if settings.top_k:
        scores_XV = TopKLogitsWarper(settings.top_k)(None, scores_XV)
    if settings.top_p < 1:
        scores_XV = TopPLogitsWarper(settings.top_p)(None, scores_XV)
    got_XV = settings.laws(logits_XV)
    torch.testing.assert_close(got_XV, torch.softmax(scores_XV, -1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(got_XV.sum(-1), torch.ones(5))
    assert torch.equal(got_XV[2], settings.law(logits_XV[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_temperature_0_is_one_hot_at_the_lowest_maximum(dtype: torch.dtype) -> None:
    law_V = Sampling(temperature=0).law(torch.tensor([0.0, 2.0, 1.0, 2.0], dtype=dtype))
    assert law_V.tolist() == [0, 1, 0, 0]
    assert law_V.dtype == torch.float32


def test_a_tiny_temperature_is_nearly_greedy_not_nan() -> None:
    assert Sampling(temperature=1e-30).law(torch.tensor([-1e4, 1e4, 0.0])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("settings", [Sampling(1, top_k=2), Sampling(1, top_p=0.4)], ids=repr)
def test_the_lowest_ids_win_ties_at_the_edge(settings: Sampling) -> None:
    assert settings.law(torch.zeros(5)).tolist() == [0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize("flatness", [0.0, 1.0, 6.0])
def test_a_short_head_gives_the_law_of_a_full_sort(flatness: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat rows need more than the head and fall back; peaked rows don't."""
    logits_XV = flatness * torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    got_XV = Sampling(1, top_p=0.9).laws(logits_XV)
    monkeypatch.setattr(sampling, "HEAD", 3000)
    assert torch.equal(got_XV, Sampling(1, top_p=0.9).laws(logits_XV))


WRONG = {"temperature": (-1, math.nan, math.inf), "top_p": (0, 1.1, math.nan), "top_k": (-1, 2.5)}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in WRONG.items() for v in values])
def test_wrong_values_are_refused_with_the_override_that_mends_them(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}, expected .*{name}="):
        Sampling(**{name: value})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_name_request_and_step(bad: float, temperature: float) -> None:
    logits_NV = torch.zeros(2, 8)
    logits_NV[1, 3] = bad
    laws = Laws(logits_NV, Sampling(temperature), "request 4, step 9")
    assert laws[0].sum() == 1
    with pytest.raises(
        FloatingPointError,
        match=r"^request 4, step 9: the target's logits are NaN or infinite; try target.dtype=float32$",
    ):
        laws[1]


def test_minus_infinity_bans_a_token() -> None:
    assert Laws(torch.tensor([[0.0, -torch.inf]]), Sampling(1))[0].tolist() == [1, 0]


VECTORS = [  # counter, key, output: Random123's known answers for philox4x32-10
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 on unsigned NumPy words, written from the paper's figure: (L, R) pairs, then a swap."""
    (l0, r0, l1, r1), (k0, k1) = np.array(counter, dtype=np.uint64), np.array(key, dtype=np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        a, b = np.uint64(0xD2511F53) * l0, np.uint64(0xCD9E8D57) * l1
        l0, r0, l1, r1 = (b >> shift) ^ r0 ^ k0, b & low, (a >> shift) ^ r1 ^ k1, a & low
    return [int(word) for word in (l0, r0, l1, r1)]


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS)
def test_philox_gives_the_published_numbers(counter: list[int], key: list[int], want: str) -> None:
    words, seed = [int(w, 16) for w in want.split()], key[0] | key[1] << 32
    assert reference_philox(counter, key) == words
    assert list(philox(seed, *counter)) == words
    assert [int(w) for w in philox(seed, *(torch.tensor([c]) for c in counter))] == words


def test_philox_equals_the_reference_on_random_counters() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (200, 4))
    got = torch.stack(philox(0x123456789ABCDEF, *torch.tensor(counters).T), -1).tolist()
    assert got == [reference_philox(list(c), [0x89ABCDEF, 0x1234567]) for c in counters]


def test_one_key_at_a_time_equals_many_at_once() -> None:
    rng, vocab = Philox(2**40 + 5), 101
    request_X, step_X, node_X = (
        torch.tensor([0, 7, 2**31]),
        torch.tensor([3, 0, 99]),
        torch.tensor([1, 2**24 - 1, 0]),
    )
    for purpose in Purpose:
        keys = [Key(*map(int, key), purpose) for key in zip(request_X, step_X, node_X, strict=True)]
        fields = (request_X, step_X, node_X, purpose)
        assert coins(rng.seed, *fields).tolist() == [rng.uniform(key) for key in keys]
        rows_XV = rows(rng.seed, *fields, vocab)
        for support in (range(vocab), [3, 50, 100], [0], range(0, vocab, 2)):
            support_S = torch.tensor(support)
            assert torch.equal(
                rows_XV[:, support_S], torch.stack([rng.uniforms(key, support_S) for key in keys])
            )


def test_keys_never_meet() -> None:
    """Every field at its ends: all counters are different, so all uniforms come from different blocks."""
    ends = ([0, 1, 2**32 - 1], [0, 1, 2**32 - 1], [0, 1, 2**24 - 1], list(Purpose))
    keys = [Key(*fields) for fields in itertools.product(*ends)]
    assert len({Philox(1).uniform(key) for key in keys}) > 0.999 * len(keys)
    words = {philox(1, 0, key.request, key.step, int(key.purpose) << 24 | key.node) for key in keys}
    assert len(words) == len(keys)


@pytest.mark.parametrize("purpose", Purpose)
def test_uniforms_are_uniform(purpose: Purpose) -> None:
    """False alarms had odds of 1 in 1000; the seeds are fixed."""
    zero_X, many_X = torch.zeros(20000, dtype=torch.long), torch.arange(20000)
    u_X = coins(5, many_X, zero_X, zero_X, purpose)
    draws = rows(5, zero_X[:4], many_X[:4], zero_X[:4], purpose, 5000).flatten()
    assert stats.kstest(u_X.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3
    assert abs(float(np.corrcoef(draws[:-1], draws[1:])[0, 1])) < 0.02


def test_uniforms_of_draws_stay_inside_their_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding a word up to u = 1 would stop a clock: a random token would win, of whatever weight."""
    words = (torch.full((3,), 2**32 - 1), torch.full((3,), 2**32 - 100), torch.zeros(3, dtype=torch.long))
    for module in ("specdec.rng", "specdec_kernels.philox"):
        monkeypatch.setattr(f"{module}.philox", lambda *_: (*words, words[0]))
    u_V = Philox(0).uniforms(Key(0, 0, 0, Purpose.DRAFT), torch.arange(12))
    assert bool(((u_V > 0) & (u_V < 1)).all())
    assert int(race(torch.tensor([0.0, 1.0] + [0.0] * 10), u_V)) == 1
    assert Philox(0).uniform(Key(0, 0, 0, Purpose.ACCEPT)).max() < 1


def test_a_race_draws_in_proportion() -> None:
    """Chi-square over 40,000 draws, one token of weight 0; false alarms had odds of 1 in 1000."""
    weights_V = torch.tensor([5.0, 0.0, 3.0, 1.0, 0.5])
    many_X, zero_X = torch.arange(40000), torch.zeros(40000, dtype=torch.long)
    u_XV = rows(3, many_X, zero_X, zero_X, Purpose.RESIDUAL, 5)
    count_V = race(weights_V, u_XV).bincount(minlength=5)
    want_V = 40000 * weights_V / weights_V.sum()
    assert count_V[1] == 0
    kept = weights_V > 0
    assert (
        stats.chisquare(count_V[kept], want_V[kept].double() * (40000 / want_V[kept].double().sum())).pvalue
        > 1e-3
    )


def test_a_rare_token_keeps_its_share() -> None:
    """A token of 2^-26 beside one of nearly 1: it wins as often as its clock's resolution lets it."""
    winners = torch.tensor([1.0, 2.0**-26])
    assert int(race(winners, torch.tensor([0.5, 2.0**-30]))) == 1
    assert int(race(winners, torch.tensor([0.5, 2.0**-24]))) == 0


def test_streams_do_not_depend_on_the_batch() -> None:
    streams = [Stream(Philox(9), request, step, 30 + step) for request, step in [(4, 0), (2, 7), (9, 7)]]
    logits_BV, sampling = torch.randn(3, 50, generator=torch.Generator().manual_seed(2)), Sampling(1.0)
    depth_BN = torch.arange(4).expand(3, 4)
    laws = LawBatch(logits_BV.unsqueeze(1).expand(3, 4, 50), sampling)
    at_BN = laws.draw(StreamBatch.pack(streams), depth_BN).tolist()
    for b, stream in enumerate(streams):
        assert at_BN[b] == [stream.draw_at(sampling.law(logits_BV[b]), depth) for depth in range(4)]
    assert len({tuple(row) for row in at_BN}) == 3


def test_draws_from_the_target_depend_on_the_position_alone() -> None:
    law_V = torch.rand(50, generator=torch.Generator().manual_seed(3))
    early, late = Stream(Philox(9), 1, step=2, position=10), Stream(Philox(9), 1, step=5, position=12)
    assert early.draw_at(law_V, 2) == late.draw_at(law_V, 0)
    assert len({early.draw_at(law_V, depth) for depth in range(20)}) > 5


def test_a_batch_has_one_seed() -> None:
    with pytest.raises(ValueError, match="share one rng"):
        StreamBatch.pack([Stream(Philox(1), 0, 0, 0), Stream(Philox(2), 1, 0, 0)])
