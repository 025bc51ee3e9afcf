"""Training on a tiny target: heads learn, are measured on held-out answers, survive an interruption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny
from safetensors.torch import load_file

from specdec.data import Conversation
from specdec.onpolicy import Answers, chat_opening, split
from specdec.proposers.medusa import Medusa, MedusaHeads, root_embeddings
from specdec.text import Bytes
from specdec.training import MedusaRecipe, PromptRecipe, collect, measure, train
from specdec.trees import Static

RECIPE = MedusaRecipe(heads=2, vocab=64, epochs=4, rows=32, lr=0.02, held_out=1)
PROMPTS = PromptRecipe(written=0, answer_tokens=40, batch=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("answers")
    conversations = [Conversation(str(i), "any", (chr(33 + i) * (2 + i % 5),)) for i in range(16)]
    return collect(tiny(), Bytes97(), conversations, PROMPTS, folder, ())


class Bytes97(Bytes):
    """Bytes within the tiny target's vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [token % tiny().vocab for token in super().encode(text)]


def test_features_are_what_the_lm_head_read_when_it_said_the_token(shards):
    answers = Answers.load(shards)
    said_X = (answers.features_XD.float() @ tiny().lm_head.T).argmax(-1)
    assert (said_X == answers.tokens_X).float().mean() > 0.98  # features are stored in 16 bits
    assert answers.end_X.max() == len(answers.tokens_X) == len(answers.end_X)


def test_answers_that_are_there_are_not_given_again(shards):
    before = [f.stat().st_mtime_ns for f in shards]
    conversations = [Conversation(str(i), "any", (chr(33 + i) * (2 + i % 5),)) for i in range(16)]
    assert collect(tiny(), Bytes97(), conversations, PROMPTS, shards[0].parent, ()) == shards
    assert [f.stat().st_mtime_ns for f in shards] == before


def test_held_out_shards_are_not_trained_on(shards):
    training, held_out = split(shards, 1)
    assert len(held_out) == 1
    assert set(training) | set(held_out) == set(shards)
    assert not set(training) & set(held_out)


def test_heads_learn_and_their_file_drafts(shards, tmp_path):
    out, answers = tmp_path / "heads.safetensors", Answers.load(shards)
    untrained = MedusaHeads(2, tiny().lm_head, torch.arange(tiny().vocab))
    info = train(tiny(), shards, RECIPE, out)
    trained, _ = MedusaHeads.load(out, tiny())
    for before_R, after_R in zip(*(measure(h, tiny(), answers) for h in (untrained, trained)), strict=True):
        assert after_R[0] > before_R[0] + 0.1
    assert [len(row) for row in info.accuracy_KR] == [10, 10]
    assert all(0 <= sum(row) <= 1 for row in info.accuracy_KR)
    medusa = Medusa(tiny(), Static(nodes=4), heads=str(out))
    assert medusa.info == info
    assert not out.with_suffix(".state").exists()


def test_an_interrupted_training_ends_with_the_same_weights(shards, tmp_path):
    def stops(step: int, total: int, loss: float) -> None:
        if step == 2 * total // 3:
            raise KeyboardInterrupt

    train(tiny(), shards, RECIPE, tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), shards, RECIPE, tmp_path / "halved.safetensors", report=stops)
    train(tiny(), shards, RECIPE, tmp_path / "halved.safetensors")
    whole, halved = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "halved"))
    assert all(torch.equal(whole[name], halved[name]) for name in whole)


def test_other_settings_do_not_go_on_with_a_begun_training(shards, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), shards, RECIPE, tmp_path / "heads.safetensors", report=_stop_in_the_second_epoch)
    with pytest.raises(ValueError, match="other settings"):
        train(tiny(), shards, replace(RECIPE, lr=0.5), tmp_path / "heads.safetensors")


def _stop_in_the_second_epoch(step: int, total: int, loss: float) -> None:
    if step > total // 2:
        raise KeyboardInterrupt


def test_an_untrained_head_repeats_the_lm_head_whatever_the_root():
    heads = MedusaHeads(2, tiny().lm_head, torch.arange(tiny().vocab))
    hidden_XD = torch.randn(3, tiny().lm_head.shape[1])
    root_XD = root_embeddings(tiny(), torch.tensor([1, 2, 3]))
    assert torch.allclose(
        heads(hidden_XD, root_XD), (hidden_XD @ tiny().lm_head.T).expand(2, -1, -1), atol=1e-5
    )
    assert torch.allclose(root_XD.pow(2).mean(-1), torch.ones(3), atol=1e-3)


def test_wrong_settings_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"head\.heads=1"):
        MedusaRecipe(heads=0)
    with pytest.raises(ValueError, match=r"head\.held_out=1"):
        train(tiny(), shards[:1], RECIPE, tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match="nothing to train on"):
        collect(tiny(), Bytes97(), [], PROMPTS, tmp_path, ())
    with pytest.raises(ValueError, match="no chat template"):
        chat_opening(Bytes97(), "")
