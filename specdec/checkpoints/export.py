"""This project's heads in the formats of others: speculators, SGLang's EAGLE-3, vLLM's Medusa.

Every export is read back as a checkpoint of others is, and must give the same config and the same bits.
Shapes: U draft vocabulary, V the target's, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import save_tensors, write_text
from ..proposers import eagle3_head
from ..proposers.eagle3_head import Eagle3Config
from ..proposers.headfile import read_head
from ..proposers.medusa_heads import MedusaHeads
from . import eagle3, medusa
from .dialects import IDS
from .files import CONFIG, Reading

if TYPE_CHECKING:
    from ..target import HFTarget

WEIGHTS = "model.safetensors"
Written = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Native:
    """A file of this project's, checked against its target.

    depths  how many levels its accuracy was measured at
    """

    config: Any
    state: dict[str, Tensor]
    depths: int


def export(file: Path, to: str, target: HFTarget, out: Path, verifier: str | None) -> None:
    """Write the heads of a native file to the folder `out`.

    to        one of FORMATS
    verifier  how the folder names the target: a hub id or a folder; None: it has no name
    ValueError: the file is no such head or another target's, the format has no place for what it does, or it
    names the target
    """
    kind, write, read = FORMATS[to]
    native = _native(file, kind, target)
    config, tensors = write(native, target, verifier)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out={out} is not empty, expected a new folder: choose another out=DIR")
    out.mkdir(parents=True, exist_ok=True)
    save_tensors({n: t.contiguous().cpu() for n, t in tensors.items()}, out / WEIGHTS, {"format": "pt"})
    write_text(json.dumps(config, indent=2), out / CONFIG)
    _check(read(str(out), target), native, out)


def _native(file: Path, kind: str, target: HFTarget) -> Native:
    if kind == medusa.KIND:
        _, info = MedusaHeads.load(file, target, "heads")
        state = read_head(file, kind)[1]
        ascending = {"tokens_U": state["tokens_U"].sort().values}
        return Native(replace(info, accuracy_KR=[]), state | ascending, info.heads)
    _, info = eagle3_head.load(file, target, "heads")
    return Native(info.config, read_head(file, kind)[1], len(info.accuracy_KR))


def _check(reading: Reading, native: Native, out: Path) -> None:
    same = reading.state.keys() == native.state.keys() and all(
        torch.equal(reading.state[name], tensor) for name, tensor in native.state.items()
    )
    if not same or reading.config != native.config:
        raise RuntimeError(f"{out} reads as {reading.name}, {reading.config}, not as what was exported")


def speculators(native: Native, target: HFTarget, verifier: str | None) -> Written:
    """The format of vllm-project/speculators, which vLLM serves. ValueError: the target has no name."""
    if verifier is None:
        raise ValueError(
            f"to=speculators says which target the heads are for, and {target.name} is no hub id or folder "
            "that others could load: verifier=HUB_ID_OR_FOLDER"
        )
    c: Eagle3Config = native.config
    greedy = {"proposal_type": "greedy", "speculative_tokens": max(1, native.depths)}
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [greedy | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": target.model.config.architectures or []},
        },
        "transformer_layer_config": _layer(c),
        "draft_vocab_size": c.draft_vocab,
        "target_hidden_size": c.target_width if c.target_width != c.width else None,
        IDS: list(c.taps),
        "norm_before_residual": c.norm_before_residual,
        "norm_before_fc": c.norm_before_fc,
        "fc_norm": c.fc_norm,
        "norm_output": c.post_norm,
        "torch_dtype": _dtype(native),
    }
    # speculators' own loader leaves an embedding that is not in the file uninitialised.
    return config, {"embed_tokens.weight": target.embedding} | _eagle3_tensors(native, target, "layers.0.")


def sglang(native: Native, target: HFTarget, verifier: str | None) -> Written:
    """SpecForge's layout, which SGLang serves. ValueError: a variant that it does not have."""
    c: Eagle3Config = native.config
    flags = {name: getattr(c, name) for name in ("norm_before_residual", "norm_before_fc", "qk_norm")}
    if any(flags.values()) or len(c.taps) != 3:
        has = ", ".join(f"{name}={value}" for name, value in flags.items())
        raise ValueError(
            f"to=sglang: the head reads {len(c.taps)} layers and has {has}, expected 3 and false, "
            "all that SGLang's EAGLE-3 knows: to=speculators"
        )
    config = _layer(c) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": c.draft_vocab,
        # Ids of outputs: what enters layer i is what layer i - 1 gave.
        "eagle_config": {IDS: [tap - 1 for tap in c.taps]},
        "fc_norm": c.fc_norm,
        "norm_output": c.post_norm,
        "torch_dtype": _dtype(native),
    }
    if c.target_width != c.width:
        config["target_hidden_size"] = c.target_width
    return config, _eagle3_tensors(native, target, "midlayer.")


