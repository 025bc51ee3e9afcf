"""Medusa heads of others (2401.10774): the original layout, TGI's, and vLLM's.

The original stores {head}.{block}.linear.{weight,bias}, and {head}.{blocks}.weight, an LM head of its own;
its config may name another number of heads than there are. TGI leaves out LM heads that are the target's.
vLLM stores blocks.{head}.layers.{block}.weight and lm_heads.{head}.weight, and may draft a part of the
vocabulary, the ids in token_map. Shapes: K heads, U draft vocabulary, V the target's, D width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lm_head import LMHead
from ..proposers.base import FromLogits
from ..proposers.medusa import Medusa
from ..proposers.medusa_heads import KIND, MedusaHeads, MedusaInfo
from .files import Reading, Unusable, read, refused, same_tokenizer

if TYPE_CHECKING:
    from ..target import HFTarget
    from ..trees import TreePolicy

WEIGHTS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors", "pytorch_model.bin")
PREFIX = re.compile(r"^medusa_heads?\.")
BLOCK = re.compile(r"(?:blocks\.)?(\d+)\.(?:layers\.)?(\d+)(?:\.linear)?\.(weight|bias)")
LM_HEAD = re.compile(r"(?:lm_heads\.(\d+)|(\d+)\.\d+)\.weight")


@dataclass
class _Parts:
    """Tensors by what they are: blocks[weight or bias][head], the LM heads that heads have, the rest."""

    blocks: dict[str, dict[int, Tensor]] = field(default_factory=lambda: {"weight": {}, "bias": {}})
    lm_heads: dict[int, Tensor] = field(default_factory=dict)
    shared: Tensor | None = None
    token_map: Tensor | None = None

    @property
    def whole(self) -> list[Tensor]:
        """All LM heads."""
        return [*self.lm_heads.values(), *([] if self.shared is None else [self.shared])]


def read_medusa(heads: str, target: HFTarget) -> Reading:
    """The heads of a folder or hub id; its state has lm_head_KUD where they don't use the target's LM head.

    ValueError: no Medusa heads, damaged, with several blocks a head, or for a target of other sizes
    """
    config, tensors = read(heads, WEIGHTS, KIND)
    try:
        return _reading(config, tensors, target)
    except Unusable as problem:
        raise refused(heads, str(problem), KIND) from problem


def medusa_heads(reading: Reading, target: HFTarget) -> MedusaHeads:
    """The heads on the target's device and dtype."""
    tokens_U = reading.state["tokens_U"].long().to(target.device)
    own = "lm_head_KUD" in reading.state
    lm_head = LMHead(target.lm_head[tokens_U]) if own else target.lm_head_of(tokens_U)
    heads = MedusaHeads(reading.config.heads, lm_head, tokens_U, root=False, own=own)
    heads.load_state_dict(reading.state | {"tokens_U": tokens_U})
    return heads.to(target.device, target.dtype).eval().requires_grad_(False)


class MedusaInMemory(Medusa):
    """Drafts with heads that lie in no file of ours."""

    def __init__(self, target: HFTarget, tree: TreePolicy, heads: MedusaHeads) -> None:
        FromLogits.__init__(self, target, tree)
        self.heads = heads


def _reading(config: dict[str, Any], tensors: dict[str, Tensor], target: HFTarget) -> Reading:
    parts, width = _parts(tensors), target.embedding.shape[1]
    weight_KDD, bias_KD = _blocks(parts, width)
    K, ids_U = len(bias_KD), _vocabulary(config, parts, target.vocab)
    state = {"weight_KDD": weight_KDD, "bias_KD": bias_KD, "tokens_U": ids_U.sort().values.int()}
    own = _lm_heads(parts, K, ids_U, target)
    info = MedusaInfo(K, width, target.name, target.fingerprint, [])
    layout = "vLLM" if any("blocks." in name for name in tensors) else "original"
    if own is None:
        return Reading(f"{layout} layout, the target's LM head", info, state)
    return Reading(f"{layout} layout, LM heads of their own", info, state | {"lm_head_KUD": own})


