"""Targets of real size without their weights: for what a step costs, never for what a model says."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf

from .hardware import memory_gib
from .loading import Loaded, choose_device, choose_dtype, finished


def systems_model(
    name: str,
    architecture: str,
    config: Mapping[str, Any],
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
) -> Loaded:
    """A causal LM with random weights, made in its dtype on the device itself.

    name    what tables and summaries call it; "random" goes before it
    config  every key of the architecture's config that differs from its default

    ValueError: the device has no room for the weights
    """
    chosen = choose_device(device)
    torch_dtype = choose_dtype(dtype, chosen)
    settings = hf.AutoConfig.for_model(architecture, **config)
    _check_room(name, settings, torch_dtype, chosen)
    on_gpu = chosen.type == "cuda"
    with torch.random.fork_rng([chosen] if on_gpu else []), torch.device(chosen):
        (torch.cuda.manual_seed if on_gpu else torch.default_generator.manual_seed)(seed)
        model = hf.AutoModelForCausalLM.from_config(settings, dtype=torch_dtype)
    return finished(model, None, f"random-{name}", label="random-")


def _check_room(name: str, settings: hf.PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    needed = sum(p.nbytes for p in model.parameters()) / 2**30
    on_gpu = device.type == "cuda"
    room = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else memory_gib()
    if room is not None and needed > room:
        raise ValueError(
            f"{name} needs {needed:.0f} GiB for its weights, {device.type} has {room:.0f}: fewer layers, "
            "target.config.num_hidden_layers=2, or a smaller one, target=random_1b"
        )
