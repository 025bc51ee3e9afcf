"""Training on tiny targets: batches, losses, sums of batches, what is measured and what is refused.

Shapes: S texts, T tokens, D width, X rows, U draft vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from answers import EAGLE, MEDUSA, RECIPES, TAPS, collected
from models import VOCAB, cyclic, tiny
from torch import Tensor

from specdec.onpolicy import write_answers
from specdec.proposers.medusa_heads import MedusaHeads, token_embeddings
from specdec.training import heldout, loop
from specdec.training.eagle3 import Eagle3Recipe
from specdec.training.heads import OBJECTIVES, HeadRecipe
from specdec.training.loop import Progress, best_row, train
from specdec.training.medusa import MedusaRecipe
from specdec.training.texts import GRANULE, Texts, split


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return collected(tiny(), tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same answers without features."""
    return collected(tiny(), tmp_path_factory.mktemp("bare"), ())


def test_a_batch_is_the_texts_side_by_side(shards: list[Path]) -> None:
    texts = Texts.load(shards, TAPS)
    assert len({len(text) for text in texts.tokens}) > 5
    for group in texts.groups(4 * GRANULE, torch.Generator()):
        batch = texts.batch(tiny(), group)
        for s, i in enumerate(group):
            *tokens, last = texts.tokens[i].tolist()
            T, rest = len(tokens), batch.tokens_ST.shape[1] - len(tokens)
            assert batch.tokens_ST[s].tolist() == tokens + [0] * rest
            assert batch.next_ST[s].tolist() == [*tokens[1:], last] + [0] * rest
            said = [texts.prompts[i] <= t + 1 <= T for t in range(T + rest)]
            assert batch.said_ST[s].tolist() == said
            side_by_side = torch.cat([batch.hidden[tap][s] for tap in TAPS], dim=-1)
            assert torch.equal(side_by_side[:T], texts.features[i])
            assert not side_by_side[T:].any()
    assert texts.said == sum(int(texts.batch(tiny(), [i]).said_ST.sum()) for i in range(len(texts))), (
        "tokens that the target said are counted in one way"
    )


