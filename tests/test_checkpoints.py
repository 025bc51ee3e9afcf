"""Checkpoints of others: what is written in each dialect reads as the head it was written from."""

from pathlib import Path

import pytest
import torch
from foreign import (
    DIALECTS,
    IDS,
    LAYERS,
    TAPS,
    VOCAB,
    WIDTH,
    config,
    deepspec,
    nvidia,
    official,
    random_state,
    same,
    shifting,
    specforge,
    speculators,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.checkpoints import is_checkpoint
from specdec.checkpoints.eagle3 import eagle3_head, read_eagle3
from specdec.config import as_target
from specdec.loading import random_model
from specdec.proposers.eagle3_head import Eagle3Config

VARIANTS = {
    "3": {},
    "3.1": {"fc_norm": True, "post_norm": True},
    "normed residual": {"norm_before_residual": True},
    "a base of its own": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "five layers": {"taps": (1, 2, 4, 5, 7)},
    "joint norm": {"norm_before_fc": True},
    "Qwen3's layer": {"qk_norm": True},
}
# What a dialect's config has no place for.
LACKS = {
    "official": {"fc_norm", "post_norm", "norm_before_residual", "rope_parameters", "taps"},
    "SpecForge": {"norm_before_residual", "norm_before_fc"},
    "NVIDIA": {"fc_norm", "post_norm", "norm_before_residual", "rope_parameters", "qk_norm"},
    "speculators": set(),
}
PAIRS = [(d, v) for d in DIALECTS for v in VARIANTS if not VARIANTS[v].keys() & LACKS[d]]


@pytest.mark.parametrize(("dialect", "variant"), PAIRS)
def test_every_dialect_reads_as_what_it_was_written_from(dialect: str, variant: str, tmp_path: Path) -> None:
    c = config(**VARIANTS[variant])
    state = random_state(c)
    readings = read_eagle3(DIALECTS[dialect](tmp_path, c, state), shifting())
    assert readings[0].config == c
    assert all(same(reading.state, state) for reading in readings)
    assert all(reading.name.startswith(dialect) for reading in readings)
    assert len({reading.name for reading in readings}) == len({repr(r.config) for r in readings})
    eagle3_head(readings[0], shifting())


def test_layer_ids_are_inputs_or_outputs_as_their_dialect_has_them_and_then_the_other_way(
    tmp_path: Path,
) -> None:
    c = config()
    state = random_state(c)
    later, ids = tuple(tap + 1 for tap in TAPS), [tap - 1 for tap in TAPS]
    expected = {
        "official": [TAPS, later],
        "speculators": [TAPS, later],
        "SpecForge": [TAPS, tuple(ids)],
        "NVIDIA": [TAPS, tuple(ids)],
    }
    for dialect, taps in expected.items():
        readings = read_eagle3(DIALECTS[dialect](tmp_path / dialect, c, state), shifting())
        assert list(dict.fromkeys(r.config.taps for r in readings)) == taps
    at_the_top = official(tmp_path / "vllm", c, state, **{IDS: list(TAPS)})
    assert read_eagle3(at_the_top, shifting())[0].config.taps == TAPS
    assert read_eagle3(at_the_top, shifting())[0].name.startswith("vLLM")
    last = speculators(tmp_path / "last", config(taps=(1, 2, LAYERS - 1)), state)
    assert {r.config.taps for r in read_eagle3(last, shifting())} == {(1, 2, LAYERS - 1)}


def test_deepspec_s_layers_are_outputs_and_its_embedding_and_lm_head_the_target_s(tmp_path: Path) -> None:
    c = config(draft_vocab=VOCAB, taps=(1, 2, 4, 5, 7), qk_norm=True, shared_head=True)
    state = random_state(c)
    copies = {"embed_tokens.weight": shifting().embedding, "lm_head.weight": shifting().lm_head}
    reading = read_eagle3(deepspec(tmp_path, c, state | copies), shifting())[0]
    assert reading.config == c
    assert same(reading.state, state)
    assert reading.name.startswith("DeepSpec")


def test_a_residual_or_a_feedback_in_doubt_is_read_both_ways(tmp_path: Path) -> None:
    c = config()
    state = random_state(c)

    def variants(folder: str) -> list[tuple[bool, bool]]:
        configs = [r.config for r in read_eagle3(folder, shifting()) if r.config.taps == TAPS]
        return [(one.norm_before_residual, one.post_norm) for one in configs]

    assert variants(official(tmp_path / "a", c, state)) == [(False, False), (True, False)]
    said = {"norm_before_residual": True, "norm_output": True}
    assert variants(speculators(tmp_path / "b", c, state, **said)) == [(True, True), (False, True)]
    both = [(False, True), (False, False), (True, True), (True, False)]
    assert variants(specforge(tmp_path / "c", c, state, norm_output=True)) == both
    nested = {IDS: [1, 3, 4], "use_aux_hidden_state": True, "norm_output": True}
    assert variants(nvidia(tmp_path / "d", c, state, eagle_config=nested)) == both


def test_a_vocabulary_in_any_order_is_put_in_order_with_its_rows(tmp_path: Path) -> None:
    c = config()
    state = random_state(c)
    order_U = torch.randperm(c.draft_vocab, generator=torch.Generator().manual_seed(1))
    mixed = state | {
        "tokens_U": state["tokens_U"][order_U],
        "lm_head.weight": state["lm_head.weight"][order_U],
    }
    for dialect, to in DIALECTS.items():
        assert same(read_eagle3(to(tmp_path / dialect, c, mixed), shifting())[0].state, state)


def test_ids_in_place_of_offsets_are_known_by_t2d(tmp_path: Path) -> None:
    c = config()
    state = random_state(c)
    folder = Path(speculators(tmp_path, c, state))
    tensors = load_file(folder / "model.safetensors")
    tensors["d2t"] = state["tokens_U"].long()
    save_file(tensors, folder / "model.safetensors")
    assert same(read_eagle3(str(folder), shifting())[0].state, state)


def test_what_only_copies_the_target_is_borrowed_and_the_rest_is_the_head_s_own(tmp_path: Path) -> None:
    target, c = shifting(), config(draft_vocab=VOCAB)
    state = random_state(c, torch.float32) | {"lm_head.weight": target.lm_head}
    read = read_eagle3(
        official(tmp_path / "a", c, state | {"embed_tokens.weight": target.embedding}), target
    )[0]
    assert read.config.shared_head
    assert not {"lm_head.weight", "embed_tokens.weight"} & read.state.keys()
    padded = torch.cat([2 * target.embedding, torch.zeros(3, WIDTH)])
    read = read_eagle3(official(tmp_path / "b", c, state | {"embed_tokens.weight": padded}), target)[0]
    assert torch.equal(read.state["embed_tokens.weight"], 2 * target.embedding)
    assert torch.equal(eagle3_head(read, target).embed_tokens.weight, 2 * target.embedding)
    none = {name: t for name, t in state.items() if name != "lm_head.weight"}
    assert read_eagle3(official(tmp_path / "c", c, none), target)[0].config.shared_head


@pytest.mark.parametrize(("rows", "vocab"), [(200, 202), (202, 200)])
def test_an_embedding_padded_otherwise_than_the_target_s_is_cut_or_padded(
    rows: int, vocab: int, tmp_path: Path
) -> None:
    sizes = {"vocab_size": vocab, "num_hidden_layers": LAYERS}
    target, c = as_target(random_model(config=sizes, device="cpu")), config(target_vocab=rows)
    theirs, common = target.embedding, min(rows, vocab)

    def read(name: str, embedding_VD: Tensor, c: Eagle3Config = c) -> dict[str, Tensor]:
        state = random_state(c) | {"embed_tokens.weight": embedding_VD}
        folder = official(tmp_path / name, c, state, target_hidden_size=WIDTH)
        reading = read_eagle3(folder, target)[0]
        assert eagle3_head(reading, target).embed_tokens.num_embeddings == vocab
        return reading.state

    copied = torch.cat([theirs, torch.ones(2, WIDTH)])[:rows]
    assert "embed_tokens.weight" not in read("copied", copied)
    expected = torch.cat([2 * copied[:common], theirs[common:]])
    assert torch.equal(read("own", 2 * copied)["embed_tokens.weight"], expected)
    narrow = torch.ones(rows, 48, dtype=torch.bfloat16)
    padded = read("narrow", narrow, config(target_vocab=rows, width=48, heads=3))["embed_tokens.weight"]
    assert torch.equal(padded, torch.cat([narrow[:common], torch.zeros(vocab - common, 48)]).bfloat16())


def test_a_head_narrower_than_its_target_reads_its_own_embedding(tmp_path: Path) -> None:
    c = config(width=48, heads=3)
    state = random_state(c) | {"embed_tokens.weight": torch.ones(VOCAB, 48, dtype=torch.bfloat16)}
    folder = specforge(tmp_path / "a", c, state, target_hidden_size=WIDTH)
    read = read_eagle3(folder, shifting())[0]
    assert read.config == c
    assert same(read.state, state)
    state.pop("embed_tokens.weight")
    with pytest.raises(ValueError, match=r"is 48 wide, has no embed_tokens"):
        read_eagle3(specforge(tmp_path / "b", c, state, target_hidden_size=WIDTH), shifting())


def test_scaled_positions_keep_their_scaling(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 1024
    said = {"rope_theta": 5e5, "rope_scaling": scaling}
    read = read_eagle3(specforge(tmp_path, config(), random_state(config()), **said), shifting())[0]
    assert read.config.rope_parameters == scaling | {"rope_theta": 5e5}
    eagle3_head(read, shifting())


def test_a_hub_id_is_downloaded_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = specforge(tmp_path / "snapshot", config(), random_state(config()))
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "someone/head":
            raise LocalEntryNotFoundError("no connection\nat all")
        return folder

    monkeypatch.setattr("specdec.checkpoints.files.snapshot_download", download)
    assert read_eagle3("someone/head", shifting())[0].config == config()
    assert asked == [("someone/head", ["config.json", "model.safetensors", "pytorch_model.bin"])]
    with pytest.raises(
        ValueError, match=r"proposer.heads=no/body is no folder, nor a hub id .*\(no connection\);"
    ):
        read_eagle3("no/body", shifting())


def test_a_checkpoint_is_a_folder_or_could_be_a_hub_id(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    file.touch()
    assert is_checkpoint(str(tmp_path))
    assert is_checkpoint("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
    for name in (str(file), "smollm2-135m-hydra", "out/heads.safetensors", "a/b/c", "/nowhere/head"):
        assert not is_checkpoint(name)
