"""EAGLE-3 heads of others, read into this project's.

Configs leave three things open, or have them wrong so often that the self-test tries both ways: whether a
layer id names the layer's input or its output, so that ids are one off; whether the residual is taken before
or after its norm; whether `norm_output` feeds the normed state back (SpecForge: not before September 2026).
Shapes: U draft vocabulary, V the target's, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..proposers.base import FromLogits
from ..proposers.eagle3 import Eagle3
from ..proposers.eagle3_head import KIND, Eagle3Config, Eagle3Head, ready
from .dialects import SPECULATORS, Said, understood
from .files import Reading, Unusable, read, refused, same_tokenizer

if TYPE_CHECKING:
    from ..target import HFTarget
    from ..trees import TreePolicy

State = dict[str, Tensor]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREFIX = re.compile(r"^(model\.)?(midlayer\.|layers\.0\.)?")
# Buffers, and the target's weights that training keeps beside the head's own.
IGNORED = ("t2d", "d2t", "verifier_norm.weight", "verifier_lm_head.weight", "self_attn.rotary_emb.inv_freq")


def read_eagle3(heads: str, target: HFTarget) -> list[Reading]:
    """All plausible readings of a folder or hub id for this target, the one that its config documents first.

    ValueError: no EAGLE-3 head, damaged, of a variant that is not supported, or for a target of other sizes
    """
    config, tensors = read(heads, WEIGHTS, KIND)
    try:
        return _readings(understood(config), {_native(name): t for name, t in tensors.items()}, target)
    except Unusable as problem:
        raise refused(heads, str(problem), KIND) from problem


def eagle3_head(reading: Reading, target: HFTarget) -> Eagle3Head:
    """The head on the target's device and dtype, with its own embedding if it has one."""
    weights = dict(reading.state)
    own_VD = weights.pop("embed_tokens.weight", None)
    head = ready(Eagle3Head(reading.config), weights, target)
    if own_VD is not None:
        own_VD = own_VD.to(target.device, target.dtype)
        head.embed_tokens = torch.nn.Embedding.from_pretrained(own_VD, freeze=True)
    return head


class Eagle3InMemory(Eagle3):
    """Drafts with a head that lies in no file of ours."""

    def __init__(self, target: HFTarget, tree: TreePolicy, head: Eagle3Head) -> None:
        FromLogits.__init__(self, target, tree)
        self._take(head)


def _native(name: str) -> str:
    return PREFIX.sub("", name).replace("fc_norms.", "fc_norm.")


