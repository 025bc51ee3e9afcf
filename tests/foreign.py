"""EAGLE-3 heads as other projects write them, and a target that only one reading of such a head fits.

The target always says the token SHIFT further. The upper half of its residual stream holds the token only
where layer 4 begins: layer 3 writes it there, and layer 4 puts another in its place.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from specdec.checkpoints.export import export
from specdec.config import as_target
from specdec.loading import fingerprint, random_model
from specdec.proposers.eagle3_head import Eagle3Config, Eagle3Info
from specdec.proposers.headfile import write_head
from specdec.target import HFTarget
from specdec.text import Bytes

VOCAB, WIDTH, LAYERS, SHIFT = 32, 64, 8, 5
TAPS = (2, 4, 5)
LATER = torch.arange(VOCAB).add(SHIFT) % VOCAB  # what the target says after each token
IDS = "eagle_aux_hidden_state_layer_ids"


class Folded(Bytes):
    """Bytes within the target's vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [byte % VOCAB for byte in super().encode(text)]


@cache
def shifting() -> HFTarget:
    """The target described above."""
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    loaded = random_model(config=sizes, device="cpu")
    one_VD = torch.eye(VOCAB, WIDTH)
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        right, wrong = torch.eye(VOCAB), torch.eye(VOCAB).roll(1, 0)
        # A unit gives silu(x) x of what it reads: one dimension at a root mean square of 1, then two.
        for i, added, at in ((3, right, WIDTH**0.5), (4, 2 * wrong - right, (WIDTH / 2) ** 0.5)):
            mlp = loaded.model.model.layers[i].mlp
            mlp.gate_proj.weight.copy_(torch.eye(2 * WIDTH, WIDTH))
            mlp.up_proj.weight.copy_(torch.eye(2 * WIDTH, WIDTH))
            mlp.down_proj.weight[VOCAB:, :VOCAB] = added / (F.silu(torch.tensor(at)) * at)
        loaded.model.model.embed_tokens.weight.copy_(one_VD)
        loaded.model.lm_head.weight[LATER] = 4 * one_VD
    return replace_tokenizer(as_target(replace(loaded, fingerprint=fingerprint(loaded.model))))


def replace_tokenizer(target: HFTarget) -> HFTarget:
    target.tokenizer = Folded()
    return target


