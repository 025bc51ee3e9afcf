"""What a checkout and a wheel hold, that both find their configuration and kernels, and what they need."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from specdec import _paths

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    "LICENSE",
    "Makefile",
    "README.md",
    "conf",
    "constraints.txt",
    "experiments",
    "kernels",
    "notebooks",
    "pyproject.toml",
    "specdec",
    "tests",
}
SHIPPED = {"specdec": "specdec", "conf": "specdec/conf", "kernels/specdec_kernels": "specdec_kernels"}
BARE = """
import sys
from pathlib import Path

for name in ("hydra", "omegaconf", "wandb", "gguf", "datasets"):
    sys.modules[name] = None
import transformers.models.llama.modeling_llama
import specdec.data
import specdec_kernels
from specdec import onpolicy
from specdec.accept import Match
from specdec.decode import Sequence, decode
from specdec.loading import random_model
from specdec.proposers import draft_lm, ngram, none
from specdec.rng import Philox
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.training.eagle3 import Eagle3Recipe
from specdec.training.loop import train
from specdec.training.medusa import MedusaRecipe
from specdec.trees import Chain

print(specdec_kernels.__file__)
loaded = random_model(config={"vocab_size": 32, "hidden_size": 32}, device="cpu")
target = HFTarget(loaded.model, name="tiny", fingerprint=loaded.fingerprint)
prompts = [[n, 2, 3] for n in range(4)]
shards = onpolicy.write_answers(target, prompts, Path(), stop_ids=(), longest=6, batch=2)
recipes = MedusaRecipe(vocab=16, epochs=1), Eagle3Recipe(vocab=16, epochs=1)
files = [Path(f"{recipe.kind}.safetensors") for recipe in recipes]
for recipe, file in zip(recipes, files):
    train(target, shards, recipe, file)
proposers = [
    none.NoDraft(target, Chain()),
    ngram.NGram(target, Chain()),
    draft_lm.DraftLM(target, Chain(), layers=1),
    *(recipe.proposer(target, file) for recipe, file in zip(recipes, files)),
]
for proposer in proposers:
    seqs = [Sequence(0, [1, 2, 3, 1, 2], 8, Philox())]
    list(decode(target, proposer, Match(), Sampling(), seqs))
    print(seqs[0].new_tokens)
"""


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Standard output of a fresh interpreter in `cwd` with `path` first on its import path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_top_level_holds_nothing_else() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listing.stdout.splitlines()}
    assert {name for name in top - TOP_LEVEL if not name.startswith(".")} == set()


def test_kernels_folder_is_no_package() -> None:
    """A package named `kernels` would hide Hugging Face's, and transformers would fail to import Llama."""
    assert (ROOT / "kernels" / "specdec_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What BARE prints in a fresh process, with the checkout first on its path."""
    return run_python(BARE, tmp_path_factory.mktemp("bare"), ROOT, ROOT / "kernels").splitlines()


def test_transformers_imports_with_the_checkout_first_on_the_path(bare: list[str]) -> None:
    assert Path(bare[0]) == ROOT / "kernels" / "specdec_kernels" / "__init__.py"


def test_decoding_and_training_need_no_hydra_wandb_gguf_or_datasets(bare: list[str]) -> None:
    none, *others = bare[-5:]
    assert others == [none] * 4


def test_conf_dir_of_the_checkout() -> None:
    assert Path(_paths.conf_dir()) == ROOT / "conf"


def test_conf_dir_prefers_the_packaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "specdec"
    monkeypatch.setattr(_paths, "_PACKAGE", package)
    for folder in (tmp_path / "conf", package / "conf"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        assert Path(_paths.conf_dir()) == folder


def test_conf_dir_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paths, "_PACKAGE", tmp_path / "specdec")
    with pytest.raises(FileNotFoundError, match="reinstall") as error:
        _paths.conf_dir()
    assert str(tmp_path / "conf") in str(error.value)


def shipped_files() -> set[str]:
    """Names in the wheel of every file that a checkout's three shipped folders hold."""
    names = set()
    for source, target in SHIPPED.items():
        files = (f for f in (ROOT / source).rglob("*") if f.is_file() and "__pycache__" not in f.parts)
        names |= {f"{target}/{f.relative_to(ROOT / source).as_posix()}" for f in files}
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="builds without the network")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), *options]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("specdec_lab-*.whl")
    return file


@pytest.mark.slow
def test_wheel_holds_every_shipped_file_and_no_other_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert shipped_files() - set(names) == set()
    assert {"specdec/conf/config.yaml", "specdec_kernels/__init__.py"} <= set(names)
    assert any(name.startswith("specdec/prompts/") and name.endswith(".jsonl") for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"specdec", "specdec_kernels"}


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    imports = "import specdec_kernels as kernels, specdec._paths as paths"
    prints = r"print(kernels.__file__, paths.__file__, paths.conf_dir(), sep='\n')"
    lines = run_python(f"{imports}; {prints}", tmp_path, site).splitlines()
    expected = ["specdec_kernels/__init__.py", "specdec/_paths.py", "specdec/conf"]
    assert [Path(line) for line in lines] == [site / name for name in expected]
