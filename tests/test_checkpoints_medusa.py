"""Medusa heads in other projects' layouts read as the heads they were written from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import same, write
from models import ACCURACY, VOCAB, cyclic, cyclic_heads, requests, run, tiny, tokens_per_step
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.checkpoints import open_medusa
from specdec.checkpoints.medusa import medusa_heads, read_medusa
from specdec.proposers.medusa import Medusa
from specdec.trees import Chain, Static

HEADS, WIDTH = 3, 64
ORIGINAL = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna"}


def state(tokens: list[int] | None = None, own: bool = False) -> dict[str, Tensor]:
    """Native tensors with random weights."""
    draw = torch.Generator().manual_seed(0)
    tokens_U = torch.tensor(sorted(tokens or range(VOCAB)), dtype=torch.int32)
    shapes: dict[str, tuple[int, ...]] = {"weight_KDD": (HEADS, WIDTH, WIDTH), "bias_KD": (HEADS, WIDTH)}
    shapes |= {"lm_head_KUD": (HEADS, len(tokens_U), WIDTH)} if own else {}
    random = {n: torch.randn(shape, generator=draw).bfloat16() for n, shape in shapes.items()}
    return random | {"tokens_U": tokens_U}


def original(folder: Path, native: dict[str, Tensor], name: str = "medusa_lm_head.pt") -> str:
    """FasterDecoding's, whose config names the wrong number of heads; TGI's without LM heads."""
    tensors = {}
    for k in range(len(native["bias_KD"])):
        tensors[f"{k}.0.linear.weight"] = native["weight_KDD"][k].T
        tensors[f"{k}.0.linear.bias"] = native["bias_KD"][k]
        if "lm_head_KUD" in native:
            tensors[f"{k}.1.weight"] = native["lm_head_KUD"][k]
    return write(folder, ORIGINAL, tensors, name)


def tgi(folder: Path, native: dict[str, Tensor]) -> str:
    return original(folder, native, "medusa_lm_head.safetensors")


def vllm(folder: Path, native: dict[str, Tensor], **said: Any) -> str:
    """With biases, LM heads of each head's own or none, and the vocabulary as a map."""
    K, tokens_U = len(native["bias_KD"]), native["tokens_U"].long()
    tensors = {f"medusa_heads.blocks.{k}.layers.0.weight": native["weight_KDD"][k].T for k in range(K)}
    tensors |= {f"medusa_heads.blocks.{k}.layers.0.bias": native["bias_KD"][k] for k in range(K)}
    if "lm_head_KUD" in native:
        tensors |= {f"medusa_heads.lm_heads.{k}.weight": native["lm_head_KUD"][k] for k in range(K)}
    if len(tokens_U) < VOCAB:
        tensors["medusa_heads.token_map"] = tokens_U
    plain = {"model_type": "medusa", "num_heads": K, "num_hidden_layers": 1, "vocab_size": VOCAB}
    return write(folder, plain | {"truncated_vocab_size": len(tokens_U)} | said, tensors, "model.safetensors")


