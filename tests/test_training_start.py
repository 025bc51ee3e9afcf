"""Training that goes on from a head that exists."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from answers import EAGLE, MEDUSA, SMALL, collected, weights
from models import tiny

from specdec.training.draft_lm import DraftLMRecipe
from specdec.training.heads import HeadRecipe
from specdec.training.loop import train
from specdec.training.texts import Texts

RECIPES = [MEDUSA, replace(MEDUSA, hydra=True), EAGLE, DraftLMRecipe(layers=1, **SMALL)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return collected(tiny(), tmp_path_factory.mktemp("answers"))


def first_loss(shards: list[Path], recipe: HeadRecipe, out: Path) -> float:
    return train(tiny(), shards, replace(recipe, epochs=1), out)[0]["loss"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.kind)
def test_it_goes_on_where_the_head_is(recipe: HeadRecipe, shards: list[Path], tmp_path: Path) -> None:
    curve = train(tiny(), shards, recipe, file := tmp_path / "heads.safetensors")
    further = replace(recipe, start=str(file))
    texts = Texts.load(shards, recipe.taps(tiny()))
    head = further.fresh(tiny(), texts)
    further.save(head, tiny(), texts, copy := tmp_path / "copy.safetensors")
    assert weights(copy) == weights(file), "nothing is lost on the way from file to file"
    assert {p.dtype for p in head.parameters() if p.requires_grad} == {torch.float32}
    assert first_loss(shards, further, tmp_path / "more") < min(curve[0]["loss"], curve[1]["loss"])


def test_another_head_than_the_recipe_says_is_refused(shards: list[Path], tmp_path: Path) -> None:
    train(tiny(), shards, EAGLE, file := tmp_path / "heads.safetensors")
    wrong = {
        r"its post_norm is True, .* says False: give head.post_norm as it is": {"post_norm": False},
        r"its layers is \(0, 1\), .* says \(0,\): give head.layers": {"layers": (0,)},
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            train(tiny(), shards, replace(EAGLE, start=str(file), **changed), tmp_path / "other")


def test_a_head_that_is_not_there_is_noticed_at_once() -> None:
    with pytest.raises(ValueError, match=r"^head.start=nowhere: no such file"):
        replace(EAGLE, start="nowhere")
