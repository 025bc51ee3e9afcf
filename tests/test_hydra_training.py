"""Hydra heads in training read the true path, and learn what depends on the drafted token.

Shapes: X places in a batch, U draft vocabulary, S texts, T tokens, D width, P squares, J tokens of a path.
"""

from functools import cache

import pytest
import torch
from answers import MEDUSA, TAPS, collected
from models import VOCAB, requests, run, saying, tiny, tokens_per_step, untrained_heads
from test_hydra import HALF, Reference

from specdec.onpolicy import write_answers
from specdec.proposers.medusa import Medusa
from specdec.proposers.medusa_heads import MedusaHeads
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.training import medusa as training
from specdec.training.loop import train
from specdec.training.medusa import MedusaRecipe
from specdec.training.texts import Texts
from specdec.trees import TopK


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory):
    target = tiny().cast(torch.float64)
    texts = Texts.load(collected(target, tmp_path_factory.mktemp("answers")), TAPS)
    return texts.batch(target, [0, 7, 12])


def check_training(batch) -> int:
    """The property: head k reads, behind what the target said, its k - 1 true tokens."""
    target, heads = tiny().cast(torch.float64), untrained_heads(tiny(), HALF, hydra=True).double()
    reference, checked = Reference(heads, target), 0
    for k, (logits_XU, _, _) in enumerate(MEDUSA.judged(heads, target, batch), start=1):
        rows = iter(logits_XU)
        for said_T, next_T, hidden_TD in zip(
            batch.said_ST, batch.next_ST, batch.hidden["final"], strict=True
        ):
            for t in said_T.nonzero().flatten().tolist():
                if t + k < len(said_T) and said_T[t + k]:
                    root, *path = next_T[t : t + k].tolist()
                    want_U = reference.logits(hidden_TD[t], root, path)
                    torch.testing.assert_close(next(rows), want_U, atol=1e-6, rtol=1e-6)
                    checked += 1
        assert next(rows, None) is None
    return checked


def test_training_reads_the_true_path(batch) -> None:
    assert check_training(batch) > 100


def test_a_path_that_is_one_token_late_is_caught(batch, monkeypatch: pytest.MonkeyPatch) -> None:
    said_next = training._said_next
    monkeypatch.setattr(training, "_said_next", lambda root_XD, J: said_next(root_XD, J).roll(1, 0))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_training(batch)


def test_a_step_down_the_gradient_lowers_the_loss(batch) -> None:
    recipe = MedusaRecipe(heads=3, hydra=True)
    heads = MedusaHeads(3, tiny().lm_head_of(), torch.arange(VOCAB), hydra=True)
    loss = recipe.loss(heads, tiny(), batch)
    loss.backward()
    assert all(square.any() for square in heads.path_PDD.grad), "every square is read"
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter -= 0.1 * parameter.grad
    assert recipe.loss(heads, tiny(), batch) < loss


FORK, WAYS = 0, [1, 2, 3, 4]
FOLLOWS = [WAYS, *([w + 4] for w in WAYS), *([FORK] for _ in WAYS), *([t] for t in range(9, VOCAB))]


@cache
def forking() -> HFTarget:
    """A target that says any of WAYS after FORK, after each of them a token of its own, then FORK again."""
    return saying(FOLLOWS)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Files of heads that were trained on texts of `forking`: Medusa's, and Hydra's."""
    folder, prompts = tmp_path_factory.mktemp("forked"), [[t, FORK] for t in range(9, VOCAB)]
    drawn = {"sampling": Sampling(temperature=1.0), "taps": ("final",), "stop_ids": (), "longest": 20}
    files = write_answers(forking(), prompts, folder / "answers", batch=4, **drawn)
    for hydra in (False, True):
        recipe = MedusaRecipe(hydra=hydra, vocab=VOCAB, epochs=10, rows=256, lr=0.05)
        train(forking(), files, recipe, folder / f"{hydra}.safetensors")
    return {hydra: str(folder / f"{hydra}.safetensors") for hydra in (False, True)}


def right_behind(proposer: Medusa, token: int) -> int:
    """Of the ways that are drafted behind FORK, how many what really follows is drafted behind."""
    seqs, hidden_1D = requests([[token, FORK]]), torch.eye(VOCAB)[token : token + 1] * VOCAB**0.5
    proposer.start(seqs, [{"final": hidden_1D}])
    (tree,) = proposer.propose(seqs)
    assert sorted(tree.tokens_N[1:5]) == WAYS
    return sum(tree.child(n, FOLLOWS[tree.tokens_N[n]][0]) is not None for n in range(1, 5))


def test_only_hydra_learns_what_depends_on_the_drafted_token(forked: dict[bool, str]) -> None:
    """From FORK on, what is drawn and what follows it are one step's work; for Medusa one time in four."""
    rates = {}
    for hydra, file in forked.items():
        proposer = Medusa(forking(), TopK(depth=2, widths=(4, 1)), heads=file)
        assert right_behind(proposer, 9) == (4 if hydra else 1)
        seqs = requests([[t, FORK] for t in range(9, VOCAB)], 3)
        rates[hydra] = tokens_per_step(run(proposer, seqs, Sampling(temperature=1.0)))
    assert rates[True] == 3
    assert rates[False] < 2
