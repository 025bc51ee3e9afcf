"""Trained heads that ship with specdec: safetensors files, each with a card beside it."""

from pathlib import Path

ZOO = Path(__file__).parent


def zoo_file(name: str, key: str = "proposer.heads") -> Path:
    """The file of a head: a path that exists, else a name in the zoo. ValueError if it is neither.

    key  the override that named it, for the error
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = sorted(p.stem for p in ZOO.glob("*.safetensors"))
    if name in known:
        return ZOO / f"{name}.safetensors"
    raise ValueError(f"{key}={name}: no such file, nor one of the zoo's: {', '.join(known) or '(empty)'}")
