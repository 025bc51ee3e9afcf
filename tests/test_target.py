"""HFTarget against the plain forward of many architectures: every node of a tree, over many commits."""

import copy
import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from specdec import target as target_module
from specdec.attention import attend
from specdec.cache import SlotCache
from specdec.target import HFTarget
from specdec.tree import TokenTree, TreeBatch, Verdict
from specdec_kernels import TreeMask

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


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_of_trees_are_those_of_plain_forwards(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = reference_model(kind)
    target = make_target(kind)
    monkeypatch.setattr(target_module, "PREFILL_CHUNK", 7)
    check_rounds(target, reference, [20])
    check_rounds(target, reference, [20, 31, 9])
    ids = torch.tensor([random_tokens(random.Random(1), 20)])
    assert reference(input_ids=ids).logits.std() > 0.1, "logits are too flat to prove anything"


def siblings_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def ancestors(batch: TreeBatch) -> Tensor:
        depth_BN = batch.depth_BN
        return depth_BN.unsqueeze(2) >= depth_BN.unsqueeze(1)

    monkeypatch.setattr(TreeBatch, "ancestors_BNN", property(ancestors))


def depth_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = TreeBatch.pack

    def packed(*args: object) -> TreeBatch:
        batch = pack(*args)
        batch.depth_BN[:, 1:] += 1
        return batch

    monkeypatch.setattr(TreeBatch, "pack", packed)


def commits_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = SlotCache.keep
    monkeypatch.setattr(
        SlotCache, "keep", lambda c, s, rows: keep(c, s, [[0, *reversed(r[1:])] for r in rows])
    )


def commits_without_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = SlotCache.keep
    monkeypatch.setattr(SlotCache, "keep", lambda c, s, rows: keep(c, s, [r[1:] for r in rows]))


def counts_the_window_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = TreeMask.visible

    def by_rows(mask: TreeMask, length: int, window: int | None = None) -> Tensor:
        T, C = mask.ancestors_BTC.shape[1:]
        row_BT = mask.prefix_B.unsqueeze(1) + torch.arange(C - T, C)
        near_BTL = row_BT.unsqueeze(2) - torch.arange(length) < (window or length)
        return visible(mask, length) & near_BTL

    monkeypatch.setattr(TreeMask, "visible", by_rows)


@pytest.mark.parametrize(
    "bug",
    [
        siblings_see_each_other,
        depth_is_off_by_one,
        commits_out_of_order,
        commits_without_the_root,
        counts_the_window_in_rows,
    ],
)
def test_the_property_catches(bug: object, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("mistral")
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="off by"):
        check_rounds(target, reference_model("mistral"), [20])


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma2"])
def test_scoring_bit_by_bit_is_scoring_at_once(kind: str) -> None:
    rng, target = random.Random(2), make_target(kind, ("final",))
    seqs, texts = (
        [SimpleNamespace(slot=0), SimpleNamespace(slot=1)],
        [random_tokens(rng, 14), random_tokens(rng, 9)],
    )
    trees = [random_tree(rng, texts[0][-1], 11), random_tree(rng, texts[1][-1], 7)]
    target.reserve(2, 64)
    for seq, text in zip(seqs, texts, strict=True):
        target.prefill(seq.slot, text[:-1])
    whole = target.score(seqs, trees)
    target.cache._stacks = {heads: torch.zeros_like(stack) for heads, stack in target.cache._stacks.items()}
    for seq, text in zip(seqs, texts, strict=True):
        target.cache.lengths[seq.slot] = 0
        target.prefill(seq.slot, text[:-1])
    parts = []
    for since, until in [(0, 1), (1, 4), (4, 11)]:
        grown = [TokenTree(t.tokens_N[:until], t.parents_N[:until], [], t.q_row_N[:until]) for t in trees]
        parts.append((target.score(seqs, grown, since), until - since))
    for b, tree in enumerate(trees):
        logits_NV = torch.cat([part.logits_BNV[b, :rows] for part, rows in parts])
        assert_close(logits_NV[: len(tree)], whole.logits_BNV[b, : len(tree)])
        final_ND = torch.cat([part.hidden["final"][b, :rows] for part, rows in parts])
        assert_close(final_ND[: len(tree)], whole.hidden["final"][b, : len(tree)])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "cohere", "olmo2", "granite", "gpt_oss"])
