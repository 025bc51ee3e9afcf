"""python -m specdec.train: what it says and writes, on given answers, and in two processes."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from answers import LONGEST, collected, weights
from models import tiny

from specdec import train
from specdec.config import load_config
from specdec.logger import Silent
from specdec.train import asked_for, keep_compiled_products, keep_freed_memory, run
from specdec.training.loop import _Run

COMMAND = ["target=random", "head=eagle3", "prompts.written=0", "prompts.answer_tokens=12", "data=jsonl"]
COMMAND += ["head.vocab=64", "head.epochs=2", "head.rows=32", "prompts.batch=2", "threads=1"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of twelve prompts, two of them the same."""
    file = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    rows = [{"question_id": i, "category": "any", "turns": [chr(65 + max(i, 1)) * 4]} for i in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return f"data.path={file}"


def test_the_command_trains_and_says_what_it_does(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*COMMAND, asked, f"out={tmp_path / 'heads'}"]
    file = run(load_config(words, "train"), overrides=words)
    said = capsys.readouterr().out
    for part in ("1 of them repeated", "target: random-llama", "M parameters", "memory: ", "tokens/s"):
        assert part in said
    assert (
        said.index("memory: ") < said.index("time: ") < said.index("accepted by depth") < said.index("top-1")
    )
    heads = f"proposer=eagle3 proposer.heads={file}"
    assert f"use it: python -m specdec.run target=random {heads}\n" in said
    assert not {"heads.state", "heads.best", "heads.latest"} & {f.name for f in file.parent.iterdir()}
    record = json.loads((file.parent / "train.json").read_text())
    assert record["config"]["head"]["epochs"] == 2
    assert record["environment"]["versions"]["torch"] == version("torch")
    assert "commit" in record["environment"]["git"]
    assert [row["step"] for row in record["curve"] if "loss" in row] == list(
        range(1, len(record["curve"]) - 1)
    )
    assert run(load_config(words, "train")) == file
    assert "is trained already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"head.lr is 0.001 there, 0.5 here: choose another out="):
        run(load_config([*words, "head.lr=0.5"], "train"))


@pytest.mark.parametrize(("where", "name"), [(train, "write_text"), (Silent, "log_training")])
def test_a_training_whose_record_fails_is_not_made_again(
    where: object, name: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, out, logged = [*COMMAND, asked, f"out={tmp_path / 'heads'}"], tmp_path / "heads", []

    def fails(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(where, name, fails)
        with pytest.raises(OSError, match="full"):
            run(load_config(words, "train"))
    head = weights(out / "heads.safetensors")
    monkeypatch.setattr(_Run, "_step", fails)
    monkeypatch.setattr(Silent, "log_training", lambda _, config, curve, folder: logged.append(curve))
    run(load_config(words, "train"))
    assert weights(out / "heads.safetensors") == head
    assert logged == [json.loads((out / "train.json").read_text())["curve"]]
    assert not list(out.glob("*.state"))


def test_two_heads_are_trained_on_the_same_answers(asked: str, tmp_path: Path) -> None:
    run(load_config([*COMMAND, asked, f"out={tmp_path / 'one'}"], "train"))
    again = ["target=random", "head=medusa", "head.vocab=64", "head.epochs=1", f"shards={tmp_path / 'one'}"]
    file = run(load_config([*again, f"out={tmp_path / 'two'}"], "train"))
    assert sorted(f.name for f in file.parent.iterdir()) == ["heads.safetensors", "train.json"]
    with pytest.raises(ValueError, match=r"shards=.*leave one of them out"):
        run(load_config([*again, "data=demo", f"out={tmp_path / 'three'}"], "train"))
    with pytest.raises(ValueError, match=rf"shards={tmp_path} holds no answers-.*out=FOLDER"):
        run(load_config([*again[:-1], f"shards={tmp_path}", f"out={tmp_path / 'three'}"], "train"))


def test_shards_are_not_taken_for_what_other_settings_would_give(tmp_path: Path) -> None:
    files = collected(tiny(), tmp_path)

    def asked(*given: str) -> tuple[list[Path], list]:
        words = [f"shards={tmp_path}", *given]
        return asked_for(load_config(words, "train"), words)

    true = f"prompts.answer_tokens={LONGEST}", "prompts.temperature=0", "prompts.store_features=false"
    assert asked(*true) == asked() == (files, [])
    for given, said in {
        "prompts.temperature=0.7": r".*-00000.* was made with prompts.temperature=0.0: leave it out",
        "prompts.seed=3": r".* was made with prompts.seed=0",
        "prompts.written=9": r".* does not say its prompts.written: leave it out, or leave shards= out",
    }.items():
        with pytest.raises(ValueError, match=f"^{given}{said}"):
            asked(*true, given)


def test_what_is_wrong_is_said_before_anything_is_answered(asked: str, tmp_path: Path) -> None:
    wrong = {
        "threads=0": r"threads is 0, expected 1 or more, or null .*: threads=2",
        "threads=-1": r"threads is -1, expected 1 or more",
        "threads=two": r"threads is 'two', expected 1 or more",
        "head.unroll=0": r"head.unroll is 0, expected 1 or more: head.unroll=4",
        "head.layers=[0,2]": r"head.layers is \[0, 2\], expected .* 0 to 1: head.layers=\[0,1\]",
        "prompts.temperature=-1": r"prompts.temperature is -1, expected 0",
        "data.chat=true": r"data.chat=true needs a tokenizer with a chat template",
    }
    for word, said in wrong.items():
        with pytest.raises(ValueError, match=said):
            run(load_config([*COMMAND, asked, word, f"out={tmp_path / 'heads'}"], "train"))
    assert not list(tmp_path.glob("heads/*"))


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_two_batches_a_step(asked: str, tmp_path: Path) -> None:
    """The gradients of two ranks are summed as those of two batches are: the same curve, bit for bit."""
    words = [*COMMAND, asked]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "specdec.train"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, *words, f"out={tmp_path / 'two'}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("memory: ") == 1, "the others are silent"
    run(load_config([*words, "head.accumulate=2", f"out={tmp_path / 'one'}"], "train"))
    one, two = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    assert two["curve"] == one["curve"]
    assert len(one["curve"]) > 4
    assert weights(tmp_path / "one" / "heads.safetensors") == weights(tmp_path / "two" / "heads.safetensors")


@pytest.mark.parametrize("said", [None, "12"])
def test_onednn_keeps_more_unless_told_how_much(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, said or "")
    if said is None:
        monkeypatch.delenv(name)
    keep_compiled_products()
    assert os.environ[name] == (said or "8192")


def test_only_glibc_is_asked_to_keep_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_freed_memory()
    asked, glibc = [], type("Glibc", (), {"mallopt": lambda self, *option: asked.append(option)})
    monkeypatch.setattr(train.sys, "platform", "linux")
    for library, options in ((glibc, [(-3, 2**30), (-1, 2**30)]), (object, [])):
        monkeypatch.setattr(train.ctypes, "CDLL", lambda _, library=library: library())
        keep_freed_memory()
        assert asked == options
        asked.clear()
    monkeypatch.setattr(train.ctypes, "CDLL", None)
    monkeypatch.setattr(train.sys, "platform", "darwin")
    keep_freed_memory()
