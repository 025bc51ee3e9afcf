"""EAGLE-3's training-time test (arXiv:2503.01840): the head is unrolled on its own output, as when it drafts.

At unroll i the row of token t reads the embedding of token t + 1 + i and its own output of unroll i - 1; it
attends to the rows of unroll 0 up to t, and to its own of the unrolls between. The loss is the cross-entropy
between the target's law and the head's, over the draft vocabulary.
Shapes: S texts, T rows, I earlier unrolls, H heads, D width, U draft vocabulary, X rows that count, R ranks.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..proposers.eagle3 import Eagle3
from ..proposers.eagle3_head import Eagle3Config, Eagle3Head, Eagle3Info, load, save
from ..taps import Tap
from ..target import HFTarget
from ..trees import Chain
from .heads import HeadRecipe, expect_shape, laws
from .texts import GRANULE, TextBatch, Texts

VARIANT = ("fc_norm", "post_norm", "norm_before_residual", "shared_head")


@dataclass(frozen=True)
class Eagle3Recipe(HeadRecipe):
    """How a head is trained, besides what all recipes say.

    layers       of the target, read at their entrance; null: 2, the middle, the last but two
    unroll       steps of the training-time test
    decay        an unroll's share of the loss, against the one before
    shared_head  draft with the target's own LM head, cut to the draft vocabulary, instead of a trained copy
    """

    layers: tuple[int, ...] | None = None
    unroll: int = 4
    decay: float = 0.8
    fc_norm: bool = True
    post_norm: bool = True
    norm_before_residual: bool = False
    shared_head: bool = True

    kind: ClassVar[str] = "eagle3"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("unroll", self.unroll >= 1, "1 or more", 4)

    def taps(self, target: HFTarget) -> tuple[Tap, ...]:
        return (*self._layers(target), *super().taps(target))

    def _layers(self, target: HFTarget) -> tuple[int, ...]:
        n = len(target.layers)
        usual = sorted({min(2, n - 1), n // 2, max(n - 3, 0)})
        layers = tuple(usual if self.layers is None else self.layers)
        if not layers or not all(i in range(n) for i in layers):
            raise ValueError(
                f"head.layers is {list(layers)}, expected some of this target's layers 0 to {n - 1}: "
                f"head.layers=[{','.join(map(str, usual))}]"
            )
        return layers

    def new(self, target: HFTarget, tokens_U: Tensor) -> Eagle3Head:
        head = Eagle3Head(self._config(target, len(tokens_U)))
        head.tokens_U.copy_(tokens_U)
        if not self.shared_head:
            theirs = target.lm_head_of(head.tokens_U.long())
            head.lm_head.weight.data.copy_(theirs.scale * theirs.weight)
        _like_the_target(head, target)
        return _borrowing(head, target)

    def begun(self, target: HFTarget, path: Path, texts: Texts) -> Eagle3Head:
        there, _ = load(path, target, "head.start")
        expect_shape(path, {name: getattr(there.config, name) for name in VARIANT}, self._variant)
        expect_shape(path, {"layers": there.config.taps}, {"layers": self._layers(target)})
        tokens_U = there.tokens_U
        if self.shared_head:
            tokens_U = texts.most_said(target.vocab, self.vocab, tokens_U)
        head = Eagle3Head(replace(there.config, draft_vocab=len(tokens_U)))
        head.load_state_dict(there.stored() | {"tokens_U": tokens_U}, strict=False)
        return _borrowing(head, target)

    def _config(self, target: HFTarget, draft_vocab: int) -> Eagle3Config:
        c = target.config
        heads = c.num_attention_heads
        return Eagle3Config(
            width=c.hidden_size,
            heads=heads,
            kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
            mlp_width=getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
            taps=self._layers(target),
            target_width=c.hidden_size,
            target_vocab=target.vocab,
            draft_vocab=draft_vocab,
            rope_parameters=_rope(c),
            max_length=target.max_length,
            **self._variant,
        )

    @property
    def _variant(self) -> dict[str, bool]:
        return {name: getattr(self, name) for name in VARIANT}

    def judged(
        self, head: Eagle3Head, target: HFTarget, batch: TextBatch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        text_X, place_X = batch.said_ST.nonzero(as_tuple=True)
        tokens_U = head.tokens_U.long()
        laws_XU = laws(batch.hidden["final"][text_X, place_X], target.lm_head_of(tokens_U))
        drafted_X = torch.isin(batch.next_ST[text_X, place_X], tokens_U)
        fused_STD = head.fuse(batch.hidden[tap].to(head.fc.weight.dtype) for tap in head.config.taps)
        first = max(0, int(place_X.min()) - self.unroll) // GRANULE * GRANULE
        for i, out_STD in enumerate(unroll(head, batch.tokens_ST, fused_STD, self.unroll, first)):
            row_X = place_X - 1 - i  # the row of token t says what follows token t + 1 + i
            has_row_X = row_X >= 0
            hidden_XD = out_STD[text_X[has_row_X], row_X[has_row_X] - first]
            yield head.logits(hidden_XD), laws_XU[has_row_X], drafted_X[has_row_X]

    def save(self, head: Eagle3Head, target: HFTarget, texts: Texts, path: Path) -> None:
        accuracy_KR = self.accuracy(head, target, texts)
        save(path, head, Eagle3Info(head.config, target.name, target.fingerprint, accuracy_KR))

    def proposer(self, target: HFTarget, path: Path) -> Eagle3:
        return Eagle3(target, Chain(depth=self.unroll), heads=str(path))


def _borrowing(head: Eagle3Head, target: HFTarget) -> Eagle3Head:
    return head.to(target.device).borrow(target).float()


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The target's own, if all of its layers have the same and they turn all of a head's dimensions.

    Else the default type with its base: this head turns all of them, and a scaling is for as many as it says.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or "rope_theta" not in rope:
        return {"rope_type": "default", "rope_theta": rope.get("rope_theta", 1e4)}
    # "type" is what older configs call rope_type.
    return {key: value for key, value in rope.items() if key not in ("partial_rotary_factor", "type")}


@torch.no_grad()
def _like_the_target(head: Eagle3Head, target: HFTarget) -> None:
    """Start from the target's last layer where it has that shape: the LM head expects what that one gives."""
    width, last = head.config.width, dict(target.layers[-1].named_modules())
    # A layer with four norms gives the second one's name to that of what attention adds.
    second = "pre_feedforward" if "post_feedforward_layernorm" in last else "post_attention"
    last["post_attention_layernorm"] = last.get(f"{second}_layernorm")
    last["norm"] = getattr(target.model.base_model.get_decoder(), "norm", None)
    for name, ours in head.named_modules():
        theirs = last.get(name)
        if theirs is not None and isinstance(ours, nn.RMSNorm):
            ours.weight.copy_(_gain(theirs, ours.weight))
        elif isinstance(theirs, nn.Linear) and theirs.weight.shape == ours.weight.shape:
            ours.weight.copy_(theirs.weight)
        elif isinstance(theirs, nn.Linear) and theirs.weight.shape == (len(ours.weight), width):
            ours.weight[:, width:].copy_(theirs.weight)


