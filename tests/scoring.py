"""Random trees, scored by a target and by the plain forwards of its model."""

import copy
import random
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec.target import HFTarget
from specdec.tree import TokenTree, Verdict

VOCAB, WINDOW, TOLERANCE = 120, 8, 1e-5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": WINDOW}
ALTERNATING = SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20}
ARCHITECTURES = {
    "llama": {},
    "qwen2": ALTERNATING | {"use_sliding_window": True},
    "qwen3": ALTERNATING | {"use_sliding_window": True, "head_dim": 16},
    "mistral": SLIDING,
    "phi3": SLIDING,
    "gemma2": SLIDING | {"head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": ALTERNATING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt_oss": SLIDING | EXPERTS | {"head_dim": 16, "num_local_experts": 4},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "head_dim": 16},
    "mixtral": SLIDING | {"num_local_experts": 4},
    "starcoder2": SLIDING,
    "cohere": {"logit_scale": 1.0},
    "cohere2": ALTERNATING | {"head_dim": 16, "logit_scale": 1.0},
    "diffllama": {},
    "modernbert-decoder": {"local_attention": WINDOW, "global_attn_every_n_layers": 2},
    "glm": {"head_dim": 16},
    "smollm3": {},
    "exaone4": ALTERNATING,
    "deepseek_v3": EXPERTS
    | MLA
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": GPT2,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},
}


def build(kind: str, **changes: object) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **SIZES | ARCHITECTURES.get(kind, {}) | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@cache
def reference_model(kind: str) -> PreTrainedModel:
    """The model with its own attention and with random weights that make logits of about 1."""
    model = build(kind)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else weight + 0.1 * noise)
    return model


def make_target(kind: str, needs_hidden: tuple = (), dtype: torch.dtype = torch.float32) -> HFTarget:
    return HFTarget(copy.deepcopy(reference_model(kind)).to(dtype), needs_hidden)


def random_tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(n)]


def random_tree(rng: random.Random, root: int, nodes: int) -> TokenTree:
    """Uneven branches; deep, because every second node hangs below the one before."""
    tree = TokenTree([root])
    while len(tree) < nodes:
        parent = len(tree) - 1 if len(tree) % 2 else rng.randrange(len(tree))
        token = rng.randrange(3, VOCAB)
        if tree.child(parent, token) is None:
            tree.add(token, parent)
    return tree


def path_to(tree: TokenTree, node: int) -> list[int]:
    """Nodes from below the root to `node`."""
    return [n for n in range(1, node + 1) if tree.ancestors_NN[node, n]]


@torch.no_grad()
def plain_logits(model: PreTrainedModel, text: list[int], tree: TokenTree) -> Tensor:
    """[N, V]: an ordinary forward over the text, which ends in the root, and each path to a leaf."""
    leaves = sorted(set(range(len(tree))) - set(tree.parents_N))
    paths = [[0, *path_to(tree, leaf)] for leaf in leaves]
    longest = max(map(len, paths))
    rows = [text[:-1] + [tree.tokens_N[n] for n in path] + [3] * (longest - len(path)) for path in paths]
    logits_PTV = model(input_ids=torch.tensor(rows), use_cache=False).logits[:, len(text) - 1 :]
    at = {
        node: logits_TV[t]
        for path, logits_TV in zip(paths, logits_PTV, strict=True)
        for t, node in enumerate(path)
    }
    return torch.stack([at[node] for node in range(len(tree))])


def assert_close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    error = (got.float() - want.float()).abs().max().item()
    assert error <= tolerance, f"off by {error:.1e}, more than {tolerance:.0e}"


def check_rounds(target: HFTarget, reference: PreTrainedModel, lengths: list[int], until: int = 44) -> None:
    """The property: scores of every node are those of plain forwards, up to texts of `until` tokens.

    Sequences end one by one, so that the slots in use aren't contiguous.
    """
    rng = random.Random(0)
    texts = [random_tokens(rng, length) for length in lengths]
    seqs = [SimpleNamespace(slot=slot) for slot in range(len(texts))]
    target.reserve(len(texts), 64)
    for seq, text in zip(seqs, texts, strict=True):
        target.prefill(seq.slot, text[:-1])
    while live := [seq for seq in seqs if len(texts[seq.slot]) < until]:
        trees = [random_tree(rng, texts[seq.slot][-1], rng.randrange(2, 12)) for seq in live]
        logits_BNV = target.score(live, trees).logits_BNV
        for seq, tree, logits_NV in zip(live, trees, logits_BNV, strict=True):
            assert_close(logits_NV[: len(tree)], plain_logits(reference, texts[seq.slot], tree))
        verdicts = [
            Verdict(path_to(tree, rng.randrange(1, len(tree))), rng.randrange(3, VOCAB)) for tree in trees
        ]
        target.commit(live, verdicts)
        for seq, tree, verdict in zip(live, trees, verdicts, strict=True):
            texts[seq.slot] += verdict.emitted(tree)
