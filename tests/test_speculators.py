"""What is exported for speculators, loaded and run by speculators itself.

Its package lies in a folder of its own, which `make test` puts on the path of these tests only.
"""

from pathlib import Path

import pytest
import torch
from foreign import EXPORTED, VOCAB, WIDTH, config, exported, shifting
from torch import Tensor

from specdec.proposers.eagle3_head import load
from specdec.training.eagle3 import unroll

models = pytest.importorskip("speculators.models.eagle3", reason="needs speculators: see the Makefile")


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The target's own checkpoint, from which speculators takes what a head leaves out."""
    folder = tmp_path_factory.mktemp("verifier")
    shifting().model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("variant", EXPORTED)
def test_speculators_loads_and_runs_it_as_we_do(variant: str, verifier: str, tmp_path: Path) -> None:
    """Every law of three unrolls, from its own model and its own loading of head and target."""
    c = config(**EXPORTED[variant])
    folder = exported(c, "speculators", tmp_path, verifier)
    theirs_config = models.Eagle3SpeculatorConfig.from_pretrained(folder)
    theirs_config.transformer_layer_config._attn_implementation = "eager"
    theirs = models.Eagle3DraftModel.from_pretrained(folder, config=theirs_config).float()
    assert theirs.target_layer_ids == list(c.taps)
    got: list[Tensor] = []
    theirs.lm_head.register_forward_hook(lambda module, args, out: got.append(out[0].detach()))
    draw = torch.Generator().manual_seed(1)
    tokens_T, taps_CTD = torch.arange(3, 19) % VOCAB, torch.randn(len(c.taps), 16, WIDTH, generator=draw)
    taps_1TC = torch.cat(list(taps_CTD[:, :-1]), dim=-1).unsqueeze(0)
    theirs(taps_1TC, tokens_T[1:].unsqueeze(0), torch.zeros(1, 15, dtype=torch.long), ttt_steps=3)
    head, _ = load(tmp_path / "head.safetensors", shifting())
    for i, out_1TD in enumerate(unroll(head, tokens_T.unsqueeze(0), head.fuse(taps_CTD.unsqueeze(1)), 3)):
        rows = 15 - i
        torch.testing.assert_close(got[i][:rows], head.logits(out_1TD)[0, :rows], atol=1e-3, rtol=1e-3)
