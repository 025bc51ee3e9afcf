"""Drafting with Medusa heads, and their files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import (
    ACCURACY,
    VOCAB,
    cyclic,
    cyclic_heads,
    info,
    requests,
    run,
    save_heads,
    tiny,
    tokens_per_step,
    untrained_heads,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.proposers.medusa import Medusa
from specdec.proposers.medusa_heads import MedusaHeads
from specdec.trees import Chain, Static


def test_heads_survive_a_file(tmp_path: Path) -> None:
    heads = untrained_heads(tiny(), [3, 1, 4, 15, 9])
    loaded, said = MedusaHeads.load(Path(save_heads(heads, tiny(), tmp_path / "heads.safetensors")), tiny())
    assert said == info(tiny())
    assert loaded.tokens_U.tolist() == [3, 1, 4, 15, 9]
    assert torch.equal(loaded.weight_KDD, heads.weight_KDD.bfloat16().float())
    hidden_XD, root_XD = torch.randn(2, 3, heads.bias_KD.shape[1])
    logits_KXU = loaded(hidden_XD, root_XD)
    assert logits_KXU.shape == (len(ACCURACY), 3, 5)
    turned_XD = hidden_XD @ loaded.weight_KDD[1] + root_XD @ loaded.root_KDD[1] + loaded.bias_KD[1]
    want_XU = (hidden_XD + torch.nn.functional.silu(turned_XD)) @ tiny().lm_head[[3, 1, 4, 15, 9]].T
    assert torch.allclose(logits_KXU[1], want_XU, atol=1e-4)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_tree_is_fitted_to_the_heads_and_no_deeper_than_they_are_many(tmp_path: Path) -> None:
    path = save_heads(cyclic_heads(), cyclic(), tmp_path / "heads.safetensors")
    proposer = Medusa(cyclic(), Static(nodes=6), heads=path)
    assert proposer.tree == Static(nodes=6).fitted(ACCURACY)
    deep = Medusa(cyclic(), Chain(depth=20), heads=path)
    assert tokens_per_step(run(deep, requests([[1, 2]], 24))) == len(ACCURACY) + 1


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def with_tensors(change: Callable[[dict[str, Tensor]], None], **said: object) -> Callable[[Path], None]:
    """Rewrite a file of heads with some of its tensors, or of what it says of itself, changed."""

    def rewrite(path: Path) -> None:
        tensors, metadata = load_file(path), vars(info(tiny())) | said
        change(tensors)
        save_file(tensors, path, metadata={"medusa": json.dumps(metadata)})

    return rewrite


def nothing(tensors: dict[str, Tensor]) -> None:
    """Leave the tensors as they are."""


DAMAGE = {
    "truncated": (truncated, "is no file of medusa heads"),
    "empty": (lambda path: path.write_bytes(b""), "is no file of medusa heads"),
    "no heads": (lambda path: save_file({"x": torch.zeros(1)}, path), "is no file of medusa heads"),
    "garbled": (
        lambda path: save_file({"x": torch.zeros(1)}, path, metadata={"medusa": "{"}),
        "is no file of medusa heads",
    ),
    "says more": (with_tensors(nothing, hydras=5), "is no file of medusa heads .*hydras"),
    "other target": (with_tensors(nothing, fingerprint="0123"), r"was trained for .*fingerprint 0123"),
    "NaN": (with_tensors(lambda t: t["bias_KD"][1].fill_(torch.nan)), "weights that are not finite"),
    "infinite": (
        with_tensors(lambda t: t["weight_KDD"][0, 0].fill_(torch.inf)),
        "weights that are not finite",
    ),
    "missing": (with_tensors(lambda t: t.pop("bias_KD")), "expected: bias_KD None, not .5, 64."),
    "no vocabulary": (with_tensors(lambda t: t.pop("tokens_U")), "expected: tokens_U None, not"),
    "no list": (
        with_tensors(lambda t: t.update(tokens_U=torch.tensor(3))),
        "expected: tokens_U .., not .1,.",
    ),
    "other width": (
        with_tensors(lambda t: t.update(bias_KD=torch.zeros(5, 7))),
        "expected: bias_KD .5, 7., not .5, 64.",
    ),
    "fewer heads": (with_tensors(nothing, heads=4), "expected: bias_KD .5, 64., not .4, 64."),
    "other vocabulary": (with_tensors(lambda t: t["tokens_U"].add_(VOCAB)), "vocabulary that is not"),
    "negative token": (with_tensors(lambda t: t["tokens_U"].sub_(9)), "vocabulary that is not"),
    "token twice": (with_tensors(lambda t: t["tokens_U"].fill_(3)), "vocabulary that is not"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_foreign_heads_are_refused(damage: Callable, message: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(untrained_heads(tiny(), list(range(8))), tiny(), path)
    Medusa(tiny(), Chain(), heads=str(path))
    damage(path)
    with pytest.raises(ValueError, match=f"heads.safetensors.*{message}.*specdec.train head=medusa"):
        Medusa(tiny(), Chain(), heads=str(path))


def test_medusa_refuses_a_temperature_of_zero(tmp_path: Path) -> None:
    path = save_heads(cyclic_heads(), cyclic(), tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match=r"proposer.temperature is 0.*proposer.temperature=1"):
        Medusa(cyclic(), Chain(), heads=path, temperature=0)
