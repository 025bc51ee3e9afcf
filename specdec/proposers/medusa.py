"""Drafting with Medusa heads (Cai et al. 2024, arXiv:2401.10774) or Hydra's (Ankner et al. 2024, 2402.05109).

Medusa's laws depend on the depth alone: one forward says them all before a tree grows. Hydra's depend on the
path: one forward a level says those of all its nodes, in the trees of all sequences.
Shapes: K heads, B sequences, F nodes of a level, J tokens from the root down to a node, X nodes, N nodes of a
tree, A accepted nodes, D width, U draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..transfer import to_device
from ..tree import TokenTree, TreeBatch, Verdict, VerdictBatch
from ..trees import DraftLaw
from ..trees.device import DeviceDraft
from ..zoo import zoo_file
from .base import FromLogits
from .medusa_heads import MedusaHeads, MedusaInfo, token_embeddings

if TYPE_CHECKING:
    from ..decode import Sequence
    from ..device_texts import DeviceTexts
    from ..target import HFTarget, TargetOutput
    from ..trees import TreePolicy

Node = tuple["Sequence", list[int]]  # the tokens lead from the sequence's root down to it


class Medusa(FromLogits):
    """Drafts with Medusa or Hydra heads, whichever the file holds.

    heads        file of heads, or the name of one in the zoo; or a folder or hub id of another project's
    temperature  of the draft's laws
    top_k        of those that the tree draws from; 0: the whole vocabulary
    """

    needs_hidden: ClassVar = ("final",)

    def __init__(
        self,
        target: HFTarget,
        tree: TreePolicy,
        *,
        heads: str = "smollm2-135m-hydra",
        temperature: float = 1.0,
        top_k: int = 256,
    ) -> None:
        super().__init__(target, tree, temperature, top_k)
        self.heads, self.info, self.reading = _opened(heads, target)
        self.heads.pack()
        self.tree = tree.fitted(self.info.accuracy_KR) if self.info.accuracy_KR else tree

    def start(self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]) -> None:
        for seq, taps in zip(seqs, hidden, strict=True):
            seq.draft = _Draft(taps["final"][-1:])

    def levels(self, seq: Sequence) -> int:
        return min(super().levels(seq), len(self.heads.bias_KD) if len(seq.draft.hidden_1D) else 0)

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        if not self.heads.hydra and (read := [s for s in seqs if len(s.draft.hidden_1D)]):
            self._run_heads(read)
        return super().propose(seqs)

    @torch.inference_mode()
    def _run_heads(self, seqs: list[Sequence]) -> None:
        root_BD = token_embeddings(self.target, torch.tensor([s.tokens[-1] for s in seqs]))
        logits_KBU = self.heads(torch.cat([s.draft.hidden_1D for s in seqs]), root_BD)
        laws = self._laws(logits_KBU.flatten(0, 1))
        for b, seq in enumerate(seqs):
            seq.draft.laws = laws[b :: len(seqs)]

    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        if self.heads.hydra:
            return self._along_paths(seqs, trees, frontiers)
        depths = [tree.depth_N for tree in trees]
        return [
            [seq.draft.laws[depth_N[node]] for node in frontier]
            for seq, depth_N, frontier in zip(seqs, depths, frontiers, strict=True)
        ]

    def _along_paths(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        nodes = [
            (seq, tree.tokens_to(node))
            for seq, tree, frontier in zip(seqs, trees, frontiers, strict=True)
            for node in frontier
        ]
        laws: dict[int, DraftLaw] = {}
        for depth in {len(path) for _, path in nodes}:
            level = [i for i, (_, path) in enumerate(nodes) if len(path) == depth]
            laws |= zip(level, self._level([nodes[i] for i in level]), strict=True)
        given = iter(range(len(nodes)))
        return [[laws[next(given)] for _ in frontier] for frontier in frontiers]

    @torch.inference_mode()
    def _level(self, nodes: list[Node]) -> list[DraftLaw]:
        """Laws at nodes of one depth."""
        tokens_XJ = to_device([path for _, path in nodes], self.target.device)
        read_XJD = token_embeddings(self.target, tokens_XJ)
        hidden_XD = torch.cat([seq.draft.hidden_1D for seq, _ in nodes])
        return self._laws(self.heads.behind(hidden_XD, read_XJD))

    def _laws(self, logits_XU: Tensor) -> list[DraftLaw]:
        return [
            DraftLaw(logq_U, self.target.vocab, self.heads.tokens_U) for logq_U in self.log_laws(logits_XU)
        ]

    def obstacle(self, seqs: list[Sequence]) -> str | None:
        if not all(len(s.draft.hidden_1D) for s in seqs):
            return "a prompt of one token leaves its heads nothing to read"
        return self.tree.obstacle(len(self.heads.tokens_U))

    def device_state(self, seqs: list[Sequence]) -> dict[str, Tensor]:
        return {"hidden_BD": torch.cat([s.draft.hidden_1D for s in seqs])}

    def propose_device(self, texts: DeviceTexts) -> TreeBatch:
        hidden_BD, root_B = texts.draft["hidden_BD"], texts.root_B
        if self.heads.hydra:
            expand = partial(self._at_paths, hidden_BD)
        else:
            logits_KBU = self.heads(hidden_BD, token_embeddings(self.target, root_B))
            expand = partial(_at_depth, self.log_laws(logits_KBU))
        draft = DeviceDraft(expand, self.target.vocab, self.heads.tokens_U, len(self.heads.bias_KD))
        return self.tree.grow_on_device(root_B, texts.levels_B, draft, texts.streams)

    def _at_paths(self, hidden_BD: Tensor, paths_BFJ: Tensor) -> Tensor:
        """The laws of Hydra's heads [B, F, U]."""
        B, F, _ = paths_BFJ.shape
        read_XJD = token_embeddings(self.target, paths_BFJ.flatten(0, 1))
        hidden_XD = hidden_BD.repeat_interleave(F, 0)
        logits_XU = self.heads.behind(hidden_XD, read_XJD)
        return self.log_laws(logits_XU).view(B, F, -1)

    def observe_device(self, texts: DeviceTexts, verdicts: VerdictBatch, out: TargetOutput) -> None:
        final_BND = out.hidden["final"]
        end_B1D = verdicts.path_BA.amax(1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, final_BND.shape[2])
        texts.draft["hidden_BD"].copy_(final_BND.gather(1, end_B1D).squeeze(1))

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        for b, (seq, verdict) in enumerate(zip(seqs, verdicts, strict=True)):
            end = verdict.path_A[-1] if verdict.path_A else 0
            seq.draft = _Draft(out.hidden["final"][b, end : end + 1])


def _at_depth(logq_KBU: Tensor, paths_BFJ: Tensor) -> Tensor:
    """The laws of Medusa's heads [B, F, U], which are the same along all paths."""
    logq_BU = logq_KBU[paths_BFJ.shape[2] - 1]
    return logq_BU.unsqueeze(1).expand(-1, paths_BFJ.shape[1], -1)


def _opened(heads: str, target: HFTarget) -> tuple[MedusaHeads, MedusaInfo, str | None]:
    """Heads, what is known of them, and how a checkpoint of others was understood."""
    from ..checkpoints import is_checkpoint, open_medusa  # it tries heads in the loop, which knows proposers

    if is_checkpoint(heads):
        return open_medusa(heads, target)
    return *MedusaHeads.load(zoo_file(heads), target), None


@dataclass
class _Draft:
    """What the LM head read when it said the root (no row if nothing was prefilled), and laws by depth."""

    hidden_1D: Tensor
    laws: list[DraftLaw] = field(default_factory=list)
