"""The main job end to end: what it prints, what it writes, what it keeps when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdec import config
from specdec.config import load_config, load_target
from specdec.data import digest
from specdec.logger import Silent
from specdec.run import live, main, run, target_line
from specdec.store import RunFolder

BASE = ["target=random", "proposer=ngram", "tree=chain", "data.limit=2", "max_new_tokens=8"]
KEYS = """schema_version target fingerprint dtype device proposer tree accept data batch_size temperature
reading hardware price_per_hour requests tokens
tokens_per_step nodes_per_step break_even acceptance_by_depth acceptance_histogram tokens_per_second speedup
ttft_ms tpot_ms latency_ms itl_ms time_split_ms_per_step usd_per_million_tokens joules_per_token
peak_memory_mb lossless by_category"""
FILES = {"summary.json", "requests.parquet", "steps.parquet", "config.yaml", "env.json"}
QUIET = {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "WANDB_SILENT": "true"}


def here(folder: Path, *overrides: str) -> dict:
    """A run in this process."""
    asked = [*BASE, "ui=none", *overrides]
    return run(load_config(asked), str(folder), asked)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "specdec.run", *words]


def there(cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """A run in a process of its own."""
    return subprocess.run(command(*words), cwd=cwd, env=os.environ | QUIET, capture_output=True, text=True)


def test_the_command_line(tmp_path: Path) -> None:
    done = there(tmp_path, *BASE, "baseline=[none,hf]", "ui=json", "out=out")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    summary = json.loads(line)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary) == KEYS.split()
    assert [summary[key] for key in ("target", "proposer", "tree", "accept", "data")] == [
        "random-llama",
        "ngram",
        "chain",
        "match",
        "demo",
    ]
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert list(summary["speedup"]) == ["none", "hf"]
    for kinds in summary["speedup"].values():
        assert list(kinds) == ["decode", "end_to_end"]
        assert all(set(numbers) == {"mean", "low", "high", "ratio_of_totals"} for numbers in kinds.values())
    assert set(summary["itl_ms"]) == {"event", "smoothed"}
    assert set(summary["itl_ms"]["event"]) == {"p50", "p90", "p99"}
    assert set(summary["time_split_ms_per_step"]) == {"propose", "score", "accept", "commit", "host"}
    assert summary["lossless"] == {"rule": True, "identical": 4, "divergences": [], "audit": None}
    assert (summary["requests"], summary["tokens"]) == (4, 32)
    environment = json.loads((tmp_path / "out" / "env.json").read_text())
    assert "proposer=ngram" in environment["overrides"]


def test_a_sweep_loads_its_target_once_and_combines_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config._load_once.cache_clear()
    words = ["run", "-m", *BASE, "tree.depth=1,2", "accept=match,greedy", "ui=plain", f"out={tmp_path}"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setenv("COLUMNS", "160")
    main()
    assert config._load_once.cache_info().misses == 1
    assert config._load_once.cache_info().hits == 3
    shown = capsys.readouterr().out
    jobs = [f"tree.depth={depth} accept={rule}" for depth in (1, 2) for rule in ("match", "greedy")]
    assert all(job in shown for job in jobs)
    assert len((tmp_path / "combined.csv").read_text().splitlines()) == 5
    assert shown.splitlines()[-1] == str(tmp_path / "combined.csv")


def test_the_first_lines_say_what_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here(tmp_path, "ui=plain", "target.dtype=auto", "target.device=cpu", "baseline=[]")
    method, prompts, baselines, out, target = capsys.readouterr().out.splitlines()[:5]
    assert method == "method: proposer=ngram tree=chain accept=match temperature=0 batch_size=1"
    assert prompts == "prompts: data=demo, 2 conversations, 4 requests, up to 8 tokens each"
    assert baselines.startswith("baselines: no; plain decoding runs too")
    assert out == f"out: {tmp_path}"
    assert target.startswith("target: random-llama, ")
    assert "(target.dtype=auto: " in target


def test_a_gpu_without_bfloat16_says_why_its_target_has_float16() -> None:
    target = SimpleNamespace(name="t", dtype_name="float16", device=torch.device("cuda"))
    line = target_line(target, load_config(["target.dtype=auto", "target.device=cuda"]))
    assert line == "t, float16 (target.dtype=auto: bfloat16 is not multiplied natively here), cuda"


@pytest.mark.parametrize(
    "overrides",
    [
        ["proposer=none"],
        ["baseline=[]"],
        ["baseline=[none,hf,hf_lookup_10]", "repeats=2"],
        ["batch_size=4", "data.limit=6", "data.categories=[coding,writing]", "baseline=[none,hf]"],
        ["proposer=draft_lm", "proposer.layers=1", "tree=sampled", "accept=recursive", "temperature=1"],
        ["data.chat=false", "target.dtype=auto", "target.device=cpu", "hardware=cpu"],
    ],
    ids=" ".join,
)
def test_ways_to_run(overrides: list[str], tmp_path: Path) -> None:
    summary = here(tmp_path, *overrides)
    asked = load_config([*BASE, *overrides])
    assert list(summary["speedup"]) == list(asked.baseline)
    assert list(summary) == KEYS.split()
    records = RunFolder(tmp_path).load()
    assert {r.arm for r in records} == {"method", "none", *asked.baseline}
    assert {r.repeat for r in records} == set(range(asked.repeats))
    hashes = {(r.request, r.prompt_hash) for r in records}
    assert len(hashes) == len({r.request for r in records}) == summary["requests"]
    assert summary["lossless"]["identical"] == (None if asked.temperature else summary["requests"])
    if asked.proposer._target_.endswith("NoDraft"):
        assert summary["tokens_per_step"] == summary["nodes_per_step"] == 1
    assert (summary["usd_per_million_tokens"] is None) == (asked.hardware.price_per_hour is None)
    assert [summary[key] for key in ("hardware", "price_per_hour")] == [
        asked.hardware.name,
        asked.hardware.price_per_hour,
    ]
    assert summary["dtype"] in ("float32", "bfloat16")
    assert summary["device"] in ("cpu", "cuda")
    assert summary["fingerprint"] == load_target(asked).fingerprint


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    here(tmp_path, "logger=wandb", "logger.mode=offline", "data.limit=1")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_finished_run_is_still_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []

    def log(_: Silent, config: dict, summary: dict, read: Callable, folder: str) -> None:
        logged.append((summary, read()))
        if len(logged) == 1:
            raise OSError("nobody answers")

    monkeypatch.setattr(Silent, "log", log)
    with pytest.raises(OSError, match="nobody"):
        here(tmp_path, "data.limit=1")
    here(tmp_path, "data.limit=1")
    assert logged == [(RunFolder(tmp_path).summary(), RunFolder(tmp_path).load())] * 2


def test_a_file_of_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "questions.jsonl"
    prompts.write_text('{"question_id": "a/b", "category": "x", "turns": ["one", "two", "three"]}\n')
    summary = here(tmp_path / "out", "data=jsonl", f"data.path={prompts}")
    assert (summary["data"], summary["requests"], list(summary["by_category"])) == ("jsonl", 3, ["x"])
    records = {(r.request, r.arm): r for r in RunFolder(tmp_path / "out").load()}
    said = [bytes(records[f"a/b/{turn}", "none"].tokens) for turn in (0, 1)]
    text = b"one\n\n%b\n\ntwo\n\n%b\n\nthree" % tuple(said)
    assert records["a/b/2", "method"].prompt_hash == digest(text), "every byte is a token, UTF-8 or not"


def killed_after(groups: int, words: list[str], partial: Path) -> None:
    process = subprocess.Popen(
        command(*words), env=os.environ | QUIET, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(list(partial.glob("group-*.json"))) < groups:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["data.categories=[coding,writing]", "data.limit=6", "max_new_tokens=48"]
    killed_after(2, [*BASE, *overrides, "ui=none", f"out={tmp_path}"], tmp_path / "partial")
    before = {file.name: file.read_bytes() for file in (tmp_path / "partial").glob("group-*.json")}
    assert len(before) >= 2
    assert not (tmp_path / "summary.json").exists()
    kept = RunFolder(tmp_path).load()

    seen: dict[str, bytes] = {}
    finish = RunFolder.finish

    def spy(self: RunFolder, summary: dict) -> None:
        seen.update({name: (self.partial / name).read_bytes() for name in before})
        finish(self, summary)

    monkeypatch.setattr(RunFolder, "finish", spy)
    summary = here(tmp_path, *overrides)
    assert seen == before
    records = RunFolder(tmp_path).load()
    assert records[: len(kept)] == kept
    keys = [(r.request, r.arm, r.repeat) for r in records]
    assert len(keys) == len(set(keys)) == 2 * summary["requests"]
    fresh = here(tmp_path / "fresh", *overrides)
    said = {(r.request, r.arm): (r.prompt_hash, r.tokens) for r in RunFolder(tmp_path / "fresh").load()}
    assert {(r.request, r.arm): (r.prompt_hash, r.tokens) for r in records} == said
    assert fresh["acceptance_histogram"] == summary["acceptance_histogram"]


def test_the_same_folder_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = here(tmp_path, "data.limit=1")
    with pytest.raises(ValueError, match=r"max_new_tokens is 8 there, 9 here.* choose another out=DIR"):
        here(tmp_path, "data.limit=1", "max_new_tokens=9")
    monkeypatch.setattr(config, "_load_once", lambda *_: pytest.fail("a model was loaded"))
    assert here(tmp_path, "data.limit=1", "ui=json") == summary
    assert json.loads(capsys.readouterr().out) == summary


def test_settings_that_never_worked_do_not_bind_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower max_new_tokens="):
        here(tmp_path, "data.limit=1", "max_new_tokens=4000")
    asked_for = RunFolder(tmp_path).path / "env.json"
    assert "max_new_tokens=4000" in json.loads(asked_for.read_text())["overrides"], "what was asked for"
    here(tmp_path, "data.limit=1")
    assert "max_new_tokens=4000" not in json.loads(asked_for.read_text())["overrides"]


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specdec.run.measure", interrupt)
    monkeypatch.setattr("sys.argv", ["run", *BASE, "ui=none", f"out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (
        str(stopped.value)
        == f"specdec: interrupted; the same command with out={tmp_path / 'out'} goes on where it was"
    )


def test_what_the_progress_line_shows(tmp_path: Path) -> None:
    here(tmp_path, "data.limit=1", "baseline=[none,hf]")
    shown = live(RunFolder(tmp_path).load())
    assert list(shown) == ["tokens_per_step", "speedup none", "speedup hf"]
    assert all(value > 0 for value in shown.values())
