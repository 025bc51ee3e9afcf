"""A training that is stopped, killed or ended early: the same curve and the same head, and no leftovers."""

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from answers import EAGLE, MEDUSA, RECIPES, STEPS, collected, weights
from models import tiny, tiny_model

from specdec.target import HFTarget
from specdec.training import loop
from specdec.training.heads import HeadRecipe
from specdec.training.heldout import HeldOut
from specdec.training.loop import Progress, best_row, train


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return collected(tiny(), tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same answers without features."""
    return collected(tiny(), tmp_path_factory.mktemp("bare"), ())


class Killed(BaseException):
    """As KeyboardInterrupt: nothing may catch it."""


def kills(at: int) -> Callable[[Progress], None]:
    """A report that ends the training at its call number `at`."""
    calls = iter(range(10**6))

    def report(_: Progress) -> None:
        if next(calls) == at:
            raise Killed

    return report


REPORTS = 2 * (STEPS + 1)  # two epochs of steps, and a measurement each


@pytest.fixture(scope="module")
def whole(shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[HeadRecipe], tuple]:
    """Curve and weights of a recipe's training that nothing disturbs."""

    @functools.cache
    def trained(recipe: HeadRecipe) -> tuple[list[dict], dict[str, list]]:
        out = tmp_path_factory.mktemp("whole") / "heads.safetensors"
        curve = train(tiny(), shards, recipe, out)
        assert [("loss" in row) for row in curve] == [*[True] * STEPS, False] * 2
        return curve, weights(out)

    return trained


def check_the_end(shards: list[Path], recipe: HeadRecipe, out: Path, whole: Callable) -> None:
    """The property: what was killed ends as if it were not, and leaves nothing else behind."""
    curve = train(tiny(), shards, recipe, out)
    assert (curve, weights(out)) == whole(recipe)
    assert [f.name for f in out.parent.iterdir() if f.suffix != ".part"] == [out.name]


@RECIPES
@pytest.mark.parametrize("at", range(REPORTS))
def test_a_training_killed_anywhere_ends_as_if_it_were_not(
    at: int, recipe: HeadRecipe, shards: list[Path], whole: Callable, tmp_path: Path, monkeypatch
) -> None:
    """Its state is there after every second step, and after a measurement."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    out = tmp_path / "heads.safetensors"
    with pytest.raises(Killed):
        train(tiny(), shards, recipe, out, report=kills(at))
    assert not out.exists(), "a head appears when it is complete"
    check_the_end(shards, recipe, out, whole)


def test_a_training_killed_again_and_again_ends_as_if_it_were_not(
    bare: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With features that the target computes, whose cache has another size in every process."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 1)
    once, killed = tmp_path / "once.safetensors", tmp_path / "killed.safetensors"
    curve, deaths, ended = train(tiny(), bare, EAGLE, once), 0, None
    while ended is None:
        target = HFTarget(tiny_model(), name=tiny().name, fingerprint=tiny().fingerprint)
        try:
            ended = train(target, bare, EAGLE, killed, report=kills(1))
        except Killed:
            deaths += 1
    assert deaths == REPORTS - 1, "of two reports a life, the second is lost"
    assert ended == curve
    assert weights(killed) == weights(once)


def half_written(path: Path, _: object) -> None:
    path.with_name(path.name + ".part").write_bytes(b"half")


def named_but_not_cleaned_up(out: Path, _: object) -> None:
    out.with_suffix(".best").replace(out)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("acceptance", lambda *_: None),
        ("atomically", half_written),
        ("_finish", lambda *_: None),
        ("_finish", named_but_not_cleaned_up),
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_a_training_killed_where_it_writes_ends_as_if_it_were_not(
    at: int, name: str, act: Callable, shards: list[Path], whole: Callable, tmp_path: Path, monkeypatch
) -> None:
    """While a head is tried, while the state is written, before and after the head has its name."""
    whole(MEDUSA)
    real, calls, out = getattr(loop, name), iter(range(10**6)), tmp_path / "heads.safetensors"

    def dies(*args: object) -> object:
        if next(calls) < at:
            return real(*args)
        act(*args)
        raise Killed

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(loop, name, dies)
        train(tiny(), shards, MEDUSA, out)
    check_the_end(shards, MEDUSA, out, whole)


def begun(shards: list[Path], out: Path) -> None:
    """A training that was killed after its first epoch."""
    with pytest.raises(Killed):
        train(tiny(), shards, EAGLE, out, report=kills(STEPS + 1))


def test_a_begun_training_goes_on_with_its_own_settings_only(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "heads.safetensors"
    begun(shards, out)
    for changed, said in (
        ({"recipe": replace(EAGLE, lr=0.5)}, r"head.lr is 0.02 there, 0.5 here"),
        ({"seed": 3}, r"seed is 0 there, 3 here"),
        ({"shards": shards[:-1]}, r"texts is '\w+' there, '\w+' here"),
    ):
        options = {"shards": shards, "recipe": EAGLE, "out": out} | changed
        with pytest.raises(ValueError, match=rf"heads.state was begun with other settings: {said}.*out="):
            train(tiny(), **options)
    out.with_suffix(".state").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"heads.state is no state of a training .*delete it"):
        train(tiny(), shards, EAGLE, out)


def scripted(monkeypatch: pytest.MonkeyPatch, measured: list[float]) -> None:
    values = iter(measured)
    monkeypatch.setattr(loop, "acceptance", lambda *_: HeldOut(next(values), [0.5]))


def test_it_stops_early_and_keeps_the_best_epoch(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, best = replace(EAGLE, epochs=9, patience=2), tmp_path / "heads.safetensors", []
    scripted(monkeypatch, [1.2, 1.5, 1.5, 1.4, 9.0])

    def report(now: Progress) -> None:
        if now.heldout == HeldOut(1.5, [0.5]) and not best:
            best.append(weights(out.with_suffix(".best")))

    curve = train(tiny(), shards, recipe, out, report=report)
    assert curve[-1]["step"] == 4 * STEPS, "two epochs after the best"
    assert best_row(curve)["step"] == 2 * STEPS
    assert weights(out) == best[0]


def test_without_patience_it_trains_to_the_end(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [2.0, 1.0])
    assert train(tiny(), shards, EAGLE, tmp_path / "h.safetensors")[-1]["step"] == 2 * STEPS
