"""Files that appear whole or not at all."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside it, which then takes its place."""
    part = file.with_name(file.name + ".part")
    write(part)
    part.replace(file)


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file."""
    atomically(file, lambda part: save_file(tensors, part, metadata=metadata))


def write_text(text: str, file: Path) -> None:
    """A text file in UTF-8."""
    atomically(file, lambda part: part.write_text(text, encoding="utf-8"))
