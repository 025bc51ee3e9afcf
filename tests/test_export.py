"""Exported heads: read back bit for bit, and run as the projects they are for would run them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import EXPORTED, IDS, TAPS, VOCAB, WIDTH, config, exported, native, random_state, shifting
from models import save_eagle, tiny, untrained_heads
from safetensors.torch import load_file, save_file

from specdec import export as entry
from specdec.checkpoints import export as exporting
from specdec.checkpoints.eagle3 import read_eagle3
from specdec.checkpoints.export import FORMATS, export
from specdec.checkpoints.medusa import read_medusa
from specdec.config import as_target, load_config
from specdec.loading import Loaded, random_model
from specdec.proposers.medusa_heads import MedusaHeads, MedusaInfo
from specdec.training.eagle3 import Eagle3Recipe


def longrope(part: float) -> dict[str, Any]:
    """Phi's positions for texts longer than it was first trained on; they turn a part of each head."""
    factors = int(WIDTH // 4 * part) // 2
    scaling = {"type": "longrope", "rope_type": "longrope", "original_max_position_embeddings": 1024}
    scaling |= {"short_factor": [1.0] * factors, "long_factor": [2.0] * factors}
    return {"rope_parameters": scaling | {"rope_theta": 1e4, "partial_rotary_factor": part}}


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("variant", EXPORTED)
@pytest.mark.parametrize("to", ["speculators", "sglang"])
def test_what_is_exported_reads_back_as_it_was(to: str, variant: str, tmp_path: Path) -> None:
    c = config(**EXPORTED[variant])
    if to == "sglang" and variant in ("normed residual", "five layers", "joint norm", "Qwen3's layer"):
        with pytest.raises(ValueError, match=r"to=sglang: .*expected 3 and false, .*: to=speculators"):
            exported(c, to, tmp_path)
        return
    reading = read_eagle3(str(exported(c, to, tmp_path)), shifting())[0]
    state = random_state(c)
    assert reading.config == c
    assert reading.state.keys() == state.keys()
    assert all(torch.equal(reading.state[name], t) for name, t in state.items())


ROTARY: dict[str, tuple[str, dict[str, Any], str]] = {
    "whole": ("phi3", {}, "default"),
    "whole, scaled": ("phi3", longrope(1.0), "longrope"),
    "half": ("glm", {"head_dim": WIDTH // 4}, "default"),
    "half, scaled": ("phi3", longrope(0.5), "default"),
}


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("to", ["speculators", "sglang"])
def test_a_head_trained_for_a_target_with_any_rotary_positions_is_exported(
    to: str, rotary: str, tmp_path: Path
) -> None:
    architecture, settings, rope_type = ROTARY[rotary]
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 4}
    target = as_target(random_model(architecture, sizes | settings, device="cpu"))
    head = Eagle3Recipe(layers=(1, 2, 3)).new(target, torch.arange(VOCAB))
    assert (head.rotary.rope_type, head.config.rope_parameters["rope_theta"]) == (rope_type, 1e4)
    head.project(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, WIDTH), torch.arange(2)[None])
    save_eagle(head, target, tmp_path / "head.safetensors")
    export(tmp_path / "head.safetensors", to, target, tmp_path / "out", "someone/target")


def test_sglang_gets_the_names_ids_and_offsets_that_it_reads(tmp_path: Path) -> None:
    """Its loader takes `midlayer`, adds one to each layer id, and the row to each d2t."""
    folder, state = exported(config(), "sglang", tmp_path), random_state(config())
    tensors, plain = load_file(folder / "model.safetensors"), said(folder)
    assert plain["architectures"] == ["LlamaForCausalLMEagle3"]
    assert tuple(i + 1 for i in plain["eagle_config"][IDS]) == TAPS
    assert (plain["draft_vocab_size"], plain["vocab_size"], plain["tie_word_embeddings"]) == (
        28,
        VOCAB,
        False,
    )
    assert torch.equal(tensors["d2t"] + torch.arange(28), state["tokens_U"].long())
    assert tensors["t2d"].nonzero().flatten().tolist() == state["tokens_U"].tolist()
    top = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert all(name.startswith("midlayer.") for name in tensors.keys() - top)
    for name in state.keys() - {"tokens_U"}:
        assert torch.equal(tensors[name if name in top else f"midlayer.{name}"], state[name])


def test_a_borrowed_lm_head_is_written_out(tmp_path: Path) -> None:
    c = config(shared_head=True)
    folder, rows_UD = exported(c, "sglang", tmp_path), shifting().lm_head[random_state(c)["tokens_U"].long()]
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], rows_UD)


def medusa_file(path: Path, tokens: list[int], root: bool = False, hydra: bool = False) -> Path:
    heads = untrained_heads(tiny(), tokens, hydra)
    info = MedusaInfo(len(heads.bias_KD), WIDTH, tiny().name, tiny().fingerprint, [[0.5]] * 5)
    heads.save(path, info)
    if not root:
        tensors = {name: t for name, t in load_file(path).items() if name != "root_KDD"}
        save_file(tensors, path, metadata={"medusa": json.dumps(vars(info))})
    return path