def _gain(norm: nn.Module, otherwise_D: Tensor) -> Tensor:
    """The weight with which RMSNorm does what this norm does, if there is one: Gemma's count from 1."""
    weight_D = getattr(norm, "weight", None)
    if weight_D is None:
        return otherwise_D
    weight_D, exact = weight_D.float(), copy.deepcopy(norm).float()
    probe_D = torch.linspace(-1, 2, len(weight_D), device=weight_D.device)
    normed_D, near = F.rms_norm(probe_D, probe_D.shape), partial(torch.allclose, exact(probe_D), rtol=1e-3)
    return next((gain_D for gain_D in (weight_D, 1 + weight_D) if near(gain_D * normed_D)), otherwise_D)


def unroll(
    head: Eagle3Head, tokens_ST: Tensor, fused_STD: Tensor, steps: int, first: int = 0
) -> Iterator[Tensor]:
    """The layer's output at each unroll, [S, T - first, D]: of the rows from `first` on, the others are read.

    Rows whose tokens lie behind the text's end mean nothing.
    """
    T, past = tokens_ST.shape[1], Past(head.config.head_dim**-0.5)
    hidden_STD, start = fused_STD, 0
    for i in range(min(steps, T - 1)):
        shifted_ST = F.pad(tokens_ST[:, start + 1 + i :], (0, 1 + i))
        positions_ST = torch.arange(start + i, T + i, device=tokens_ST.device).expand_as(shifted_ST)
        residual_STD, q, k, v = head.project(shifted_ST, hidden_STD, positions_ST)
        out_STD = head.finish(residual_STD[:, first - start :], past.attend(q[:, :, first - start :], k, v))
        yield out_STD
        hidden_STD, start = head.fed_back(out_STD), first


@dataclass
class Past:
    """Keys and values of the unrolls so far, [S, H, T, D] each."""

    scale: float
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add k and v, and attend: to unroll 0 causally, to the others where they stand in the same row."""
        groups = q.shape[1] // k.shape[1]
        self.keys.append(k.repeat_interleave(groups, 1))
        self.values.append(v.repeat_interleave(groups, 1))
        first_SHTT = einsum(q, self.keys[0], "s h t d, s h u d -> s h t u") * self.scale
        rows, T = first_SHTT.shape[2:]
        causal_TT = torch.ones(rows, T, dtype=torch.bool, device=q.device).tril(T - rows)
        first_SHTT = first_SHTT.masked_fill(~causal_TT, -torch.inf)
        own_SHTI = [einsum(q, key, "s h t d, s h t d -> s h t") * self.scale for key in self.keys[1:]]
        scores = torch.cat([first_SHTT, *(own.unsqueeze(-1) for own in own_SHTI)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        out = einsum(weights[..., :T], self.values[0], "s h t u, s h u d -> s h t d")
        for i, value in enumerate(self.values[1:]):
            out = out + weights[..., T + i, None] * value
        return out
