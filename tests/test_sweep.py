"""The end of a sweep: every job is in the table or named as failed; every shipped wandb sweep can run."""

import copy
import csv
import itertools
import json
import time
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from specdec._paths import conf_dir
from specdec.config import load_config, make
from specdec.sweep import CombinedTable, Job

SWEEPS = sorted(Path(__file__).parents[1].glob("experiments/sweeps/*.yaml"))


def interval(mean: float | None) -> dict:
    return {"mean": mean, "low": None, "high": None, "ratio_of_totals": mean}


def summary(decode: float | None, *, rule: bool = True, baseline: str = "none", **changes: object) -> dict:
    return {
        "target": "random",
        "proposer": "NGram",
        "tree": "Chain",
        "accept": "Match",
        "temperature": 0.0,
        "batch_size": 1,
        "tokens_per_step": 2.5,
        "nodes_per_step": 4.0,
        "break_even": None,
        "tokens_per_second": 61.0,
        "speedup": {baseline: {"decode": interval(decode), "end_to_end": interval(1.1)}},
        "ttft_ms": {"p50": 12.0, "p90": 20.0},
        "usd_per_million_tokens": None,
        "joules_per_token": 0.01,
        "lossless": {"rule": rule, "identical": 7, "divergences": [{"request": "a"}]},
        **changes,
    }


def job(sweep: Path, name: str, overrides: list[str], written: dict | None, failed: bool = False) -> Job:
    folder = sweep / name
    folder.mkdir(parents=True)
    if written is not None:
        (folder / "summary.json").write_text(json.dumps(written))
    return Job(folder, overrides, failed)


def end(sweep: Path, jobs: list[Job], ui: str = "plain") -> None:
    table = CombinedTable()
    table.jobs = jobs
    table.on_multirun_end(OmegaConf.create({"ui": ui, "hydra": {"sweep": {"dir": str(sweep)}}}))


def lines(sweep: Path) -> list[dict]:
    with (sweep / "combined.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_one_line_a_job_fastest_first_lossy_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [
        job(tmp_path, "0", ["data.limit=2", "tree.depth=2"], summary(1.2)),
        job(tmp_path, "1", ["data.limit=2", "tree.depth=4"], summary(None, baseline="hf")),
        job(tmp_path, "2", ["data.limit=2", "tree.depth=8"], summary(1.9)),
        job(tmp_path, "3", ["data.limit=2", "accept=typical"], summary(9.9, rule=False)),
        job(tmp_path, "10", ["data.limit=2"], summary(1.5)),
    ]
    end(tmp_path, jobs)
    found = lines(tmp_path)
    order = ["tree.depth=8", "10", "tree.depth=2", "tree.depth=4", "accept=typical"]
    assert [line["job"] for line in found] == order
    best = found[0]
    assert ",".join(best) == (
        "job,target,dtype,device,proposer,tree,accept,temperature,batch_size,tokens_per_step,nodes_per_step,"
        "break_even,tokens_per_second,"
        "speedup_none_decode,speedup_none_low,speedup_none_high,speedup_none_end_to_end,"
        "speedup_hf_decode,speedup_hf_low,speedup_hf_high,speedup_hf_end_to_end,"
        "ttft_ms_p50,hardware,price_per_hour,usd_per_million_tokens,joules_per_token,lossless,identical,divergences"
    )
    said = {"speedup_none_decode": "1.9", "speedup_none_end_to_end": "1.1", "speedup_none_low": ""}
    said |= {"identical": "7", "divergences": "1", "lossless": "True"}
    said |= {"usd_per_million_tokens": "", "speedup_hf_end_to_end": ""}
    assert {key: best[key] for key in said} == said
    assert found[-1]["lossless"] == "False"
    assert found[3]["speedup_hf_end_to_end"] == "1.1"
    shown = capsys.readouterr().out
    assert shown.index("tree.depth=8") < shown.index("tree.depth=2") < shown.index("accept=typical")
    assert "data.limit=2" not in shown
    assert str(tmp_path / "combined.csv") in shown
    assert not list(tmp_path.glob("*.tmp"))


def test_jobs_that_failed_are_named_whatever_lies_in_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        job(tmp_path, "0", ["seed=1"], summary(1.2)),
        job(tmp_path, "1", ["seed=2"], summary(9.9), failed=True),
        job(tmp_path, "2", [], None, failed=True),
    ]
    with pytest.raises(SystemExit) as stopped:
        end(tmp_path, jobs)
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["failed: 1: seed=2", "failed: 2"]
    assert [line["job"] for line in lines(tmp_path)] == ["seed=1"]


def test_a_sweep_in_which_every_job_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end(tmp_path, [job(tmp_path, "0", ["seed=1"], None, failed=True)])
    assert capsys.readouterr().out == "failed: 0: seed=1\n"
    assert not (tmp_path / "combined.csv").exists()


