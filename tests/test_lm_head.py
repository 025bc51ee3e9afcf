"""What turns hidden states into logits, wherever heads do so in the target's place: scales, caps and a bias.

Shapes: X rows, T tokens, D width, U draft vocabulary, V the target's, K heads.
"""

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from models import LOGITS, PROMPTS, VOCAB, sharp_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specdec.checkpoints.eagle3 import _state
from specdec.checkpoints.export import export
from specdec.checkpoints.medusa import read_medusa
from specdec.loading import fingerprint
from specdec.proposers.medusa_heads import token_embeddings
from specdec.target import HFTarget
from specdec.training.draft_lm import DraftLMRecipe
from specdec.training.eagle3 import Eagle3Recipe
from specdec.training.heads import HeadRecipe
from specdec.training.medusa import MedusaRecipe
from specdec.training.texts import Texts

KINDS = pytest.mark.parametrize("kind", ["llama", *LOGITS])
TOKENS_U = torch.tensor([2, 3, 5, 8, 13, 21, 30])
TEXT = torch.tensor([*PROMPTS[0], *PROMPTS[3], *PROMPTS[0]])
RECIPES = [MedusaRecipe(heads=2), Eagle3Recipe(unroll=2), DraftLMRecipe(layers=1)]


@cache
def target(kind: str) -> HFTarget:
    model = sharp_model(kind)
    return HFTarget(model, name=kind, fingerprint=fingerprint(model))


@cache
def said(kind: str) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] and logits [T, V] of the model as it is."""
    model = sharp_model(kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        final_TD = model.base_model(TEXT[None], use_cache=False).last_hidden_state[0]
        return final_TD, model(TEXT[None], use_cache=False).logits[0]


@KINDS
def test_the_lm_head_gives_the_logits_of_the_model(kind: str) -> None:
    (final_TD, logits_TV), lm_head = said(kind), target(kind).lm_head_of(TOKENS_U)
    torch.testing.assert_close(lm_head.logits(final_TD), logits_TV[:, TOKENS_U])
    assert lm_head.plain == target(kind).plain_lm_head == (kind == "llama")
    assert target(kind).cast(torch.bfloat16).plain_lm_head == lm_head.plain


@KINDS
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.kind)
def test_what_a_head_is_taught_is_what_the_target_says(kind: str, recipe: HeadRecipe) -> None:
    texts = Texts([TEXT], [3], [], recipe.taps(target(kind)))
    head = recipe.new(target(kind), TOKENS_U)
    want_XU = said(kind)[1][2:-1, TOKENS_U].softmax(-1)  # of a text that is 3 tokens of prompt and an answer
    for _, teacher_XU, _ in recipe.judged(head, target(kind), texts.batch(target(kind), [0])):
        want = want_XU[len(want_XU) - len(teacher_XU) :]
        torch.testing.assert_close(teacher_XU, want, atol=0.02, rtol=0)  # features are kept in 16 bits


@KINDS
def test_a_draft_of_all_layers_says_what_the_target_does(kind: str) -> None:
    recipe, texts = DraftLMRecipe(layers=2), Texts([TEXT], [3], [], ("final",))
    head = recipe.new(target(kind), TOKENS_U)
    ((logits_XU, _, _),) = recipe.judged(head, target(kind), texts.batch(target(kind), [0]))
    torch.testing.assert_close(logits_XU, said(kind)[1][2:-1, TOKENS_U], atol=1e-4, rtol=1e-4)


@KINDS
def test_untrained_medusa_heads_repeat_the_target(kind: str) -> None:
    final_TD, logits_TV = said(kind)
    heads = MedusaRecipe(heads=2, hydra=True).new(target(kind), TOKENS_U)
    root_TD = token_embeddings(target(kind), TEXT)
    want_KTU = logits_TV[:, TOKENS_U].expand(2, -1, -1)
    torch.testing.assert_close(heads(final_TD, root_TD, root_TD.unsqueeze(1)), want_KTU)
    heads.pack()
    torch.testing.assert_close(heads.behind(final_TD, root_TD.unsqueeze(1)), want_KTU[0])


OWN = [(kind, False) for kind in ("llama", "granite", "cohere")]  # a cap and a bias are no weights


@pytest.mark.parametrize(("kind", "shared"), [*((kind, True) for kind in ["llama", *LOGITS]), *OWN])
def test_eagle3_says_of_a_hidden_state_what_the_target_does(kind: str, shared: bool) -> None:
    """With an LM head of its own it starts there."""
    (final_TD, logits_TV), head = said(kind), Eagle3Recipe(shared_head=shared).new(target(kind), TOKENS_U)
    head.norm = torch.nn.Identity()
    torch.testing.assert_close(head.logits(final_TD), logits_TV[:, TOKENS_U])


def test_no_head_is_trained_or_loaded_for_a_target_that_does_more() -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("modernbert-decoder", **sizes, intermediate_size=64, pad_token_id=0)
    other = HFTarget(AutoModelForCausalLM.from_config(config).eval())
    assert not other.plain_lm_head
    for recipe in RECIPES:
        for ask in (recipe.taps, partial(recipe.new, tokens_U=TOKENS_U)):
            with pytest.raises(ValueError, match=r"^ModernBertDecoderForCausalLM makes logits by .*=ngram"):
                ask(other)


def test_a_config_that_says_what_the_model_does_not_do_is_noticed() -> None:
    model = sharp_model("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="LlamaForCausalLM makes logits by more than an LM head"):
        HFTarget(model).lm_head_of(TOKENS_U)


@pytest.mark.parametrize("kind", ["llama", "granite", "phi"])
def test_an_lm_head_of_others_is_the_target_s_only_if_that_does_no_more(kind: str, tmp_path: Path) -> None:
    lm_head_VD = target(kind).lm_head
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))
    width = lm_head_VD.shape[1]
    tensors = {"0.0.linear.weight": torch.zeros(width, width), "0.1.weight": lm_head_VD.clone()}
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    medusa = read_medusa(str(tmp_path), target(kind)).state
    eagle3 = _state({"lm_head.weight": lm_head_VD}, torch.arange(VOCAB), torch.arange(VOCAB), target(kind))
    assert ("lm_head_KUD" in medusa) == ("lm_head.weight" in eagle3) == (kind != "llama")


@pytest.mark.parametrize(
    ("recipe", "to"),
    [(MedusaRecipe(root=False), "vllm-medusa"), (Eagle3Recipe(), "speculators")],
    ids=["medusa", "eagle3"],
)
def test_heads_of_a_target_that_does_more_are_not_exported(
    recipe: HeadRecipe, to: str, tmp_path: Path
) -> None:
    texts = Texts([TEXT], [3], [], recipe.taps(target("granite")))
    recipe.save(recipe.new(target("granite"), TOKENS_U), target("granite"), texts, tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match=r"LM head of granite, which scales.*head.shared_head=false"):
        export(tmp_path / "h.safetensors", to, target("granite"), tmp_path / "out", "someone/target")
    assert not (tmp_path / "out").exists()
