"""python -m specdec.export heads=FILE to=speculators out=FOLDER: heads in the formats that others serve."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ._paths import conf_dir
from .checkpoints.export import FORMATS, export
from .config import as_target, load_target
from .loading import Loaded
from .overrides import expect_known
from .run import check_command, check_out, errors_in_one_line
from .zoo import zoo_file


def run(cfg: DictConfig) -> Path:
    """Write the folder, read it back, and return it. ValueError: see `export`, or wrong keys."""
    expect_known(str(cfg.to), list(FORMATS), f"to={cfg.to}")
    file, out = _file(cfg.heads), Path(cfg.out)
    check_out(out)
    loaded = load_target(cfg)
    export(file, cfg.to, as_target(loaded), out, _verifier(cfg.verifier, loaded))
    print(f"{out} holds the heads for {cfg.to}; read back, they are the same, bit for bit")
    return out


def _verifier(named: str | None, loaded: Loaded) -> str | None:
    """How the folder names the target: an absolute folder, so that it is found from anywhere, or a hub id."""
    if named is None:
        return loaded.source
    folder = Path(str(named)).expanduser()
    return str(folder.resolve() if folder.is_dir() else named)


def _file(heads: str | None) -> Path:
    if heads is None:
        raise ValueError("heads is null, expected a file, or the name of one in the zoo: heads=FILE")
    return zoo_file(str(heads), "heads")


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="export")
def _main(cfg: DictConfig) -> None:
    with errors_in_one_line():
        run(cfg)


def main() -> None:
    """The entry point."""
    with errors_in_one_line():
        check_command(sys.argv[1:], "export")
    _main()


if __name__ == "__main__":
    main()
