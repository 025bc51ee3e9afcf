"""A draft model: its cache, its laws, its vocabulary and tokenizer."""

import copy
from pathlib import Path

import pytest
import torch
from models import (
    PROMPTS,
    SAMPLED,
    VOCAB,
    below,
    check_draft_cache,
    plain,
    requests,
    run,
    tiny,
    tiny_model,
    tokens_per_step,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from specdec.decode import Sequence
from specdec.loading import random_model
from specdec.proposers.draft_lm import DraftLM, check_same_tokenizer, first_layers
from specdec.target import HFTarget
from specdec.text import Bytes
from specdec.tree import TokenTree
from specdec.trees import Chain, Sampled, Static, TopK, TreePolicy

POLICIES = {
    "chain": Chain(depth=3),
    "heuristic": Chain(depth=3, length="heuristic"),
    "ends where unsure": TopK(depth=3, widths=(2, 2, 1), length="confidence", threshold=0.3),
    "static": Static(nodes=7),
    "sampled": Sampled(depth=3, widths=(2, 2, 1)),
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_draft_s_cache_is_that_of_the_text(policy: str, layers: int) -> None:
    """Also where neighbours draft deeper, longer, or are done."""
    proposer = DraftLM(tiny(), POLICIES[policy], layers=layers)
    seqs = requests(PROMPTS, [24, 30, 9, 26])
    run(proposer, seqs, SAMPLED)
    check_draft_cache(proposer, [s for s in seqs if s.request != 2])


def test_a_neighbour_that_drafts_on_leaves_the_rows_of_a_complete_tree_alone() -> None:
    """The one in the middle drafts every second step only, and then lags further behind than the others."""

    class Uneven(DraftLM):
        def levels(self, seq: Sequence) -> int:
            return 3 if seq.request != 1 else len(seq.history) % 2

    proposer, seqs = Uneven(tiny(), Chain(depth=3), layers=2), requests([[5, 6, 7]] * 3, 20)
    alone = requests([[5, 6, 7]] * 3, 20)
    for seq in alone:
        run(proposer, [seq])
    run(proposer, seqs)
    check_draft_cache(proposer, seqs)
    assert [s.history for s in seqs] == [s.history for s in alone]


def test_a_drawn_tree_draws_from_the_most_likely_tokens() -> None:
    few, whole = (DraftLM(tiny(), Sampled(depth=1, widths=(4,)), layers=1, top_k=k) for k in (5, 0))
    logits_XV = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    q_XV, p_XV = few.log_laws(logits_XV).exp(), whole.log_laws(logits_XV).exp()
    kept_XV = p_XV >= p_XV.topk(5).values[:, -1:]
    assert torch.equal(q_XV > 0, kept_XV)
    assert torch.allclose(q_XV, p_XV * kept_XV / (p_XV * kept_XV).sum(-1, keepdim=True))
    assert torch.equal(DraftLM(tiny(), Chain(depth=1), layers=1, top_k=5).log_laws(logits_XV).exp(), p_XV)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_draft_s_laws_are_those_of_a_plain_forward(temperature: float) -> None:
    proposer = DraftLM(tiny(), Sampled(depth=2, widths=(2, 1)), layers=1, temperature=temperature)
    reference = first_layers(tiny_model(), 1)
    grow, checked = proposer.propose, []

    def checking(seqs: list[Sequence]) -> list[TokenTree]:
        trees = grow(seqs)
        for seq, tree in zip(seqs, trees, strict=True):
            for node in (n for n in range(len(tree)) if tree.q(n) is not None):
                text = seq.tokens + below(tree, node)
                logits_V = reference(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
                want_V = (logits_V / temperature).softmax(-1)
                checked.append(torch.allclose(tree.q(node), want_V, atol=1e-5))
        return trees

    proposer.propose = checking
    run(proposer, requests(PROMPTS, 10), SAMPLED)
    assert len(checked) > 20
    assert all(checked)


def saved(folder: Path, vocab: int, words: list[str] | None = None, seed: int = 0) -> str:
    """A draft model in a folder, with a tokenizer of these words if there are any."""
    random_model(config={"vocab_size": vocab}, seed=seed, device="cpu").model.save_pretrained(folder)
    if words:
        tokenizer_of(words).save_pretrained(folder)
    return str(folder)


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


@pytest.mark.parametrize("vocab", [VOCAB - 4, VOCAB, VOCAB + 9])
@pytest.mark.parametrize("policy", [Chain(depth=3), Sampled(depth=2, widths=(2, 2))])
def test_a_padded_vocabulary_is_masked(vocab: int, policy: TreePolicy, tmp_path: Path) -> None:
    proposer = DraftLM(tiny(), policy, path=saved(tmp_path, vocab, seed=1))
    grow, drafted, laws = proposer.propose, [], []

    def watching(seqs: list[Sequence]) -> list[TokenTree]:
        trees = grow(seqs)
        drafted.extend(token for tree in trees for token in tree.tokens_N[1:])
        laws.extend(q_V for tree in trees for q_V in tree.q_rows)
        return trees

    proposer.propose = watching
    seqs = requests([[31, 30, 29], [5, 31]], 40)
    run(proposer, seqs, SAMPLED)
    assert [s.new_tokens for s in seqs] == plain(tiny(), requests([[31, 30, 29], [5, 31]], 40), SAMPLED)
    assert max(drafted) < min(vocab, VOCAB)
    assert all(q_V.shape == (VOCAB,) and float(q_V.sum()) == pytest.approx(1, abs=1e-5) for q_V in laws)
    assert not any(q_V[vocab:].any() for q_V in laws)


def test_a_draft_with_another_tokenizer_is_refused_with_a_token(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(VOCAB)]
    swapped = [*words[:7], "w8", "w7", *words[9:]]
    target = copy.copy(tiny())
    target.tokenizer = tokenizer_of(words)
    DraftLM(target, Chain(), path=saved(tmp_path / "same", VOCAB, words))
    with pytest.raises(ValueError, match=r"swapped has another tokenizer .*'w7' is 8 there and 7 here"):
        DraftLM(target, Chain(), path=saved(tmp_path / "swapped", VOCAB, swapped))
    check_same_tokenizer(Bytes(), None, "draft")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"path": "somewhere", "layers": 1}, "path=somewhere, layers=1: expected one of"),
        ({"layers": 0}, "proposer.layers is 0, expected 1 to 2"),
        ({"layers": 3}, "proposer.layers is 3, expected 1 to 2"),
        ({"layers": 1, "temperature": 0.0}, "proposer.temperature is 0.0.*proposer.temperature=1"),
        ({"layers": 1, "top_k": -1}, "proposer.top_k is -1.*proposer.top_k=256"),
        ({"path": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_draft_lm_refuses_wrong_values(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftLM(tiny(), Chain(), **wrong)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3_text"])
def test_the_first_layers_share_the_weights_and_leave_the_model_whole(kind: str) -> None:
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 64} if kind == "opt" else {}
    model = random_model(kind, sizes, device="cpu").model
    ids, names = torch.tensor([[5, 6, 7, 8]]), set(model.state_dict())
    before = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    target = HFTarget(model)
    cut = DraftLM(target, Chain(), layers=1).draft.model
    assert {p.data_ptr() for p in cut.parameters()} < {p.data_ptr() for p in model.parameters()}
    assert set(model.state_dict()) == names
    assert model.config.get_text_config().num_hidden_layers == 2
    proposer, seqs = DraftLM(target, Chain(depth=3), layers=2), requests([[5, 6, 7]], 12)
    assert tokens_per_step(run(proposer, seqs)) == 4
    model.set_attn_implementation("sdpa")
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, before.logits, atol=1e-5)
