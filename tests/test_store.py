"""The folder of a run: exact round trips, whole files or none, and a resume that never mixes settings."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from specdec.records import RequestRecord, StepRecord
from specdec.store import RunFolder

CONFIG = {"temperature": 0.0, "proposer": {"name": "ngram", "k": 4}, "ui": "rich", "logger": {"name": "none"}}
ENV = {"python": "3.12"}
AWKWARD = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]


def record(group: int, repeat: int = 0, arm: str = "method", size: int = 3) -> RequestRecord:
    steps = [StepRecord(i, 4, 2, 1, 2, 2, AWKWARD[i % 4] * (i % 2 + 1) / 3) for i in range(size)]
    return RequestRecord(
        request=f"é-{group}/0",
        conversation=f"é-{group}",
        turn=0,
        category="coding",
        arm=arm,
        repeat=repeat,
        group=group,
        prompt_tokens=7,
        prompt_hash="ab12",
        tokens=list(range(group, group + size)),
        finish="length",
        prefill_end=0.1 + 0.2,
        burst_times=[(i + 1) / 3 for i in range(size)],
        burst_sizes=[1] * size,
        steps=steps if arm == "method" else [],
        peak_memory_mb=None if arm == "method" else math.pi,
    )


def group_records(group: int, size: int = 3) -> list[RequestRecord]:
    return [record(group, repeat, arm, size) for repeat in (0, 1) for arm in ("method", "none")]


def opened(path: Path, **changes: object) -> RunFolder:
    folder = RunFolder(path)
    folder.open(CONFIG | changes, ENV)
    return folder


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_groups_come_back_exactly_and_in_order(tmp_path: Path) -> None:
    folder = opened(tmp_path / "new" / "run")
    for group in (100_001, 2, 11):
        folder.save_group(group, group_records(group))
    again = opened(tmp_path / "new" / "run")
    assert again.finished() == {2, 11, 100_001}
    assert again.load() == [r for group in (2, 11, 100_001) for r in group_records(group)]
    assert again.summary() is None


def test_a_finished_run_reads_back_from_its_tables(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for group in (1, 0):
        folder.save_group(group, group_records(group))
    folder.finish({"tokens_per_step": 2.0, "joules_per_token": None, "broken": math.nan})
    assert names(tmp_path) == {"config.yaml", "env.json", "requests.parquet", "steps.parquet", "summary.json"}
    again = opened(tmp_path)
    assert again.summary() == {"tokens_per_step": 2.0, "joules_per_token": None, "broken": None}
    assert again.finished() == {0, 1}
    assert again.load() == group_records(0) + group_records(1)


def test_tables_have_a_row_a_request_and_a_row_a_step(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.save_group(0, group_records(0))
    folder.finish({})
    requests, steps = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("requests", "steps"))
    assert len(requests) == 4
    assert requests["tokens"][0].as_py() == [0, 1, 2]
    assert set(requests.column_names) == set(RequestRecord.__dataclass_fields__) - {"steps"}
    assert len(steps) == 6
    owner = {"request", "conversation", "category", "arm", "repeat", "group"}
    assert set(steps.column_names) == owner | set(StepRecord.__dataclass_fields__)


def test_a_run_without_any_step_finishes(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.save_group(0, [record(0, arm="hf")])
    folder.finish({})
    assert opened(tmp_path).load() == [record(0, arm="hf")]


def test_a_kill_between_the_tables_and_the_summary_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened(tmp_path)
    folder.save_group(0, group_records(0))
    write = RunFolder._write

    def dies_at_the_summary(self: RunFolder, path: Path, data: bytes) -> None:
        if path.name == "summary.json":
            raise KeyboardInterrupt
        write(self, path, data)

    monkeypatch.setattr(RunFolder, "_write", dies_at_the_summary)
    with pytest.raises(KeyboardInterrupt):
        folder.finish({})
    monkeypatch.undo()
    again = opened(tmp_path)
    assert again.summary() is None
    assert again.load() == group_records(0)
    again.finish({"done": True})
    assert again.summary() == {"done": True}


def test_other_settings_are_refused_by_name_and_the_run_stays(tmp_path: Path) -> None:
    opened(tmp_path).save_group(0, group_records(0))
    with pytest.raises(
        ValueError, match=r"temperature is 0.0 there, 1.0 here; proposer.k is 4 there, 8 here"
    ) as caught:
        opened(tmp_path, temperature=1.0, proposer={"name": "ngram", "k": 8})
    assert "choose another out=DIR or repeat the same settings" in str(caught.value)
    with pytest.raises(ValueError, match=r"top_p is 'unset' there, 0.9 here"):
        opened(tmp_path, top_p=0.9)
    assert opened(tmp_path).finished() == {0}


def test_settings_that_change_no_number_may_differ(tmp_path: Path) -> None:
    opened(tmp_path).save_group(0, group_records(0))
    folder = opened(
        tmp_path, ui="json", out="elsewhere", logger={"name": "wandb", "project": "x"}, hydra={"a": 1}
    )
    assert folder.finished() == {0}
    with pytest.raises(ValueError, match="uint"):
        opened(tmp_path, uint=8)


def test_every_environment_of_a_run_is_named(tmp_path: Path) -> None:
    first, same, other = ENV | {"date": "1"}, ENV | {"date": "2"}, {"python": "3.13", "date": "3"}
    for env in (first, same, other, other, same):
        RunFolder(tmp_path).open(CONFIG, env)
    assert json.loads((tmp_path / "env.json").read_text()) == first | {"resumed": [other, same]}


def test_the_environment_of_a_run_that_failed_is_not_kept(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "config.yaml").unlink()
    RunFolder(tmp_path).open(CONFIG, {"python": "3.13"})
    assert json.loads((tmp_path / "env.json").read_text()) == {"python": "3.13"}


def test_results_of_unknown_settings_are_refused(tmp_path: Path) -> None:
    opened(tmp_path).save_group(0, group_records(0))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"no config.yaml: choose another out=DIR"):
        opened(tmp_path)


@pytest.mark.parametrize("tail", ["", "below"])
def test_a_file_in_the_way(tmp_path: Path, tail: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"a file is in the way.*choose another out=DIR"):
        opened(tmp_path / "file" / tail)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("resumed", [False, True])
def test_an_unwritable_folder_is_found_on_opening(public_path: Path, resumed: bool) -> None:
    if resumed:
        opened(public_path)
    locked = public_path / "partial" if resumed else public_path
    locked.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # root writes everywhere
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match=r"can't be written .*choose another out=DIR"):
            opened(public_path if resumed else public_path / "run")
    finally:
        os.seteuid(user)
        locked.chmod(0o755)


def test_disk_full_names_the_remedy_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened(tmp_path)
    folder.save_group(0, group_records(0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"free space, then run the same command again with out=.*prompts are kept"
    ) as caught:
        folder.save_group(1, group_records(1))
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == {"config.yaml", "env.json", "partial/group-00000.json"}
    assert folder.load() == group_records(0)


def test_leftovers_of_a_killed_write_are_ignored_and_overwritten(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.save_group(0, group_records(0))
    (tmp_path / "partial" / "group-00001.json.tmp").write_text('[{"request": "é')
    again = opened(tmp_path)
    assert again.finished() == {0}
    assert again.load() == group_records(0)
    again.save_group(1, group_records(1))
    assert names(tmp_path / "partial") == {"group-00000.json", "group-00001.json"}


@pytest.mark.parametrize("content", ["[{", '[{"request": "a"}]', '[{"steps": [], "unknown": 1}]'])
def test_a_damaged_group_is_named(tmp_path: Path, content: str) -> None:
    folder = opened(tmp_path)
    (tmp_path / "partial" / "group-00003.json").write_text(content)
    with pytest.raises(ValueError, match=r"group-00003.json can't be read .*delete it"):
        folder.load()


def test_records_that_could_not_be_told_apart_are_refused(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with pytest.raises(ValueError, match=r"appears twice in group 0 .*its own id"):
        folder.save_group(0, [record(0), record(0)])
    with pytest.raises(ValueError, match="is of group 0, expected group 1"):
        folder.save_group(1, [record(0)])
    assert folder.finished() == set()


WRITER = """
import builtins, io, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_store import group_records, opened

def drip(path, mode="r", *args, plain_open=io.open, **kwargs):
    # Files grow by a few bytes at a time, so that a kill nearly always falls into the middle of one.
    file = plain_open(path, mode, *args, **kwargs)
    if mode == "wb":
        write = file.write
        def slowly(data):
            for i in range(0, len(data), 1 + len(data) // 20):
                write(data[i : i + 1 + len(data) // 20])
                file.flush()
                time.sleep(0.001)
        return Wrapped(file, slowly)
    return file

class Wrapped:
    def __init__(self, file, write): self.file, self.write = file, write
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()

folder = opened(Path(sys.argv[2]))
builtins.open = io.open = drip
while True:
    for group in range(4):
        folder.save_group(group, group_records(group))
        print(group, flush=True)
"""


@pytest.mark.slow
def test_sigkill_leaves_whole_groups_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(tmp_path)]
    for lines in (2, 6, 11):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert all(writer.stdout.readline() for _ in range(lines))
            time.sleep(0.01)
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
        folder = opened(tmp_path)
        assert len(folder.finished()) >= min(lines, 4)
        assert folder.load() == [r for group in sorted(folder.finished()) for r in group_records(group)]
