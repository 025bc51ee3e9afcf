"""Where the Hydra configuration lies: inside the package in a wheel, beside it in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> str:
    """Absolute path of the folder that holds `config.yaml`; FileNotFoundError if there is none."""
    # The packaged one first: beside an installed package lies site-packages, whose `conf` could be anyone's.
    candidates = (_PACKAGE / "conf", _PACKAGE.parent / "conf")
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return str(folder)
    looked = " nor in ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(
        f"config.yaml is neither in {looked}: this copy of specdec is incomplete, "
        "reinstall it (in a checkout: `make setup`)"
    )