def test_jobs_that_nobody_saw_end_are_no_success(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no job ran in this process.*hydra/launcher=basic"):
        end(tmp_path, [])


@pytest.mark.parametrize("ui", ["json", "none"])
def test_quiet_screens_still_get_their_file(
    ui: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end(tmp_path, [job(tmp_path, "0", ["seed=1"], summary(1.2))], ui)
    assert capsys.readouterr().out == ""
    assert [line["job"] for line in lines(tmp_path)] == ["seed=1"]


def test_a_failed_write_leaves_the_table_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job(tmp_path, "0", ["seed=1"], summary(1.2))]
    end(tmp_path, jobs)
    before = (tmp_path / "combined.csv").read_text()

    def full(self: object, path: Path, **_: object) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pandas.DataFrame.to_csv", full)
    with pytest.raises(OSError, match="No space"):
        end(tmp_path, jobs)
    assert (tmp_path / "combined.csv").read_text() == before


SWEEP_CONFIG = """
seed: 0
ui: plain
out: {out}/${{now:%Y-%m-%d_%H-%M-%S}}
hydra:
  mode: null
  output_subdir: null
  run: {{dir: "${{out}}"}}
  sweep: {{dir: "${{out}}", subdir: "${{hydra.job.num}}"}}
  callbacks: {{combined: {{_target_: specdec.sweep.CombinedTable}}}}
defaults: [_self_, override hydra/job_logging: disabled, override hydra/hydra_logging: disabled]
"""


def task(cfg: DictConfig) -> None:
    config = hydra.core.hydra_config.HydraConfig.get()
    folder = Path(config.runtime.output_dir)
    if cfg.seed == 2:
        raise ValueError("seed=2 is unlucky")
    if cfg.seed == 3:
        time.sleep(1.1)  # into the next second: the sweep's folder must not move with the clock
        raise RuntimeError("a bug")
    (folder / "summary.json").write_text(json.dumps(summary(1.0 + cfg.seed)))


def launch(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "conf").mkdir(exist_ok=True)
    (folder / "conf" / "config.yaml").write_text(SWEEP_CONFIG.format(out=folder / "out"))
    monkeypatch.setattr("sys.argv", ["app", *arguments])
    hydra.main(version_base="1.3", config_path=str(folder / "conf"), config_name="config")(task)()


def test_hydra_runs_all_jobs_of_a_sweep_in_which_some_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch(tmp_path, ["-m", "seed=1,2,3,4"], monkeypatch)
    assert stopped.value.code == 1
    [sweep] = (tmp_path / "out").iterdir()
    assert [line["job"] for line in lines(sweep)] == ["seed=4", "seed=1"]
    out, err = capsys.readouterr()
    assert out.splitlines()[-2:] == ["failed: 1: seed=2", "failed: 2: seed=3"]
    assert "specdec: seed=2 is unlucky\n" in err
    assert err.count("Traceback") == 1
    assert "RuntimeError: a bug" in err


def test_a_sweep_into_a_used_folder_reports_its_own_jobs_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "used"
    launch(tmp_path, ["-m", "seed=1,4,5", f"hydra.sweep.dir={sweep}"], monkeypatch)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        launch(tmp_path, ["-m", "seed=6,2", f"hydra.sweep.dir={sweep}"], monkeypatch)
    assert [line["job"] for line in lines(sweep)] == ["seed=6"]
    assert capsys.readouterr().out.splitlines()[-1] == "failed: 1: seed=2"


def test_a_single_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="unlucky"):
        launch(tmp_path, ["seed=2"], monkeypatch)
    assert not list(tmp_path.glob("out/*/combined.csv"))


def commands(sweep: dict) -> list[list[str]]:
    """What an agent would start, for every combination of the parameters."""
    names, choices = zip(*((name, one["values"]) for name, one in sweep["parameters"].items()), strict=True)
    found = []
    for values in itertools.product(*choices):
        chosen = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        parts = create_sweep_command_args({"args": chosen})
        expanded = [
            parts.get(part[2:-1], [part]) if part.startswith("${") else [part] for part in sweep["command"]
        ]
        found.append(list(itertools.chain(*expanded)))
    return found


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_combination_of_a_wandb_sweep_is_a_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    sweep = yaml.safe_load(path.read_text())
    assert path.read_text().startswith(f"# wandb sweep experiments/sweeps/{path.name}\n")
    assert sweep["metric"] == {"name": "speedup", "goal": "maximize"}
    assert sweep["program"]  # the agent reads it whatever the command is
    for command in commands(sweep):
        assert command[:4] == ["${env}", "${interpreter}", "-m", "specdec.run"]
        cfg = load_config(command[4:])
        chosen = dict(override.split("=", 1) for override in command[4:])
        assert str(cfg.tree.depth) == chosen["tree.depth"]
        for group in ("proposer", "tree"):
            there = yaml.safe_load(Path(conf_dir(), group, f"{chosen[group]}.yaml").read_text())
            assert cfg[group]._target_ == there["_target_"]
        make(cfg.tree)
        assert (cfg.logger.mode, cfg.out) == ("online", "outputs/sweeps/abc123")


def test_a_misspelt_parameter_of_a_sweep_would_be_found() -> None:
    sweep = copy.deepcopy(yaml.safe_load(SWEEPS[0].read_text()))
    sweep["parameters"]["tree.dept"] = sweep["parameters"].pop("tree.depth")
    with pytest.raises(ValueError, match=r"tree.dept is unknown"):
        load_config(commands(sweep)[0][4:])
