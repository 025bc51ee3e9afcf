"""Trained heads that ship with specdec: safetensors files, each with a card beside it."""

from pathlib import Path

ZOO = Path(__file__).parent


def zoo_file(name: str) -> Path:
    """The file of a head: a path that exists, else a name in the zoo. ValueError if it is neither."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = sorted(p.stem for p in ZOO.glob("*.safetensors"))
    if name in known:
        return ZOO / f"{name}.safetensors"
    raise ValueError(
        f"proposer.heads={name}: no such file, nor one of the zoo's: {', '.join(known) or '(empty)'}"
    )
