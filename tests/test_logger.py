"""Tracking in wandb, read back from the files that an offline run leaves; nothing here reaches a network."""

import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import wandb
from wandb.errors.term import can_use_terminput

from specdec.config import load_config, make
from specdec.logger import Silent, Wandb, scalars
from specdec.metrics import summarise
from specdec.records import RequestRecord, StepRecord

HEADER = {
    "target": "random",
    "fingerprint": "random-0123",
    "dtype": "float32",
    "device": "cpu",
    "proposer": "NGram",
    "tree": "Chain",
    "accept": "Match",
    "data": "demo",
    "batch_size": 1,
    "temperature": 0.0,
    "reading": None,
    "hardware": "local",
    "price_per_hour": None,
}
CONFIG = {
    "proposer": {"_target_": "specdec.proposers.ngram.NGram", "max_n": 3},
    "top_p": 1.0,
    "baseline": ["none"],
}


def record(request: str, arm: str, repeat: int, accepted: list[int]) -> RequestRecord:
    method = arm == "method"
    steps = [StepRecord(i, 4, min(a + 1, 3), a, a + 1, a + 1, 0.002) for i, a in enumerate(accepted)]
    sizes = [1, *(s.emitted for s in steps)] if method else [1] * 5
    return RequestRecord(
        request=request,
        conversation=request,
        turn=0,
        category="coding",
        arm=arm,
        repeat=repeat,
        group=int(request),
        prompt_tokens=7,
        prompt_hash="ab12",
        tokens=list(range(sum(sizes))),
        finish="length",
        prefill_end=0.01,
        burst_times=[0.01 + (0.002 if method else 0.004) * i for i in range(len(sizes))],
        burst_sizes=sizes,
        steps=steps if method else [],
    )


METHOD = [record(request, "method", repeat, [0, 1, 3]) for repeat in (0, 1) for request in "01"]
PLAIN = [record(request, "none", repeat, []) for repeat in (0, 1) for request in "01"]
EXTRA = {"split": {"score": 1.5, "host": 0.5}}
SUMMARY = summarise(
    METHOD,
    {"none": PLAIN},
    header=HEADER,
    lossless={"rule": True, "identical": 1, "divergences": [{"request": "1", "index": 3, "top2_gap": 0.1}]},
    **EXTRA,
)


def offline(folder: Path, summary: dict, records: list[RequestRecord], **options: object) -> dict:
    """What `wandb leet` finds in the only run below the folder."""
    Wandb(mode="offline", **options).log(CONFIG, summary, lambda: records, str(folder))
    return json.loads(inspected(folder, "--summary"))


def inspected(folder: Path, *options: str) -> str:
    [log] = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(log)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def media(folder: Path, name: str) -> dict:
    [path] = folder.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json")
    return json.loads(path.read_text())


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine on which nobody has logged in, before wandb's first call."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal in which wandb could ask, whose user answers nothing but end-of-file."""
    ours, theirs = pty.openpty()
    os.write(ours, b"\x04\x04\x04")
    with monkeypatch.context() as patch, open(theirs) as stdin, open(os.dup(theirs), "w") as stderr:
        patch.setattr("sys.stdin", stdin)
        patch.setattr("sys.stderr", stderr)
        patch.setenv("TERM", "xterm")
        assert can_use_terminput()
        yield
    os.close(ours)


@pytest.mark.usefixtures("env")
def test_an_offline_run_reads_back(tmp_path: Path) -> None:
    found = offline(tmp_path, SUMMARY, METHOD + PLAIN, project="mine", name="n", tags=["a"])
    told = {"state": "finished", "project": "mine", "name": "n", "tags": ["a"]}
    assert {key: found[key] for key in told} == told
    assert found["config"]["proposer._target_"] == CONFIG["proposer"]["_target_"]
    assert found["config"]["baseline"] == ["none"]
    logged = found["summary"]
    for key, value in scalars(SUMMARY).items():
        assert logged[key] == pytest.approx(value), key
    assert logged["accepted_tokens"]["bins"] == [0, 1, 2, 3, 4]
    assert logged["accepted_tokens"]["values"] == [2, 2, 0, 2]
    assert logged["nodes"]["values"] == [0, 0, 0, 0, 6]
    assert sum(logged["step_ms"]["values"]) == 12

    table = media(tmp_path, "per_request")
    assert len(table["data"]) == 8
    ours, theirs = (dict(zip(table["columns"], table["data"][i], strict=True)) for i in (0, 4))
    assert ours == {
        "request": "0",
        "category": "coding",
        "arm": "method",
        "repeat": 0,
        "prompt_tokens": 7,
        "tokens": 8,
        "ttft_ms": 10.0,
        "decode_ms_per_token": pytest.approx(6 / 7),
        "tokens_per_step": pytest.approx(7 / 3),
    }
    assert (theirs["arm"], theirs["decode_ms_per_token"], theirs["tokens_per_step"]) == (
        "none",
        pytest.approx(4),
        None,
    )
    depths = media(tmp_path, "acceptance_by_depth")
    assert [row[:2] for row in depths["data"]] == [
        [d["depth"], d["rate"]] for d in SUMMARY["acceptance_by_depth"]
    ]