def config(**changes: Any) -> Eagle3Config:
    """A head for `shifting`."""
    sizes = {"width": WIDTH, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_width": 96}
    target = {"taps": TAPS, "target_width": WIDTH, "target_vocab": VOCAB, "draft_vocab": 28}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_length": 2048}
    flags = {"fc_norm": False, "post_norm": False}
    return Eagle3Config(**sizes | target | rope | flags | changes)


def random_state(c: Eagle3Config, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random weights in native names."""
    D, E, T = c.width, c.head_dim, c.target_width
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (D, len(c.taps) * T)}
    shapes |= {f"fc_norm.{i}.weight": (T,) for i in range(len(c.taps)) if c.fc_norm}
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm", "norm")
    shapes |= {f"{name}.weight": (D,) for name in norms}
    shapes |= {"input_norm.weight": (len(c.taps) * T,)} if c.norm_before_fc else {}
    shapes |= {f"self_attn.{name}_norm.weight": (E,) for name in "qk" if c.qk_norm}
    rows = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
    shapes |= {f"self_attn.{n}_proj.weight": (rows[n] * E, 2 * D) for n in "qkv"}
    shapes |= {"self_attn.o_proj.weight": (D, c.heads * E), "mlp.down_proj.weight": (D, c.mlp_width)}
    shapes |= {f"mlp.{n}_proj.weight": (c.mlp_width, D) for n in ("gate", "up")}
    shapes |= {} if c.shared_head else {"lm_head.weight": (c.draft_vocab, D)}
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    tokens_U = torch.randperm(c.target_vocab, generator=draw)[: c.draft_vocab].sort().values
    return state | {"tokens_U": tokens_U.int()}


def right_state(c: Eagle3Config) -> dict[str, Tensor]:
    """Weights that are right about `shifting` if read as `c` says, and mostly wrong if not.

    From the one-hot vector of the token before the root, the layer makes that of the root: it subtracts the
    one and adds the other, at the scale that the residual has. With `post_norm` it adds a large number in a
    dimension that only the norm behind the layer erases.
    """
    state = {name: t.float().zero_() if t.is_floating_point() else t for name, t in random_state(c).items()}
    eye, large, junk = torch.eye(VOCAB), 20.0 if c.post_norm else 0.0, VOCAB
    scale, said = (4.0, 100.0) if c.norm_before_residual else (1.0, 1.0)
    for name in ("hidden_norm", "post_attention_layernorm"):
        state[f"{name}.weight"].fill_(1.0)
    state["norm.weight"][:VOCAB] = (scale**2 + large**2) ** 0.5 / WIDTH**0.5 if c.post_norm else 1.0
    state["hidden_norm.weight"].fill_(scale / WIDTH**0.5 if c.norm_before_residual else 1.0)
    state["fc.weight"][:VOCAB, WIDTH + VOCAB : 2 * WIDTH] = said * eye
    for name in ("gate_proj", "up_proj"):
        state[f"mlp.{name}.weight"][:VOCAB, :VOCAB] = eye
        state[f"mlp.{name}.weight"][VOCAB, :VOCAB] = 1.0
    unit = F.silu(torch.tensor(WIDTH**0.5)) * WIDTH**0.5
    state["mlp.down_proj.weight"][:VOCAB, :VOCAB] = scale * (eye[LATER].T - eye) / unit
    state["mlp.down_proj.weight"][junk, VOCAB] = large / unit
    state["lm_head.weight"][:, :VOCAB] = 3 * eye[(state["tokens_U"].long() - SHIFT) % VOCAB]
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether states are equal in names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def layer_config(c: Eagle3Config) -> dict[str, Any]:
    """Llama's, or Qwen3's, whose heads are 128 wide unless they say how wide."""
    return ({"head_dim": c.head_dim} if c.qk_norm else {}) | {
        "hidden_act": "silu",
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.max_length,
        "model_type": "qwen3" if c.qk_norm else "llama",
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "num_hidden_layers": 1,
        "rms_norm_eps": c.eps,
        "vocab_size": c.target_vocab,
    }


def offsets(state: dict[str, Tensor], c: Eagle3Config) -> dict[str, Tensor]:
    """d2t and t2d."""
    tokens_U = state["tokens_U"].long()
    t2d_V = torch.zeros(c.target_vocab, dtype=torch.bool)
    t2d_V[tokens_U] = True
    return {"d2t": tokens_U - torch.arange(len(tokens_U)), "t2d": t2d_V}


def named(state: dict[str, Tensor], c: Eagle3Config, layer: str) -> dict[str, Tensor]:
    """With the decoder layer's tensors under another name, and the vocabulary as offsets."""
    top = ("fc", "input_norm.", "norm.", "lm_head", "embed_tokens")
    tensors = {n if n.startswith(top) else layer + n: t for n, t in state.items() if n != "tokens_U"}
    return tensors | offsets(state, c)


def write(folder: Path, said: dict[str, Any], tensors: dict[str, Tensor], name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said))
    tensors = {n: t.clone().contiguous() for n, t in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / name)
    return str(folder)


def official(folder: Path, c: Eagle3Config, state: dict[str, Tensor], **said: Any) -> str:
    """SafeAILab's: no layer is named, positions are Llama's default unless a base is."""
    plain = layer_config(c) | {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": c.draft_vocab}
    return write(folder, plain | said, named(state, c, "midlayer."), "pytorch_model.bin")


def specforge(folder: Path, c: Eagle3Config, state: dict[str, Tensor], **said: Any) -> str:
    """Layers by their outputs; no embedding."""
    plain = layer_config(c) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": c.draft_vocab,
        "eagle_config": {IDS: [tap - 1 for tap in c.taps]},
        "head_dim": c.head_dim,
        "rope_theta": c.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "fc_norm": c.fc_norm,
        "norm_output": c.post_norm,
        "torch_dtype": "bfloat16",
    }
    return write(folder, plain | said, named(state, c, "midlayer."), "model.safetensors")


def nvidia(folder: Path, c: Eagle3Config, state: dict[str, Tensor], **said: Any) -> str:
    """Model Optimizer's: a template with many nulls, layers by their outputs and in any order, no t2d."""
    nested = {IDS: [tap - 1 for tap in c.taps][::-1], "use_aux_hidden_state": True}
    nested |= {
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "norm_before_fc": c.norm_before_fc,
    }
    plain = layer_config(c) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": None,
        "draft_vocab_size": c.draft_vocab,
        "head_dim": None,
        "mlp_bias": None,
        "rope_scaling": {"rope_type": "default", "rope_theta": 1e4},
        "rope_theta": None,
        "eagle_config": nested,
    }
    tensors = named(state, c, "layers.0.")
    tensors.pop("t2d")
    return write(folder, plain | said, tensors, "model.safetensors")


