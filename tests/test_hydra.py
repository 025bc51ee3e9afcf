"""Hydra heads against an independent slow reference, in the loop, in training, and on a text that forks.

Shapes: K heads, D width, U draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from answers import MEDUSA, TAPS, collected
from models import (
    ACCURACY,
    PROMPTS,
    SAMPLED,
    VOCAB,
    info,
    plain,
    requests,
    run,
    save_heads,
    saying,
    tiny,
    tiny_model,
    tokens_per_step,
    untrained_heads,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.accept import Match, Recursive, Rule
from specdec.onpolicy import write_answers
from specdec.proposers import medusa
from specdec.proposers.medusa import Medusa
from specdec.proposers.medusa_heads import MedusaHeads
from specdec.sampling import Sampling
from specdec.target import HFTarget
from specdec.training import medusa as training
from specdec.training.loop import train
from specdec.training.medusa import MedusaRecipe
from specdec.training.texts import Texts
from specdec.tree import TokenTree
from specdec.trees import Chain, DraftLaw, Eagle2, Sampled, Static, TopK, TreePolicy

HALF = list(range(0, VOCAB, 2))
LIMITS = [24, 5, 1, 17]


def saved(tmp_path: Path) -> str:
    return save_heads(untrained_heads(tiny(), HALF, hydra=True), tiny(), tmp_path / "hydra.safetensors")


class Reference:
    """The published equations, a node at a time, in float64."""

    def __init__(self, heads: MedusaHeads, target: HFTarget) -> None:
        self.w = {name: t.double() for name, t in heads.state_dict().items() if name != "tokens_U"}
        self.lm_head_UD, self.embedding_VD = heads.lm_head.weight.double(), target.embedding.double()
        pairs = [(k, j) for k in range(1, len(heads.bias_KD) + 1) for j in range(1, k)]
        self.square = {pair: self.w["path_PDD"][p] for p, pair in enumerate(pairs)}

    def read(self, token: int) -> Tensor:
        x_D = self.embedding_VD[token]
        return x_D / x_D.square().mean().sqrt()

    def logits(self, hidden_D: Tensor, root: int, path: list[int]) -> Tensor:
        """[U] of what stands behind the root and the tokens drafted below it."""
        k, h_D = len(path) + 1, hidden_D.double()
        x_D = h_D @ self.w["weight_KDD"][k - 1] + self.w["bias_KD"][k - 1]
        x_D = x_D + self.read(root) @ self.w["root_KDD"][k - 1]
        for j, token in enumerate(path, start=1):
            x_D = x_D + self.read(token) @ self.square[k, j]
        return self.lm_head_UD @ (h_D + x_D * torch.sigmoid(x_D))


def below(tree: TokenTree, node: int) -> list[int]:
    """Tokens from below the root down to `node`."""
    return [tree.tokens_N[n] for n in range(1, node + 1) if tree.ancestors_NN[node, n]]


class Watched(Medusa):
    """Compares every law that it gives with the reference's, from the text as the model alone reads it."""

    seen = 0

    def expand(self, seqs, trees, frontiers):
        laws, reference, model = super().expand(seqs, trees, frontiers), *alone(self.heads, self.target)
        for seq, tree, frontier, laws_of in zip(seqs, trees, frontiers, laws, strict=True):
            if not frontier:
                continue
            ids = torch.tensor([seq.tokens[:-1]])
            hidden_D = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]
            for node, law in zip(frontier, laws_of, strict=True):
                want_U = reference.logits(hidden_D, seq.tokens[-1], below(tree, node)).log_softmax(0)
                torch.testing.assert_close(law.logq_K, want_U.float(), atol=1e-6, rtol=1e-6)
                self.seen += 1
        return laws


@cache
def alone(heads: MedusaHeads, target: HFTarget) -> tuple:
    return Reference(heads, target), tiny_model().double()


