"""Answers of the tiny target, small recipes, and what is compared of a training's result."""

from pathlib import Path

import pytest
from models import VOCAB
from safetensors.torch import load_file

from specdec.onpolicy import write_answers
from specdec.target import HFTarget
from specdec.training.eagle3 import Eagle3Recipe
from specdec.training.medusa import MedusaRecipe

TAPS, STOP, LONGEST = (0, 1, "final"), (3, 9), 24
SMALL = {"vocab": VOCAB, "epochs": 2, "rows": 128, "lr": 0.02}
MEDUSA, EAGLE = MedusaRecipe(heads=2, **SMALL), Eagle3Recipe(unroll=2, **SMALL)
RECIPES = pytest.mark.parametrize("recipe", [MEDUSA, EAGLE], ids=lambda recipe: recipe.kind)
STEPS = 4  # of an epoch: 16 texts of up to 31 tokens in batches of 128 rows


def collected(target: HFTarget, folder: Path, taps: tuple = TAPS) -> list[Path]:
    """Answers of many lengths to 20 prompts of three tokens or more, in five shards."""
    prompts = [[(7 * i + j) % VOCAB for j in range(3 + i % 5)] for i in range(20)]
    return write_answers(target, prompts, folder, stop_ids=STOP, longest=LONGEST, batch=4, taps=taps)


def weights(file: Path) -> dict[str, list]:
    return {name: t.tolist() for name, t in load_file(file).items()}