@pytest.mark.parametrize("tokens", [[3, 30, 11, 4], list(range(VOCAB))])
def test_vllm_s_medusa_runs_as_our_heads_do(tokens: list[int], tmp_path: Path) -> None:
    """As its model does it: a block with a residual, one LM head for all, its rows put where the map says."""
    file = medusa_file(tmp_path / "heads.safetensors", sorted(tokens))
    export(file, "vllm-medusa", tiny(), tmp_path / "out", "someone/target")
    w, plain = load_file(tmp_path / "out" / "model.safetensors"), said(tmp_path / "out")
    assert plain["original_lm_head"]
    assert plain["medusa_fc_bias"]
    assert (
        ("token_map" in w) == (plain["truncated_vocab_size"] < plain["vocab_size"]) == (len(tokens) < VOCAB)
    )
    heads, _ = MedusaHeads.load(file, tiny())
    hidden_XD = torch.randn(5, WIDTH)
    for k, ours_XU in enumerate(heads(hidden_XD, hidden_XD)):
        block, bias = (w[f"blocks.{k}.layers.0.{part}"].float() for part in ("weight", "bias"))
        turned_XD = torch.nn.functional.linear(hidden_XD, block, bias)
        logits_XU = (hidden_XD + torch.nn.functional.silu(turned_XD)) @ w["lm_heads.0.weight"].T
        logits_XV = torch.full((5, VOCAB), -torch.inf)
        logits_XV[:, w.get("token_map", torch.arange(VOCAB))] = logits_XU
        torch.testing.assert_close(logits_XV[:, heads.tokens_U], ours_XU, atol=1e-4, rtol=1e-4)
        assert logits_XV.isfinite().sum() == 5 * len(tokens)
    assert plain["num_heads"] == len(heads.bias_KD) == k + 1


def test_unsorted_medusa_heads_are_written_with_their_own_order(tmp_path: Path) -> None:
    file = medusa_file(tmp_path / "heads.safetensors", [3, 30, 11, 4])
    export(file, "vllm-medusa", tiny(), tmp_path / "out", "someone/target")
    assert read_medusa(str(tmp_path / "out"), tiny()).state["tokens_U"].tolist() == [3, 4, 11, 30]


@pytest.mark.parametrize("hydra", [False, True])
def test_heads_that_read_tokens_have_no_place_in_vllm(hydra: bool, tmp_path: Path) -> None:
    file = medusa_file(tmp_path / "heads.safetensors", [3, 4], root=True, hydra=hydra)
    reads = r"the root's embedding " + (r"and those of .*path_PDD" if hydra else r"\(root_KDD")
    again = r"heads=FILE, or train some: .* head.hydra=false head.root=false$"
    with pytest.raises(ValueError, match=f"^to=vllm-medusa: the heads read {reads}.*{again}"):
        export(file, "vllm-medusa", tiny(), tmp_path / "out", "someone/target")
    assert not (tmp_path / "out").exists()


def test_an_export_that_reads_back_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded bugs: layers one off, and offsets that are ids."""
    kind, write, read = FORMATS["speculators"]

    def one_off(*args: Any) -> exporting.Written:
        plain, tensors = write(*args)
        return plain | {IDS: [i - 1 for i in plain[IDS]]}, tensors

    def another_row(*args: Any) -> exporting.Written:
        plain, tensors = write(*args)
        return plain, tensors | {"lm_head.weight": tensors["lm_head.weight"].roll(1, 0)}

    for i, bug in enumerate((one_off, another_row)):
        monkeypatch.setitem(FORMATS, "speculators", (kind, bug, read))
        with pytest.raises(RuntimeError, match="reads as speculators"):
            exported(config(), "speculators", tmp_path / str(i))


def test_a_folder_in_use_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = exported(config(), "sglang", tmp_path)
    with pytest.raises(
        ValueError, match=r"out=.*out is not empty, expected a new folder: .* another out=DIR"
    ):
        export(tmp_path / "head.safetensors", "speculators", shifting(), folder, "")
    with pytest.raises(ValueError, match="is no file of medusa heads"):
        export(tmp_path / "head.safetensors", "vllm-medusa", shifting(), tmp_path / "new", "")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Exports a head for a target that was loaded from `source`, and returns the folder."""
    native(tmp_path / "head.safetensors", config())
    monkeypatch.setattr(entry, "as_target", lambda loaded: shifting())

    def run(source: str | None, *words: str) -> Path:
        loaded = Loaded(shifting().model, None, "shifting", "", (), source)
        monkeypatch.setattr(entry, "load_target", lambda cfg: loaded)
        known = [f"heads={tmp_path / 'head.safetensors'}", f"out={tmp_path / 'out'}", "target=random"]
        return entry.run(load_config([*known, *words], "export"))

    return run


def named(folder: Path) -> str:
    return said(folder)["speculators_config"]["verifier"]["name_or_path"]


def test_the_command_writes_a_folder_that_names_its_target(
    command: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    assert named(command("someone/target")) == "someone/target"
    assert "the same, bit for bit" in capsys.readouterr().out


def test_a_verifier_that_is_named_is_found_from_anywhere(
    command: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    assert named(command("a/b", "verifier=target", "out=folder")) == str(tmp_path / "target")
    assert named(command("a/b", "verifier=c/d", "out=id")) == "c/d"


def test_a_target_that_nobody_could_load_must_be_named_where_the_format_names_it(
    command: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^to=speculators .*random-llama is no hub id .*: verifier="):
        command(None)
    assert not (tmp_path / "out").exists()
    assert said(command(None, "to=sglang"))["architectures"] == ["LlamaForCausalLMEagle3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("out=new", "heads is null, expected a file, or the name of one in the zoo: heads=FILE"),
        ("heads=nobody", "^specdec: heads=nobody: no such file, nor one of the zoo's"),
        ("heads=nobody to=vllm", "to=vllm is unknown; the nearest is 'vllm-medusa'"),
        ("heads=nobody --config-dir .", "^specdec: heads=nobody: no such file, nor one of the zoo's"),
        ("verifiers=nobody", "override verifiers is unknown; the nearest is 'verifier'"),
    ],
)
def test_the_command_answers_in_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", "target=random", *words.split()])
    with pytest.raises(SystemExit, match=message):
        entry.main()