@pytest.mark.usefixtures("env")
def test_a_training_reads_back_step_by_step(tmp_path: Path) -> None:
    measured = {"step": 2, "tokens_per_step": 1.5, "acceptance_by_depth": [0.5, 0.25]}
    curve = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, measured, {"step": 3, "loss": 2.0}]
    Wandb(mode="offline").log_training(CONFIG, curve, str(tmp_path))
    found = [json.loads(line) for line in inspected(tmp_path).splitlines()]
    history = [each["history"]["item"] for each in found if each["type"] == "history"]
    assert [{key: value for key, value in row.items() if key[0] != "_"} for row in history] == [
        {"loss": 3.0},
        {"loss": 2.5, "tokens_per_step": 1.5, "acceptance_by_depth.1": 0.5, "acceptance_by_depth.2": 0.25},
        {"loss": 2.0},
    ]
    assert [row["_step"] for row in history] == [1, 2, 3]


@pytest.mark.usefixtures("env")
def test_a_sweep_keeps_its_parameters_and_the_whole_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tmp_path / "chosen.yaml"
    chosen.write_text("wandb_version: 1\nproposer: {value: ngram}\ntop_p: {value: 1.0}\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(chosen))
    silent = [record("0", "method", 0, [])]
    empty = summarise(silent, {}, header=HEADER, lossless=None, **EXTRA)
    found = offline(tmp_path, empty, silent)
    assert found["config"] == {
        "proposer": "ngram",
        "proposer._target_": CONFIG["proposer"]["_target_"],
        "proposer.max_n": 3,
        "top_p": 1,
        "baseline": ["none"],
    }
    assert "speedup" not in found["summary"]
    assert found["state"] == "finished"


def test_numbers_that_are_not_known_are_absent() -> None:
    found = scalars(SUMMARY)
    assert found["speedup"] == SUMMARY["speedup"]["none"]["decode"]["mean"]
    assert found["divergences"] == 1
    assert "usd_per_million_tokens" not in found
    assert not any(isinstance(value, list | dict) or value is None for value in found.values())
    assert all(math.isfinite(value) for value in found.values() if not isinstance(value, str))
    assert "speedup" not in scalars(SUMMARY | {"speedup": {"hf": SUMMARY["speedup"]["none"]}})


@pytest.mark.usefixtures("env")
def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    Wandb(mode="disabled").log(CONFIG, SUMMARY, list, str(tmp_path))
    Wandb(mode="disabled").log_training(CONFIG, [{"step": 1, "loss": 3.0}], str(tmp_path))
    Silent().log(CONFIG, SUMMARY, list, str(tmp_path))
    Silent().log_training(CONFIG, [{"step": 1, "loss": 3.0}], str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("env")
def test_a_run_is_written_once_to_each_place_and_again_where_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(**options: str) -> int:
        Wandb(**options).log(CONFIG, SUMMARY, lambda: METHOD, str(tmp_path))
        return len(list(tmp_path.glob("wandb/offline-run-*/*.wandb")))

    def offends(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("no\nanswer")

    with monkeypatch.context() as patched:
        patched.setattr(wandb, "init", offends)
        with pytest.raises(OSError, match=r"^logger=wandb: not logged: no answer: .*same command.*offline$"):
            log()
    assert [log(), log(), log(project="another"), log()] == [1, 1, 2, 2]


@pytest.mark.parametrize(("mode", "nearest"), [("of", "offline"), ("ONLINE", "online"), (None, "online")])
def test_an_unknown_mode_names_the_nearest(mode: str | None, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"expected one of offline, online, disabled.*logger.mode={nearest}"):
        Wandb(mode=mode)


@pytest.mark.parametrize(
    ("key", "said"), [("", "none is configured: set WANDB_API_KEY"), ("short", "WANDB_API_KEY invalid")]
)
@pytest.mark.usefixtures("env")
def test_online_without_a_key_is_an_error_and_no_prompt(
    key: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    problem = f"logger.mode=online.*{said}.*logger.mode=offline"
    with terminal(monkeypatch), pytest.raises(ValueError, match=problem):
        Wandb(mode="online")


def test_the_configs_make_their_loggers() -> None:
    assert isinstance(make(load_config(["logger=none"]).logger), Silent)
    made = make(load_config(["logger=wandb", "logger.tags=[a,b]", "logger.group=g"]).logger)
    assert isinstance(made, Wandb)
    assert (made.mode, made.where["project"], made.where["tags"]) == ("offline", "specdec", ["a", "b"])
