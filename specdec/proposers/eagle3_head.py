"""EAGLE-3's model (Li et al. 2025, arXiv:2503.01840), and 3.1's: one decoder layer that reads hidden states.

Row t reads the embedding of token t + 1 and either what three layers of the target held at token t, or, where
the target has not been yet, what this head itself gave for the row before. It says what follows token t + 1.
Shapes: B sequences, T rows, H heads, D width, E twice the width, U draft vocabulary, K depths, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ..transfer import in_dtype
from .headfile import check_head, read_head, write_head

if TYPE_CHECKING:
    from ..target import HFTarget

KIND = "eagle3"


@dataclass(frozen=True)
class Eagle3Config:
    """Shape of a head, and which of the variants it is.

    taps                  layers of the target: the residuals that enter them are read
    rope_parameters       as in a `transformers` config: rope_theta, rope_type and what the type needs
    fc_norm               3.1: each tap is normed before they are joined
    post_norm             3.1: what is fed back is normed
    norm_before_residual  the residual is the normed hidden state, not the hidden state
    norm_before_fc        the taps are normed as one, when they are joined (speculators, NVIDIA)
    qk_norm               queries and keys are normed, head by head, before they are turned (Qwen3's layer)
    shared_head           the LM head is the target's, cut to the draft vocabulary
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    taps: tuple[int, ...]
    target_width: int
    target_vocab: int
    draft_vocab: int
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1e4}
    )
    max_length: int = 8192
    eps: float = 1e-5
    fc_norm: bool = True
    post_norm: bool = True
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    qk_norm: bool = False
    shared_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))  # JSON knows lists only


class Eagle3Head(nn.Module):
    """The layer. Its embedding, and with `shared_head` its LM head, are given by `borrow` and not stored."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        c = self.config = config
        self.fc = nn.Linear(len(c.taps) * c.target_width, c.width, bias=False)
        norms = len(c.taps) if c.fc_norm else 0
        self.fc_norm = nn.ModuleList(nn.RMSNorm(c.target_width, c.eps) for _ in range(norms))
        self.input_norm = nn.RMSNorm(self.fc.in_features, c.eps) if c.norm_before_fc else nn.Identity()
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm, self.norm = (
            nn.RMSNorm(c.width, c.eps) for _ in range(4)
        )
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(2 * c.width, c.heads * c.head_dim, bias=False),
                "k_proj": nn.Linear(2 * c.width, c.kv_heads * c.head_dim, bias=False),
                "v_proj": nn.Linear(2 * c.width, c.kv_heads * c.head_dim, bias=False),
                "o_proj": nn.Linear(c.heads * c.head_dim, c.width, bias=False),
            }
        )
        for name in ("q_norm", "k_norm"):
            self.self_attn[name] = nn.RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(c.width, c.mlp_width, bias=False),
                "up_proj": nn.Linear(c.width, c.mlp_width, bias=False),
                "down_proj": nn.Linear(c.mlp_width, c.width, bias=False),
            }
        )
        self.lm_head = nn.Linear(c.width, c.draft_vocab, bias=False)
        self.embed_tokens = nn.Embedding(0, c.width)
        self.register_buffer("tokens_U", torch.arange(c.draft_vocab, dtype=torch.int32))
        self.rotary = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=c.heads * c.head_dim,
                num_attention_heads=c.heads,
                head_dim=c.head_dim,
                max_position_embeddings=c.max_length,
                rope_parameters=dict(c.rope_parameters),
            )
        )

    def borrow(self, target: HFTarget) -> Eagle3Head:
        """Read the target's embedding, and draft with its LM head where this one has none of its own."""
        self.embed_tokens = nn.Embedding.from_pretrained(target.embedding, freeze=True)
        if self.config.shared_head:
            self.lm_head = target.lm_head_of(self.tokens_U.long())
        return self

    def fuse(self, taps: Iterable[Tensor]) -> Tensor:
        """[..., D] of the taps, each [..., target_width]."""
        if self.config.fc_norm:
            taps = [norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)]
        return self.fc(self.input_norm(torch.cat(list(taps), dim=-1)))

    def project(self, tokens_BT: Tensor, hidden_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, ...]:
        """The residual [B, T, D], and queries, keys, values [B, H, T, D], turned to their positions."""
        normed_BTD = self.hidden_norm(hidden_BTD)
        read_BTE = torch.cat([self.input_layernorm(self.embed_tokens(tokens_BT)), normed_BTD], dim=-1)
        q, k, v = (
            rearrange(
                self.self_attn[f"{name}_proj"](read_BTE), "b t (h d) -> b h t d", d=self.config.head_dim
            )
            for name in "qkv"
        )
        cos_BTD, sin_BTD = self.rotary(v, positions_BT)
        q, k = self.self_attn["q_norm"](q), self.self_attn["k_norm"](k)
        q, k = apply_rotary_pos_emb(q, k, cos_BTD, sin_BTD)
        return (normed_BTD if self.config.norm_before_residual else hidden_BTD), q, k, v

    def finish(self, residual_BTD: Tensor, attended_BHTD: Tensor) -> Tensor:
        """The layer's output [B, T, D]."""
        joined_BTE = rearrange(attended_BHTD, "b h t d -> b t (h d)")
        hidden_BTD = residual_BTD + self.self_attn["o_proj"](joined_BTE)
        normed_BTD = self.post_attention_layernorm(hidden_BTD)
        gated = F.silu(self.mlp["gate_proj"](normed_BTD)) * self.mlp["up_proj"](normed_BTD)
        return hidden_BTD + self.mlp["down_proj"](gated)

    def fed_back(self, hidden_BTD: Tensor) -> Tensor:
        """What the next row reads in place of the target's hidden states."""
        return self.norm(hidden_BTD) if self.config.post_norm else hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """[B, T, U] over the draft vocabulary."""
        product_BTU = self.lm_head(self.norm(hidden_BTD))
        return self.lm_head.scaled(product_BTU) if self.config.shared_head else product_BTU

    def stored(self) -> dict[str, Tensor]:
        """What a file of this head holds, in its own dtypes."""
        borrowed = {"embed_tokens.weight"} | ({"lm_head.weight"} if self.config.shared_head else set())
        return {
            name: t.detach().contiguous() for name, t in self.state_dict().items() if name not in borrowed
        }