def _parts(tensors: dict[str, Tensor]) -> _Parts:
    parts = _Parts()
    for full, tensor in tensors.items():
        name = PREFIX.sub("", full)
        # The original numbers blocks and LM heads alike, and calls a block's part linear.
        block = BLOCK.fullmatch(name) if ".linear." in name or name.startswith("blocks.") else None
        if block and block[2] != "0":
            raise Unusable(f"has several residual blocks a head ({full}), expected one")
        if block:
            parts.blocks[block[3]][int(block[1])] = tensor
        elif head := LM_HEAD.fullmatch(name):
            parts.lm_heads[int(head[1] or head[2])] = tensor
        elif name == "token_map":
            parts.token_map = tensor
        elif name == "lm_head.weight":
            parts.shared = tensor
        else:
            raise Unusable(f"holds {full}, which Medusa heads do not have")
    return parts


def _blocks(parts: _Parts, width: int) -> tuple[Tensor, Tensor]:
    """Weights [K, D, D], read from the left, and biases [K, D], zero where there is none."""
    weights, biases = parts.blocks["weight"], parts.blocks["bias"]
    heads = range(len(weights))
    if not weights or set(weights) != set(heads) or not biases.keys() <= weights.keys():
        raise Unusable(f"has weights for the heads {sorted(weights)}, expected all from 0 on")
    for name, found, shape in (("blocks", weights, (width, width)), ("biases", biases, (width,))):
        if wrong := [tuple(t.shape) for t in found.values() if t.shape != shape]:
            raise Unusable(f"has {name} of {wrong[0]}, this target's hidden states are {width} wide")
    zeros_D = torch.zeros(width, dtype=weights[0].dtype)
    return torch.stack([weights[k].T for k in heads]), torch.stack([biases.get(k, zeros_D) for k in heads])


def _vocabulary(config: dict[str, Any], parts: _Parts, vocab: int) -> Tensor:
    """Target ids of the draft vocabulary, in the order of the LM heads' rows."""
    told = config.get("vocab_size") or vocab
    if not same_tokenizer(told, vocab):
        raise Unusable(f"knows {told} tokens, this target has {vocab}")
    if parts.token_map is None:
        rows = max((len(t) for t in parts.whole), default=vocab)
        if not same_tokenizer(rows, vocab):
            raise Unusable(f"drafts {rows} of {vocab} tokens, and has no token_map that says which")
        return torch.arange(min(rows, vocab))
    ids_U = parts.token_map.long()
    different_U = ids_U[(ids_U >= 0) & (ids_U < vocab)].unique()
    if not 0 < len(different_U) == len(ids_U):
        raise Unusable(f"has a token_map that does not name different tokens of this target's {vocab}")
    return ids_U


def _lm_heads(parts: _Parts, K: int, ids_U: Tensor, target: HFTarget) -> Tensor | None:
    """[K, U, D], rows ascending by token; None where they are all the target's, which does nothing else."""
    if not parts.whole:
        return None
    found = [parts.shared] * K if parts.shared is not None else [parts.lm_heads.get(k) for k in range(K)]
    if parts.lm_heads.keys() == {0}:
        found = [parts.lm_heads[0]] * K
    order_U, width = ids_U.argsort(), target.embedding.shape[1]
    lm_head_UD = target.lm_head[ids_U[order_U].to(target.device)]
    if any(t is None or t.shape[1:] != (width,) or len(t) < len(ids_U) for t in found):
        shapes = {k: tuple(t.shape) for k, t in parts.lm_heads.items()}
        raise Unusable(f"has LM heads of {shapes}, expected {K} of {(len(ids_U), width)}")
    cut = [t[ids_U[order_U] if len(t) > len(ids_U) else order_U] for t in found]
    if target.plain_lm_head and all(torch.equal(t.to(lm_head_UD), lm_head_UD) for t in cut):
        return None
    return torch.stack(cut)
