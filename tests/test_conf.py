"""Every file of conf/ composes, calls what it names, and says how to use it; wrong names get the nearest."""

import inspect
import shlex
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object

from specdec._paths import conf_dir
from specdec.arms import Settings
from specdec.config import build, load_config, make
from specdec.sampling import Sampling

CONF = Path(conf_dir())
CHOICES = sorted(p for p in CONF.glob("*/*.yaml") if p.parent.name != "experiment")
EXPERIMENTS = sorted(CONF.glob("experiment/*.yaml"))
OWN_SHAPES = ("sampled", "sampled_chain", "topk")  # with widths of their own
OUR_KEYS = {"data": {"chat"}}  # read by the run, not by the loader


def name(path: Path) -> str:
    return f"{path.parent.name}={path.stem}"


def command(path: Path) -> tuple[str, list[str]]:
    """The module and the overrides of the command in the file's first comment, behind Hydra's own."""
    comments = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    sharp, python, flag, module, *words = shlex.split(comments[0])
    assert (sharp, python, flag) == ("#", "python", "-m")
    return module, [word for word in words if word != "-m"]


@pytest.mark.parametrize(
    "path", [CONF / "config.yaml", CONF / "train.yaml", *CHOICES, *EXPERIMENTS], ids=name
)
def test_the_command_in_its_first_comment_composes(path: Path) -> None:
    module, overrides = command(path)
    assert module in ("specdec.run", "specdec.train")
    cfg = load_config(overrides, "train" if module == "specdec.train" else "config")
    if path in CHOICES:
        assert name(path) in overrides
        assert cfg[path.parent.name]._target_ == yaml.safe_load(path.read_text())["_target_"]


@pytest.mark.parametrize("path", CHOICES, ids=name)
def test_every_key_is_a_parameter_of_its_target(path: Path) -> None:
    group = path.parent.name
    node = yaml.safe_load(path.read_text())
    keys = {key for key in node if key[0] != "_"} - OUR_KEYS.get(group, set()) - {"defaults"}
    signature = inspect.signature(get_object(node["_target_"]))
    objects = ["target", "tree"] if group == "proposer" else []
    bound = signature.bind(*objects, **dict.fromkeys(keys))
    assert keys | set(objects) == set(bound.arguments) - {"selection"} | set(
        bound.arguments.get("selection", {})
    )
    missing = [
        p.name for p in signature.parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    assert set(missing) <= keys | set(objects)


@pytest.mark.parametrize(
    "path", [p for p in CHOICES if p.stem not in OWN_SHAPES and p.parent.name != "hardware"], ids=name
)
def test_what_the_file_says_is_the_default(path: Path) -> None:
    """A default that stands in two places must be one default."""
    node = yaml.safe_load(path.read_text())
    for key, parameter in inspect.signature(get_object(node["_target_"])).parameters.items():
        default = parameter.default
        if key in node and default is not inspect.Parameter.empty:
            assert node[key] == (list(default) if isinstance(default, tuple) else default), key


def test_the_main_file_says_the_defaults_of_its_dataclasses() -> None:
    there = yaml.safe_load((CONF / "config.yaml").read_text())
    for made in (Settings, Sampling):
        assert is_dataclass(made)
        for field in (f for f in fields(made) if f.name in there):
            assert field.default is not MISSING
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert there[field.name] == default, field.name
    assert {f.name for f in fields(Settings)} - set(there) == {"chat"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_an_experiment_says_how_to_run_it(path: Path) -> None:
    assert name(path) in command(path)[1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["proposer=ngrma"], r"proposer=ngrma is unknown; the nearest is 'ngram'; there is: .*medusa"),
        (["experiment=demos"], r"experiment=demos is unknown; the nearest is 'demo'"),
        (["tree.dept=3"], r"override tree.dept is unknown; the nearest is 'tree.depth'"),
        (["depth=3"], r"override depth is unknown; the nearest is 'tree.depth'"),
        (["max_tokens=3"], r"override max_tokens is unknown; the nearest is 'max_new_tokens'"),
        (["tree=chain", "tree.widths=[2]"], r"override tree.widths is unknown; the nearest is 'tree"),
        (["temperature"], r"'temperature' is no override, expected KEY=VALUE"),
        (["baseline=[none"], r"'baseline=\[none' is no override"),
        (["tree.depth=2,4"], r"tree.depth.*-m"),
    ],
)
def test_unknown_names_are_answered_by_the_nearest(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_config(overrides)
    assert "\n" not in str(caught.value)


def test_composing_does_not_depend_on_the_folder_we_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_config(["target=random", "out=o"])
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config(["target=random", "out=o"]) == here


def test_names_are_those_that_a_user_types() -> None:
    cfg = load_config(
        ["proposer=draft_lm", "tree=sampled_chain", "accept=block", "temperature=1", "data=jsonl"]
    )
    assert cfg.names == {"proposer": "draft_lm", "tree": "sampled_chain", "accept": "block", "data": "jsonl"}
    assert "hydra" not in cfg


@pytest.mark.parametrize(
    "override",
    [
        "proposer._target_=os.system",
        "target._target_=builtins.eval",
        "+tree.more={_target_:os.remove}",
        "data._target_=os.walk",
    ],
)
def test_a_target_outside_specdec_is_refused_before_it_is_imported(
    override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(path: str) -> None:
        raise AssertionError(f"{path} was imported")

    cfg = load_config(["target=random", "proposer=ngram", "tree=chain", override])
    monkeypatch.setattr("hydra.utils.get_object", must_not_run)
    with pytest.raises(ValueError, match=r"lies outside specdec .*allow=\[(os|builtins)\]"):
        make(cfg[override.partition("=")[0].strip("+").partition(".")[0]])


def test_an_allowed_package_may_be_called() -> None:
    node = {"_target_": "fractions.Fraction", "numerator": 3}
    with pytest.raises(ValueError, match=r"allow=\[fractions\]"):
        make(node)
    assert make(node, ["fractions"]) == 3


def test_a_target_that_is_not_there() -> None:
    with pytest.raises(
        ValueError, match=r"^proposer._target_=specdec.nothing.X can't be imported: .*specdec.nothing"
    ):
        build(
            load_config(
                ["target=random", "proposer=ngram", "tree=chain", "proposer._target_=specdec.nothing.X"]
            )
        )
