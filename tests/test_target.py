"""HFTarget against the plain forward of many architectures: every node of a tree, over many commits."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from scoring import (
    ARCHITECTURES,
    SIZES,
    VOCAB,
    assert_close,
    build,
    check_rounds,
    make_target,
    path_to,
    plain_logits,
    random_tokens,
    random_tree,
    reference_model,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specdec import target as target_module
from specdec.cache import SlotCache
from specdec.target import HFTarget
from specdec.tree import TokenTree, TreeBatch, Verdict
from specdec_kernels import TreeMask


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


def test_laws_of_a_drawn_tree_are_left_to_the_rule() -> None:
    """One that nobody may look at changes nothing."""
    seq, tree, target = SimpleNamespace(slot=0), TokenTree.chain([5, 6, 7]), make_target("llama")
    target.reserve(1, 8)
    want_1NV = target.score([seq], [tree]).logits_BNV
    tree.draw_children_from(0, None)
    assert torch.equal(target.score([seq], [tree]).logits_BNV, want_1NV)


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
