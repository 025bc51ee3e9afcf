"""EAGLE-3 against an independent slow reference, in the loop and in training.

Shapes: T tokens, D width, U draft vocabulary.
"""

import math
from pathlib import Path

import pytest
import torch
from models import PROMPTS, plain, requests, run, save_eagle, tiny, tiny_model, untrained_eagle
from torch import Tensor

from specdec.proposers.eagle3 import Eagle3
from specdec.proposers.eagle3_head import Eagle3Head
from specdec.training.eagle3 import unroll
from specdec.trees import Chain, TopK

VARIANTS = {
    "3": {"fc_norm": False, "post_norm": False},
    "3.1": {"fc_norm": True, "post_norm": True},
    "norm before residual": {"fc_norm": False, "post_norm": False, "norm_before_residual": True},
    "norm before fc": {"fc_norm": False, "norm_before_fc": True},
    "Qwen3's layer": {"qk_norm": True},
    "shared head": {"shared_head": True},
}


def untrained(**flags: bool) -> Eagle3Head:
    return untrained_eagle(tiny(), list(range(0, tiny().vocab, 2)), **flags)


def saved(tmp_path: Path, **flags: bool) -> str:
    return save_eagle(untrained(**flags), tiny(), tmp_path / "head.safetensors")


class Reference:
    """The published equations, a row at a time, in float64, with nothing cached."""

    def __init__(self, head: Eagle3Head) -> None:
        held = head.state_dict() | {"lm_head.weight": head.lm_head.weight}
        self.w = {name: t.double() for name, t in held.items()}
        self.config = head.config

    def norm(self, name: str, x_D: Tensor) -> Tensor:
        return self.w[f"{name}.weight"] * x_D / (x_D.square().mean() + self.config.eps).sqrt()

    def fuse(self, taps: list[Tensor]) -> Tensor:
        if self.config.fc_norm:
            taps = [self.norm(f"fc_norm.{i}", tap) for i, tap in enumerate(taps)]
        joined = torch.cat(taps)
        if self.config.norm_before_fc:
            joined = self.norm("input_norm", joined)
        return self.w["fc.weight"] @ joined

    def rotated(self, x_D: Tensor, position: int) -> Tensor:
        half = len(x_D) // 2
        turned = [
            complex(x_D[i], x_D[i + half]) * complex(math.cos(angle), math.sin(angle))
            for i in range(half)
            for angle in [position * 1e4 ** (-i / half)]
        ]
        return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=torch.float64)

    def row(self, token: int, hidden_D: Tensor, position: int) -> tuple[Tensor, ...]:
        """Residual, and queries, keys, values by head."""
        normed_D = self.norm("hidden_norm", hidden_D)
        read = torch.cat([self.norm("input_layernorm", self.w["embed_tokens.weight"][token]), normed_D])
        q, k, v = ((self.w[f"self_attn.{n}_proj.weight"] @ read).split(self.config.head_dim) for n in "qkv")
        if self.config.qk_norm:
            q, k = ([self.norm(f"self_attn.{n}_norm", x) for x in heads] for n, heads in (("q", q), ("k", k)))
        q, k = ([self.rotated(head, position) for head in heads] for heads in (q, k))
        return (normed_D if self.config.norm_before_residual else hidden_D), q, k, v

    def layer(self, row: tuple, visible: list[tuple]) -> Tensor:
        """The output of a row that sees `visible`, itself among them."""
        residual_D, q, _, _ = row
        heads, group = [], len(q) // len(visible[0][2])
        for h, query in enumerate(q):
            scores = torch.stack([query @ other[2][h // group] for other in visible])
            weights = (scores / self.config.head_dim**0.5).softmax(0)
            heads.append(sum(w * other[3][h // group] for w, other in zip(weights, visible, strict=True)))
        x_D = residual_D + self.w["self_attn.o_proj.weight"] @ torch.cat(heads)
        y_D = self.norm("post_attention_layernorm", x_D)
        gate = torch.nn.functional.silu(self.w["mlp.gate_proj.weight"] @ y_D)
        return x_D + self.w["mlp.down_proj.weight"] @ (gate * (self.w["mlp.up_proj.weight"] @ y_D))

    def fed_back(self, out_D: Tensor) -> Tensor:
        return self.norm("norm", out_D) if self.config.post_norm else out_D

    def logits(self, out_D: Tensor) -> Tensor:
        return self.w["lm_head.weight"] @ self.norm("norm", out_D)

    def unrolled(self, tokens: list[int], fused: list[Tensor], steps: int) -> list[list[Tensor]]:
        """[i][t]: the output of row t at unroll i."""
        first = [self.row(tokens[t + 1], fused[t], t) for t in range(len(tokens) - 1)]
        outs = [[self.layer(first[t], first[: t + 1]) for t in range(len(first))]]
        own: list[list[tuple]] = [[] for _ in first]
        for i in range(1, steps):
            outs.append([])
            for t in range(len(tokens) - 1 - i):
                own[t].append(self.row(tokens[t + 1 + i], self.fed_back(outs[i - 1][t]), t + i))
                outs[i].append(self.layer(own[t][-1], first[: t + 1] + own[t]))
        return outs

    def laws(self, text: list[int], fused: list[Tensor], drafted: list[int]) -> Tensor:
        """[U] log-probabilities of what follows `text` and the tokens `drafted` behind it."""
        rows = [self.row(text[t + 1], fused[t], t) for t in range(len(text) - 1)]
        out_D = self.layer(rows[-1], rows)
        for i, token in enumerate(drafted):
            rows.append(self.row(token, self.fed_back(out_D), len(text) - 1 + i))
            out_D = self.layer(rows[-1], rows)
        return self.logits(out_D).log_softmax(0)


def true_taps(text: list[int], head: Eagle3Head) -> list[list[Tensor]]:
    """[t][i]: what the target's layers hold when it reads the text from the beginning, without our cache."""
    model = tiny_model().double()
    hidden = model(torch.tensor([text]), output_hidden_states=True, use_cache=False).hidden_states
    return [[hidden[tap][0, t] for tap in head.config.taps] for t in range(len(text))]


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_training_time_test_equals_the_reference(variant: str, first: int) -> None:
    head, tokens = untrained(**VARIANTS[variant]).double(), [3, 14, 15, 9, 2, 6, 5]
    taps = [torch.randn(3, head.config.target_width, dtype=torch.float64) for _ in tokens]
    reference = Reference(head)
    expected = reference.unrolled(tokens, [reference.fuse(list(t)) for t in taps], steps=4)
    fused_STD = head.fuse(torch.stack(taps, 1).unsqueeze(1))
    for i, out_STD in enumerate(unroll(head, torch.tensor([tokens]), fused_STD, 4, first)):
        got_TD = out_STD[0, : len(tokens) - 1 - i - first]
        torch.testing.assert_close(got_TD, torch.stack(expected[i][first:]), atol=1e-6, rtol=1e-6)


class Watched(Eagle3):
    """Compares every law that it gives with the reference's, from the text and the target's hidden states."""

    seen = 0

    def expand(self, seqs, trees, frontiers):
        laws = super().expand(seqs, trees, frontiers)
        reference = Reference(self.head)
        for seq, tree, frontier, laws_of in zip(seqs, trees, frontiers, laws, strict=True):
            fused = [reference.fuse(taps) for taps in true_taps(seq.tokens, self.head)]
            for node, law in zip(frontier, laws_of, strict=True):
                path = [tree.tokens_N[n] for n in range(1, node + 1) if tree.ancestors_NN[node, n]]
                expected_U = reference.laws(seq.tokens, fused, path)
                torch.testing.assert_close(law.logq_K, expected_U.float(), atol=1e-6, rtol=1e-6)
                self.seen += 1
        return laws


class Stale(Watched):
    """A seeded bug: rows of accepted drafts stay as they were drafted."""

    def observe(self, seqs, trees, verdicts, out):
        for seq, verdict in zip(seqs, verdicts, strict=True):
            drafted = [n - 1 for n in verdict.path_A if n <= len(seq.draft.out_ND) - 1]
            self.kept += len(drafted)
            self.cache.keep([seq.slot], [drafted])
        super().observe(seqs, trees, verdicts, out)
        for seq, verdict in zip(seqs, verdicts, strict=True):
            behind = len(seq.tokens) - 1 + len(verdict.path_A) + 1 - self.cache.lengths[seq.slot]
            seq.draft.pending_TD = seq.draft.pending_TD[-behind:]

    kept = 0


def watched(tmp_path: Path, kind: type[Watched], flags: dict[str, bool]) -> Watched:
    target = tiny().cast(torch.float64)
    return kind(target, TopK(depth=3, widths=(3, 2, 1)), heads=saved(tmp_path, **flags))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_law_in_the_loop_equals_the_reference(tmp_path: Path, variant: str) -> None:
    proposer = watched(tmp_path, Watched, VARIANTS[variant])
    run(proposer, requests(PROMPTS, [12, 6, 9, 12]))
    assert proposer.seen > 50


def test_a_head_that_keeps_its_own_hidden_states_is_caught(tmp_path: Path) -> None:
    proposer = watched(tmp_path, Stale, {})
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        run(proposer, requests(PROMPTS, 24))
    assert proposer.kept


@pytest.mark.parametrize("tree", [Chain(depth=4), TopK(widths=(3, 2, 1))], ids=str)
def test_greedy_output_is_that_of_plain_decoding(tmp_path: Path, tree) -> None:
    proposer = Eagle3(tiny(), tree, heads=saved(tmp_path))
    seqs = requests(PROMPTS, [24, 5, 1, 17])
    run(proposer, seqs)
    assert [s.new_tokens for s in seqs] == plain(tiny(), requests(PROMPTS, [24, 5, 1, 17]))