def _readings(said: Said, tensors: State, target: HFTarget) -> list[Reading]:
    _check_target(said, tensors, target)
    tokens_U, rows_U = _vocabulary(said, tensors, target.vocab)
    state = _state(tensors, tokens_U, rows_U, target)
    taps = _taps(said, state["fc.weight"].shape[-1] // said.target_width, len(target.layers))
    common = _common(said, state, target)
    _check_shapes(Eagle3Config(taps=taps[0][1], **common), state)
    return list(_variants(said, taps, common, state))


def _variants(
    said: Said, taps: list[tuple[str, tuple[int, ...]]], common: dict[str, Any], state: State
) -> Iterator[Reading]:
    after, fed = (said.flags.get(name, False) for name in ("norm_before_residual", "norm_output"))
    doubtful = fed and said.dialect != SPECULATORS
    feedbacks = (True, False) if doubtful else (fed,)
    for (words, layers), residual, feedback in product(taps, (after, not after), feedbacks):
        config = Eagle3Config(taps=layers, norm_before_residual=residual, post_norm=feedback, **common)
        variant = f"residual {'after' if residual else 'before'} its norm"
        variant += f", {'normed' if feedback else 'raw'} feedback" if doubtful else ""
        yield Reading(f"{said.dialect}, {words}, {variant}", config, state)


def _check_target(said: Said, tensors: State, target: HFTarget) -> None:
    """Unusable: no EAGLE-3 layer, or sizes that are not this target's."""
    if missing := [name for name in ("fc.weight", "hidden_norm.weight") if name not in tensors]:
        there = ", ".join(sorted(tensors)[:4])
        raise Unusable(f"holds no {missing[0]}, so it is no EAGLE-3 head (it holds {there}, ...)")
    width, read_width = target.embedding.shape[1], tensors["fc.weight"].shape[-1]
    if said.target_width != width or read_width % width:
        raise Unusable(
            f"reads hidden states of width {said.target_width} (fc.weight: {read_width} values), "
            f"this target's are {width} wide"
        )
    if not same_tokenizer(said.layer.vocab_size, target.vocab):
        raise Unusable(f"knows {said.layer.vocab_size} tokens, this target has {target.vocab}")
    if said.layer.hidden_size != width and "embed_tokens.weight" not in tensors:
        raise Unusable(f"is {said.layer.hidden_size} wide, has no embed_tokens, and can't read this target's")


def _vocabulary(said: Said, tensors: State, vocab: int) -> tuple[Tensor, Tensor]:
    """Target ids of the draft vocabulary, ascending, and the row of the LM head of each.

    d2t holds offsets, target = row + d2t[row]; where t2d says so, ids.
    """
    d2t_U = tensors.get("d2t")
    sizes = {len(t) for t in (tensors.get("lm_head.weight"), d2t_U) if t is not None}
    rows = sizes.pop() if sizes else said.layer.vocab_size
    if sizes:
        raise Unusable(f"has {rows} and {sizes.pop()} rows in lm_head.weight and d2t, expected as many")
    if d2t_U is None and not same_tokenizer(rows, vocab):
        raise Unusable(f"drafts {rows} of {vocab} tokens, and has no d2t that says which")
    ids_U = torch.arange(rows) if d2t_U is None else _target_ids(d2t_U.long(), tensors.get("t2d"))
    tokens_U, rows_U = ids_U.sort(stable=True)
    if not rows or int(tokens_U[0]) < 0 or bool((tokens_U[1:] == tokens_U[:-1]).any()):
        raise Unusable("has a d2t that does not name different tokens")
    known_U = tokens_U < vocab
    if not same_tokenizer(int(known_U.sum()), rows):
        raise Unusable(f"drafts tokens up to {int(tokens_U[-1])}, this target has {vocab}")
    return tokens_U[known_U], rows_U[known_U]


def _target_ids(d2t_U: Tensor, t2d_V: Tensor | None) -> Tensor:
    ids_U = torch.arange(len(d2t_U)) + d2t_U
    if t2d_V is None:
        return ids_U
    known_U = t2d_V.nonzero().flatten()
    for candidate_U in (ids_U, d2t_U):
        if torch.equal(candidate_U.sort().values, known_U):
            return candidate_U
    raise Unusable("has a d2t and a t2d that contradict each other")


def _state(tensors: State, tokens_U: Tensor, rows_U: Tensor, target: HFTarget) -> State:
    """The head's own tensors; without embeddings or an LM head that only copy the target's.

    Such heads use an LM head as it is: it is no copy where the target scales, caps or has a bias.
    """
    state = {name: t for name, t in tensors.items() if name not in IGNORED}
    state["tokens_U"] = tokens_U.int()
    if "lm_head.weight" in state:
        state["lm_head.weight"] = state["lm_head.weight"][rows_U]
    lm_head_UD = target.lm_head[tokens_U.to(target.device)]
    copies = {"embed_tokens.weight": target.embedding}
    copies |= {"lm_head.weight": lm_head_UD} if target.plain_lm_head else {}
    state = {n: t for n, t in state.items() if n not in copies or not _copied(t, copies[n])}
    if "embed_tokens.weight" in state:
        state["embed_tokens.weight"] = _padded(state["embed_tokens.weight"], target.embedding)
    return state


def _copied(own_XD: Tensor, theirs_XD: Tensor) -> bool:
    """Whether the rows that both have are the same, and those that only one has could be padding."""
    rows = min(len(own_XD), len(theirs_XD))
    return same_tokenizer(rows, len(theirs_XD)) and torch.equal(own_XD[:rows].to(theirs_XD), theirs_XD[:rows])


def _padded(own_XD: Tensor, theirs_VD: Tensor) -> Tensor:
    """[V, D] if it could be of one tokenizer: rows that miss are the target's, zero where widths differ."""
    rows, vocab = len(own_XD), len(theirs_VD)
    if rows >= vocab or not same_tokenizer(rows, vocab):
        return own_XD[:vocab]
    same_width = own_XD.shape[1:] == theirs_VD.shape[1:]
    missing = theirs_VD[rows:] if same_width else own_XD.new_zeros(vocab - rows, *own_XD.shape[1:])
    return torch.cat([own_XD, missing.to(own_XD)])


def _taps(said: Said, count: int, layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """What the layer ids may mean, in words, and the layers whose inputs are read; all read them in order."""
    ids = said.ids or (2, layers // 2, layers - 3)
    found = []
    for inputs in (said.inputs, not said.inputs):
        taps = tuple(sorted({i + (not inputs) for i in ids}))
        words = f"layers {list(taps)} (ids {list(ids)} as {'inputs' if inputs else 'outputs'})"
        if len(taps) == count and taps[0] >= 0 and taps[-1] < layers:
            found.append((words, taps))
    if not found:
        raise Unusable(
            f"reads {count} layers, {'by default' if said.ids is None else 'with the ids'} {list(ids)}: "
            f"expected as many different ones of this target's {layers} (0 to {layers - 1})"
        )
    return found


def _common(said: Said, state: State, target: HFTarget) -> dict[str, Any]:
    """What all readings share."""
    c = said.layer
    return {
        "width": c.hidden_size,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads or c.num_attention_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "mlp_width": c.intermediate_size,
        "target_width": said.target_width,
        "target_vocab": target.vocab,
        "draft_vocab": len(state["tokens_U"]),
        "rope_parameters": {key: value for key, value in c.rope_parameters.items() if key != "type"},
        "max_length": c.max_position_embeddings,
        "eps": c.rms_norm_eps,
        "norm_before_fc": said.flags.get("norm_before_fc", False) or "input_norm.weight" in state,
        "qk_norm": "self_attn.q_norm.weight" in state,
        "fc_norm": said.flags.get("fc_norm", False) or "fc_norm.0.weight" in state,
        "shared_head": "lm_head.weight" not in state,
    }


def _check_shapes(config: Eagle3Config, state: State) -> None:
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in Eagle3Head(config).stored().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if "embed_tokens.weight" in found:
        expected["embed_tokens.weight"] = (config.target_vocab, config.width)
    if wrong := sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)):
        pairs = [(n, found.get(n, "missing"), expected.get(n, "none")) for n in wrong[:3]]
        said = "; ".join(f"{name} is {has}, expected {want}" for name, has, want in pairs)
        raise Unusable(f"holds other tensors than its config says: {said}")