TREES = {
    "chain": Chain(depth=5),
    "static": Static(nodes=9),
    "topk": TopK(depth=3, widths=(3, 2, 1)),
    "eagle2": Eagle2(depth=4, nodes=10, width=3),
    "sampled": Sampled(depth=3, widths=(2, 2, 1)),
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


@every_tree
def test_every_law_in_the_loop_equals_the_reference(tree: TreePolicy, tmp_path: Path) -> None:
    proposer = Watched(tiny().cast(torch.float64), tree, heads=saved(tmp_path))
    run(proposer, requests(PROMPTS, [12, 6, 9, 12]), SAMPLED)
    assert proposer.seen > 50


def node_before(node: int, tree: TokenTree) -> list[int]:
    """A seeded bug: the ancestor of a node is the one added before it, at its parent's depth or not."""
    depth_N = tree.depth_N
    last = {depth_N[n]: tree.tokens_N[n] for n in range(node + 1)}
    return [last[d] for d in range(depth_N[node])] + [tree.tokens_N[node]]


def one_too_far(node: int, tree: TokenTree) -> list[int]:
    """A seeded bug: the grandparent in the parent's place."""
    path = [tree.tokens_N[0], *below(tree, node)]
    return [path[0], *path[:-2], path[-1]] if len(path) > 2 else path


@pytest.mark.parametrize("bug", [node_before, one_too_far])
def test_a_wrong_ancestor_is_caught(bug: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medusa, "tokens_to", bug)
    proposer = Watched(tiny().cast(torch.float64), TREES["topk"], heads=saved(tmp_path))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        run(proposer, requests(PROMPTS, 12), SAMPLED)


PARENTS = [-1, 0, 0, 1, 2, 3, 5]
TOKENS = [5, 3, 7, 9, 11, 2, 4]


def laws(proposer: Medusa, trees: list[TokenTree], frontiers: list[list[int]]) -> list[list[DraftLaw]]:
    """Behind these roots, one hidden state for all."""
    hidden_1D = torch.randn(1, proposer.heads.bias_KD.shape[1], generator=torch.Generator().manual_seed(1))
    seqs = requests([[1, tree.tokens_N[0]] for tree in trees])
    proposer.start(seqs, [{"final": hidden_1D.to(proposer.target.dtype)} for _ in seqs])
    return proposer.expand(seqs, trees, frontiers)


def test_nodes_of_different_depths_and_trees_are_scored_together(tmp_path: Path) -> None:
    """A policy may ask for any nodes, in any order; a tree that is complete asks for none."""
    proposer = Medusa(tiny().cast(torch.float64), Chain(), heads=saved(tmp_path))
    trees = [TokenTree(TOKENS, PARENTS), TokenTree.chain([8, 1]), TokenTree([9])]
    given = laws(proposer, trees, [[5, 2, 0, 4], [], [0]])
    assert [len(some) for some in given] == [4, 0, 1]
    for tree, frontier, some in zip(trees, [[5, 2, 0, 4], [], [0]], given, strict=True):
        for node, law in zip(frontier, some, strict=True):
            (again,) = laws(proposer, [tree], [[node]])[0]
            torch.testing.assert_close(law.logq_K, again.logq_K, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("node", range(len(TOKENS)))
def test_a_law_depends_on_the_tokens_above_it_and_on_no_others(node: int, tmp_path: Path) -> None:
    proposer = Medusa(tiny(), Chain(), heads=saved(tmp_path))
    nodes = list(range(6))
    before = laws(proposer, [TokenTree(TOKENS, PARENTS)], [nodes])[0]
    other = [30 if n == node else token for n, token in enumerate(TOKENS)]
    after = laws(proposer, [TokenTree(other, PARENTS)], [nodes])[0]
    same = [torch.equal(a.logq_K, b.logq_K) for a, b in zip(before, after, strict=True)]
    assert same == [not TokenTree(TOKENS, PARENTS).ancestors_NN[n, node] for n in nodes]


def test_a_level_of_all_trees_is_one_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proposer, forwards = Medusa(tiny(), TREES["topk"], heads=saved(tmp_path)), []
    behind = proposer.heads.behind

    def counted(hidden_XD: Tensor, read_XJD: Tensor) -> Tensor:
        forwards.append(read_XJD.shape[:2])
        return behind(hidden_XD, read_XJD)

    monkeypatch.setattr(proposer.heads, "behind", counted)
    seqs = requests([[1, 2, 3], [4, 5]])
    hidden_1D = torch.randn(1, proposer.heads.bias_KD.shape[1])
    proposer.start(seqs, [{"final": hidden_1D}] * 2)
    proposer.propose(seqs)
    assert forwards == [(2, 1), (6, 2), (12, 3)]


@every_tree
def test_greedy_output_is_that_of_plain_decoding(tree: TreePolicy, tmp_path: Path) -> None:
    proposer, rule = Medusa(tiny(), tree, heads=saved(tmp_path)), Recursive() if tree.draws else Match()
    seqs = requests(PROMPTS, LIMITS)
    run(proposer, seqs, rule=rule)
    assert [s.new_tokens for s in seqs] == plain(tiny(), requests(PROMPTS, LIMITS))


@pytest.mark.parametrize("rule", [Match(), Recursive()], ids=["match", "recursive"])
@every_tree
def test_neighbours_change_nothing(tree: TreePolicy, rule: Rule, tmp_path: Path) -> None:
    proposer = Medusa(tiny(), tree, heads=saved(tmp_path))
    seqs, single = requests(PROMPTS, LIMITS), requests(PROMPTS, LIMITS)
    run(proposer, seqs, SAMPLED, rule)
    for seq in single:
        run(proposer, [seq], SAMPLED, rule)
    assert [s.new_tokens for s in seqs] == [s.new_tokens for s in single]
    if isinstance(rule, Match):
        assert [s.new_tokens for s in seqs] == plain(tiny(), requests(PROMPTS, LIMITS), SAMPLED)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory):
    target = tiny().cast(torch.float64)
    texts = Texts.load(collected(target, tmp_path_factory.mktemp("answers")), TAPS)
    return texts.batch(target, [0, 7, 12])


def check_training(batch) -> int:
    """The property: head k reads, behind what the target said, its k - 1 true tokens."""
    target, heads = tiny().cast(torch.float64), untrained_heads(tiny(), HALF, hydra=True).double()
    reference, checked = Reference(heads, target), 0
    for k, (logits_XU, _, _) in enumerate(MEDUSA.judged(heads, target, batch), start=1):
        rows = iter(logits_XU)
        for said_T, next_T, hidden_TD in zip(
            batch.said_ST, batch.next_ST, batch.hidden["final"], strict=True
        ):
            for t in said_T.nonzero().flatten().tolist():
                if t + k < len(said_T) and said_T[t + k]:
                    root, *path = next_T[t : t + k].tolist()
                    want_U = reference.logits(hidden_TD[t], root, path)
                    torch.testing.assert_close(next(rows), want_U, atol=1e-6, rtol=1e-6)
                    checked += 1
        assert next(rows, None) is None
    return checked


def test_training_reads_the_true_path(batch) -> None:
    assert check_training(batch) > 100


def test_a_path_that_is_one_token_late_is_caught(batch, monkeypatch: pytest.MonkeyPatch) -> None:
    said_next = training._said_next
    monkeypatch.setattr(training, "_said_next", lambda root_XD, J: said_next(root_XD, J).roll(1, 0))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_training(batch)


def test_a_step_down_the_gradient_lowers_the_loss(batch) -> None:
    recipe = MedusaRecipe(heads=3, hydra=True)
    heads = MedusaHeads(3, tiny().lm_head_of(), torch.arange(VOCAB), hydra=True)
    loss = recipe.loss(heads, tiny(), batch)
    loss.backward()
    assert all(square.any() for square in heads.path_PDD.grad), "every square is read"
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter -= 0.1 * parameter.grad
    assert recipe.loss(heads, tiny(), batch) < loss


FORK, WAYS = 0, [1, 2, 3, 4]
FOLLOWS = [WAYS, *([w + 4] for w in WAYS), *([FORK] for _ in WAYS), *([t] for t in range(9, VOCAB))]


@cache
def forking() -> HFTarget:
    """A target that says any of WAYS after FORK, after each of them a token of its own, then FORK again."""
    return saying(FOLLOWS)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Files of heads that were trained on texts of `forking`: Medusa's, and Hydra's."""
    folder, prompts = tmp_path_factory.mktemp("forked"), [[t, FORK] for t in range(9, VOCAB)]
    drawn = {"sampling": Sampling(temperature=1.0), "taps": ("final",), "stop_ids": (), "longest": 20}
    files = write_answers(forking(), prompts, folder / "answers", batch=4, **drawn)
    for hydra in (False, True):
        recipe = MedusaRecipe(hydra=hydra, vocab=VOCAB, epochs=10, rows=256, lr=0.05)
        train(forking(), files, recipe, folder / f"{hydra}.safetensors")
    return {hydra: str(folder / f"{hydra}.safetensors") for hydra in (False, True)}


def right_behind(proposer: Medusa, token: int) -> int:
    """Of the ways that are drafted behind FORK, how many what really follows is drafted behind."""
    seqs, hidden_1D = requests([[token, FORK]]), torch.eye(VOCAB)[token : token + 1] * VOCAB**0.5
    proposer.start(seqs, [{"final": hidden_1D}])
    (tree,) = proposer.propose(seqs)
    assert sorted(tree.tokens_N[1:5]) == WAYS
    return sum(tree.child(n, FOLLOWS[tree.tokens_N[n]][0]) is not None for n in range(1, 5))


def test_only_hydra_learns_what_depends_on_the_drafted_token(forked: dict[bool, str]) -> None:
    """From FORK on, what is drawn and what follows it are one step's work; for Medusa one time in four."""
    rates = {}
    for hydra, file in forked.items():
        proposer = Medusa(forking(), TopK(depth=2, widths=(4, 1)), heads=file)
        assert right_behind(proposer, 9) == (4 if hydra else 1)
        seqs = requests([[t, FORK] for t in range(9, VOCAB)], 3)
        rates[hydra] = tokens_per_step(run(proposer, seqs, Sampling(temperature=1.0)))
    assert rates[True] == 3
    assert rates[False] < 2


def test_heads_survive_a_file(tmp_path: Path) -> None:
    heads = untrained_heads(tiny(), [3, 1, 4, 15, 9], hydra=True)
    loaded, said = MedusaHeads.load(Path(save_heads(heads, tiny(), tmp_path / "a.safetensors")), tiny())
    assert (loaded.hydra, said) == (True, info(tiny()))
    assert loaded.tokens_U.tolist() == [3, 1, 4, 15, 9]
    for name, weight in heads.state_dict().items():
        assert torch.equal(
            loaded.state_dict()[name], weight if name == "tokens_U" else weight.bfloat16().float()
        )
    again = Path(save_heads(loaded, tiny(), tmp_path / "b.safetensors"))
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_one_head_has_no_path_to_read(tmp_path: Path) -> None:
    heads = MedusaHeads(1, tiny().lm_head_of(), torch.arange(VOCAB), hydra=True)
    path = tmp_path / "one.safetensors"
    heads.save(path, replace(info(tiny()), heads=1, accuracy_KR=ACCURACY[:1]))
    proposer, seqs = Medusa(tiny(), TopK(depth=4), heads=str(path)), requests(PROMPTS, 12)
    assert proposer.heads.path_PDD.shape[0] == 0
    assert max(step.nodes for step in run(proposer, seqs)) == 1 + 4
    assert [s.new_tokens for s in seqs] == plain(tiny(), requests(PROMPTS, 12))


def with_path(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Rewrite a file with some of its tensors changed."""

    def rewrite(path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return rewrite


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is no file of medusa heads"),
    "NaN": (with_path(lambda t: t["path_PDD"][7, 3].fill_(torch.nan)), "weights that are not finite"),
    "a square short": (
        with_path(lambda t: t.update(path_PDD=t["path_PDD"][1:].clone())),
        r"expected: path_PDD \(9, 64, 64\), not \(10, 64, 64\)",
    ),
    "other width": (
        with_path(lambda t: t.update(path_PDD=torch.zeros(10, 64, 32))),
        r"expected: path_PDD \(10, 64, 32\), not \(10, 64, 64\)",
    ),
    "no root": (with_path(lambda t: t.pop("root_KDD")), r"expected: root_KDD None, not \(5, 64, 64\)"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_heads_are_refused(damage: Callable, message: str, tmp_path: Path) -> None:
    path = Path(saved(tmp_path))
    damage(path)
    with pytest.raises(ValueError, match=f"hydra.safetensors.*{message}.*specdec.train head=medusa"):
        Medusa(tiny(), Chain(), heads=str(path))


def test_heads_of_another_target_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"hydra.safetensors was trained for .*; choose heads trained for"):
        Medusa(forking(), Chain(), heads=path)
