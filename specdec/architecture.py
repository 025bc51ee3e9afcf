"""What a target must be told about a `transformers` model, and which models it refuses."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


def refuse_unsupported(config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """ValueError for models whose state can't drop rejected tokens, or that aren't decoders."""
    if model.config.is_encoder_decoder or config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; expected a causal LM in target.path")
    kinds = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if model._is_stateful or kinds:
        raise ValueError(
            f"{type(model).__name__} keeps a state that can't be rolled back after a rejection "
            f"({', '.join(sorted(kinds)) or 'recurrent'} layers); expected full or sliding attention: "
            "choose another target.path"
        )


def longest_text(config: PreTrainedConfig) -> int:
    """Tokens a text may have. Past its first length longrope turns every angle, of cached keys too."""
    rope = getattr(config, "rope_parameters", None) or {}
    long = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return long or getattr(config, "max_position_embeddings", None) or 2**31


def slides(config: PreTrainedConfig) -> bool:
    """Whether a layer has a sliding window that is shorter than the longest text."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    used = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return bool(used and 0 < (getattr(config, "sliding_window", None) or 0) < longest_text(config))


def stock_attention(model: PreTrainedModel) -> str:
    """The attention of `transformers` that gives what ours does: its sdpa leaves out softcaps and sinks."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped or not model._supports_sdpa else "sdpa"


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a causal LM, or of the language model in a multimodal one."""
    wanted = model.config.get_text_config().num_hidden_layers
    lists = (
        m
        for m in model.base_model.get_decoder().modules()
        if isinstance(m, nn.ModuleList) and len(m) == wanted
    )
    if (layers := next(lists, None)) is None:
        raise ValueError(
            f"{type(model).__name__} has no list of {wanted} layers to tap; choose another target.path"
        )
    return layers
