"""Files of heads of all kinds: what is refused, and what the refusal says."""

import json
from pathlib import Path

import pytest
import torch
from models import ACCURACY, cyclic, save_eagle, save_heads, tiny, untrained_eagle, untrained_heads
from safetensors.torch import save_file

from specdec.proposers import draft_head, eagle3_head
from specdec.proposers.medusa_heads import MedusaHeads
from specdec.zoo import zoo_file

LOADERS = {"medusa": MedusaHeads.load, "eagle3": eagle3_head.load, "draft_lm": draft_head.load}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("said", [{"target": "x"}, {"config": {"width": 3}, "source": [0]}, [], 3], ids=str)
def test_a_file_that_says_too_little_is_refused(kind: str, said: object, tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={kind: json.dumps(said)})
    with pytest.raises(ValueError, match=rf"^head.start={path} is no file of {kind} heads .* head={kind}$"):
        LOADERS[kind](path, tiny(), "head.start")


@pytest.mark.parametrize("kind", LOADERS)
def test_heads_of_another_target_are_refused_with_the_override_that_named_them(
    kind: str, tmp_path: Path
) -> None:
    path, draft = tmp_path / "heads.safetensors", draft_head.DraftHead(tiny(), (0,))
    if kind == "medusa":
        save_heads(untrained_heads(tiny(), [1, 2]), cyclic(), path)
    elif kind == "eagle3":
        save_eagle(untrained_eagle(tiny(), [1, 2]), cyclic(), path)
    else:
        said = draft_head.DraftInfo((0,), cyclic().name, cyclic().fingerprint, ACCURACY)
        draft_head.save(path, draft.drafting(tiny(), torch.tensor([1, 2])), said)
    with pytest.raises(ValueError, match=r"was trained for .* with head.start=FILE"):
        LOADERS[kind](path, tiny(), "head.start")


def test_heads_that_do_not_exist_are_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"proposer.heads=no-such-head: no such file, nor one of the zoo's: "
    ):
        zoo_file("no-such-head")
    path = tmp_path / "mine.safetensors"
    path.touch()
    assert zoo_file(str(path)) == path