CASES = {
    "original": (original, state(own=True)),
    "TGI": (tgi, state()),
    "TGI, first version": (tgi, state(own=True)),
    "vLLM": (vllm, state(own=True)),
    "vLLM, cut": (vllm, state([3, 30, 4, 11], own=True)),
    "vLLM, the target's": (vllm, state()),
    "vLLM, the target's, cut": (vllm, state([3, 30, 4, 11])),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layout_reads_as_what_it_was_written_from(case: str, tmp_path: Path) -> None:
    to, native = CASES[case]
    read = read_medusa(to(tmp_path, native), tiny())
    assert same(read.state, native)
    assert (read.config.heads, read.config.width, read.config.accuracy_KR) == (HEADS, WIDTH, [])
    assert read.name.startswith("vLLM" if "vLLM" in case else "original")


@pytest.mark.parametrize("own", [False, True])
def test_the_heads_are_the_paper_s(own: bool, tmp_path: Path) -> None:
    """W_k (h + silu(A_k h + b)), whatever the root is."""
    native = state(own=own)
    heads = medusa_heads(read_medusa(original(tmp_path, native), tiny()), tiny())
    hidden_XD, root_XD = torch.randn(2, 5, WIDTH)
    for k, logits_XU in enumerate(heads(hidden_XD, root_XD)):
        turned_XD = hidden_XD @ native["weight_KDD"][k].float() + native["bias_KD"][k].float()
        lm_head_UD = native["lm_head_KUD"][k].float() if own else tiny().lm_head
        want_XU = (hidden_XD + torch.nn.functional.silu(turned_XD)) @ lm_head_UD.T
        assert torch.allclose(logits_XU, want_XU, atol=1e-3, rtol=1e-4)


def test_lm_heads_that_are_the_target_s_are_shared(tmp_path: Path) -> None:
    native = state()
    copies = {"lm_head_KUD": tiny().lm_head.repeat(HEADS, 1, 1)}
    assert same(read_medusa(original(tmp_path / "a", native | copies), tiny()).state, native)
    folder = Path(vllm(tmp_path / "b", state([3, 30, 4, 11])))
    for name, rows in (("lm_heads.0.weight", slice(None)), ("lm_head.weight", [3, 4, 11, 30])):
        tensors = load_file(folder / "model.safetensors")
        tensors = {n: t for n, t in tensors.items() if "lm_head" not in n} | {name: tiny().lm_head[rows]}
        save_file(tensors, folder / "model.safetensors")
        assert same(read_medusa(str(folder), tiny()).state, state([3, 30, 4, 11]))


def test_a_map_in_any_order_is_put_in_order_with_its_rows(tmp_path: Path) -> None:
    native, order_U = state([3, 30, 4, 11], own=True), torch.tensor([2, 0, 3, 1])
    rows = {"tokens_U": native["tokens_U"][order_U], "lm_head_KUD": native["lm_head_KUD"][:, order_U]}
    assert same(read_medusa(vllm(tmp_path, native | rows), tiny()).state, native)


def right(own: bool) -> dict[str, Tensor]:
    """Heads that are always right about `cyclic`."""
    heads = {n: t.detach() for n, t in cyclic_heads().state_dict().items() if n != "root_KDD"}
    return heads | ({"lm_head_KUD": 2 * cyclic().lm_head.repeat(len(ACCURACY), 1, 1)} if own else {})


@pytest.mark.parametrize("own", [False, True])
def test_a_folder_drafts_as_the_heads_in_it_do(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.checkpoints.questions", lambda target: [[1, 2, 3], [5, 6]])
    proposer = Medusa(cyclic(), Chain(depth=20), heads=original(tmp_path, right(own)))
    assert tokens_per_step(run(proposer, requests([[1, 2]], 24))) == len(ACCURACY) + 1
    assert proposer.reading.startswith(
        "original layout, LM heads of their own" if own else "original layout, the"
    )
    assert "1.00 1.00 1.00, 0.00 nats (right at depths 1 to 3, 0.12 by chance)" in proposer.reading
    assert Medusa(cyclic(), Static(nodes=6), heads=str(tmp_path)).tree == Static(nodes=6)


def test_heads_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.checkpoints.questions", lambda target: [[1, 2, 3], [5, 6]])
    turned = right(False) | {"weight_KDD": right(False)["weight_KDD"].roll(1, 1)}
    with pytest.raises(ValueError, match=r"drafts no better than chance for random-llama.*head=medusa"):
        open_medusa(original(tmp_path, turned), cyclic())


def changed(**tensors: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda native: {n: t for n, t in (native | tensors).items() if t is not None}


DAMAGE: dict[str, tuple[Callable[..., str], dict[str, Any], str]] = {
    "other width": (original, {"weight_KDD": torch.zeros(3, 8, 8)}, "blocks of .8, 8., .* are 64 wide"),
    "other biases": (original, {"bias_KD": torch.zeros(3, 7)}, "biases of .7,., .* are 64 wide"),
    "NaN": (original, {"bias_KD": torch.full((3, WIDTH), torch.nan)}, "not finite: 0.0.linear.bias"),
    "other vocabulary": (original, {"lm_head_KUD": torch.zeros(3, 99, WIDTH)}, "drafts 99 of 32 tokens"),
    "beyond": (vllm, {"tokens_U": torch.tensor([3, 40])}, "token_map that does not name different tokens"),
    "an empty map": (vllm, {"tokens_U": torch.tensor([])}, "token_map that does not name different tokens"),
    "twice": (vllm, {"tokens_U": torch.tensor([3, 3])}, "token_map that does not name different tokens"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_and_foreign_heads_are_refused(case: str, tmp_path: Path) -> None:
    to, wrong, message = DAMAGE[case]
    with pytest.raises(ValueError, match=f"^proposer.heads={tmp_path} .*{message}.*; choose heads"):
        read_medusa(to(tmp_path, state() | wrong), tiny())


SQUARE, LM_HEAD = torch.zeros(WIDTH, WIDTH), torch.zeros(VOCAB, WIDTH)
TWO_BLOCKS = {"0.0.linear.weight": SQUARE, "1.0.linear.weight": SQUARE}
NAMES: dict[str, tuple[dict[str, Tensor], str]] = {
    "a second block": ({"0.1.linear.weight": SQUARE}, "has several residual blocks a head"),
    "another model's": (
        {"model.layers.0.mlp.up_proj.weight": SQUARE},
        "holds model.layers.0.*which Medusa heads do not have",
    ),
    "a gap": ({"4.0.linear.weight": SQUARE}, r"for the heads \[0, 4\], expected all from 0 on"),
    "a narrow LM head": (
        TWO_BLOCKS | {"0.1.weight": torch.zeros(VOCAB, 9)},
        r"has LM heads of .*\(32, 9\).*expected 2 of \(32, 64\)",
    ),
    "the second's LM head only": (
        TWO_BLOCKS | {"1.1.weight": LM_HEAD},
        r"has LM heads of \{1: \(32, 64\)\}, expected 2 of \(32, 64\)",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_tensors_that_do_not_belong_are_refused(case: str, tmp_path: Path) -> None:
    tensors, message = NAMES[case]
    folder = write(tmp_path, ORIGINAL, {"0.0.linear.weight": SQUARE} | tensors, "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=message):
        read_medusa(folder, tiny())


def test_a_config_for_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"knows 64 tokens, this target has 32"):
        read_medusa(vllm(tmp_path, state(), vocab_size=64), tiny())
