"""Training layers distilled from the target: what is trained, on which laws, and that it learns."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from drafts import deep, text_logits
from models import CYCLE, VOCAB, cyclic, plain, requests

from specdec.loading import random_model
from specdec.proposers.draft_head import DraftHead, load
from specdec.shards import Shard
from specdec.target import HFTarget
from specdec.training.draft_lm import DraftLMRecipe
from specdec.training.heldout import acceptance
from specdec.training.loop import train
from specdec.training.texts import Texts

RECIPE = DraftLMRecipe(layers=2, epochs=4, rows=256, lr=0.01, held_out=1)


@dataclass(frozen=True)
class Disturbed(DraftLMRecipe):
    """Starts far from what it should be: `cyclic`'s own layers would leave nothing to learn."""

    def fresh(self, target: HFTarget, texts: Texts) -> DraftHead:
        head = super().fresh(target, texts)
        for weight in head.decoder.parameters():
            weight.data.add_(0.1 * torch.randn_like(weight))
        return head


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What `cyclic` says to prompts of three tokens, without features."""
    folder = tmp_path_factory.mktemp("answers")
    prompts = torch.randint(VOCAB, (4, 16, 3), generator=torch.Generator().manual_seed(0)).tolist()
    for i, group in enumerate(prompts):
        texts_SX = torch.tensor([cycled(prompt, 20) for prompt in group], dtype=torch.int32)
        shard = Shard(texts_SX.flatten(), torch.full((16,), 23), torch.full((16,), 3))
        shard.save(folder / f"answers-{i}.safetensors")
    return sorted(folder.iterdir())


def cycled(prompt: list[int], tokens: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + tokens:
        text.append(CYCLE[text[-1]])
    return text


@pytest.mark.parametrize(
    "objective", ["kl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tv", "lk"))]
)
def test_it_learns_what_the_target_says(objective: str, shards: list[Path], tmp_path: Path) -> None:
    recipe, path = Disturbed(**vars(RECIPE) | {"objective": objective}), tmp_path / "draft.safetensors"
    held_out = Texts.load([shards[2]], recipe.taps(cyclic()))  # what `train` keeps, of four shards
    torch.manual_seed(0)
    recipe.save(recipe.fresh(cyclic(), held_out), cyclic(), held_out, path)
    before = acceptance(cyclic(), recipe.proposer(cyclic(), path), held_out).tokens_per_step
    losses = [row["loss"] for row in train(cyclic(), shards, recipe, path) if "loss" in row]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert acceptance(cyclic(), recipe.proposer(cyclic(), path), held_out).tokens_per_step > before + 0.4
    head, info = load(path, cyclic())
    assert info.source == (0, 1)
    assert info.accuracy_KR == [pytest.approx(recipe.accuracy(head, cyclic(), held_out)[0], abs=0.02)]


@pytest.fixture(scope="module")
def texts() -> Texts:
    """Two answers of `deep`, one of them shorter."""
    prompts = [[3, 1, 4], [1, 5, 9]]
    answers = plain(deep(), requests(prompts, [6, 20]))
    joined = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Texts(joined, [3, 3], [], ("final",))


def test_only_the_layers_and_the_norm_are_trained(texts: Texts) -> None:
    before = {name: weight.clone() for name, weight in deep().model.state_dict().items()}
    head = RECIPE.fresh(deep(), texts)
    RECIPE.loss(head, deep(), texts.batch(deep(), [0, 1])).backward()
    trained = {name for name, weight in head.named_parameters() if weight.grad is not None}
    assert trained == {f"decoder.{name}" for name in head.stored() if name != "tokens_U"}
    assert all(torch.equal(weight, before[name]) for name, weight in deep().model.state_dict().items())


def test_a_loss_reads_the_laws_of_both_at_the_tokens_said(texts: Texts) -> None:
    head = RECIPE.fresh(deep(), texts)
    ((logits_XU, teacher_XU, drafted_X),) = RECIPE.judged(head, deep(), texts.batch(deep(), [0, 1]))
    alone = [text_logits(head, deep(), text[:-1].tolist())[2:] for text in texts.tokens]
    torch.testing.assert_close(logits_XU, torch.cat(alone), atol=1e-5, rtol=1e-5)
    model = random_model(config={"vocab_size": VOCAB, "num_hidden_layers": 5}, device="cpu").model
    said = [model(text[None, :-1], use_cache=False).logits[0, 2:] for text in texts.tokens]
    want_XU = torch.cat(said)[:, head.tokens_U.long()].softmax(-1)
    torch.testing.assert_close(teacher_XU, want_XU, atol=0.03, rtol=0)  # features are kept in 16 bits
    assert drafted_X.all()


@pytest.mark.parametrize(("layers", "source"), [(1, (4,)), (2, (0, 4)), (5, (0, 1, 2, 3, 4))])
def test_the_first_layers_and_the_last_are_where_it_starts(layers: int, source: tuple[int, ...]) -> None:
    assert replace(RECIPE, layers=layers)._source(deep()) == source


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": 0}, r"head.layers is 0.*head.layers=2"),
        ({"layers": 6}, r"head.layers is 6, this target has 5: head.layers=5"),
        ({"source": (0, 5)}, r"head.source is \[0, 5\].*head.source=\[0,4\]"),
        ({"source": ()}, r"head.source is \[\]"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict, message: str, texts: Texts) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **wrong).fresh(deep(), texts)