def test_taps_are_what_their_names_say(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "PREFILL_CHUNK", 5)
    reference, target = reference_model(kind), make_target(kind, (0, 2, "final"))
    text, read = random_tokens(random.Random(3), 17), []
    handle = reference.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: read.append(args[0][0])
    )
    with torch.no_grad():
        own = reference(input_ids=torch.tensor([text]), use_cache=False, output_hidden_states=True)
    handle.remove()
    want = {0: own.hidden_states[0][0], 2: own.hidden_states[2][0], "final": read[0]}
    target.reserve(1, 32)
    prefilled = target.prefill(0, text[:12])
    scored = target.score([SimpleNamespace(slot=0)], [TokenTree.chain(text[12:])]).hidden
    for tap, want_TD in want.items():
        assert_close(prefilled[tap], want_TD[:12])
        assert_close(scored[tap][0, : len(text) - 12], want_TD[12:])


def test_an_empty_prefix_has_empty_taps() -> None:
    target = make_target("llama", (1, "final"))
    target.reserve(1, 8)
    assert {tap: tuple(h.shape) for tap, h in target.prefill(0, []).items()} == {1: (0, 48), "final": (0, 48)}
    check_rounds(target, reference_model("llama"), [1])


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, seq = random.Random(4), SimpleNamespace(slot=0)
    text = random_tokens(rng, 19)
    tree = random_tree(rng, text[-1], 5)
    scores = {}
    for padded in (True, False):
        target = make_target("mistral", dtype=torch.bfloat16)
        if not padded:
            monkeypatch.setattr(target, "padded", lambda rows, batch=1: rows)
        target.reserve(1, 64)
        target.prefill(0, text[:-1])
        scores[padded] = target.score([seq], [tree]).logits_BNV[0]
    assert scores[True].shape[0] == 8
    assert scores[False].shape[0] == 5
    assert_close(scores[True][:5], scores[False], 0.05)
    assert_close(scores[True][:5], plain_logits(reference_model("mistral"), text, tree), 0.2)


def poison(target: HFTarget) -> None:
    for stack in target.cache._stacks.values():
        stack.fill_(torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_nobody_wrote_are_never_read(dtype: torch.dtype) -> None:
    rng, seq, target = random.Random(5), SimpleNamespace(slot=0), make_target("gpt_oss", dtype=dtype)
    text = random_tokens(rng, 20)
    target.reserve(1, 64)
    with torch.inference_mode():
        target.prefill(0, text[:1])
        poison(target)
    target.cache.lengths[0] = 0
    target.prefill(0, text[:-1])
    for _ in range(3):
        tree = random_tree(rng, text[-1], 9)
        assert not target.score([seq], [tree]).logits_BNV.isnan().any()
        verdict = Verdict(path_to(tree, len(tree) - 1), 3)
        target.commit([seq], [verdict])
        text += verdict.emitted(tree)


def test_reserve_forgets_nan_of_an_earlier_request() -> None:
    target = make_target("mistral")
    check_rounds(target, reference_model("mistral"), [20, 31, 9])
    with torch.inference_mode():
        poison(target)
    check_rounds(target, reference_model("mistral"), [20, 31, 9])


def test_a_tree_larger_than_the_spare_rows_makes_the_cache_grow() -> None:
    rng, target = random.Random(6), make_target("llama")
    text = random_tokens(rng, 12)
    tree = random_tree(rng, text[-1], target_module.SLACK + 40)
    target.reserve(1, 16)
    target.prefill(0, text[:-1])
    logits_NV = target.score([SimpleNamespace(slot=0)], [tree]).logits_BNV[0]
    assert_close(logits_NV, plain_logits(reference_model("llama"), text, tree))


def test_nodes_past_the_last_position_are_harmless() -> None:
    model = build("gpt2", n_positions=16)
    reference, target = copy.deepcopy(model), HFTarget(model)
    text = random_tokens(random.Random(7), 15)
    target.reserve(1, 16)
    target.prefill(0, text[:-1])
    logits_NV = target.score([SimpleNamespace(slot=0)], [TokenTree.chain([text[-1], 5, 6, 7])]).logits_BNV[0]
    assert_close(logits_NV[:2], plain_logits(reference, text, TokenTree.chain([text[-1], 5])))


def test_reserve_refuses_more_than_the_model_knows() -> None:
    target = make_target("llama")
    target.reserve(1, 256)
    with pytest.raises(ValueError, match=r"257 tokens .* exceed the model's 256.*max_new_tokens="):
        target.reserve(1, 257)


def test_longrope_ends_where_cached_angles_would_change() -> None:
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 10000.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64} | factors
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert HFTarget(model).max_length == 64