def test_every_text_is_in_one_group_of_its_length(shards: list[Path]) -> None:
    texts, orders = Texts.load(shards, ()), set()
    texts.tokens[::3] = [torch.cat([text] * 8) for text in texts.tokens[::3]]
    for seed in range(4):
        groups = texts.groups(4 * GRANULE, torch.Generator().manual_seed(seed))
        assert sorted(i for group in groups for i in group) == list(range(len(texts)))
        for group in groups:
            longest = -(-max(len(texts.tokens[i]) - 1 for i in group) // GRANULE) * GRANULE
            assert len(group) == 1 or len(group) * longest <= 4 * GRANULE
        orders.add((len(groups), tuple(map(tuple, groups))))
    assert len(orders) == 4, "another order every time"
    assert len({count for count, _ in orders}) == 1, "a schedule knows how many batches there will be"


def test_features_of_some_taps_are_chosen_from_all(shards: list[Path]) -> None:
    everything = Texts.load(shards, TAPS)
    some = Texts.load(shards, ("final", 0))
    for all_TC, some_TC in zip(everything.features, some.features, strict=True):
        first_TD, _, final_TD = all_TC.chunk(3, dim=-1)
        assert torch.equal(some_TC, torch.cat([final_TD, first_TD], dim=-1))
    assert Texts.load(shards, TAPS, stored=False).features == []
    assert Texts.load(shards, ()).features == []


def test_features_computed_on_the_fly_are_those_stored(tmp_path: Path) -> None:
    """In float64 what decoding and prefill give differs by less than the 16 bits that are kept."""
    target = tiny().cast(torch.float64)
    texts = Texts.load(collected(target, tmp_path), TAPS)
    computed = replace(texts, features=[])
    for group in texts.groups(4 * GRANULE, torch.Generator()):
        stored, anew = (each.batch(target, group).hidden for each in (texts, computed))
        assert all(torch.equal(stored[tap], anew[tap]) for tap in TAPS)


def test_shards_that_lack_features_are_refused(shards: list[Path], bare: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"of no layer, training needs \[0\] too: .*store_features=false"):
        Texts.load([shards[0], bare[1]], (0,))
    with pytest.raises(ValueError, match=r"answers-00000.*training needs \[2\] too"):
        Texts.load(shards, (1, 2))
    assert len(Texts.load([shards[0], bare[1]], (0,), stored=False)) == 8


def test_held_out_shards_are_not_trained_on_and_of_all_lengths() -> None:
    files = [Path(f"{i:02d}") for i in range(10)]
    for count in (1, 2, 3, 10):
        training, held_out = split(files, count)
        assert len(held_out) == count
        assert sorted(training + held_out) == files
    assert split(files, 1)[1] == [files[5]]
    assert split(files, 2)[1] == [files[2], files[7]]


@pytest.mark.parametrize("count", [5, 12, 13, 23, 31])
def test_drafts_are_tried_on_prompts_from_all_over_the_texts(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, prompt = [], torch.zeros(3, dtype=torch.int64)
    monkeypatch.setattr(heldout, "decode", lambda *rest: tried.extend(seq.request for seq in rest[-1]) or [])
    heldout.acceptance(tiny(), None, Texts([prompt] * count, [1] * count, [], ()))
    gaps = [after - before for before, after in pairwise([*tried, count])]
    assert (tried[0], len(tried)) == (0, min(heldout.PROMPTS, count))
    assert max(gaps) - min(gaps) <= 1


def plain_kl(p: list[float], q: list[float]) -> float:
    """Without p's own entropy."""
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def plain_tv(p: list[float], q: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def plain_lk(p: list[float], q: list[float]) -> float:
    accepted = sum(min(a, b) for a, b in zip(p, q, strict=True))
    share = math.exp(-3 * accepted)
    return share * plain_kl(p, q) + (1 - share) * plain_tv(p, q)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_the_published_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_XU, teacher_XU = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64) * 3
    teacher_XU = teacher_XU.softmax(-1)
    laws = zip(teacher_XU.tolist(), logits_XU.softmax(-1).tolist(), strict=True)
    plain = {"kl": plain_kl, "tv": plain_tv, "lk": plain_lk}[name]
    expected_X = torch.tensor([plain(p, q) for p, q in laws], dtype=torch.float64)
    torch.testing.assert_close(OBJECTIVES[name](teacher_XU, logits_XU), expected_X)


class Judged(HeadRecipe):
    """Says what it is given; depth 1 is twice as deep as it was drafted."""

    kind = "judged"
    taps = new = begun = save = proposer = lambda *_: None
    depths: tuple = ()
    decay = 0.5

    def judged(self, *_: object) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from self.depths


def test_a_loss_is_the_mean_over_what_can_be_drafted_deeper_ones_count_less() -> None:
    teacher_XU, logits_XU = torch.rand(4, 5).softmax(-1), torch.randn(4, 5)
    drafted_X = torch.tensor([True, False, True, True])
    recipe = Judged(objective="tv")
    depths = ((logits_XU, teacher_XU, drafted_X), (logits_XU[2:], teacher_XU[2:], drafted_X[:2]))
    object.__setattr__(recipe, "depths", depths)
    tv = [plain_tv(p, q) for p, q in zip(teacher_XU.tolist(), logits_XU.softmax(-1).tolist(), strict=True)]
    expected = ((tv[0] + tv[2] + tv[3]) / 3 + 0.5 * tv[2]) / 1.5
    assert float(recipe.loss(None, None, None)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "kind", [MedusaRecipe, partial(MedusaRecipe, hydra=True), Eagle3Recipe], ids=["medusa", "hydra", "eagle3"]
)
def test_heads_learn_what_the_target_says(kind: Callable[..., HeadRecipe], tmp_path: Path) -> None:
    """The cycle: an untrained head is never right about it, a trained one nearly always."""
    prompts = [[(i + j) % 8 for j in range(3 + i // 8)] for i in range(24)]
    files = write_answers(cyclic(), prompts, tmp_path, stop_ids=(), longest=20, batch=4, taps=TAPS)
    recipe, out = kind(vocab=VOCAB, epochs=6, rows=128, lr=0.05), tmp_path / "heads.safetensors"
    curve = train(cyclic(), files, recipe, out)
    best, info = best_row(curve), recipe.proposer(cyclic(), out).info
    assert best["tokens_per_step"] > 3.5
    assert all(rate > 0.8 for rate in best["acceptance_by_depth"])
    assert curve[-2]["loss"] < 0.2 * curve[0]["loss"]
    assert [len(row) for row in info.accuracy_KR] == [10] * len(best["acceptance_by_depth"])
    assert all(row[0] > 0.8 for row in info.accuracy_KR)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([f.name for f in files] + [out.name])


def test_an_untrained_head_repeats_the_lm_head_whatever_the_root() -> None:
    heads = MedusaHeads(2, tiny().lm_head_of(), torch.arange(tiny().vocab))
    hidden_XD = torch.randn(3, tiny().lm_head.shape[1])
    root_XD = token_embeddings(tiny(), torch.tensor([1, 2, 3]))
    repeated_KXU = (hidden_XD @ tiny().lm_head.T).expand(2, -1, -1)
    assert torch.allclose(heads(hidden_XD, root_XD), repeated_KXU, atol=1e-5)
    assert torch.allclose(root_XD.pow(2).mean(-1), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("rows", [32, 128])
def test_accumulated_batches_are_one_big_batch(rows: int, shards: list[Path], tmp_path: Path) -> None:
    """Texts of different lengths weigh as their tokens do: the mean of batches' means would differ."""
    batches = len(Texts.load(split(shards, 1)[0], ()).groups(rows, torch.Generator()))
    assert batches > 2
    whole = replace(EAGLE, rows=16 * 32, epochs=4)
    parts = replace(whole, rows=rows, accumulate=batches)
    one = train(tiny(), shards, whole, tmp_path / "one.safetensors")
    many = train(tiny(), shards, parts, tmp_path / "many.safetensors")
    assert [row["step"] for row in one] == [row["step"] for row in many] == [1, 1, 2, 2, 3, 3, 4, 4]
    losses = [[row["loss"] for row in curve if "loss" in row] for curve in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@RECIPES
def test_a_forward_in_16_bits_updates_weights_in_32(
    recipe: HeadRecipe, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 1)
    losses, weights = [], []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.safetensors"
        begun = begun_training(shards, replace(recipe, dtype=dtype), out)
        losses.append(begun["curve"][-1]["loss"])
        weights.append(begun["head"])
    assert losses[0] != losses[1], "the forward is in 16 bits"
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    for name, weight in weights[1].items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float()), f"{name} has 16 bits only"


def begun_training(shards: list[Path], recipe: HeadRecipe, out: Path) -> dict:
    """The state after two steps."""

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(tiny(), shards, recipe, out, report=stop)
    return torch.load(out.with_suffix(".state"), weights_only=True)


def test_a_loss_that_is_no_number_ends_it(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d+.*lower head.lr"):
        train(tiny(), shards, replace(EAGLE, lr=1e30), tmp_path / "heads.safetensors")


def test_wrong_settings_are_refused(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "heads.safetensors"
    with pytest.raises(ValueError, match=r"head.heads is 0, expected 1 or more: head.heads="):
        MedusaRecipe(heads=0)
    with pytest.raises(ValueError, match=r"head.hydra=true, head.root=false: .*: head.root=true"):
        MedusaRecipe(hydra=True, root=False)
    with pytest.raises(ValueError, match=r"head.dtype is 'int8', expected float32 or bfloat16"):
        MedusaRecipe(dtype="int8")
    with pytest.raises(ValueError, match=r"head.objective is 'l2', expected kl, tv, lk: head.objective=kl"):
        Eagle3Recipe(objective="l2")
    with pytest.raises(ValueError, match=r"head.unroll is 0, expected 1 or more: head.unroll=4"):
        Eagle3Recipe(unroll=0)
    for layers in ((), (-1, 1), (0, 2)):
        with pytest.raises(ValueError, match=r"head.layers is .*expected .* 0 to 1: head.layers=\[0,1\]"):
            Eagle3Recipe(layers=layers).taps(tiny())
    with pytest.raises(ValueError, match=r"1 shards are too few to hold 1 out: .*prompts.batch=16"):
        train(tiny(), shards[:1], EAGLE, out)
    with pytest.raises(ValueError, match=r"was written by random-llama .* this target is .*shards=FOLDER"):
        train(cyclic(), shards, MEDUSA, out)
    assert not list(tmp_path.iterdir())
