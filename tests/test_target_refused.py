"""Models that can't score trees are refused, with the reason."""

import pytest
import torch
from scoring import EXPERTS, SLIDING, VOCAB, build, make_target
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.models.llama.modeling_llama import LlamaAttention

from specdec.attention import attend
from specdec.target import HFTarget
from specdec_kernels import TreeMask

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
REFUSED = {
    "mamba": ({"state_size": 4}, "state that can't be rolled back"),
    "qwen3_next": (LINEAR | EXPERTS | {"num_experts": 4, "head_dim": 16}, "state that can't be rolled back"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, "state that can't be rolled back"),
    "bloom": ({"n_layer": 3, "n_head": 4}, "attention registry in 0 of 3 layers"),
    "bert": ({}, "both directions"),
    "stablelm": ({"partial_rotary_factor": 0.5}, "no tree"),
    "bart": ({"d_model": 48, "decoder_layers": 3, "decoder_attention_heads": 4}, "counts positions itself"),
    "phimoe": (SLIDING | {"num_local_experts": 2}, "window of 8 by a mask of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_can_t_score_trees_is_refused(kind: str) -> None:
    changes, problem = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"{problem}.*target\.path"):
        HFTarget(build(kind, **changes))


def test_an_encoder_decoder_is_refused() -> None:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(ValueError, match=r"encoder-decoder.*target\.path"):
        HFTarget(model)


def test_attention_that_bypasses_the_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(module: LlamaAttention, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return module.o_proj(module.q_proj(hidden_states)), None

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM calls the attention registry in 0 of 3 layers"):
        make_target("llama")


@pytest.mark.parametrize(
    "extra", [{"position_bias": torch.zeros(1)}, {"tree_mask": None}, {"attention_mask": 1}]
)
def test_attention_with_a_bias_or_mask_of_its_own_is_refused(extra: dict) -> None:
    one = torch.zeros(1, 1, 1, 4)
    zero_11 = torch.zeros(1, 1, dtype=torch.long)
    mask = TreeMask(zero_11[0], zero_11, torch.ones(1, 1, 1, dtype=torch.bool))
    fine = {"attention_mask": None, "tree_mask": mask}
    assert attend(torch.nn.Identity(), one, one, one, **fine)[0].shape == (1, 1, 1, 4)
    with pytest.raises(ValueError, match="Identity calls attention in a way"):
        attend(torch.nn.Identity(), one, one, one, **fine | extra)
