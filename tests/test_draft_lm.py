"""A draft distilled from the target: its file, its laws in the loop, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from drafts import (
    ACCURACY,
    ARCHITECTURES,
    HALF,
    deep,
    exact,
    in_16_bits,
    saved,
    text_logits,
    untrained,
)
from models import (
    PROMPTS,
    below,
    plain,
    requests,
    run,
    sharp_model,
    tiny,
    tokens_per_step,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.decode import Sequence
from specdec.proposers.draft_head import KIND, DraftInfo, load
from specdec.proposers.draft_lm import DraftLM
from specdec.transfer import in_dtype
from specdec.trees import Chain, Sampled, Static, TopK, TreePolicy


def test_a_draft_survives_a_file(tmp_path: Path) -> None:
    head = untrained(deep(), (0, 4), HALF)
    loaded, info = load(Path(saved(head, deep(), (0, 4), tmp_path)), deep())
    assert info == DraftInfo((0, 4), deep().name, deep().fingerprint, ACCURACY)
    assert loaded.tokens_U.tolist() == HALF
    assert all(torch.equal(tensor, loaded.stored()[name]) for name, tensor in head.stored().items())
    assert "layers.1.self_attn.q_proj.weight" in head.stored()
    assert not any("embed" in name or "lm_head" in name for name in head.stored())
    assert torch.equal(text_logits(loaded, deep(), [3, 1, 4]), text_logits(head, deep(), [3, 1, 4]))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_layers_of_the_target_are_a_perfect_draft(kind: str, tmp_path: Path) -> None:
    target, names = exact(kind), set(exact(kind).model.state_dict())
    path = saved(untrained(target), target, (0, 1), tmp_path)
    proposer, seqs = DraftLM(target, Chain(depth=3), heads=path), requests([[5, 6, 7]], 12)
    assert tokens_per_step(run(proposer, seqs)) == 4
    assert [s.new_tokens for s in seqs] == plain(target, requests([[5, 6, 7]], 12))
    assert set(target.model.state_dict()) == names
    assert len(target.layers) == 2
    shared = {p.data_ptr() for p in target.model.get_input_embeddings().parameters()}
    assert shared < {p.data_ptr() for p in proposer.draft.model.parameters()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_law_in_the_loop_is_that_of_training(kind: str, tmp_path: Path) -> None:
    """Of layers in another order, one of them twice: each must cache where it stands."""
    target, source, seen = exact(kind), (1, 0, 1), []
    head = untrained(target, source, HALF)
    proposer = DraftLM(target, TopK(widths=(2, 2)), heads=saved(head, target, source, tmp_path))
    expand = proposer.expand

    def checking(seqs: list[Sequence], trees: list, frontiers: list) -> list:
        laws = expand(seqs, trees, frontiers)
        for seq, tree, frontier, laws_of in zip(seqs, trees, frontiers, laws, strict=True):
            for node, law in zip(frontier, laws_of, strict=True):
                want_U = text_logits(head, target, seq.tokens + below(tree, node))[-1].log_softmax(-1)
                torch.testing.assert_close(law.logq_K, want_U, atol=1e-5, rtol=1e-5)
                assert law.tokens_K.tolist() == head.tokens_U.tolist()
                seen.append(node)
        return laws

    proposer.expand = checking
    run(proposer, requests(PROMPTS, [12, 6, 9, 12]))
    assert len(seen) > 50


@pytest.mark.parametrize(
    "tree", [Chain(depth=4), TopK(widths=(3, 2, 1)), Static(nodes=6), Sampled(widths=(2, 2))], ids=str
)
def test_the_text_is_that_of_plain_decoding(tree: TreePolicy, tmp_path: Path) -> None:
    path = saved(untrained(deep(), (0, 4), HALF), deep(), (0, 4), tmp_path)
    seqs = requests(PROMPTS, [24, 5, 1, 17])
    run(DraftLM(deep(), tree, heads=path), seqs)
    assert [s.new_tokens for s in seqs] == plain(deep(), requests(PROMPTS, [24, 5, 1, 17]))


def test_a_static_tree_is_fitted_at_every_depth(tmp_path: Path) -> None:
    path = saved(untrained(tiny()), tiny(), (0, 1), tmp_path)
    tree = Static(nodes=8, depth=6)
    assert DraftLM(tiny(), tree, heads=path).tree == tree.fitted(ACCURACY * 6) != tree


def test_the_assistant_of_transformers_has_the_whole_vocabulary(tmp_path: Path) -> None:
    path, ids = saved(untrained(exact(), tokens=HALF), exact(), (0, 1), tmp_path), torch.tensor([[5, 6, 7]])
    assistant = DraftLM(exact(), Chain(), heads=path).assistant
    assistant.set_attn_implementation("sdpa")
    want = sharp_model("llama")
    in_16_bits(want).model.set_attn_implementation("sdpa")
    got_1TV = assistant(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got_1TV, want(input_ids=ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_a_draft_in_16_bits_keeps_exact_rotary_frequencies(tmp_path: Path) -> None:
    head = in_dtype(untrained(deep(), (0, 4)), torch.bfloat16)
    theirs = deep().model.model.rotary_emb.inv_freq
    assert torch.equal(head.decoder.rotary_emb.inv_freq, theirs)
    assert theirs.dtype == torch.float32
    path = saved(head, deep(), (0, 4), tmp_path)
    proposer = DraftLM(deep().cast(torch.bfloat16), Chain(depth=3), heads=path)
    assert {p.dtype for p in (*head.parameters(), *proposer.draft.model.parameters())} == {torch.bfloat16}
    assert tokens_per_step(run(proposer, requests([[5, 6, 7]], 12))) >= 1


def broken(change: Callable[[dict[str, Tensor]], object] = len, **said: object) -> Callable[[Path], None]:
    """Rewrite a file with some of its tensors, or of what it says of itself, changed."""

    def rewrite(path: Path) -> None:
        tensors, info = load_file(path), DraftInfo((0, 1), tiny().name, tiny().fingerprint, ACCURACY)
        change(tensors)
        save_file(tensors, path, metadata={KIND: json.dumps(asdict(info) | said)})

    return rewrite


NORM = "norm.weight"
DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is no file of draft_lm heads"),
    "no head": (lambda path: save_file({"x": torch.zeros(1)}, path), "is no file of draft_lm heads"),
    "other target": (broken(fingerprint="0123", source=[29]), "was trained for .*fingerprint 0123"),
    "more said": (broken(colour="red"), "is no file of draft_lm heads .*colour"),
    "no such layer": (broken(source=[0, 2]), r"head.source is \[0, 2\], expected .* 0 to 1"),
    "fewer layers": (broken(source=[0]), "other tensors than expected: layers.1"),
    "NaN": (broken(lambda t: t[NORM][1].fill_(torch.nan)), "weights that are not finite"),
    "other width": (broken(lambda t: t.update({NORM: torch.zeros(7)})), r"norm.weight \(7,\), not"),
    "missing": (broken(lambda t: t.pop(NORM)), "norm.weight None, not"),
    "no vocabulary": (broken(lambda t: t.pop("tokens_U")), "tokens_U None, not"),
    "unsorted": (broken(lambda t: t["tokens_U"].copy_(t["tokens_U"].flip(0))), "vocabulary that is not"),
    "unknown token": (broken(lambda t: t["tokens_U"].add_(1)), "vocabulary that is not"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_foreign_drafts_are_refused(damage: Callable, message: str, tmp_path: Path) -> None:
    path = saved(untrained(tiny()), tiny(), (0, 1), tmp_path)
    DraftLM(tiny(), Chain(), heads=path)
    damage(Path(path))
    with pytest.raises(ValueError, match=message):
        DraftLM(tiny(), Chain(), heads=path)


@pytest.mark.parametrize(
    "two", [{"path": "a", "heads": "b"}, {"layers": 1, "heads": "b"}, {"path": "a", "layers": 1}], ids=str
)
def test_one_kind_of_draft_at_a_time(two: dict) -> None:
    with pytest.raises(ValueError, match=r"one of proposer.path=.*proposer.layers=.*proposer.heads="):
        DraftLM(tiny(), Chain(), **two)


def test_the_zoo_is_asked_where_nothing_is_given() -> None:
    with pytest.raises(ValueError, match="smollm2-135m-draft"):
        DraftLM(tiny(), Chain())
