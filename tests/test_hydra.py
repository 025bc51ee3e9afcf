"""Hydra heads against an independent slow reference, in the loop and from a file.

Shapes: K heads, D width, U draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from models import (
    ACCURACY,
    PROMPTS,
    SAMPLED,
    VOCAB,
    below,
    cyclic,
    info,
    plain,
    requests,
    run,
    save_heads,
    tiny,
    tiny_model,
    untrained_heads,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.accept import Match, Recursive, Rule
from specdec.proposers.medusa import Medusa
from specdec.proposers.medusa_heads import MedusaHeads
from specdec.target import HFTarget
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


def node_before(tree: TokenTree, node: int) -> list[int]:
    """A seeded bug: the ancestor of a node is the one added before it, at its parent's depth or not."""
    depth_N = tree.depth_N
    last = {depth_N[n]: tree.tokens_N[n] for n in range(node + 1)}
    return [last[d] for d in range(depth_N[node])] + [tree.tokens_N[node]]


def one_too_far(tree: TokenTree, node: int) -> list[int]:
    """A seeded bug: the grandparent in the parent's place."""
    path = [tree.tokens_N[0], *below(tree, node)]
    return [path[0], *path[:-2], path[-1]] if len(path) > 2 else path


@pytest.mark.parametrize("bug", [node_before, one_too_far])
def test_a_wrong_ancestor_is_caught(bug: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenTree, "tokens_to", bug)
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
    proposer, seqs = Medusa(tiny(), TopK(), heads=str(path)), requests(PROMPTS, 12)
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
        Medusa(cyclic(), Chain(), heads=path)
