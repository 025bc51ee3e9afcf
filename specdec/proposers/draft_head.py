"""A draft of a few decoder layers between the target's own embedding and its LM head.

Shapes: S texts, T tokens, D width, U draft vocabulary, K depths, R ranks.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..architecture import stock_attention
from .headfile import check_head, read_head, write_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..target import HFTarget

KIND = "draft_lm"


@dataclass(frozen=True)
class DraftInfo:
    """What a file says of itself.

    source       which of the target's layers these started as
    accuracy_KR  [0][r]: how often the rank-r token was right, told the right ones before it. One row for all
                 depths: what this draft has read at any depth are tokens, so it can't tell which it drafted
    """

    source: tuple[int, ...]
    target: str
    fingerprint: str
    accuracy_KR: list[list[float]]

    @classmethod
    def of(cls, plain: dict[str, Any]) -> DraftInfo:
        """From a file's metadata. KeyError, TypeError: not all of it is there, or more."""
        return cls(**plain | {"source": tuple(plain["source"])})


class DraftHead(nn.Module):
    """Copies of some of the target's layers, and of all else in its decoder but the embedding.

    decoder   reads embeddings; what is trained and stored
    lm_head   the target's rows of the draft vocabulary
    tokens_U  int32, ascending: the draft vocabulary; both are given by `drafting`
    ValueError: the target has no such layers
    """

    def __init__(self, target: HFTarget, source: tuple[int, ...]) -> None:
        super().__init__()
        shared: dict[int, Any] = {}
        self.config = copy.deepcopy(target.model.config, shared)
        self.config._attn_implementation = stock_attention(target.model)  # until HFTarget sets its own
        _cut(self.config.get_text_config(), check_source(source, len(target.layers)))
        decoder = target.model.base_model.get_decoder()
        layers = nn.ModuleList(_placed(target.layers[i], place, shared) for place, i in enumerate(source))
        shared[id(target.layers)], shared[id(decoder.get_input_embeddings())] = layers, nn.Identity()
        self.decoder = copy.deepcopy(decoder, shared)

    def drafting(self, target: HFTarget, tokens_U: Tensor) -> DraftHead:
        """The same with a draft vocabulary."""
        self.register_buffer("tokens_U", tokens_U.int().to(target.device))
        self.lm_head = target.lm_head_of(self.tokens_U.long())
        return self

    def forward(self, embedded_STD: Tensor) -> Tensor:
        """[S, T, D]: what the LM head reads, from the target's embeddings of the tokens."""
        return self.decoder(inputs_embeds=embedded_STD, use_cache=False).last_hidden_state

    def stored(self) -> dict[str, Tensor]:
        """What a file holds, in its own dtypes; names as in the decoder."""
        return {n: t.detach() for n, t in self.decoder.state_dict().items()} | {"tokens_U": self.tokens_U}


def check_source(source: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """The layers themselves. ValueError: none, or some that the target does not have."""
    if not source or not all(0 <= i < n_layers for i in source):
        raise ValueError(
            f"head.source is {list(source)}, expected some of this target's layers 0 to {n_layers - 1}: "
            f"head.source=[0,{n_layers - 1}]"
        )
    return source


def _cut(text: Any, source: tuple[int, ...]) -> None:
    """Have a model's config say these layers only."""
    text.num_hidden_layers = len(source)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in source]


def _placed(layer: nn.Module, place: int, shared: dict[int, Any]) -> nn.Module:
    """A copy that caches as the layer of that place; of a layer that is taken twice, each copy is its own."""
    twin = copy.deepcopy(layer, dict(shared))
    for part in twin.modules():
        if hasattr(part, "layer_idx"):
            part.layer_idx = place
    return twin


def causal_lm(head: DraftHead, target: HFTarget) -> PreTrainedModel:
    """The whole draft: the target's embedding, these layers, their LM head. No weight is copied."""
    nowhere = head.decoder.get_input_embeddings()
    decoder = with_part(head.decoder, nowhere, target.model.get_input_embeddings())
    model = with_part(target.model, target.model.base_model.get_decoder(), decoder)
    model = with_part(model, model.get_output_embeddings(), head.lm_head)
    model.config = head.config
    return model


def with_part(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """A copy that shares the weights of `module` and has `new` where `old` was."""
    if module is old:
        return new
    twin = copy.copy(module)
    twin._modules = {name: part and with_part(part, old, new) for name, part in module._modules.items()}
    return twin


def save(path: Path, head: DraftHead, info: DraftInfo) -> None:
    """A native file."""
    write_head(path, KIND, asdict(info), head.stored())


def load(path: Path, target: HFTarget, key: str = "proposer.heads") -> tuple[DraftHead, DraftInfo]:
    """A file's draft on the target's device and dtype. ValueError: damaged, or for another target.

    key  the override that named the file, for the error
    """
    info, tensors = read_head(path, KIND, DraftInfo.of, key)
    # Another target, which is refused below, may have other layers.
    head = DraftHead(target, info.source if info.fingerprint == target.fingerprint else (0,))
    expected = {name: tuple(t.shape) for name, t in head.decoder.state_dict().items()}
    expected["tokens_U"] = tuple(tensors["tokens_U"].shape)[:1] if "tokens_U" in tensors else ()
    check_head(path, KIND, info, tensors, expected, target, key)
    tokens_U = tensors.pop("tokens_U")
    head.decoder.load_state_dict(tensors)
    return head.drafting(target, tokens_U), info
