"""Medusa heads (Cai et al. 2024, arXiv:2401.10774) and Hydra heads (Ankner et al. 2024, arXiv:2402.05109).

Small residual blocks that read what the LM head reads. Head k (1-based) says what stands k tokens behind the
root, the token that the LM head said there. The root is known by then, so heads read its embedding too. The
law of a Medusa head depends on the depth alone. A Hydra head reads also the k - 1 tokens drafted between the
root and what it says, so its law depends on the path.
Shapes: K heads, J drafted tokens, P squares (one for each head and token on its path), X positions, D width,
I read side by side, U draft vocabulary, R ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lm_head import LMHead
from ..packed import packed_product
from .headfile import Shapes, check_head, read_head, write_head

if TYPE_CHECKING:
    from ..target import HFTarget

KIND = "medusa"


@dataclass(frozen=True)
class MedusaInfo:
    """What a file of heads says of itself.

    accuracy_KR  [k][r]: how often the rank-r token of the k-th head was right on held-out text, with a Hydra
                 head told the tokens before it
    """

    heads: int
    width: int
    target: str
    fingerprint: str
    accuracy_KR: list[list[float]]


class MedusaHeads(nn.Module):
    """K residual blocks, h + silu(h W_k + r R_k + b_k), before the target's LM head cut to U tokens.

    r is the root's embedding. A Hydra head adds e_j P_kj inside, for each j < k: e_j is the embedding of the
    j-th token drafted below the root. All weights start at zero, so an untrained head repeats the LM head.
    root   without it there is no R, as in Medusa's paper
    hydra  with it there is P: K(K-1)/2 squares, stacked head after head and in each place after place. So a
           head's path is one product with one slice, and no square is stored that no head reads
    own    with it every head has an LM head of its own, as in Medusa's paper
    """

    def __init__(
        self,
        heads: int,
        lm_head: LMHead,
        tokens_U: Tensor,
        *,
        root: bool = True,
        hydra: bool = False,
        own: bool = False,
    ) -> None:
        super().__init__()
        assert not (hydra and own), "a level of a tree goes through one LM head"
        width = lm_head.weight.shape[1]
        self.weight_KDD = nn.Parameter(torch.zeros(heads, width, width))
        self.root_KDD = nn.Parameter(torch.zeros(heads, width, width)) if root else None
        self.path_PDD = nn.Parameter(torch.zeros(_before(heads), width, width)) if hydra else None
        self.bias_KD = nn.Parameter(torch.zeros(heads, width))
        self.lm_head_KUD = nn.Parameter(lm_head.weight.repeat(heads, 1, 1)) if own else None
        self.lm_head = lm_head
        self.register_buffer("tokens_U", tokens_U)

    @property
    def hydra(self) -> bool:
        """Whether laws depend on the path."""
        return self.path_PDD is not None

    def forward(self, hidden_XD: Tensor, root_XD: Tensor, path_XJD: Tensor | None = None) -> Tensor:
        """Logits [K, X, U] over the draft vocabulary; root and path as `token_embeddings` gives them.

        path_XJD  Hydra only: the K - 1 tokens below each root; head k reads the first k - 1
        """
        turned_KXD = hidden_XD @ self.weight_KDD + self.bias_KD.unsqueeze(-2)
        if self.root_KDD is not None:
            turned_KXD = turned_KXD + root_XD @ self.root_KDD
        if self.hydra:
            along = [self._along(path_XJD[:, :J]) for J in range(len(turned_KXD))]
            turned_KXD = turned_KXD + torch.stack(along)
        read_KXD = hidden_XD + F.silu(turned_KXD)
        if self.lm_head_KUD is not None:
            return read_KXD @ self.lm_head_KUD.mT
        return self.says(read_KXD)

    def says(self, read: Tensor) -> Tensor:
        """Logits [..., U] through the target's LM head."""
        return self.lm_head.logits(read)

    def behind(self, hidden_XD: Tensor, read_XJD: Tensor) -> Tensor:
        """Logits [X, U] of what stands behind J tokens, the root and those drafted: packed Hydra head J."""
        J = read_XJD.shape[1]
        read_XI = torch.cat([hidden_XD.unsqueeze(1), read_XJD], 1).flatten(1)
        return self.says(hidden_XD + F.silu(self.turns[J - 1](read_XI) + self.bias_KD[J - 1]))

    def pack(self) -> None:
        """Have products packed for a handful of rows, and those of one Hydra head done as one."""
        product = packed_product(self.lm_head.weight, self.lm_head.bias)
        self.says = lambda read: self.lm_head.scaled(product(read))
        if self.hydra:
            self.turns = [packed_product(self._square(J).T.contiguous()) for J in range(len(self.bias_KD))]

    def _square(self, J: int) -> Tensor:
        """[(2 + J) D, D] of head J + 1: what it makes of the hidden state, the root and J drafted tokens."""
        return torch.cat([self.weight_KDD[J], self.root_KDD[J], *self._path(J)])

    def _along(self, path_XJD: Tensor) -> Tensor:
        """[X, D]: what J drafted tokens add for head J + 1."""
        return path_XJD.flatten(1) @ self._path(path_XJD.shape[1]).flatten(0, 1)

    def _path(self, J: int) -> Tensor:
        """[J, D, D] of head J + 1."""
        return self.path_PDD[_before(J) : _before(J + 1)]

    def save(self, path: Path, info: MedusaInfo) -> None:
        """Weights in bfloat16 and the draft vocabulary, as safetensors with `info` in its metadata."""
        write_head(path, KIND, asdict(info), self.state_dict() | {"tokens_U": self.tokens_U.int()})

    @classmethod
    def load(
        cls, path: Path, target: HFTarget, key: str = "proposer.heads"
    ) -> tuple[MedusaHeads, MedusaInfo]:
        """Heads on the target's device and dtype. ValueError: no heads, damaged, or for another target.

        key  the override that named the file, for the error
        """
        info, tensors = read_head(path, KIND, lambda plain: MedusaInfo(**plain), key)
        # Files need not have their vocabulary in order; which tokens it has is what is checked.
        ordered = {n: t.sort().values if n == "tokens_U" else t for n, t in tensors.items()}
        check_head(path, KIND, info, ordered, _shapes(info, tensors, target), target, key)
        tokens_U = tensors["tokens_U"].long().to(target.device)
        parts = {"root": "root_KDD" in tensors, "hydra": "path_PDD" in tensors}
        heads = cls(info.heads, target.lm_head_of(tokens_U), tokens_U, **parts)
        heads.load_state_dict(tensors | {"tokens_U": tokens_U.cpu()})
        return heads.to(target.device, target.dtype).eval().requires_grad_(False), info


def _before(J: int) -> int:
    """Squares of all heads that read fewer than J drafted tokens."""
    return J * (J - 1) // 2


def _shapes(info: MedusaInfo, tensors: dict[str, Tensor], target: HFTarget) -> Shapes:
    """Of what such a file holds; heads that read the path read the root."""
    K, width, hydra = info.heads, target.lm_head.shape[1], "path_PDD" in tensors
    drafted = tensors["tokens_U"].numel() if "tokens_U" in tensors else 0
    shapes = {"weight_KDD": (K, width, width), "bias_KD": (K, width), "tokens_U": (drafted,)}
    if hydra or "root_KDD" in tensors:
        shapes["root_KDD"] = (K, width, width)
    if hydra:
        shapes["path_PDD"] = (_before(K), width, width)
    return shapes


def token_embeddings(target: HFTarget, tokens: Tensor) -> Tensor:
    """[..., D]: the target's embeddings of tokens, scaled to a root mean square of 1 as hidden states are."""
    embedding = target.embedding[tokens.to(target.device)]
    return F.rms_norm(embedding, embedding.shape[-1:])
