"""python -m specdec.tune: the tree that it writes as a run takes it, and what it refuses."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from specdec import config
from specdec.calibrate import Size
from specdec.config import load_config, make
from specdec.run import main as run_main
from specdec.tune import halves, run
from specdec.tune import main as tune_main
from specdec.tuning import Search

BASE = ["target=random", "proposer=draft_lm", "proposer.layers=1", "data=demo", "data.categories=[maths]"]
BASE += ["max_new_tokens=12", "prompts=4", "search.rounds=2", "search.nodes=[2,4]", "search.depths=[1,2]"]


ASKED = {
    "both": [],
    "eagle2": ["tree=eagle2", "beside=null"],
    "within an experiment": ["experiment=eagle3", "tree=best_first"],
}


@pytest.mark.parametrize("words", ASKED.values(), ids=ASKED)
def test_a_run_takes_the_tuned_tree_by_the_command_that_is_printed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*BASE, *words, f"out={tmp_path / 'tuned'}"]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["tune", *asked])
    tune_main()
    shown = capsys.readouterr().out
    assert "fastest" in shown
    assert re.search(r"tokens per step: measured \d", shown)
    assert re.search(r"decode speedup: predicted [\d.]+x, measured [\d.]+x", shown)
    [line] = [line for line in shown.splitlines() if line.startswith("use it: ")]
    python, _, module, *told = shlex.split(line.removeprefix("use it: "))
    assert (python, module) == ("python", "specdec.run")
    monkeypatch.setattr("sys.argv", ["run", *told, "data.limit=1", f"out={tmp_path / 'run'}", "ui=none"])
    run_main()
    node = yaml.safe_load((tmp_path / "tuned" / "tree" / "tuned.yaml").read_text())
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert used["tree"] == node
    assert used["proposer"]["layers"] == 1
    policy = make(node)
    assert (policy.nodes, policy.depth) in {(2, 1), (4, 1), (4, 2)}
    assert {"plain_seconds", "trees", "check"} <= set(
        yaml.safe_load((tmp_path / "tuned" / "tuning.json").read_text())
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tree=chain"], r"tree=chain is not tuned: tree=sequoia, tree=eagle2 or tree=best_first"),
        (
            ["tree.length=confidence"],
            r"tree=sequoia with length=confidence is not predicted.*: tree.length=fixed, or tree=",
        ),
        (["beside.nodes=0"], r"beside.nodes is 0"),
        (["tree@beside=chain"], r"tree@beside=Chain is not tuned: tree@beside=sequoia"),
        (["tree.draws=true", "temperature=1"], r"tree=sequoia that draws is not tuned"),
        (["proposer=none"], r"proposer=none leaves no tree to a policy: proposer=medusa"),
        (["accept=typical"], r"accept=typical is not predicted: accept=match"),
        (["batch_size=2"], r"batch_size is 2, tuning takes one sequence: batch_size=1"),
        (["search.nodes=[1]"], r"search.nodes is \[1\], expected counts from 2 on: search.nodes=\[2,4\]"),
        (["search.depths=[]"], r"search.depths is \[\], expected counts from 1 on"),
        (["search.rounds=0"], r"search.rounds is 0, expected 1 or more: search.rounds=8"),
        (
            ["search.nodes=[2,4]", "search.depths=[4,6]"],
            r"search.nodes is \[2, 4\] and search.depths is \[4, 6\], expected a depth below a number of "
            r"nodes: search.nodes=\[5\] or search.depths=\[3\]",
        ),
        (["threads=0"], r"threads is 0, expected 1 or more, or null .*: threads=2"),
        (["threads=two"], r"threads is 'two', expected 1 or more"),
        (["ui=jason"], r"ui=jason: expected one of .*; the nearest is ui=json"),
        (["skip=9"], r"skip=9 and prompts=4 leave 1 of 10 conversations, expected 2 or more"),
        (["skip=-1"], r"skip=-1 and prompts=4"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_a_model_is_loaded(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(config, "_load_once", load)
    base = [word for word in BASE if "proposer=none" not in overrides or not word.startswith("proposer.")]
    with pytest.raises(ValueError, match=message):
        run(load_config([*base, f"out={tmp_path}", "ui=none", *overrides], "tune"), [])


def test_commands_with_options_of_hydra_s_are_left_to_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "tuned.yaml").write_text("_target_: specdec.trees.Sequoia\n")
    words = ["--config-dir", str(tmp_path), *BASE, "tree=tuned", "skip=-1", f"out={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", ["tune", *words])
    with pytest.raises(SystemExit, match=r"^specdec: skip=-1 and prompts=4 leave"):
        tune_main()


def test_prompts_are_asked_for_and_never_both_measured_and_checked() -> None:
    with pytest.raises(ValueError, match=r"You must specify 'data'.*gsm8k"):
        load_config(["target=random"], "tune")
    conversations = config.load_conversations(load_config(["data=demo"]))
    calibration, held_back = halves(conversations, skip=3, prompts=7)
    assert [c.id for c in calibration] == [c.id for c in conversations[3:10:2]]
    assert [c.id for c in held_back] == [c.id for c in conversations[4:10:2]]
    assert all(len(c.turns) == 1 for c in calibration + held_back)


def test_the_command_in_the_first_comment_composes() -> None:
    line = (Path(config.conf_dir()) / "tune.yaml").read_text().splitlines()[0]
    sharp, python, flag, module, *words = line.split()
    assert (sharp, python, flag, module) == ("#", "python", "-m", "specdec.tune")
    cfg = load_config(words, "tune")
    search = make(cfg.search)
    assert (search.branches, search.rounds) == (Search([2], [1]).branches, Search([2], [1]).rounds)
    assert Size(2, 1, 1.5, 3.0).seconds_per_token == 2