def speculators(folder: Path, c: Eagle3Config, state: dict[str, Tensor], **said: Any) -> str:
    """RedHat's: layers by their inputs, a nested layer that leaves out the defaults of its type."""
    layer = {k: v for k, v in layer_config(c).items() if (k, v) not in (("hidden_act", "silu"),)}
    plain = {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": c.draft_vocab,
        IDS: list(c.taps),
        "norm_before_residual": c.norm_before_residual,
        "norm_before_fc": c.norm_before_fc,
        "fc_norm": c.fc_norm,
        "norm_output": c.post_norm,
        "speculators_config": {"algorithm": "eagle3"},
        "speculators_model_type": "eagle3",
        "target_hidden_size": None,
        "transformer_layer_config": layer | {"rope_parameters": dict(c.rope_parameters)},
    }
    return write(folder, plain | said, named(state, c, "layers.0."), "model.safetensors")


def deepspec(folder: Path, c: Eagle3Config, state: dict[str, Tensor], **said: Any) -> str:
    """DeepSeek's: Qwen3's layer, layers by their outputs, the whole vocabulary."""
    plain = layer_config(c) | {
        "architectures": ["Qwen3Eagle3Model"],
        "layer_types": ["full_attention"],
        "num_target_layers": LAYERS,
        "rope_parameters": dict(c.rope_parameters),
        "target_layer_ids": [tap - 1 for tap in c.taps],
        "ttt_length": 7,
    }
    tensors = {n: t for n, t in named(state, c, "layers.0.").items() if n not in ("d2t", "t2d")}
    return write(folder, plain | said, tensors, "model.safetensors")


DIALECTS = {"official": official, "SpecForge": specforge, "NVIDIA": nvidia, "speculators": speculators}

# What heads of this project's are exported as.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
EXPORTED: dict[str, dict[str, Any]] = {
    "3": {},
    "3.1": {"fc_norm": True, "post_norm": True},
    "normed residual": {"norm_before_residual": True},
    "the target's LM head": {"shared_head": True},
    "the whole vocabulary": {"draft_vocab": VOCAB},
    "scaled positions": {"rope_parameters": LLAMA3},
    "five layers": {"taps": (0, 1, 2, 4, 7)},
    "joint norm": {"norm_before_fc": True},
    "Qwen3's layer": {"qk_norm": True},
}


def native(path: Path, c: Eagle3Config) -> Path:
    """A file of this project's with a random head for `shifting`."""
    info = Eagle3Info(c, shifting().name, shifting().fingerprint, [[0.5]] * 4)
    write_head(path, "eagle3", vars(info) | {"config": vars(c)}, random_state(c))
    return path


def exported(c: Eagle3Config, to: str, folder: Path, verifier: str = "someone/target") -> Path:
    folder.mkdir(exist_ok=True)
    export(native(folder / "head.safetensors", c), to, shifting(), folder / "out", verifier)
    return folder / "out"
