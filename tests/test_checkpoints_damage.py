"""Checkpoints that are damaged, or no heads for this target, are refused in one line that says why."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import IDS, VOCAB, WIDTH, config, official, random_state, shifting
from torch import Tensor

from specdec.checkpoints.eagle3 import read_eagle3
from specdec.config import as_target
from specdec.loading import random_model


def changed(**tensors: Tensor | None) -> Callable[[Path], None]:
    """Replace tensors of an official checkpoint, or take them away."""

    def change(folder: Path) -> None:
        file = folder / "pytorch_model.bin"
        state = torch.load(file, weights_only=True) | {n.replace("__", "."): t for n, t in tensors.items()}
        torch.save({name: t for name, t in state.items() if t is not None}, file)

    return change


def said(**keys: object) -> Callable[[Path], None]:
    """Change the config."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def truncated(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-2000])


def pickled(folder: Path) -> None:
    torch.save({"fc.weight": Path("run me")}, folder / "pytorch_model.bin")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


NAN, HALF = torch.full((WIDTH,), torch.nan), torch.zeros(WIDTH, 3 * WIDTH // 2)
DAMAGE = {
    "truncated": (truncated, "has a damaged or unsafe pytorch_model.bin"),
    "more than tensors": (pickled, "has a damaged or unsafe pytorch_model.bin"),
    "no weights": (
        without("pytorch_model.bin"),
        "holds config.json, expected config.json and one of model.safe",
    ),
    "no config": (without("config.json"), "has no readable config.json"),
    "garbled config": (lambda f: (f / "config.json").write_text("{"), "has no readable config.json"),
    "NaN": (changed(midlayer__hidden_norm__weight=NAN), "not finite: midlayer.hidden_norm.weight"),
    "quantised": (changed(fc__weight=HALF.to(torch.float8_e4m3fn)), "quantised: fc.weight is torch.float8"),
    "no EAGLE-3": (
        changed(midlayer__hidden_norm__weight=None),
        "holds no hidden_norm.weight, so it is no EAGLE-3",
    ),
    "wrong width": (said(hidden_size=128), "reads hidden states of width 128 .*this target's are 64 wide"),
    "wrong fc": (changed(fc__weight=HALF), r"\(fc.weight: 96 values\), this target's are 64 wide"),
    "wrong vocabulary": (said(vocab_size=64), "knows 64 tokens, this target has 32"),
    "other tokens": (
        changed(d2t=torch.full((28,), 30), t2d=None),
        "drafts tokens up to 57, this target has 32",
    ),
    "tokens twice": (changed(d2t=-torch.arange(28), t2d=None), "d2t that does not name different tokens"),
    "contradiction": (changed(t2d=torch.ones(VOCAB, dtype=torch.bool)), "d2t and a t2d that contradict"),
    "rows": (
        changed(d2t=torch.zeros(9, dtype=torch.int64)),
        "has (9 and 28|28 and 9) rows in lm_head.weight and d2t",
    ),
    "no d2t": (changed(d2t=None), "drafts 28 of 32 tokens, and has no d2t that says which"),
    "layers": (
        said(**{IDS: [2, 4, 9]}),
        r"reads 3 layers, with the ids \[2, 4, 9\]: .*of this target's 8 \(0 to 7\)",
    ),
    "layers in words": (said(**{IDS: "2, 4, 5"}), "expected a list of whole numbers"),
    "an eagle_config of none": (said(eagle_config=[2, 4, 5]), r"eagle_config of \[2, 4, 5\], expected keys"),
    "too few layers": (said(**{IDS: [2, 4]}), r"reads 3 layers, with the ids \[2, 4\]"),
    "biases": (
        changed(midlayer__self_attn__q_proj__bias=torch.zeros(64)),
        "q_proj.bias is .64,., expected none",
    ),
    "missing": (changed(norm__weight=None), r"norm.weight is missing, expected \(64,\)"),
    "other MLP": (said(intermediate_size=80), r"mlp.down_proj.weight is \(64, 96\), expected \(64, 80\)"),
    "two layers": (said(num_hidden_layers=2), "has num_hidden_layers=2, expected one layer"),
    "GELU": (said(hidden_act="gelu"), "has hidden_act=gelu"),
    "half rotary": (said(partial_rotary_factor=0.5), "has partial_rotary_factor=0.5"),
    "unknown layer": (said(model_type="lama"), "config of a lama layer that makes none"),
    "heads that do not divide": (
        said(num_attention_heads=7),
        "config of a llama layer that makes none",
    ),
    "no joint norm": (said(norm_before_fc=True), r"input_norm.weight is missing, expected \(192,\)"),
    "half of Qwen3's norms": (
        changed(midlayer__self_attn__q_norm__weight=torch.ones(16)),
        r"k_norm.weight is missing, expected \(16,\)",
    ),
    "other method": (
        said(speculators_model_type="dflash"),
        "speculators head of type dflash, expected eagle3",
    ),
    "words for numbers": (said(hidden_size="wide"), "config of a llama layer that makes none"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_and_foreign_checkpoints_are_refused_before_anything_is_decoded(
    case: str, tmp_path: Path
) -> None:
    damage, message = DAMAGE[case]
    damage(Path(official(tmp_path, config(), random_state(config()))))
    with pytest.raises(ValueError, match=f"^proposer.heads={tmp_path} .*{message}.*; choose heads") as error:
        read_eagle3(str(tmp_path), shifting())
    assert "\n" not in str(error.value)


def test_a_target_with_too_few_layers_is_told_so(tmp_path: Path) -> None:
    small = as_target(random_model(config={"vocab_size": VOCAB}, device="cpu"))
    folder = official(tmp_path, config(), random_state(config()))
    with pytest.raises(ValueError, match=r"reads 3 layers, by default .*of this target's 2 \(0 to 1\)"):
        read_eagle3(folder, small)
