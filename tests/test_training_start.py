"""Training that goes on from a head that exists."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from answers import EAGLE, MEDUSA, SMALL, collected, weights
from models import VOCAB, tiny, tiny_model
from safetensors.torch import load_file

from specdec.target import HFTarget
from specdec.training.draft_lm import DraftLMRecipe
from specdec.training.heads import HeadRecipe
from specdec.training.loop import train
from specdec.training.texts import Texts, split

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
    texts = Texts.load(split(shards, 1)[0], recipe.taps(tiny()))
    head = further.fresh(tiny(), texts)
    further.save(head, tiny(), texts, copy := tmp_path / "copy.safetensors")
    assert weights(copy) == weights(file), "nothing is lost on the way from file to file"
    assert {p.dtype for p in head.parameters() if p.requires_grad} == {torch.float32}
    assert first_loss(shards, further, tmp_path / "more") < min(curve[0]["loss"], curve[1]["loss"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.kind)
def test_its_vocabulary_follows_what_the_target_says(
    recipe: HeadRecipe, shards: list[Path], tmp_path: Path
) -> None:
    train(tiny(), shards, replace(recipe, vocab=6), file := tmp_path / "heads.safetensors")
    before = sorted(load_file(file)["tokens_U"].tolist())
    new = [token for token in range(VOCAB) if token not in before][:4]
    texts = Texts.load(shards, ())
    texts.tokens = [
        torch.cat([t[:p], torch.tensor(new)]) for t, p in zip(texts.tokens, texts.prompts, strict=True)
    ]
    head = replace(recipe, vocab=6, start=str(file)).fresh(tiny(), texts)
    assert head.tokens_U.tolist() == sorted(new + before[:2])
    recipe.save(head, tiny(), Texts.load(shards, recipe.taps(tiny())), copy := tmp_path / "copy.safetensors")
    assert weights(copy) | {"tokens_U": before} == weights(file) | {"tokens_U": before}, (
        "no other weight changes"
    )
    assert torch.equal(head.lm_head.weight, tiny().lm_head[head.tokens_U.long()])


def test_a_head_with_an_lm_head_of_its_own_keeps_its_vocabulary(shards: list[Path], tmp_path: Path) -> None:
    own = replace(EAGLE, vocab=6, shared_head=False)
    train(tiny(), shards, own, file := tmp_path / "heads.safetensors")
    texts = Texts.load(shards, ())
    before = load_file(file)["tokens_U"].tolist()
    new = next(token for token in range(VOCAB) if token not in before)
    texts.tokens = [torch.full_like(text, new) for text in texts.tokens]
    assert replace(own, start=str(file)).fresh(tiny(), texts).tokens_U.tolist() == before


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


NORMS = {"llama": [("input_layernorm", "input_layernorm"), ("post_attention_layernorm",) * 2]}
NORMS |= {"gemma3_text": [NORMS["llama"][0], ("post_attention_layernorm", "pre_feedforward_layernorm")]}
NORMS |= {"olmo2": []}  # norms what attention and MLP add, which an EAGLE-3 head does not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_an_eagle3_head_begins_with_norms_that_do_what_the_target_s_do(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.normal_(std=10, generator=torch.Generator().manual_seed(len(name)))
            weight.data = weight.data.bfloat16().float()
    head = EAGLE.new(HFTarget(copy.deepcopy(model).to(dtype)), torch.arange(VOCAB))
    x_XD = torch.randn(5, head.config.width) + 1
    layer = model.model.layers[-1]
    pairs = [(head.norm, model.model.norm)]
    pairs += [(getattr(head, ours), getattr(layer, theirs)) for ours, theirs in NORMS[kind]]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours(x_XD), theirs(x_XD), atol=1e-4, rtol=1e-4)
    begun = {id(ours) for ours, _ in pairs}
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        ours = getattr(head, name)
        assert id(ours) in begun or bool((ours.weight == 1).all()), f"{name} has weights of another norm"


@pytest.mark.parametrize("kind", ["phi", "cohere"])
def test_a_norm_that_takes_the_mean_away_is_not_copied(kind: str) -> None:
    model = tiny_model(kind)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.fill_(3)
    head = EAGLE.new(HFTarget(model), torch.arange(VOCAB))
    assert all((w == 1).all() for name, w in head.named_parameters() if "norm" in name)
