"""What the configs of other projects' EAGLE-3 heads say, in one form.

Dialects: official EAGLE-3, SpecForge and SGLang, NVIDIA Model Optimizer, DeepSpec, vLLM, and speculators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers as hf
from huggingface_hub.errors import StrictDataclassError

from .files import Unusable

SPECULATORS, DEEPSPEC = "speculators", "DeepSpec"
IDS = "eagle_aux_hidden_state_layer_ids"
FLAGS = ("norm_before_residual", "norm_output", "fc_norm", "norm_before_fc")
LAYER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
LAYER += ("hidden_act", "max_position_embeddings", "rms_norm_eps", "vocab_size", "num_hidden_layers")
LAYER += ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


@dataclass(frozen=True)
class Said:
    """What a config says.

    layer         the decoder layer, as a `transformers` config
    ids           layers of the target, None where none are named
    inputs        whether an id names a layer's input; else its output, the input of the next
    flags         those of FLAGS that are set, true or false
    target_width  of the hidden states that are read
    """

    dialect: str
    layer: hf.PreTrainedConfig
    ids: tuple[int, ...] | None
    inputs: bool
    flags: dict[str, bool]
    target_width: int


def understood(config: dict[str, Any]) -> Said:
    """Unusable: no EAGLE-3 config, or of a layer that this project does not have."""
    kind = config.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise Unusable(f"is a speculators head of type {kind}, expected eagle3")
    nested = config.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise Unusable(f"has an eagle_config of {nested!r}, expected keys and values")
    flags = {name: nested.get(name, config.get(name)) for name in FLAGS}
    layer = _layer(config.get("transformer_layer_config") or config)
    dialect, ids = _dialect(config, nested)
    if ids and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise Unusable(f"names the layers {ids!r}, expected a list of whole numbers")
    return Said(
        dialect=dialect,
        layer=layer,
        ids=tuple(ids) if ids else None,
        inputs=dialect != DEEPSPEC and not nested.get(IDS),
        flags={name: bool(value) for name, value in flags.items() if value is not None},
        target_width=config.get("target_hidden_size") or layer.hidden_size,
    )


def _dialect(config: dict[str, Any], nested: dict[str, Any]) -> tuple[str, list[int] | None]:
    """Who wrote it, and the layers it names: NVIDIA and SpecForge, who nest them, and DeepSpec by outputs."""
    if "speculators_model_type" in config:
        return SPECULATORS, config.get(IDS)
    if "target_layer_ids" in config:
        return DEEPSPEC, config["target_layer_ids"]
    if nested:
        name = "NVIDIA" if "use_aux_hidden_state" in nested else "SpecForge"
        return name, nested.get(IDS) or config.get(IDS)
    return "vLLM" if config.get(IDS) else "official", config.get(IDS)


def _layer(plain: dict[str, Any]) -> hf.PreTrainedConfig:
    """With the defaults of its model type, which speculators leaves out, and `rope_parameters`."""
    kind = plain.get("model_type") or "llama"
    known = {key: plain[key] for key in LAYER if plain.get(key) is not None}
    try:
        layer = hf.AutoConfig.for_model(kind, **known)
    except (ValueError, StrictDataclassError) as error:
        raise Unusable(f"has a config of a {kind} layer that makes none ({_line(error)})") from error
    rope = getattr(layer, "rope_parameters", None) or {}
    problems = {
        "num_hidden_layers": layer.num_hidden_layers != 1,
        "hidden_act": layer.hidden_act not in ("silu", "swish"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if wrong := [f"{key}={plain.get(key)}" for key, is_wrong in problems.items() if is_wrong]:
        raise Unusable(f"has {', '.join(wrong)}, expected one layer with silu and full rotary positions")
    return layer


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
