"""Medusa heads (Cai et al. 2024, arXiv:2401.10774): small residual heads that read what the LM head reads.

Head k (1-based) says what stands k tokens behind the root, the token that the LM head said there. The root is
known by then, so heads read its embedding too, as Hydra's first head does (2402.05109). The law at a node
depends on its depth alone.
Shapes: K heads, X positions, D width, V vocabulary, U draft vocabulary, R ranks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..tree import TokenTree, Verdict
from ..trees import DraftLaw
from ..zoo import zoo_file
from .base import Grown, above_zero

if TYPE_CHECKING:
    from ..decode import Sequence
    from ..target import HFTarget, TargetOutput
    from ..trees import TreePolicy


STORED = {
    "weight_KDD": torch.bfloat16,
    "root_KDD": torch.bfloat16,
    "bias_KD": torch.bfloat16,
    "tokens_U": torch.int32,
}


@dataclass(frozen=True)
class MedusaInfo:
    """What a file of heads says of itself.

    accuracy_KR  [k][r]: how often the rank-r token of the k-th head was right on held-out text
    """

    heads: int
    width: int
    target: str
    fingerprint: str
    accuracy_KR: list[list[float]]


class MedusaHeads(nn.Module):
    """K residual blocks, h + silu(h W_k + r R_k + b_k), before the target's LM head cut to U tokens.

    r is the root's embedding. W, R and b start at zero, so an untrained head repeats the LM head.
    root  without it there is no R, as in the paper
    own   with it every head has an LM head of its own, as in the paper
    """

    def __init__(
        self, heads: int, lm_head_UD: Tensor, tokens_U: Tensor, *, root: bool = True, own: bool = False
    ) -> None:
        super().__init__()
        width = lm_head_UD.shape[1]
        self.weight_KDD = nn.Parameter(torch.zeros(heads, width, width))
        self.root_KDD = nn.Parameter(torch.zeros(heads, width, width)) if root else None
        self.bias_KD = nn.Parameter(torch.zeros(heads, width))
        self.lm_head_KUD = nn.Parameter(lm_head_UD.repeat(heads, 1, 1)) if own else None
        self.register_buffer("lm_head_UD", lm_head_UD, persistent=False)
        self.register_buffer("tokens_U", tokens_U)

    def forward(self, hidden_XD: Tensor, root_XD: Tensor) -> Tensor:
        """Logits [K, X, U] over the draft vocabulary; root_XD as `root_embeddings` gives it."""
        turned_KXD = hidden_XD @ self.weight_KDD
        if self.root_KDD is not None:
            turned_KXD = turned_KXD + root_XD @ self.root_KDD
        read_KXD = hidden_XD + F.silu(turned_KXD + self.bias_KD.unsqueeze(1))
        if self.lm_head_KUD is not None:
            return read_KXD @ self.lm_head_KUD.mT
        return F.linear(read_KXD, self.lm_head_UD)

    def save(self, path: Path, info: MedusaInfo) -> None:
        """Weights in bfloat16 and the draft vocabulary, as safetensors with `info` in its metadata."""
        tensors = {name: t.to(STORED[name]).contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, path, metadata={"medusa": json.dumps(asdict(info))})

    @classmethod
    def load(cls, path: Path, target: HFTarget) -> tuple[MedusaHeads, MedusaInfo]:
        """Heads on the target's device and dtype. ValueError: no heads, damaged, or for another target."""
        try:
            with safe_open(path, "pt") as file:
                info = MedusaInfo(**json.loads(file.metadata()["medusa"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"proposer.heads={path} is no file of Medusa heads ({error}); train one: "
                "python -m specdec.train head=medusa"
            ) from error
        _check(path, info, tensors, target)
        tokens_U = tensors["tokens_U"].long().to(target.device)
        heads = cls(info.heads, target.lm_head[tokens_U], tokens_U, root="root_KDD" in tensors)
        heads.load_state_dict(tensors | {"tokens_U": tokens_U.cpu()})
        return heads.to(target.device, target.dtype).eval().requires_grad_(False), info


def _check(path: Path, info: MedusaInfo, tensors: dict[str, Tensor], target: HFTarget) -> None:
    if problem := _problem(info, tensors, target):
        raise ValueError(
            f"{path.name} {problem}; choose heads trained for this target with proposer.heads=FILE, "
            "or train some: python -m specdec.train head=medusa"
        )


def _problem(info: MedusaInfo, tensors: dict[str, Tensor], target: HFTarget) -> str | None:
    """What is wrong with a file of heads for this target, if anything is."""
    (vocab, width), found = target.lm_head.shape, {name: tuple(t.shape) for name, t in tensors.items()}
    square = ("weight_KDD", "root_KDD") if "root_KDD" in found else ("weight_KDD",)
    shapes = dict.fromkeys(square, (info.heads, width, width))
    shapes["bias_KD"] = (info.heads, width)
    shapes["tokens_U"] = found.get("tokens_U", ())[:1]
    if info.fingerprint != target.fingerprint:
        return (
            f"was trained for {info.target} (fingerprint {info.fingerprint}), "
            f"this target is {target.name} ({target.fingerprint})"
        )
    if found != shapes:
        return f"holds tensors {found}, expected {shapes}"
    tokens_U = tensors["tokens_U"]
    if (
        not len(tokens_U)
        or tokens_U.min() < 0
        or tokens_U.max() >= vocab
        or len(tokens_U.unique()) < len(tokens_U)
    ):
        return f"drafts from a vocabulary that is not one of different tokens of the target's {vocab}"
    if not all(t.isfinite().all() for t in tensors.values()):
        return "holds weights that are not finite"
    return None


def root_embeddings(target: HFTarget, tokens_X: Tensor) -> Tensor:
    """[X, D]: the target's embeddings of tokens, scaled to a root mean square of 1 as hidden states are."""
    embedding_XD = target.embedding[tokens_X.to(target.device)]
    return F.rms_norm(embedding_XD, embedding_XD.shape[-1:])


class Medusa(Grown):
    """Drafts with Medusa heads.

    heads        file of heads, or the name of one in the zoo; or a folder or hub id of another project's
    temperature  of the draft's laws, where the tree draws from them
    """

    needs_hidden: ClassVar = ("final",)

    def __init__(
        self,
        target: HFTarget,
        tree: TreePolicy,
        *,
        heads: str = "smollm2-135m-medusa",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(target, tree)
        self.temperature = above_zero(temperature)
        self.heads, self.info, self.reading = _opened(heads, target)
        self.tree = tree.fitted(self.info.accuracy_KR) if self.info.accuracy_KR else tree

    def start(self, seqs: list[Sequence], hidden: list[dict[int | str, Tensor]]) -> None:
        for seq, taps in zip(seqs, hidden, strict=True):
            seq.draft = _Draft(taps["final"][-1:])

    def levels(self, seq: Sequence) -> int:
        return min(super().levels(seq), len(seq.draft.laws))

    def propose(self, seqs: list[Sequence]) -> list[TokenTree]:
        self._run_heads([s for s in seqs if len(s.draft.hidden_1D)])
        return super().propose(seqs)

    @torch.inference_mode()
    def _run_heads(self, seqs: list[Sequence]) -> None:
        if not seqs:
            return
        root_BD = root_embeddings(self.target, torch.tensor([s.tokens[-1] for s in seqs]))
        logits_KBU = self.heads(torch.cat([s.draft.hidden_1D for s in seqs]), root_BD).float()
        logq_KBU = torch.log_softmax(logits_KBU / self.temperature, dim=-1)
        for b, seq in enumerate(seqs):
            seq.draft.laws = [
                DraftLaw(logq_U, self.target.vocab, self.heads.tokens_U) for logq_U in logq_KBU[:, b]
            ]

    def expand(
        self, seqs: list[Sequence], trees: list[TokenTree], frontiers: list[list[int]]
    ) -> list[list[DraftLaw]]:
        depths = [tree.depth_N for tree in trees]
        return [
            [seq.draft.laws[depth_N[node]] for node in frontier]
            for seq, depth_N, frontier in zip(seqs, depths, frontiers, strict=True)
        ]

    def observe(
        self, seqs: list[Sequence], trees: list[TokenTree], verdicts: list[Verdict], out: TargetOutput
    ) -> None:
        for b, (seq, verdict) in enumerate(zip(seqs, verdicts, strict=True)):
            end = verdict.path_A[-1] if verdict.path_A else 0
            seq.draft = _Draft(out.hidden["final"][b, end : end + 1])


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
