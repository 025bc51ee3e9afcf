"""Drafts of a target's own layers, and targets of many architectures to draft for.

Shapes: T tokens, D width, U draft vocabulary.
"""

from functools import cache
from pathlib import Path

import torch
from models import LOGITS, VOCAB, sharp_model
from torch import Tensor
from transformers import PreTrainedModel

from specdec.loading import fingerprint, random_model
from specdec.proposers.draft_head import DraftHead, DraftInfo, save
from specdec.target import HFTarget

EVERY = list(range(VOCAB))
HALF = EVERY[::2]
ACCURACY = [[0.5, 0.2, 0.1]]
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 64}
ARCHITECTURES = {"llama": {}, "gpt2": {}, "gemma3_text": {}, "mistral": {"sliding_window": 8}, "opt": OPT}
ARCHITECTURES |= {kind: {} for kind in LOGITS} | {"gpt_oss": {"head_dim": 16, "num_local_experts": 4}}


def in_16_bits(model: PreTrainedModel) -> HFTarget:
    """A target in float32 whose weights a file in bfloat16 holds exactly."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return HFTarget(model, name="exact", fingerprint=fingerprint(model))


@cache
def exact(architecture: str = "llama") -> HFTarget:
    return in_16_bits(sharp_model(architecture, **ARCHITECTURES[architecture]))


@cache
def deep() -> HFTarget:
    """Of five layers."""
    return in_16_bits(random_model(config={"vocab_size": VOCAB, "num_hidden_layers": 5}, device="cpu").model)


def untrained(target: HFTarget, source: tuple[int, ...] = (0, 1), tokens: list[int] = EVERY) -> DraftHead:
    return DraftHead(target, source).drafting(target, torch.tensor(tokens))


def saved(head: DraftHead, target: HFTarget, source: tuple[int, ...], folder: Path) -> str:
    path = folder / "draft.safetensors"
    save(path, head, DraftInfo(source, target.name, target.fingerprint, ACCURACY))
    return str(path)


def text_logits(head: DraftHead, target: HFTarget, text: list[int]) -> Tensor:
    """[T, U] of a whole text at once, as training computes them."""
    with torch.inference_mode():
        embedded_1TD = target.model.get_input_embeddings()(torch.tensor([text]))
        return head.lm_head.logits(head(embedded_1TD.to(head.lm_head.weight.dtype)))[0]
