"""Settings of a training that would train nothing, or backwards."""

import math
from dataclasses import replace

import pytest
from answers import EAGLE, MEDUSA

from specdec.training.draft_lm import DraftLMRecipe
from specdec.training.heads import HeadRecipe


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clip": 0}, "clip is 0, expected a norm of more than 0: head.clip=1"),
        ({"clip": -1}, "clip is -1, expected"),
        ({"warmup": 100}, r"warmup is 100, expected a share of the steps in \[0, 1\]: head.warmup=0.05"),
        ({"warmup": -0.1}, "warmup is -0.1, expected"),
        ({"lr": 0}, "lr is 0, expected more than 0: head.lr=0.001"),
        ({"lr": -1e-3}, "lr is -0.001, expected"),
        ({"lr": math.nan}, "lr is nan, expected"),
        ({"lr": math.inf}, "lr is inf, expected"),
        ({"patience": -1}, "patience is -1, expected 0 or more: head.patience=0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected 0 or more: head.weight_decay=0"),
        ({"decay": 0}, r"decay is 0, expected a number in \(0, 1\]: head.decay=0.8"),
        ({"decay": -1}, "decay is -1, expected"),
        ({"decay": 1.1}, "decay is 1.1, expected"),
        ({"rows": 0}, "rows is 0, expected 1 or more: head.rows=1"),
        ({"vocab": 0}, "vocab is 0, expected 1 or more: head.vocab=8192"),
    ],
)
@pytest.mark.parametrize("recipe", [MEDUSA, EAGLE], ids=lambda recipe: recipe.kind)
def test_settings_that_train_nothing_or_backwards_are_refused(
    recipe: HeadRecipe, wrong: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^head.{message}"):
        replace(recipe, **wrong)


def test_settings_at_the_end_of_their_range_are_taken() -> None:
    replace(MEDUSA, warmup=0, decay=1, clip=math.inf, weight_decay=0, patience=0)
    replace(MEDUSA, warmup=1, decay=1e-3, clip=1e-3)


def test_a_draft_of_one_depth_has_no_decay() -> None:
    with pytest.raises(TypeError, match="decay"):
        DraftLMRecipe(decay=0.5)
