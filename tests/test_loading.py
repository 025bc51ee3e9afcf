"""Targets load as asked, or name the override that helps."""

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import same_weights, word_tokenizer
from transformers import AutoConfig

from specdec import loading
from specdec.loading import Loaded, fingerprint, pretrained, random_model, smollm2


def tiny(**settings: Any) -> Loaded:
    return random_model(config={"vocab_size": 48, "hidden_size": 16, **settings}, device="cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model whose values are exact in bfloat16, with a tokenizer, and three sources of stop ids."""
    folder = tmp_path / "tiny-llama"
    model = tiny(eos_token_id=1).model.to(torch.bfloat16)
    model.generation_config.eos_token_id = [2, 1]
    model.save_pretrained(folder)
    word_tokenizer("<c>").save_pretrained(folder)
    return folder


def test_pretrained_loads_model_tokenizer_and_every_stop_id(checkpoint: Path) -> None:
    loaded = pretrained(str(checkpoint), dtype="float32", device="cpu")
    assert (loaded.name, loaded.source) == ("tiny-llama", str(checkpoint))
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("hello") == [4]
    assert loaded.stop_ids == (1, 2, 3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_checkpoint_without_tokenizer_has_none(architecture: str, tmp_path: Path) -> None:
    random_model(architecture, {"vocab_size": 48}).model.save_pretrained(tmp_path)
    loaded = pretrained(str(tmp_path), device="cpu")
    assert loaded.tokenizer is None
    assert loaded.stop_ids == ()


def test_pretrained_reads_pytorch_files_only_as_weights(checkpoint: Path) -> None:
    before = pretrained(str(checkpoint), device="cpu")
    (checkpoint / "model.safetensors").unlink()
    torch.save(before.model.state_dict(), checkpoint / "pytorch_model.bin")
    assert same_weights(pretrained(str(checkpoint), device="cpu"), before)
    torch.save({"lm_head.weight": Path("any other object")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        pretrained(str(checkpoint), device="cpu")


def test_pretrained_without_path() -> None:
    with pytest.raises(ValueError, match=r"^target=hf needs target\.path=ID_OR_FOLDER$"):
        pretrained(None)


def test_a_relative_folder_is_found_from_anywhere(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    loaded = pretrained(".", device="cpu")
    assert (loaded.name, loaded.source) == ("tiny-llama", str(checkpoint))


def test_pretrained_of_nothing_names_the_override(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=rf"target\.path={path}: (?s:.*)target\.path=ID_OR_FOLDER"):
            pretrained(str(path))


def test_pretrained_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no connection\nand a long story")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"some/model: expected .* set target\.path=.*\(no connection\)$"):
        pretrained("some/model")


def test_pretrained_refuses_other_kinds_of_models(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"t5 is no causal LM; set target\.path"):
        pretrained(str(tmp_path))


def test_pretrained_refuses_missing_and_damaged_weights(checkpoint: Path) -> None:
    deeper = json.loads((checkpoint / "config.json").read_text()) | {"num_hidden_layers": 3}
    (checkpoint / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(ValueError, match=r"layers\.2\..*target\.path"):
        pretrained(str(checkpoint))
    (checkpoint / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"target\.path=.*expected a causal LM"):
        pretrained(str(checkpoint))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, r"target\.dtype=int8: expected auto, float32, bfloat16, float16"),
        ({"device": "tpu"}, r"target\.device=tpu: expected cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, r"target\.device=cuda:: expected cpu"),
        ({"device": "cuda:99"}, r"target\.device=cuda:99: .*set target\.device=cpu"),
    ],
)
def test_wrong_dtype_and_device(wrong: dict[str, str], message: str) -> None:
    # The path does not exist: these errors come before anything is loaded.
    for make in (random_model, smollm2, lambda **settings: pretrained("/nowhere", **settings)):
        with pytest.raises(ValueError, match=message):
            make(**wrong)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_follows_the_cpu(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "native_bf16", lambda: native)
    assert random_model(dtype="auto", device="cpu").model.dtype == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_auto_dtype_follows_the_gpu(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = {torch.device("cuda:1"): capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", of.__getitem__)
    assert loading.choose_dtype("auto", torch.device("cuda:1")) == expected


def test_one_gpu_of_several_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert loading.choose_device(name) == torch.device(name)
    assert current == [torch.device("cuda:1")]


def test_random_model_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_model(device="cpu", seed=3)
    torch.manual_seed(2)
    assert same_weights(first, random_model(device="cpu", seed=3))
    assert not same_weights(first, random_model(device="cpu", seed=4))


def test_random_model_leaves_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    random_model(device="cpu", seed=3)
    assert torch.equal(torch.rand(4), expected)


def test_random_model_is_labelled_and_has_no_stop() -> None:
    loaded = random_model("qwen3", device="cpu")
    assert (loaded.name, loaded.source) == ("random-qwen3", None)
    assert loaded.fingerprint == f"random-{fingerprint(loaded.model)}"
    assert loaded.tokenizer is None
    assert loaded.stop_ids == ()


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt2", "gpt_neox"]
)
def test_random_laws_are_not_uniform(architecture: str) -> None:
    model = random_model(architecture, device="cpu").model
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, 256)
    assert 0.5 < logits.std() < 5


def test_random_config_overrides_key_by_key() -> None:
    config = tiny(eos_token_id=[5, 4]).model.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (48, 16, 2)
    assert tiny(eos_token_id=[5, 4]).stop_ids == (4, 5)


def test_random_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'lama'.*target\.architecture=llama"):
        random_model("lama")
    with pytest.raises(ValueError, match=r"'hiden_size'.*target\.config=\{hidden_size: "):
        random_model(config={"hiden_size": 8})


def test_fingerprint_does_not_depend_on_dtype(checkpoint: Path) -> None:
    dtypes = ("float32", "bfloat16", "float16")
    found = {pretrained(str(checkpoint), dtype=dtype, device="cpu").fingerprint for dtype in dtypes}
    assert len(found) == 1
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in found)


def test_fingerprint_ignores_what_float16_rounds() -> None:
    model = tiny().model.to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.mul_(2.0**-20)
    assert fingerprint(model) == fingerprint(model.to(torch.float16))


def test_fingerprint_sees_a_change_in_any_parameter() -> None:
    model = tiny().model
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        parameter.mul_(1.05)
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


@pytest.mark.parametrize("name", ["smollm2", "hf", "random"])
def test_yaml_names_exactly_the_arguments(name: str) -> None:
    path = Path(__file__).parents[1] / "conf" / "target" / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text())
    settings.pop("_convert_", None)
    module, function = settings.pop("_target_").rsplit(".", 1)
    assert module == "specdec.loading"
    parameters = inspect.signature(getattr(loading, function)).parameters
    assert settings.keys() == parameters.keys()
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    assert {key: settings[key] for key in defaults} == defaults
    assert path.read_text().startswith("# python -m specdec.run target=")
