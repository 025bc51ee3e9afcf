"""Drafting with EAGLE-3 (Li et al. 2025, arXiv:2503.01840): trees grown level by level from hidden states.

Shapes: B sequences, T rows, N nodes, X rows of all sequences, D width, U draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec_kernels import TreeMask, tree_attention

from ..packed import packed_head, packed_layers, replaced
from ..taps import Tap
from ..target import SLACK, HFTarget, few_sizes
from ..tree import TokenTree, TreeBatch, Verdict
from ..trees import DraftLaw
from ..zoo import zoo_file
from .base import FromLogits
from .eagle3_head import Eagle3Head, Eagle3Info, load

if TYPE_CHECKING:
    from ..decode import Sequence
    from ..target import TargetOutput
    from ..trees import TreePolicy


class Eagle3(FromLogits):
    """Drafts with an EAGLE-3 head.

    heads        file of a head, the name of one in the zoo, or a folder or hub id of another project's
    temperature  of the draft's laws
    top_k        of those that the tree draws from; 0: the whole vocabulary

    Its cache holds rows of true hidden states only: what was drafted is forgotten, and the accepted path is
    read anew with what the target held there.
    """

    def __init__(
        self,
        target: HFTarget,
        tree: TreePolicy,
        *,
        heads: str = "smollm2-135m-eagle3",
        temperature: float = 1.0,
        top_k: int = 256,
    ) -> None:
        super().__init__(target, tree, temperature, top_k)
        head, self.info, self.reading = _opened(heads, target)
        self.tree = tree.fitted(self.info.accuracy_KR) if self.info.accuracy_KR else tree
        self._take(head)

    def _take(self, head: Eagle3Head) -> None:
        """Draft with this head."""
        self.head, self.needs_hidden = head, head.config.taps
        self.cache = type(self.target.cache)(1, 1, 0)
        self._packed = packed_layers(head) | packed_head(head.lm_head)

    @torch.inference_mode()
    def start(self, seqs: list[Sequence], hidden: list[dict[Tap, Tensor]]) -> None:
        longest = max(len(s.tokens) + s.max_new_tokens for s in seqs)
        if len(seqs) > self.cache.slots or longest + SLACK > self.cache.rows:
            self.cache = type(self.cache)(1, len(seqs), longest + SLACK)
        self.cache.clear()
        for seq, taps in zip(seqs, hidden, strict=True):
            pending_TD = self._fused(taps)
            seq.draft = _Draft(pending_TD, pending_TD[:0])
            self._extend([seq])  # a prompt at a time, as the target reads them

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        self._extend(seqs)
        return super().propose(seqs)

    def levels(self, seq: Sequence) -> int:
        """None behind a prompt of one token: nothing was read before it."""
        return super().levels(seq) if len(seq.draft.out_ND) else 0

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        for b, (seq, verdict) in enumerate(zip(seqs, verdicts, strict=True)):
            rows = [0, *verdict.path_A]
            new_TD = self._fused({tap: out.hidden[tap][b, rows] for tap in self.needs_hidden})
            seq.draft = _Draft(torch.cat([seq.draft.pending_TD, new_TD]), new_TD[:0])

    @torch.inference_mode()
    def _fused(self, taps: dict[Tap, Tensor]) -> Tensor:
        with replaced(self._packed):
            return self.head.fuse(taps[tap] for tap in self.head.config.taps)

    @torch.inference_mode()
    def _extend(self, seqs: list[Sequence]) -> None:
        """Read the tokens up to the root, with what the target held before each, and keep their rows."""
        if not (seqs := [s for s in seqs if len(s.draft.pending_TD)]):
            return
        rows = [len(s.draft.pending_TD) for s in seqs]
        read = [TokenTree.chain(s.tokens[len(s.tokens) - n :]) for s, n in zip(seqs, rows, strict=True)]
        out_BTD = self._forward(seqs, read, [s.draft.pending_TD for s in seqs])
        self.cache.keep([s.slot for s in seqs], [list(range(n)) for n in rows])
        for seq, n, out_TD in zip(seqs, rows, out_BTD, strict=True):
            seq.draft = _Draft(out_TD[:0], out_TD[n - 1 : n])

    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        growing = [(s, tree) for s, tree, frontier in zip(seqs, trees, frontiers, strict=True) if frontier]
        self._score(*zip(*growing, strict=True))
        rows_XD = torch.cat(
            [s.draft.out_ND[frontier] for s, frontier in zip(seqs, frontiers, strict=True) if frontier]
        )
        laws = iter(self._laws(rows_XD))
        return [[next(laws) for _ in frontier] for frontier in frontiers]

    @torch.inference_mode()
    def _score(self, seqs: tuple[Sequence, ...], trees: tuple[TokenTree, ...]) -> None:
        """Run the nodes that were not run yet; the root was, when the tokens up to it were read."""
        since = min(len(s.draft.out_ND) for s in seqs) - 1
        if since == max(map(len, trees)) - 1:
            return
        below = [TokenTree(t.tokens_N[1:], [p - 1 for p in t.parents_N[1:]]) for t in trees]
        parents = [
            self.head.fed_back(s.draft.out_ND[[p + 1 for p in t.parents_N[since:]]])
            for s, t in zip(seqs, below, strict=True)
        ]
        out_BTD = self._forward(list(seqs), below, parents, since)
        for seq, tree, out_TD in zip(seqs, below, out_BTD, strict=True):
            new_TD = out_TD[: len(tree) - since]
            seq.draft.out_ND = torch.cat([seq.draft.out_ND[: since + 1], new_TD])

    def _forward(
        self, seqs: list[Sequence], trees: list[TokenTree], hidden: list[Tensor], since: int = 0
    ) -> Tensor:
        """[B, T, D]: the layer's output at the nodes [since, N) of trees behind each cached prefix."""
        slots = list(range(seqs[0].slot, seqs[-1].slot + 1))
        place = {s.slot: i for i, s in enumerate(seqs)}
        ran = [trees[place[slot]] if slot in place else TokenTree([0]) for slot in slots]
        T = few_sizes(max(map(len, ran)) - since, self.target.dtype)
        batch = TreeBatch.pack(ran, since + T, self.target.device)
        hidden_BTD = hidden[0].new_zeros(len(slots), T, hidden[0].shape[-1])
        for seq, rows_TD in zip(seqs, hidden, strict=True):
            hidden_BTD[seq.slot - slots[0], : len(rows_TD)] = rows_TD
        out_BTD = self._layer(slots, batch, hidden_BTD, since)
        return out_BTD[[s.slot - slots[0] for s in seqs]]

    def _layer(self, slots: list[int], batch: TreeBatch, hidden_BTD: Tensor, since: int) -> Tensor:
        self.cache.make_room(max(self.cache.lengths[s] for s in slots) + batch.tokens_BN.shape[1])
        prefix_B = self.cache.prefix(slots, self.target.device)
        self.cache.aim(slots, prefix_B, since, hidden_BTD.shape[1])
        positions_BT = (prefix_B.unsqueeze(1) + batch.depth_BN[:, since:]).clamp(
            max=self.target.max_length - 1
        )
        mask = TreeMask(prefix_B, batch.depth_BN, batch.ancestors_BNN[:, since:])
        scale, impl = self.head.config.head_dim**-0.5, self.target.engine.implementation
        with replaced(self._packed):
            residual_BTD, q, k, v = self.head.project(batch.tokens_BN[:, since:], hidden_BTD, positions_BT)
            attended = tree_attention(q, *self.cache.update(k, v, 0), mask, scale=scale, impl=impl)
            return self.head.finish(residual_BTD, attended)

    @torch.inference_mode()
    def _laws(self, rows_XD: Tensor) -> list[DraftLaw]:
        with replaced(self._packed):
            logq_XU = self.log_laws(self.head.logits(rows_XD))
        tokens_U = self.head.tokens_U.long()
        return [DraftLaw(logq_U, self.target.vocab, tokens_U) for logq_U in logq_XU]


def _opened(heads: str, target: HFTarget) -> tuple[Eagle3Head, Eagle3Info, str | None]:
    """A head, what is known of it, and how a checkpoint of others was understood."""
    from ..checkpoints import is_checkpoint, open_eagle3  # it tries heads in the loop, which knows proposers

    if is_checkpoint(heads):
        return open_eagle3(heads, target)
    return *load(zoo_file(heads), target), None


@dataclass
class _Draft:
    """What is kept of a sequence.

    pending_TD  true hidden states, fused, that were not read yet
    out_ND      the layer's output at each node; no row where nothing was read yet
    """

    pending_TD: Tensor
    out_ND: Tensor
