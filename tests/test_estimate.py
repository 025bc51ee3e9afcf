"""What a training takes, said before it starts: what there is to do, memory, time."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from answers import EAGLE, STEPS, TAPS, collected
from models import tiny
from safetensors.torch import load_file
from torch import Tensor, nn

from specdec.training import estimate
from specdec.training.eagle3 import Eagle3Recipe
from specdec.training.estimate import Estimate, kept_for_backward
from specdec.training.loop import train
from specdec.training.screen import lines_of
from specdec.training.texts import TextBatch, Texts, split


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return collected(tiny(), tmp_path_factory.mktemp("answers"))


class Product(nn.Module):
    """Keeps x of 100 floats and y of 10 for its backward, beside a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100))

    def loss(self) -> Tensor:
        x, y = torch.ones(100), torch.ones(10, requires_grad=True)
        return (self.weight * x).sum() * (y * y).sum().exp()


def test_what_a_backward_keeps_is_counted_once_and_without_the_weights() -> None:
    product = Product()
    scalars = 2 * 4 + 4  # both factors of the product, and what exp gave, which is one of them
    kept = kept_for_backward(product.loss, {product.weight.data_ptr()})
    assert 4 * (100 + 10) < kept <= 4 * (100 + 10) + scalars


def test_an_estimate_comes_first_and_counts_what_there_is(shards: list[Path], tmp_path: Path) -> None:
    events, out = [], tmp_path / "heads.safetensors"
    train(tiny(), shards, EAGLE, out, begin=events.append, report=events.append)
    first, texts = events[0], Texts.load(split(shards, 1)[0], TAPS)
    assert (first.texts, first.said, first.steps, first.done) == (16, texts.said, 2 * STEPS, 0)
    assert first.memory["target"] == sum(p.nbytes for p in tiny().model.parameters())
    assert first.memory["features"] == sum(rows.nbytes for rows in texts.features)
    stored = load_file(out)
    trained = {n: t for n, t in stored.items() if n != "tokens_U"}
    assert first.parameters == sum(t.numel() for t in trained.values())
    assert first.memory["gradients and moments"] == 4 * 4 * first.parameters
    assert first.memory["a batch"] > 0


def test_time_is_estimated_by_a_forward_that_is_warm(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of a clock that only a batch and a loss move, which is waited for: the first loss compiles."""
    clock, queued, estimates, took, alive = [0.0], [], [], iter([100.0, 2.0]), WeakSet()
    batch, loss, item = Texts.batch, Eagle3Recipe.loss, Tensor.item

    def read(*args: object) -> TextBatch:
        assert not alive, "two of the longest batches are held"
        clock[0] += 5
        made = batch(*args)
        alive.add(made.said_ST)
        return made

    def judge(*args: object) -> Tensor:
        queued.append(next(took))
        return loss(*args)

    def wait(tensor: Tensor) -> float:
        clock[0] += sum(queued)
        queued.clear()
        return item(tensor)

    def begin(estimated: Estimate) -> None:
        estimates.append(estimated)
        raise InterruptedError

    monkeypatch.setattr(Texts, "batch", read)
    monkeypatch.setattr(Eagle3Recipe, "loss", judge)
    monkeypatch.setattr(Tensor, "item", wait)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises(InterruptedError):
        train(tiny(), shards, replace(EAGLE, accumulate=2), tmp_path / "heads.safetensors", begin=begin)
    assert estimates[0].seconds == 2 * (5 + 3 * 2)
    said = lines_of(replace(estimates[0], steps=120, done=20, seconds=36.0), "eagle3")[-1]
    assert said.startswith("time: about 1:00:00 for 100 steps of 36 s")
