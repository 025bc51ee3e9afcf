"""Targets of real size without their weights: for what a step costs, never for what a model says."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf

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
    """
    chosen = choose_device(device)
    settings = hf.AutoConfig.for_model(architecture, **config)
    on_gpu = chosen.type == "cuda"
    with torch.random.fork_rng([chosen] if on_gpu else []), torch.device(chosen):
        (torch.cuda.manual_seed if on_gpu else torch.default_generator.manual_seed)(seed)
        model = hf.AutoModelForCausalLM.from_config(settings, dtype=choose_dtype(dtype, chosen))
    return finished(model, None, f"random-{name}", label="random-")