@dataclass(frozen=True)
class Eagle3Info:
    """What a file says of itself.

    accuracy_KR  [k][r]: how often the rank-r token at depth k + 1 was right, told the right ones before it
    """

    config: Eagle3Config
    target: str
    fingerprint: str
    accuracy_KR: list[list[float]]

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Eagle3Info:
        """From a file's metadata. KeyError, TypeError: not all of it is there, or more."""
        return cls(**plain | {"config": Eagle3Config(**plain["config"])})


def save(path: Path, head: Eagle3Head, info: Eagle3Info) -> None:
    """A native file."""
    write_head(path, KIND, asdict(info), head.stored())


def load(path: Path, target: HFTarget, key: str = "proposer.heads") -> tuple[Eagle3Head, Eagle3Info]:
    """A native file's head on the target's device and dtype. ValueError: damaged, or for another target.

    key  the override that named the file, for the error
    """
    info, tensors = read_head(path, KIND, Eagle3Info.of, key)
    with torch.device("meta"):
        head = Eagle3Head(info.config)
    expected = {name: tuple(t.shape) for name, t in head.stored().items()}
    check_head(path, KIND, info, tensors, expected, target, key)
    return ready(head, tensors, target), info


def ready(head: Eagle3Head, tensors: dict[str, Tensor], target: HFTarget) -> Eagle3Head:
    """A head with these weights, which borrows the rest from the target and drafts for it."""
    head = Eagle3Head(head.config)
    head.load_state_dict(tensors, strict=False)
    head = in_dtype(head.to(target.device).borrow(target), target.dtype)
    return head.eval().requires_grad_(False)