def vllm_medusa(native: Native, target: HFTarget, verifier: str | None) -> Written:
    """vLLM's Medusa. ValueError: heads that read tokens' embeddings, which it has no place for."""
    state, heads = native.state, native.config.heads
    if "root_KDD" in state:
        path = "and those of the drafted path (path_PDD)" if "path_PDD" in state else "(root_KDD)"
        raise ValueError(
            f"to=vllm-medusa: the heads read the root's embedding {path}, expected heads that read hidden "
            "states only, all that vLLM's Medusa knows: choose other heads=FILE, or train some: "
            "python -m specdec.train head=medusa head.hydra=false head.root=false"
        )
    tokens_U, vocab = state["tokens_U"].long(), target.vocab
    tensors = {"lm_heads.0.weight": _lm_head(target, tokens_U)}
    if len(tokens_U) < vocab:
        tensors["token_map"] = tokens_U
    for k in range(heads):
        tensors[f"blocks.{k}.layers.0.weight"] = state["weight_KDD"][k].T
        tensors[f"blocks.{k}.layers.0.bias"] = state["bias_KD"][k]
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": native.config.width,
        "vocab_size": vocab,
        "truncated_vocab_size": len(tokens_U),
        "num_heads": heads,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": True,
        "torch_dtype": _dtype(native),
    }
    return config, tensors


def _layer(c: Eagle3Config) -> dict[str, Any]:
    """The decoder layer as Llama's or Qwen3's config, in the words that transformers 4 and 5 both read."""
    rope = dict(c.rope_parameters)
    theta, scaled = rope.pop("rope_theta"), rope.get("rope_type", "default") != "default"
    return {
        "model_type": "qwen3" if c.qk_norm else "llama",
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": 1,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_length,
        "rms_norm_eps": c.eps,
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": c.target_vocab,
    }


def _eagle3_tensors(native: Native, target: HFTarget, prefix: str) -> dict[str, Tensor]:
    """The layer's under `prefix`, the LM head also where it is the target's, the vocabulary as offsets."""
    state = dict(native.state)
    tokens_U = state.pop("tokens_U").long()
    top = ("fc.", "fc_norm.", "input_norm.", "norm.", "lm_head.", "embed_tokens.")
    tensors = {name if name.startswith(top) else prefix + name: t for name, t in state.items()}
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = _lm_head(target, tokens_U)
    if len(tokens_U) < target.vocab:
        tensors["d2t"] = tokens_U - torch.arange(len(tokens_U))
        tensors["t2d"] = torch.zeros(target.vocab, dtype=torch.bool).index_fill_(0, tokens_U, True)
    return tensors


def _lm_head(target: HFTarget, tokens_U: Tensor) -> Tensor:
    """[U, D]: the target's rows. ValueError: it does more than multiply with them, which no format tells."""
    if not target.plain_lm_head:
        raise ValueError(
            f"the heads draft with the LM head of {target.name}, which scales, caps or adds a bias; expected "
            "an LM head of their own, all that other projects know: choose other heads=FILE, or train some: "
            "python -m specdec.train head=eagle3 head.shared_head=false, then to=speculators or to=sglang"
        )
    return target.lm_head[tokens_U.to(target.device)]


def _dtype(native: Native) -> str:
    return str(next(t.dtype for t in native.state.values() if t.is_floating_point())).removeprefix("torch.")


FORMATS: dict[str, tuple[str, Callable[[Native, HFTarget, str | None], Written], Callable[..., Reading]]] = {
    "speculators": (eagle3_head.KIND, speculators, lambda out, target: eagle3.read_eagle3(out, target)[0]),
    "sglang": (eagle3_head.KIND, sglang, lambda out, target: eagle3.read_eagle3(out, target)[0]),
    "vllm-medusa": (medusa.KIND, vllm_medusa, medusa.read_medusa),
}