def test_the_model_s_own_attention_still_works() -> None:
    reference, target = reference_model("mistral"), make_target("mistral")
    ids = torch.tensor([random_tokens(random.Random(8), 20)])
    target.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert_close(target.model(input_ids=ids).logits, reference(input_ids=ids).logits)
    target.model.set_attn_implementation(target_module.ATTENTION)
    check_rounds(target, reference, [20])


def test_a_multimodal_wrapper_is_scored_by_its_language_model() -> None:
    text = SIZES | ARCHITECTURES["gemma3_text"] | {"vocab_size": VOCAB}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        image_token_index=2,
    )
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    target = HFTarget(copy.deepcopy(reference), (1,))
    check_rounds(target, reference, [20])
    assert target.prefill(0, [5, 6])[1].shape == (2, 48)


LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
REFUSED = {
    "mamba": ({"state_size": 4}, "state that can't be rolled back"),
    "qwen3_next": (LINEAR | EXPERTS | {"num_experts": 4, "head_dim": 16}, "state that can't be rolled back"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, "state that can't be rolled back"),
    "bloom": ({"n_layer": 3, "n_head": 4}, "attention registry in 0 of 3 layers"),
    "bert": ({}, "both directions"),
    "stablelm": ({"partial_rotary_factor": 0.5}, "no tree"),
    "bart": ({"d_model": 48, "decoder_layers": 3, "decoder_attention_heads": 4}, "counts positions itself"),
    "phimoe": (SLIDING | {"num_local_experts": 2}, "window of 8 by a mask of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_can_t_score_trees_is_refused(kind: str) -> None:
    changes, problem = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"{problem}.*target\.path"):
        HFTarget(build(kind, **changes))


def test_an_encoder_decoder_is_refused() -> None:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(ValueError, match=r"encoder-decoder.*target\.path"):
        HFTarget(model)


def test_attention_that_bypasses_the_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(module: LlamaAttention, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return module.o_proj(module.q_proj(hidden_states)), None

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM calls the attention registry in 0 of 3 layers"):
        make_target("llama")


@pytest.mark.parametrize(
    "extra", [{"position_bias": torch.zeros(1)}, {"tree_mask": None}, {"attention_mask": 1}]
)
def test_attention_with_a_bias_or_mask_of_its_own_is_refused(extra: dict) -> None:
    one = torch.zeros(1, 1, 1, 4)
    zero_11 = torch.zeros(1, 1, dtype=torch.long)
    mask = TreeMask(zero_11[0], zero_11, torch.ones(1, 1, 1, dtype=torch.bool))
    fine = {"attention_mask": None, "tree_mask": mask}
    assert attend(torch.nn.Identity(), one, one, one, **fine)[0].shape == (1, 1, 1, 4)
    with pytest.raises(ValueError, match="Identity calls attention in a way"):
        attend(torch.nn.Identity(), one, one, one, **fine | extra)
