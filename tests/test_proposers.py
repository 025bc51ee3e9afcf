"""Each proposer on its own: lookup against a slow reference, the draft and its cache, files of heads."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    ACCURACY,
    PROMPTS,
    SAMPLED,
    VOCAB,
    check_draft_cache,
    cyclic,
    cyclic_heads,
    info,
    plain,
    requests,
    run,
    save_eagle,
    save_heads,
    tiny,
    tiny_model,
    tokens_per_step,
    untrained_eagle,
    untrained_heads,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specdec.decode import Sequence
from specdec.loading import random_model
from specdec.proposers import draft_head, eagle3_head
from specdec.proposers.draft_lm import DraftLM, check_same_tokenizer, first_layers
from specdec.proposers.medusa import Medusa
from specdec.proposers.medusa_heads import MedusaHeads
from specdec.proposers.ngram import NGram
from specdec.rng import Philox
from specdec.target import HFTarget
from specdec.text import Bytes
from specdec.tree import TokenTree
from specdec.trees import Chain, Sampled, Static, TopK, TreePolicy
from specdec.zoo import zoo_file


def ngram(tree: TreePolicy | None = None, **settings: object) -> NGram:
    return NGram(cyclic(), tree or Chain(depth=4), **settings)


def propose(proposer: NGram, text: list[int]) -> TokenTree:
    return proposer.propose([Sequence(0, list(text), 100, Philox(1))])[0]


def occurrences(text: list[int], max_n: int, min_n: int, recent: bool, matches: int) -> list[int]:
    """Where the text goes on after the suffix, as one would say it."""
    for n in range(min(max_n, len(text) - 1), min_n - 1, -1):
        ends = [i for i in range(n, len(text)) if text[i - n : i] == text[-n:]]
        if ends:
            return (ends[::-1] if recent else ends)[:matches]
    return []


texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)
lookups = {
    "min_n": st.integers(1, 3),
    "more": st.integers(0, 2),
    "recent": st.booleans(),
    "matches": st.integers(1, 4),
}


@given(text=texts, **lookups)
@settings(deadline=None)
def test_lookup_finds_the_longest_suffix(
    text: list[int], min_n: int, more: int, recent: bool, matches: int
) -> None:
    prefer = "recent" if recent else "first"
    proposer = ngram(max_n=min_n + more, min_n=min_n, prefer=prefer, matches=matches)
    want = occurrences(text, min_n + more, min_n, recent, matches)
    assert proposer.occurrences(np.asarray(text)) == want


@given(text=texts, recent=st.booleans())
@settings(deadline=None)
def test_a_chain_copies_the_preferred_occurrence(text: list[int], recent: bool) -> None:
    tree = propose(ngram(prefer="recent" if recent else "first"), text)
    starts = occurrences(text, 3, 1, recent, 8)
    copied = text[starts[0] : starts[0] + 4] if starts else []
    assert tree.is_chain
    assert tree.tokens_N[1 : len(copied) + 1] == copied
    assert tree.tokens_N[1:] in [text[s : s + len(tree) - 1] for s in starts] or len(tree) == 1


@given(text=texts)
@settings(deadline=None)
def test_a_wide_tree_merges_all_occurrences(text: list[int]) -> None:
    tree = propose(ngram(TopK(depth=2, widths=(3, 3))), text)
    tree.check(text[-1])
    paths = {tuple(path_tokens(tree, n)) for n in range(1, len(tree))}
    starts = occurrences(text, 3, 1, True, 8)
    assert paths == {tuple(text[s : s + n]) for s in starts for n in (1, 2) if s + n <= len(text)}


def path_tokens(tree: TokenTree, node: int) -> list[int]:
    """Tokens from below the root to `node`."""
    return [tree.tokens_N[n] for n in range(1, node + 1) if tree.ancestors_NN[node, n]]


def test_one_preferred_occurrence_outweighs_all_others() -> None:
    text = [1, 9, 1, 8, 1, 8, 1, 8, 1, 7, 1]
    assert propose(ngram(TopK(depth=1, widths=(3,))), text).tokens_N == [1, 7, 8, 9]
    assert propose(ngram(TopK(depth=1, widths=(3,)), prefer="first"), text).tokens_N == [1, 9, 8, 7]
    assert propose(ngram(TopK(depth=1, widths=(3,)), matches=1), text).tokens_N == [1, 7]


def test_a_text_without_a_repetition_proposes_nothing() -> None:
    for tree in (Chain(), Sampled(depth=2, widths=(2, 2))):
        assert len(propose(ngram(tree), [1, 2, 3])) == 1
    assert len(propose(ngram(min_n=2), [1, 2, 1])) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_n": 4}, "proposer.min_n=4, max_n=3.*proposer.min_n=1"),
        ({"min_n": 0}, "proposer.min_n=0"),
        ({"prefer": "last"}, "proposer.prefer is 'last'.*proposer.prefer=recent"),
        ({"matches": 0}, "proposer.matches is 0.*proposer.matches=8"),
    ],
)
def test_ngram_refuses_wrong_values(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ngram(**wrong)


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
                text = seq.tokens + path_tokens(tree, node)
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


def test_heads_survive_a_file(tmp_path: Path) -> None:
    heads = untrained_heads(tiny(), [3, 1, 4, 15, 9])
    loaded, said = MedusaHeads.load(Path(save_heads(heads, tiny(), tmp_path / "heads.safetensors")), tiny())
    assert said == info(tiny())
    assert loaded.tokens_U.tolist() == [3, 1, 4, 15, 9]
    assert torch.equal(loaded.weight_KDD, heads.weight_KDD.bfloat16().float())
    hidden_XD, root_XD = torch.randn(2, 3, heads.bias_KD.shape[1])
    logits_KXU = loaded(hidden_XD, root_XD)
    assert logits_KXU.shape == (len(ACCURACY), 3, 5)
    turned_XD = hidden_XD @ loaded.weight_KDD[1] + root_XD @ loaded.root_KDD[1] + loaded.bias_KD[1]
    want_XU = (hidden_XD + torch.nn.functional.silu(turned_XD)) @ tiny().lm_head[[3, 1, 4, 15, 9]].T
    assert torch.allclose(logits_KXU[1], want_XU, atol=1e-4)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_tree_is_fitted_to_the_heads_and_no_deeper_than_they_are_many(tmp_path: Path) -> None:
    path = save_heads(cyclic_heads(), cyclic(), tmp_path / "heads.safetensors")
    proposer = Medusa(cyclic(), Static(nodes=6), heads=path)
    assert proposer.tree == Static(nodes=6).fitted(ACCURACY)
    deep = Medusa(cyclic(), Chain(depth=20), heads=path)
    assert tokens_per_step(run(deep, requests([[1, 2]], 24))) == len(ACCURACY) + 1


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def with_tensors(change: Callable[[dict[str, Tensor]], None], **said: object) -> Callable[[Path], None]:
    """Rewrite a file of heads with some of its tensors, or of what it says of itself, changed."""

    def rewrite(path: Path) -> None:
        tensors, metadata = load_file(path), vars(info(tiny())) | said
        change(tensors)
        save_file(tensors, path, metadata={"medusa": json.dumps(metadata)})

    return rewrite


def nothing(tensors: dict[str, Tensor]) -> None:
    """Leave the tensors as they are."""


DAMAGE = {
    "truncated": (truncated, "is no file of medusa heads"),
    "empty": (lambda path: path.write_bytes(b""), "is no file of medusa heads"),
    "no heads": (lambda path: save_file({"x": torch.zeros(1)}, path), "is no file of medusa heads"),
    "garbled": (
        lambda path: save_file({"x": torch.zeros(1)}, path, metadata={"medusa": "{"}),
        "is no file of medusa heads",
    ),
    "says more": (with_tensors(nothing, hydras=5), "is no file of medusa heads .*hydras"),
    "other target": (with_tensors(nothing, fingerprint="0123"), r"was trained for .*fingerprint 0123"),
    "NaN": (with_tensors(lambda t: t["bias_KD"][1].fill_(torch.nan)), "weights that are not finite"),
    "infinite": (
        with_tensors(lambda t: t["weight_KDD"][0, 0].fill_(torch.inf)),
        "weights that are not finite",
    ),
    "missing": (with_tensors(lambda t: t.pop("bias_KD")), "expected: bias_KD None, not .5, 64."),
    "no vocabulary": (with_tensors(lambda t: t.pop("tokens_U")), "expected: tokens_U None, not"),
    "no list": (
        with_tensors(lambda t: t.update(tokens_U=torch.tensor(3))),
        "expected: tokens_U .., not .1,.",
    ),
    "other width": (
        with_tensors(lambda t: t.update(bias_KD=torch.zeros(5, 7))),
        "expected: bias_KD .5, 7., not .5, 64.",
    ),
    "fewer heads": (with_tensors(nothing, heads=4), "expected: bias_KD .5, 64., not .4, 64."),
    "other vocabulary": (with_tensors(lambda t: t["tokens_U"].add_(VOCAB)), "vocabulary that is not"),
    "negative token": (with_tensors(lambda t: t["tokens_U"].sub_(9)), "vocabulary that is not"),
    "token twice": (with_tensors(lambda t: t["tokens_U"].fill_(3)), "vocabulary that is not"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_foreign_heads_are_refused(damage: Callable, message: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(untrained_heads(tiny(), list(range(8))), tiny(), path)
    Medusa(tiny(), Chain(), heads=str(path))
    damage(path)
    with pytest.raises(ValueError, match=f"heads.safetensors.*{message}.*specdec.train head=medusa"):
        Medusa(tiny(), Chain(), heads=str(path))


LOADERS = {"medusa": MedusaHeads.load, "eagle3": eagle3_head.load, "draft_lm": draft_head.load}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("said", [{"target": "x"}, {"config": {"width": 3}, "source": [0]}, [], 3], ids=str)
def test_a_file_that_says_too_little_is_refused(kind: str, said: object, tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={kind: json.dumps(said)})
    with pytest.raises(ValueError, match=rf"^head.start={path} is no file of {kind} heads .* head={kind}$"):
        LOADERS[kind](path, tiny(), "head.start")


@pytest.mark.parametrize("kind", LOADERS)
def test_heads_of_another_target_are_refused_with_the_override_that_named_them(
    kind: str, tmp_path: Path
) -> None:
    path, draft = tmp_path / "heads.safetensors", draft_head.DraftHead(tiny(), (0,))
    if kind == "medusa":
        save_heads(untrained_heads(tiny(), [1, 2]), cyclic(), path)
    elif kind == "eagle3":
        save_eagle(untrained_eagle(tiny(), [1, 2]), cyclic(), path)
    else:
        said = draft_head.DraftInfo((0,), cyclic().name, cyclic().fingerprint, ACCURACY)
        draft_head.save(path, draft.drafting(tiny(), torch.tensor([1, 2])), said)
    with pytest.raises(ValueError, match=r"was trained for .* with head.start=FILE"):
        LOADERS[kind](path, tiny(), "head.start")


def test_heads_that_do_not_exist_are_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"proposer.heads=no-such-head: no such file, nor one of the zoo's: "
    ):
        zoo_file("no-such-head")
    path = tmp_path / "mine.safetensors"
    path.touch()
    assert zoo_file(str(path)) == path


def test_medusa_refuses_a_temperature_of_zero(tmp_path: Path) -> None:
    path = save_heads(cyclic_heads(), cyclic(), tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match=r"proposer.temperature is 0.*proposer.temperature=1"):
        Medusa(cyclic(), Chain(), heads=path, temperature=0)
